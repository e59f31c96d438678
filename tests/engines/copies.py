"""Copies of KV blocks that a test holds back, delays or breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence

import torch

from engines.block_copies import BlockPieces, copy_blocks
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection


def offload(transfer_id: int, device: Sequence[int], host: Sequence[int]) -> KVTransfer:
    return KVTransfer(transfer_id, "r", TransferDirection.OFFLOAD, tuple(device), tuple(host))


def onboard(transfer_id: int, device: Sequence[int], host: Sequence[int]) -> KVTransfer:
    return KVTransfer(transfer_id, "r", TransferDirection.ONBOARD, tuple(device), tuple(host))


class BrokenCopies:
    """Fails some transfers."""

    def __init__(self, *transfer_ids: int, error: RuntimeError | None = None) -> None:
        self.transfer_ids: Collection[int] = transfer_ids
        self.error = error or RuntimeError("the link is down")

    def __call__(self, transfer: KVTransfer, pieces: BlockPieces) -> None:
        if transfer.transfer_id in self.transfer_ids:
            raise self.error
        copy_blocks(transfer, pieces)


class HeldCopies:
    """Holds each copy of one direction until the test lets it go."""

    def __init__(self, direction: TransferDirection) -> None:
        self._direction = direction
        self._permits = threading.Semaphore(0)

    def let_go(self, num_copies: int = 1) -> None:
        """Permit so many calls: one per offload, one per onboard and layer group."""
        self._permits.release(num_copies)

    def __call__(self, transfer: KVTransfer, pieces: BlockPieces) -> None:
        if transfer.direction is self._direction:
            self._permits.acquire()
        copy_blocks(transfer, pieces)


class CountedCopies:
    """Lets a test wait for offloads, which otherwise end whenever the machine has time for them."""

    def __init__(self) -> None:
        self._num_offloaded = 0
        self._has_more = threading.Condition()

    def wait_for_offloads(self, count: int) -> None:
        """Return when so many have ended, counted from the beginning."""
        with self._has_more:
            self._has_more.wait_for(lambda: self._num_offloaded >= count)

    def __call__(self, transfer: KVTransfer, pieces: BlockPieces) -> None:
        copy_blocks(transfer, pieces)
        if transfer.direction is TransferDirection.OFFLOAD:
            with self._has_more:
                self._num_offloaded += 1
                self._has_more.notify_all()


def slow_copies(transfer: KVTransfer, pieces: BlockPieces) -> None:
    """Copy late: what does not wait for it reads old numbers. What waits is right at any speed.

    20 ms are ten steps of the tiny model; on CUDA, 50 million cycles are about as long.
    """
    if pieces.targets.is_cuda or pieces.sources.is_cuda:
        torch.cuda._sleep(50_000_000)  # noqa: SLF001 - there is no public one
    else:
        time.sleep(0.02)
    copy_blocks(transfer, pieces)
