"""The rules about the values of one run's inputs, and the step that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.trtllm.engine_spec import EngineSpec
from tests.trtllm.memory import KVMemory
from tests.trtllm.rules import Rule, RuleBroken

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One run, read from its inputs and found sound. S sequences, context requests first."""

    token_ids: Ints
    """(T,)"""

    positions: Ints
    """(T,)"""

    num_new: Ints
    """(S,), each sequence's tokens among the T."""

    lengths: Ints
    """(S,), each sequence's tokens after the step."""

    num_contexts: int
    key_offsets: Ints
    """(S, MB)"""

    value_offsets: Ints
    """(S, MB)"""


def read_step(spec: EngineSpec, arrays: Mapping[str, Ints], memory: KVMemory) -> EngineStep:
    """Return the step that these inputs describe.

    Raises:
        RuleBroken: they break a rule.
    """
    _check_twins(arrays)
    num_contexts = _check_request_types(arrays["host_request_types"])
    num_new = _check_new_tokens(arrays, num_contexts)
    lengths = _check_lengths(spec, arrays, num_contexts, num_new)
    begins = lengths - num_new
    positions = np.concatenate(
        [np.arange(begin, end) for begin, end in zip(begins, lengths, strict=True)]
    )
    if "position_ids" in arrays:
        _expect(Rule.POSITION_IDS, "position_ids", arrays["position_ids"], positions)
    _check_token_ids(arrays["input_ids"], spec.vocab_size)
    _check_blocks(spec, arrays["host_kv_cache_block_offsets"][0], begins, lengths, memory)
    _check_constants(spec, arrays, lengths)
    return EngineStep(
        token_ids=arrays["input_ids"],
        positions=positions,
        num_new=num_new,
        lengths=lengths,
        num_contexts=num_contexts,
        key_offsets=arrays["host_kv_cache_block_offsets"][0, :, 0],
        value_offsets=arrays["host_kv_cache_block_offsets"][0, :, 1],
    )


def _expect(rule: Rule, name: str, found: Ints, expected: Ints) -> None:
    if not np.array_equal(found, expected):
        raise RuleBroken(rule, f"{name} is {found.tolist()}, it should be {expected.tolist()}")


def _check_twins(arrays: Mapping[str, Ints]) -> None:
    for name in ("context_lengths", "kv_cache_block_offsets"):
        _expect(Rule.DEVICE_COPY, name, arrays[name], arrays[f"host_{name}"])


def _check_request_types(types: Ints) -> int:
    """Return how many context requests there are."""
    if not np.isin(types, (0, 1)).all():
        raise RuleBroken(Rule.REQUEST_TYPES, f"host_request_types is {types.tolist()}")
    if (np.diff(types) < 0).any():
        raise RuleBroken(Rule.CONTEXT_FIRST, f"host_request_types is {types.tolist()}")
    return int((types == 0).sum())


def _check_new_tokens(arrays: Mapping[str, Ints], num_contexts: int) -> Ints:
    """Return each sequence's new tokens."""
    context_lengths = arrays["host_context_lengths"]
    if (context_lengths < 1).any():
        raise RuleBroken(Rule.CONTEXT_LENGTH, f"context_lengths is {context_lengths.tolist()}")
    num_new = np.where(np.arange(len(context_lengths)) < num_contexts, context_lengths, 1)
    num_tokens, num_rows = len(arrays["input_ids"]), len(arrays["last_token_ids"])
    if num_tokens != num_new.sum() or num_rows != len(num_new):
        raise RuleBroken(
            Rule.NUM_TOKENS,
            f"{num_tokens} tokens and {num_rows} rows of logits, for {num_new.tolist()}",
        )
    _expect(Rule.LAST_TOKEN_IDS, "last_token_ids", arrays["last_token_ids"], np.cumsum(num_new))
    return num_new


def _check_lengths(
    spec: EngineSpec, arrays: Mapping[str, Ints], num_contexts: int, num_new: Ints
) -> Ints:
    """Return each sequence's tokens after the step."""
    lengths, prompts = arrays["sequence_length"], arrays["host_context_lengths"]
    begins = lengths - num_new
    # A generation request has its prompt and the token that is fed, at least.
    least = np.where(np.arange(len(lengths)) < num_contexts, num_new, prompts + 1)
    if (lengths < least).any() or (lengths > spec.max_seq_len).any():
        raise RuleBroken(
            Rule.SEQUENCE_LENGTH,
            f"sequence_length is {lengths.tolist()}, at least {least.tolist()} "
            f"and at most {spec.max_seq_len} are possible",
        )
    past = np.where(np.arange(len(lengths)) < num_contexts, lengths, lengths - 1)
    name = "host_past_key_value_lengths"
    _expect(Rule.PAST_LENGTH, name, arrays[name], past)
    if not spec.use_paged_context_fmha and begins[:num_contexts].any():
        raise RuleBroken(
            Rule.PAGED_CONTEXT, f"context requests begin at {begins[:num_contexts].tolist()}"
        )
    return lengths


def _check_token_ids(token_ids: Ints, vocab_size: int) -> None:
    foreign = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    if foreign.size:
        raise RuleBroken(Rule.TOKEN_IDS, f"{foreign.tolist()} outside of [0, {vocab_size})")


def _check_blocks(
    spec: EngineSpec, offsets: Ints, begins: Ints, lengths: Ints, memory: KVMemory
) -> None:
    """Check the block tables, (S, 2, MB)."""
    max_blocks = offsets.shape[2]
    per_block = 2 * spec.num_layers
    num_used = -(-lengths // spec.tokens_per_block)
    if (num_used > max_blocks).any():
        raise RuleBroken(
            Rule.NUM_BLOCKS, f"tables have {max_blocks} entries, used are {num_used.tolist()}"
        )
    if (offsets < 0).any():
        raise RuleBroken(Rule.SECONDARY_POOL, f"offset {offsets.min()}")
    is_used = np.arange(max_blocks) < num_used[:, None]
    keys, values = offsets[:, 0], offsets[:, 1]
    _check_offsets(keys[is_used], values[is_used], per_block, memory.num_blocks)
    rest = ~is_used & ((keys != 0) | (values != 0))
    try:
        _check_offsets(keys[rest], values[rest], per_block, memory.num_blocks)
    except RuleBroken as broken:
        raise RuleBroken(Rule.UNUSED_OFFSET, str(broken)) from broken
    _check_owners(keys // per_block, num_used, begins // spec.tokens_per_block)


def _check_offsets(keys: Ints, values: Ints, per_block: int, num_blocks: int) -> None:
    if (wrong := keys[keys % per_block != 0]).size:
        raise RuleBroken(Rule.KEY_OFFSET, f"{wrong[0]}, blocks are {per_block} apart")
    if (wrong := np.flatnonzero(values != keys + 1)).size:
        raise RuleBroken(Rule.VALUE_OFFSET, f"{values[wrong[0]]} beside {keys[wrong[0]]}")
    if (wrong := keys[keys >= num_blocks * per_block]).size:
        raise RuleBroken(
            Rule.BLOCK_RANGE, f"{wrong[0]}, the pool has {num_blocks} blocks of {per_block}"
        )


def _check_owners(tables: Ints, num_used: Ints, num_full: Ints) -> None:
    """Check who has which block: `num_full` blocks of each sequence are only read."""
    seen: dict[int, tuple[int, int, bool]] = {}  # block -> sequence, place, is written
    for sequence, table in enumerate(tables):
        for place, block in enumerate(table[: num_used[sequence]].tolist()):
            is_written = place >= num_full[sequence]
            other = seen.setdefault(block, (sequence, place, is_written))
            if other == (sequence, place, is_written):
                continue
            what = f"block {block} of sequence {sequence}"
            if other[0] == sequence:
                raise RuleBroken(Rule.REPEATED_BLOCK, f"{what}: at {other[1]} and {place}")
            if is_written or other[2]:
                raise RuleBroken(Rule.WRITTEN_BLOCK, f"{what}: sequence {other[0]} has it too")
            if other[1] != place:
                raise RuleBroken(Rule.SHARED_BLOCK, f"{what}: at {place}, elsewhere {other[1]}")


def _check_constants(spec: EngineSpec, arrays: Mapping[str, Ints], lengths: Ints) -> None:
    layers = np.arange(spec.num_layers)
    mapping = np.stack([np.zeros_like(layers), layers], axis=1)
    name = "host_kv_cache_pool_mapping"
    _expect(Rule.POOL_MAPPING, name, arrays[name], mapping)
    windows = arrays["host_max_attention_window_sizes"]
    if (windows < lengths.max()).any():
        raise RuleBroken(Rule.WINDOW, f"{windows.tolist()}, a sequence has {lengths.max()} tokens")
    indirection = arrays["cache_indirection"]
    if indirection.any() or indirection.shape[2] != windows.max():
        raise RuleBroken(
            Rule.CACHE_INDIRECTION,
            f"width {indirection.shape[2]} with a window of {windows.max()}, "
            f"{np.count_nonzero(indirection)} of its values are not 0",
        )
    sink = arrays["host_sink_token_length"]
    _expect(Rule.SINK, "host_sink_token_length", sink, np.zeros_like(sink))
    knobs = arrays["host_runtime_perf_knobs"]
    if not np.isin(knobs[:2], (-1, 0, 1)).all() or (knobs[2:] != -1).any():
        raise RuleBroken(Rule.PERF_KNOBS, f"host_runtime_perf_knobs is {knobs.tolist()}")
    progress = arrays["host_context_progress"]
    _expect(Rule.CONTEXT_PROGRESS, "host_context_progress", progress, np.zeros_like(progress))
