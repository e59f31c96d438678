"""A step's plan as the arrays that TensorRT-LLM's attention plugin reads: one in-flight batch.

Context requests come first, then generation requests. The plugin keeps nothing between steps:
what a row means follows from these arrays and from the KV blocks they name.

Source: batch_manager/runtimeBuffers.cpp and transformerBuffers.cpp (how TensorRT-LLM 1.2 fills
them), gptAttentionPlugin.cpp (how they are read).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from engines.kv_pool import KVLayout
from orchestrator.core.ports import ScheduledRequest

CONTEXT, GENERATION = 0, 1
"""Values of `host_request_types`."""

Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """Inputs that change with every step, under the engine's names for them.

    T is the number of new tokens, S of sequences, MB of blocks that a sequence can have.
    """

    input_ids: Int32s  # (T,), sequence after sequence
    position_ids: Int32s  # (T,)
    last_token_ids: Int32s  # (S,), new tokens up to and with this sequence: an inclusive sum
    context_lengths: Int32s  # (S,), context: new tokens; generation: tokens of the prompt
    sequence_length: Int32s  # (S,), tokens in the KV cache once the step is done
    host_past_key_value_lengths: Int32s  # (S,), the same; generation: without the new token
    host_request_types: Int32s  # (S,), CONTEXT or GENERATION
    kv_cache_block_offsets: Int32s  # (1 pool, S, 2, MB), of each block's K and V; 0 where none is

    def by_name(self) -> dict[str, Int32s]:
        """Return the arrays by the engine's names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def narrowed(self) -> NarrowArrays:
        """Return the arrays without the columns of the block tables that no sequence uses."""
        tables = self.kv_cache_block_offsets
        num_columns = int(np.count_nonzero(tables[:, :, 1], axis=-1).max())  # no V has offset 0
        arrays = replace(self, kv_cache_block_offsets=tables[..., :num_columns])
        return NarrowArrays(arrays, max_blocks_per_seq=tables.shape[-1])


@dataclass(frozen=True, slots=True)
class NarrowArrays:
    """A step's arrays in the form in which they are sent to other processes: block tables as wide
    as the longest sequence allows have megabytes, of which seldom a tenth is in use."""

    arrays: StepArrays
    max_blocks_per_seq: int

    def widened(self) -> StepArrays:
        """Return the arrays as the engine reads them."""
        narrow = self.arrays.kv_cache_block_offsets
        tables = np.zeros((*narrow.shape[:-1], self.max_blocks_per_seq), dtype=np.int32)
        tables[..., : narrow.shape[-1]] = narrow
        return replace(self.arrays, kv_cache_block_offsets=tables)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One step, ready for the engine."""

    sequences: tuple[ScheduledRequest, ...]
    """In the order of the batch; row i of the logits belongs to sequence i."""

    arrays: StepArrays


def pack_step(
    parts: Sequence[ScheduledRequest], layout: KVLayout, *, max_blocks_per_seq: int
) -> PackedStep:
    """Return the arrays of a checked, non-empty plan.

    `layout` is that of the only KV pool, which holds all layers of the rank.
    """
    # The sort is stable: within contexts and within generations, scheduling order stays.
    sequences = tuple(sorted(parts, key=_is_generation))
    is_generation = np.array([_is_generation(part) for part in sequences])
    num_prompt = np.array([part.request.num_prompt_tokens for part in sequences], dtype=np.int32)
    num_new = np.array([part.num_new_tokens for part in sequences], dtype=np.int32)
    starts = np.array([part.num_computed_tokens for part in sequences], dtype=np.int32)
    ends = np.cumsum(num_new, dtype=np.int32)
    num_tokens = int(ends[-1])
    token_ids = (token_id for part in sequences for token_id in part.token_ids)
    positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(
        starts - (ends - num_new), num_new
    )
    arrays = StepArrays(
        input_ids=np.fromiter(token_ids, np.int32, num_tokens),
        position_ids=positions,
        last_token_ids=ends,
        context_lengths=np.where(is_generation, num_prompt, num_new),
        sequence_length=starts + num_new,
        host_past_key_value_lengths=np.where(is_generation, starts, starts + num_new),
        host_request_types=np.where(is_generation, GENERATION, CONTEXT).astype(np.int32),
        kv_cache_block_offsets=_block_offsets(sequences, layout, max_blocks_per_seq),
    )
    return PackedStep(sequences, arrays)


def _is_generation(part: ScheduledRequest) -> bool:
    """Return whether the plugin shall see one token that follows a finished prompt.

    That is so if everything before the request's last token is in the KV cache and that token
    is an output, whatever brought the KV there: the step before, a reload from the host, or a
    computation of prompt and output after a preemption. All else is context: chunks of a prompt,
    also of one token, and chunks of prompt and output that are computed again.
    """
    return (
        part.num_new_tokens == 1
        and part.num_computed_tokens >= part.request.num_prompt_tokens
        and part.is_sampled
    )


def _block_offsets(
    sequences: Sequence[ScheduledRequest], layout: KVLayout, max_blocks_per_seq: int
) -> Int32s:
    """Return where the K and V of each block begin in the pool's first layer, counted in pieces
    of one layer's K of one block; the plugin adds the layer itself.

    Bit 31 would mean a block in host memory; it is never set.
    """
    pieces_per_block = layout.num_layers * 2
    offsets = np.zeros((1, len(sequences), 2, max_blocks_per_seq), dtype=np.int32)
    for row, part in enumerate(sequences):
        num_tokens = part.num_computed_tokens + part.num_new_tokens
        num_blocks = -(-num_tokens // layout.block_size_tokens)
        first_pieces = np.array(part.block_ids[:num_blocks], dtype=np.int32) * pieces_per_block
        offsets[0, row, 0, :num_blocks] = first_pieces
        offsets[0, row, 1, :num_blocks] = first_pieces + 1
    return offsets
