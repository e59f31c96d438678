"""Which requests an engine can ever serve."""

from __future__ import annotations

from orchestrator.core.errors import RequestRejected
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.request import RequestSpec


def check_request(spec: RequestSpec, capabilities: EngineCapabilities) -> None:
    """Accept a request that can run to its last token with the whole engine to itself.

    Raises:
        RequestRejected: the prompt is empty, or prompt and output exceed the engine.
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
    # The last token is delivered but never computed, so it needs no KV.
    num_blocks = -(-(num_prompt_tokens + max_tokens - 1) // capabilities.block_size_tokens)
    if num_blocks > capabilities.num_device_blocks:
        raise RequestRejected(
            f"prompt has {num_prompt_tokens:,} tokens and max_tokens is {max_tokens:,}: that needs "
            f"{num_blocks:,} KV blocks, the node has {capabilities.num_device_blocks:,}; lower "
            "max_tokens or give the node more KV memory",
            field="max_tokens",
        )
