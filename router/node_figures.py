"""What a router counts and estimates of a node, beside the deadlines of its queue."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class NodeFigures(NamedTuple, Generic[T]):
    """One node's figures, or those of all nodes as one array each.

    Requests are those of the node's last snapshot and what this router has sent there since.
    """

    max_sequence_tokens: T
    """Prompt and output tokens of one sequence, at most."""

    follows_grammars: T
    """1 if it takes requests with a grammar, else 0."""

    num_requests: T
    """Requests that have not ended."""

    num_running: T
    """Requests with KV blocks."""

    num_decoding: T
    """Requests with output."""

    num_queued_tokens: T
    """Prompt tokens not yet computed, over requests without output."""

    num_free_blocks: T
    """KV blocks that can be had at once."""

    num_blocks: T
    """KV blocks in all."""

    block_size_tokens: T
    """Tokens in a KV block."""

    max_weight: T
    """Of the requests; 0 if there are none."""

    prefill_quadratic_s: T
    """Coefficients of `LatencyProfile`, as the node has corrected them."""

    prefill_context_s: T
    prefill_token_s: T
    prefill_cached_s: T
    decode_context_s: T
    decode_token_s: T

    step_s: T
    """(28): a step's constant and one token of every decoding request."""

    decode_step_s: T
    """The same of a step without prompts."""

    began_at_s: T
    """Since when the node works on its queue; -inf if it has none."""

    drained_at_s: T
    """When it is past its queue by (29); -inf if it has none."""

    latency_budget_s: T
    """Of the last step; infinite if it had none."""

    decode_weight: T
    """Gain of one token of every decoding request."""

    min_decode_tpot_s: T
    """Tightest objective of decoding requests; infinite if they have none."""
