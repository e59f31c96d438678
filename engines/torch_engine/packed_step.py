"""A step's plan as one array of int32, which crosses to the device in one copy.

Nothing here is done per block: tables of blocks stay from step to step, and grow by what is new.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.core.ports import ScheduledRequest

# 128 bytes. Triton compiles a kernel anew for pointers that are not aligned to 16.
_ALIGNMENT = 32
_NO_SLOT = -1
_NOT_FED = -1

MAX_BUCKET = 256
"""Larger batches of decodes run without a graph: their kernels outlast their launch."""


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes, ascending, that decodes are padded to.

    Up to 64, at most 8 rows are padding; above, a quarter. The largest is `max_num_seqs` itself,
    up to `MAX_BUCKET`.
    """
    largest = min(max_num_seqs, MAX_BUCKET)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MAX_BUCKET + 1, 32)]
    return (*(size for size in sizes if size < largest), largest)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The arrays of one step, int32, decodes first, then prefill pieces."""

    token_ids: NDArray[np.int32]  # (num_tokens,); of no meaning where the token is fed
    fed_rows: NDArray[np.int32]  # (num_decodes,), see `engines.step_runner.Feed`
    positions: NDArray[np.int32]  # (num_tokens,)
    slots: NDArray[np.int32]  # (num_tokens,), block * block_size_tokens + place; negative: none
    context_lens: NDArray[np.int32]  # (num_decodes,), with this step's token; 0 for padding
    table_starts: NDArray[np.int32]  # (num_decodes,), into `tables`
    tile_rows: NDArray[np.int32]  # (num_tiles,), see `triton_attention.QueryTiles`
    tile_counts: NDArray[np.int32]
    tile_positions: NDArray[np.int32]
    tile_table_starts: NDArray[np.int32]
    sampled_rows: NDArray[np.int32]  # (num_sampled,), empty for decodes alone
    tables: NDArray[np.int32]  # block ids of all requests


class HostBlockTables:
    """The block tables of the requests of the step before, so that only new blocks are read."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size_tokens: int) -> None:
        self.block_size_tokens = block_size_tokens
        self._entries = np.zeros((max_num_seqs, -(-max_model_len // block_size_tokens)), np.int32)
        self._rows: dict[str, _Row] = {}
        self._free = list(range(max_num_seqs))

    def update(self, parts: Sequence[ScheduledRequest]) -> NDArray[np.int32]:
        """Take in the blocks of these requests, forget all others, and return their tables,
        (num_requests, max blocks in use)."""
        before, self._rows = self._rows, {}
        kept = [(part, before.pop(part.request.spec.request_id, None)) for part in parts]
        self._free += [row.index for row in before.values()]
        width = 0
        for part, known in kept:
            num_tokens = part.num_computed_tokens + part.num_new_tokens
            count = -(-num_tokens // self.block_size_tokens)
            row = known or _Row(self._free.pop(), part.block_ids, 0)
            if row.source is not part.block_ids:
                # The request has lost the blocks it had.
                row.source, row.num_blocks = part.block_ids, 0
            if row.num_blocks < count:
                new = part.block_ids[row.num_blocks : count]
                self._entries[row.index, row.num_blocks : count] = new
                row.num_blocks = count
            self._rows[part.request.spec.request_id] = row
            width = max(width, count)
        indices = [row.index for row in self._rows.values()]
        return self._entries[indices, :width]


@dataclass(slots=True)
class _Row:
    index: int
    source: Sequence[int]
    """Held, so that no other sequence can get its identity."""

    num_blocks: int


def pack_decodes(
    parts: Sequence[ScheduledRequest],
    block_tables: HostBlockTables,
    *,
    bucket: int,
    fed_rows: Sequence[int] | None = None,
) -> PackedStep:
    """Return the arrays of decodes alone, at most `bucket`, padded to it. `fed_rows` tells whose
    tokens the device has; None if it has none."""
    step = pack_step(parts, (), block_tables, sampled_rows=(), fed_rows=fed_rows)
    padding = bucket - len(parts)
    if padding == 0:
        return step

    def padded(array: NDArray[np.int32], value: int = 0) -> NDArray[np.int32]:
        return np.concatenate((array, np.full(padding, value, np.int32)))

    return replace(
        step,
        token_ids=padded(step.token_ids),
        fed_rows=padded(step.fed_rows, _NOT_FED),
        positions=padded(step.positions),
        slots=padded(step.slots, _NO_SLOT),
        context_lens=padded(step.context_lens),
        table_starts=padded(step.table_starts),
    )


def pack_step(
    parts: Sequence[ScheduledRequest],
    pieces: Sequence[ScheduledRequest],
    block_tables: HostBlockTables,
    *,
    sampled_rows: Sequence[int],
    tile_queries: int = 1,
    fed_rows: Sequence[int] | None = None,
) -> PackedStep:
    """Return the arrays of decodes (`parts`, of one new token each) and prefill pieces, which are
    cut into tiles of at most `tile_queries` tokens."""
    tables = block_tables.update([*parts, *pieces])
    num_decodes, width = len(parts), tables.shape[1]
    starts = np.array([part.num_computed_tokens for part in parts], np.int32)
    fed_rows = [_NOT_FED] * num_decodes if fed_rows is None else fed_rows
    token_ids = [
        part.request.all_token_ids[part.num_computed_tokens] if row == _NOT_FED else 0
        for part, row in zip(parts, fed_rows, strict=True)
    ]
    positions, owners = starts, np.arange(num_decodes)
    if pieces:
        counts = np.array([piece.num_new_tokens for piece in pieces])
        firsts = np.array([piece.num_computed_tokens for piece in pieces])
        ends = np.cumsum(counts)
        places = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        token_ids.extend(itertools.chain.from_iterable(piece.token_ids for piece in pieces))
        positions = np.concatenate((positions, places + np.repeat(firsts, counts)))
        piece_owners = num_decodes + np.repeat(np.arange(len(pieces)), counts)
        owners = np.concatenate((owners, piece_owners))
        tiles = _tiles(counts, firsts, tile_queries, first_row=num_decodes, width=width)
    else:
        tiles = np.zeros((4, 0), np.int32)
    block_size = block_tables.block_size_tokens
    return PackedStep(
        token_ids=np.array(token_ids, np.int32),
        fed_rows=np.array(fed_rows, np.int32),
        positions=positions.astype(np.int32),
        slots=tables[owners, positions // block_size] * block_size + positions % block_size,
        context_lens=starts + 1,
        table_starts=np.arange(num_decodes, dtype=np.int32) * width,
        tile_rows=tiles[0],
        tile_counts=tiles[1],
        tile_positions=tiles[2],
        tile_table_starts=tiles[3],
        sampled_rows=np.array(sampled_rows, np.int32),
        tables=tables.reshape(-1),
    )


def sampled_of(
    ordered: Sequence[ScheduledRequest],
) -> tuple[list[ScheduledRequest], list[int]]:
    """Return the parts of a step that are sampled, and the row of the last token of each."""
    sampled, rows, end = [], [], 0
    for part in ordered:
        end += part.num_new_tokens
        if part.is_sampled:
            sampled.append(part)
            rows.append(end - 1)
    return sampled, rows


def _tiles(
    counts: NDArray[np.int64],
    firsts: NDArray[np.int64],
    tile_queries: int,
    *,
    first_row: int,
    width: int,
) -> NDArray[np.int32]:
    """Return first row, count, position and table start of each tile, (4, num_tiles)."""
    num_tiles = -(-counts // tile_queries)
    piece = np.repeat(np.arange(len(counts)), num_tiles)
    ends = np.cumsum(num_tiles)
    offsets = (np.arange(ends[-1]) - np.repeat(ends - num_tiles, num_tiles)) * tile_queries
    rows = first_row + np.cumsum(counts) - counts
    return np.stack(
        (
            rows[piece] + offsets,
            np.minimum(tile_queries, counts[piece] - offsets),
            firsts[piece] + offsets,
            (first_row + piece) * width,
        )
    ).astype(np.int32)


_ARRAY_NAMES = tuple(field.name for field in fields(PackedStep))


class StepUpload:
    """Memory through which steps reach the device, each by one copy.

    Arrays of equal sizes arrive at equal addresses: a CUDA graph reads those of the step that it
    was captured with. The last array alone, the tables, may have another size.
    """

    def __init__(self, max_entries: int, device: torch.device) -> None:
        """`max_entries` is a bound on the numbers of one step, without alignment."""
        size = max_entries + len(_ARRAY_NAMES) * _ALIGNMENT
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host_array = self._host.numpy()
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def upload(self, step: PackedStep) -> dict[str, torch.Tensor]:
        """Begin to copy, behind all that reads the step before; return the device's arrays by their
        names in `PackedStep`."""
        if self._copied is not None:
            # The step before has ended by now, unless it failed.
            self._copied.synchronize()
        views, first, end = {}, 0, 0
        for name in _ARRAY_NAMES:
            array = getattr(step, name)
            first = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = first + len(array)
            self._host_array[first:end] = array
            views[name] = self._device[first:end]
        # An empty view would have no address for a graph to read the next step's tables from.
        views["tables"] = self._device[first:]
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return views
