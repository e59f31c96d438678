"""Copies of many pieces of KV blocks by one Triton kernel, which reads or writes pinned memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.block_copies import BlockPieces
from orchestrator.core.kv_transfer import KVTransfer

NUM_PROGRAMS = 16
"""Few, to leave the multiprocessors to the model; 32 KiB each on the way fill the link."""

_CHUNK_BYTES = 32 * 1024
_NUM_WARPS = 8


def copy_by_kernel(_: KVTransfer, pieces: BlockPieces, *, num_programs: int = NUM_PROGRAMS) -> None:
    """Queue a kernel on the current stream of the pool that is not the host's."""
    device = pieces.targets.device if pieces.sources.is_cpu else pieces.sources.device
    ids = torch.tensor([pieces.source_ids, pieces.target_ids], dtype=torch.int64)
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    layer = pieces.sources[0, 0].numel()
    num_layers = pieces.layers.stop - pieces.layers.start
    _copy_kernel[(num_programs,)](
        pieces.sources,
        pieces.targets,
        ids,
        len(pieces.source_ids),
        pieces.sources[0].numel(),
        pieces.layers.start * layer,
        num_layers * layer,
        CHUNK=_CHUNK_BYTES // pieces.sources.element_size(),
        num_warps=_NUM_WARPS,
    )


@triton.jit(do_not_specialize=["num_blocks"])
def _copy_kernel(
    sources,
    targets,
    ids,
    num_blocks,
    block_size,
    first,
    piece_size,
    CHUNK: tl.constexpr,
):
    """Copies numbers [first, first + piece_size) of each block; programs take chunks in turn."""
    chunks_per_piece = tl.cdiv(piece_size, CHUNK)
    for chunk in range(tl.program_id(0), num_blocks * chunks_per_piece, tl.num_programs(0)):
        index = chunk // chunks_per_piece
        places = (chunk % chunks_per_piece) * CHUNK + tl.arange(0, CHUNK)
        is_inside = places < piece_size
        source = sources + tl.load(ids + index) * block_size + first
        target = targets + tl.load(ids + num_blocks + index) * block_size + first
        tl.store(target + places, tl.load(source + places, mask=is_inside), mask=is_inside)
