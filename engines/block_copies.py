"""Ways to copy pieces of KV blocks between two pools; a `CopyBlocks` is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from orchestrator.core.kv_transfer import KVTransfer


@dataclass(frozen=True, slots=True)
class BlockPieces:
    """Some layers of blocks of one pool, and the blocks of the other that they go to."""

    sources: torch.Tensor  # a whole pool: (num_blocks, num_layers, ...), contiguous
    source_ids: Sequence[int]
    targets: torch.Tensor  # the other pool, of the same blocks
    target_ids: Sequence[int]
    layers: slice

    @property
    def are_whole(self) -> bool:
        """True if these are all layers."""
        return self.layers == slice(0, self.sources.shape[1])


CopyBlocks = Callable[[KVTransfer, BlockPieces], None]
"""Copies pieces of this transfer. Called once for an offload, and once per layer group for an
onboard, on the lane's thread or under its stream; raises RuntimeError if that fails."""


def copy_blocks(_: KVTransfer, pieces: BlockPieces) -> None:
    """Copy by PyTorch; the host does not wait for CUDA."""
    sources, targets = pieces.sources, pieces.targets
    if pieces.are_whole:
        runs = _runs(pieces)
        to = [targets[target : target + count] for _, target, count in runs]
        of = [sources[source : source + count] for source, _, count in runs]
    else:
        # One by one: a part of the layers is contiguous within a block only, and CUDA copies
        # nothing else without waiting.
        to = [targets[block, pieces.layers] for block in pieces.target_ids]
        of = [sources[block, pieces.layers] for block in pieces.source_ids]
    # One call for all: queueing 256 copies one by one from Python would take over a millisecond.
    torch._foreach_copy_(to, of, non_blocking=True)


def _runs(pieces: BlockPieces) -> list[tuple[int, int, int]]:
    """Return (first source, first target, count), neighbours on both sides in one."""
    runs: list[tuple[int, int, int]] = []
    for source, target in zip(pieces.source_ids, pieces.target_ids, strict=True):
        if runs:
            first_source, first_target, count = runs[-1]
            if (source, target) == (first_source + count, first_target + count):
                runs[-1] = (first_source, first_target, count + 1)
                continue
        runs.append((source, target, 1))
    return runs
