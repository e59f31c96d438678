"""Packs steps for the stand-ins by hand: one entry at a time, with nothing of the adapter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.trtllm.engine_spec import EngineSpec


@dataclass(frozen=True, slots=True)
class Part:
    """What one request has computed in a step: its tokens [begin, end)."""

    token_ids: Sequence[int]
    """All of the request's, from its prompt's first on."""

    num_prompt_tokens: int
    begin: int
    end: int
    block_ids: Sequence[int]

    @property
    def is_context(self) -> bool:
        """Whether it is prompt, not output, that is computed."""
        return self.begin < self.num_prompt_tokens


def pack(spec: EngineSpec, parts: Sequence[Part], pool: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of a step whose context requests come first, but for what several ranks
    reduce through."""
    lists: dict[str, list[int]] = {
        name: []
        for name in (
            "input_ids",
            "position_ids",
            "last_token_ids",
            "host_context_lengths",
            "sequence_length",
            "host_past_key_value_lengths",
            "host_request_types",
        )
    }
    offsets = torch.zeros(1, len(parts), 2, spec.max_blocks_per_seq, dtype=torch.int32)
    for row, part in enumerate(parts):
        for position in range(part.begin, part.end):
            lists["input_ids"].append(part.token_ids[position])
            lists["position_ids"].append(position)
        lists["last_token_ids"].append(len(lists["input_ids"]))
        lists["sequence_length"].append(part.end)
        if part.is_context:
            lists["host_request_types"].append(0)
            lists["host_context_lengths"].append(part.end - part.begin)
            lists["host_past_key_value_lengths"].append(part.end)
        else:
            lists["host_request_types"].append(1)
            lists["host_context_lengths"].append(part.num_prompt_tokens)
            lists["host_past_key_value_lengths"].append(part.end - 1)
        for place, block in enumerate(part.block_ids):
            offsets[0, row, 0, place] = block * spec.num_layers * 2
            offsets[0, row, 1, place] = block * spec.num_layers * 2 + 1
    if not spec.has_position_ids:
        del lists["position_ids"]
    inputs = {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()}
    inputs["context_lengths"] = inputs["host_context_lengths"].clone()
    inputs["kv_cache_block_offsets"] = offsets.clone()
    inputs["host_kv_cache_block_offsets"] = offsets
    return inputs | _constants(spec, len(parts), pool)


def _constants(spec: EngineSpec, num_parts: int, pool: torch.Tensor) -> dict[str, torch.Tensor]:
    knobs = torch.full((16,), -1, dtype=torch.int64)
    knobs[:2] = 1
    window = spec.max_seq_len
    layers = range(spec.num_layers)
    return {
        "host_kv_cache_pool_pointers": torch.tensor([[pool.data_ptr(), 0]], dtype=torch.int64),
        "host_kv_cache_pool_mapping": torch.tensor([[0, i] for i in layers], dtype=torch.int32),
        "cache_indirection": torch.zeros(num_parts, 1, window, dtype=torch.int32),
        "host_max_attention_window_sizes": torch.tensor([window for _ in layers]).int(),
        "host_sink_token_length": torch.zeros(1, dtype=torch.int32),
        "host_runtime_perf_knobs": knobs,
        "host_context_progress": torch.zeros(1, dtype=torch.int64),
    }
