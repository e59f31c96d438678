"""Which requests an engine can ever serve."""

from __future__ import annotations

import math

from orchestrator.core.errors import RequestRejected
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.request import RequestSpec, ResumePoint


def check_request(spec: RequestSpec, capabilities: EngineCapabilities) -> None:
    """Accept a request that can run to its last token with the whole engine to itself.

    Raises:
        RequestRejected: the prompt is empty, prompt and output exceed the engine, or it cannot
            follow the request's grammar.
    """
    num_prompt_tokens = len(spec.prompt_token_ids)
    max_tokens = spec.sampling.max_tokens
    if num_prompt_tokens == 0:
        raise RequestRejected("the prompt is empty; send at least one token", field="prompt")
    if max_tokens < 1:
        raise RequestRejected(
            f"max_tokens is {max_tokens}, it must be at least 1", field="max_tokens"
        )
    limit = capabilities.max_model_len
    if num_prompt_tokens + max_tokens > limit:
        raise RequestRejected(
            f"prompt has {num_prompt_tokens:,} tokens and max_tokens is {max_tokens:,}, the engine "
            f"takes {limit:,} together; shorten the prompt, lower max_tokens or use an engine "
            "with a longer context",
            field="prompt" if num_prompt_tokens >= limit else "max_tokens",
        )
    _check_grammar(spec, capabilities)
    # The last token is delivered but never computed, so it needs no KV.
    num_blocks = -(-(num_prompt_tokens + max_tokens - 1) // capabilities.block_size_tokens)
    if num_blocks > capabilities.num_device_blocks:
        raise RequestRejected(
            f"prompt has {num_prompt_tokens:,} tokens and max_tokens is {max_tokens:,}: that needs "
            f"{num_blocks:,} KV blocks, the node has {capabilities.num_device_blocks:,}; lower "
            "max_tokens or give the node more KV memory",
            field="max_tokens",
        )


def _check_grammar(spec: RequestSpec, capabilities: EngineCapabilities) -> None:
    if spec.sampling.grammar is None:
        return
    if capabilities.grammar_obstacle is not None:
        raise RequestRejected(
            "the request asks for output of a given form, which this node cannot give: "
            f"{capabilities.grammar_obstacle}; ask for text of any form, or use another node"
        )
    if not spec.sampling.stop_token_ids:
        raise RequestRejected(
            "the request asks for output of a given form and has no stop tokens, so that it could "
            "never end; give at least one",
            field="stop_token_ids",
        )


def check_resume_point(spec: RequestSpec, point: ResumePoint) -> None:
    """Accept a point from which a request can go on.

    Raises:
        RequestRejected: nothing was delivered, everything was, or the time is impossible.
    """
    num_delivered, max_tokens = len(point.output_token_ids), spec.sampling.max_tokens
    if not 0 < num_delivered < max_tokens:
        raise RequestRejected(
            f"resume_from has {num_delivered:,} output tokens, it must have at least 1 and fewer "
            f"than max_tokens, {max_tokens:,}; without any, leave it out",
            field="resume_from",
        )
    if not 0 <= point.ttft_s < math.inf:
        raise RequestRejected(
            f"resume_from.ttft_s is {point.ttft_s}, it must be at least 0 and finite",
            field="resume_from",
        )
