"""Moves KV blocks between device and host memory while the model computes.

Offloads and onboards have a lane each, so that neither waits for the other. Onboards come in
layer groups: all blocks' first layers, then all blocks' next ones, so that the first layer can
begin when a part of the copy is done.

Source: ProServe, layer-wise reload (section 4.3 of this project's specification).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engines.copy_lanes import CopyLane, CopyPart, make_lane
from engines.kv_pool import KVPool
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import CopyFigures

CopyBlocks = Callable[[KVTransfer, list[torch.Tensor], list[torch.Tensor]], None]
"""Copies each source to the target beside it, for this transfer. Called once for an offload, and
once per layer group for an onboard, on the lane's thread or under its stream; raises RuntimeError
if that fails."""


def copy_blocks(_: KVTransfer, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy; the host does not wait for CUDA."""
    # One call for all: queueing 256 copies one by one from Python would take over a millisecond.
    torch._foreach_copy_(targets, sources, non_blocking=True)


@dataclass(frozen=True, slots=True)
class CopyReport:
    """The copies that ended since the report before."""

    completed: tuple[int, ...]
    failed: Mapping[int, str]
    """transfer_id -> message."""

    busy_s: Mapping[int, float]
    """transfer_id -> time the copy took without waiting for its turn; completed ones."""

    figures: CopyFigures


class KVCopies:
    """All copies of one pool. One thread may use it at a time.

    For each step: `start`, then `before_layer` for each layer in order if `waits_by_layer`, or
    `hold_compute` in its place, then `finish_step`; or `give_up_step` if the step failed. Every
    transfer that was given to `start` or `give_up_step` is in exactly one report.
    """

    def __init__(
        self, pool: KVPool, *, num_layer_groups: int, copy_blocks: CopyBlocks = copy_blocks
    ) -> None:
        """`num_layer_groups` is at most the number of layers; `copy_blocks` is for tests."""
        self._pool, self._copy_blocks = pool, copy_blocks
        device = pool.blocks.device
        self._offload_lane: CopyLane = make_lane("kv-offload", device)
        self._onboard_lane: CopyLane = make_lane("kv-onboard", device)
        num_layers = pool.layout.num_layers
        bounds = [i * num_layers // num_layer_groups for i in range(num_layer_groups + 1)]
        self._groups = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._offloads: list[_Copy] = []  # oldest first
        self._onboards: list[_Copy] = []
        self._refused: dict[int, str] = {}
        # Of the current step:
        self._awaited: dict[int, CopyPart] = {}  # first layer of a group -> its last part
        self._last_parts: list[CopyPart] = []  # one per lane
        self._held: list[CopyPart] = []
        self._waited_s = 0.0

    @property
    def waits_by_layer(self) -> bool:
        """True if the step's computation has to call `before_layer`."""
        return bool(self._awaited)

    @property
    def in_flight(self) -> tuple[KVTransfer, ...]:
        """What was started and not yet reported."""
        return tuple(copy.transfer for copy in (*self._offloads, *self._onboards))

    def start(self, transfers: Iterable[KVTransfer]) -> None:
        """Begin a step with these copies; they go on beside the computation.

        They must be sound: `engines.plan_checks` says what that is.
        """
        self._forget_step()
        onboards = []
        for transfer in transfers:
            copy = _Copy(transfer, _runs(transfer), [])
            if transfer.direction is TransferDirection.ONBOARD:
                onboards.append(copy)
                continue
            copy.parts.append(self._offload_lane.submit(partial(self._offload, copy)))
            self._offloads.append(copy)
            self._last_parts = copy.parts[-1:]
        if not onboards:
            return
        for layers in self._groups:
            for copy in onboards:
                work = partial(self._onboard, copy, layers)
                copy.parts.append(self._onboard_lane.submit(work))
            self._awaited[layers.start] = onboards[-1].parts[-1]
        self._onboards += onboards
        self._last_parts.append(onboards[-1].parts[-1])

    def before_layer(self, layer: int) -> None:
        """Let what is computed from here on wait for the onboarded blocks of this layer."""
        part = self._awaited.get(layer)
        if part is not None:
            self._hold_compute(part)

    def hold_compute(self) -> None:
        """Let what is computed from here on wait for all copies of this step, whole."""
        self._awaited = {}
        for part in self._last_parts:
            self._hold_compute(part)

    def broken_onboards(self) -> list[KVTransfer]:
        """Return the onboards of this step that failed; may wait for those that have not ended."""
        return [copy.transfer for copy in self._onboards if copy.error is not None]

    def wait_for_one(self) -> None:
        """Return when there is something to report, or nothing is in flight."""
        if self._offloads and not self._onboards and not self._refused:
            self._wait(self._offloads[:1])

    def finish_step(self) -> CopyReport:
        """Wait for the onboards and return them, and the offloads that have ended by now.

        The step's computation has ended.
        """
        self._wait(self._onboards)
        ended = self._onboards + [copy for copy in self._offloads if copy.is_done]
        self._offloads = [copy for copy in self._offloads if copy not in ended]
        self._onboards = []
        failed, self._refused = self._refused, {}
        failed |= {c.transfer.transfer_id: c.error for c in ended if c.error is not None}
        completed = [copy for copy in ended if copy.error is None]
        num_bytes = dict.fromkeys(TransferDirection, 0)
        for copy in completed:
            num_blocks = len(copy.transfer.device_block_ids)
            num_bytes[copy.transfer.direction] += num_blocks * self._pool.blocks[0].nbytes
        exposed_s = self._waited_s + sum(part.held_s for part in self._held)
        self._forget_step()
        return CopyReport(
            completed=tuple(copy.transfer.transfer_id for copy in completed),
            failed=failed,
            busy_s={copy.transfer.transfer_id: copy.busy_s for copy in completed},
            figures=CopyFigures(
                offloaded_bytes=num_bytes[TransferDirection.OFFLOAD],
                onboarded_bytes=num_bytes[TransferDirection.ONBOARD],
                copy_s=sum((copy.busy_s for copy in ended), 0.0),
                exposed_s=exposed_s,
            ),
        )

    def give_up_step(self, transfers: Iterable[KVTransfer], reason: str) -> None:
        """End a step that failed and has no report; the next step's tells of these transfers.

        Those that were not started have failed, with `reason`. The onboards have ended when this
        returns: their blocks may soon belong to others.
        """
        started = {transfer.transfer_id for transfer in self.in_flight}
        for transfer in transfers:
            if transfer.transfer_id not in started:
                self._refused[transfer.transfer_id] = reason
        self._wait(self._onboards)
        self._forget_step()

    def close(self) -> None:
        """Return when nothing is copied any more; what has not begun is left undone."""
        self._onboard_lane.close()
        self._offload_lane.close()

    def _offload(self, copy: _Copy) -> None:
        device, host = self._pool.blocks, self._pool.host_blocks
        self._copy_blocks(
            copy.transfer,
            [host[first_host : first_host + count] for _, first_host, count in copy.runs],
            [device[first : first + count] for first, _, count in copy.runs],
        )

    def _onboard(self, copy: _Copy, layers: slice) -> None:
        device, host = self._pool.blocks, self._pool.host_blocks
        if len(self._groups) == 1:
            targets = [device[first : first + count] for first, _, count in copy.runs]
            sources = [host[first : first + count] for _, first, count in copy.runs]
        else:
            # One by one: a part of the layers is contiguous within a block only, and CUDA
            # copies nothing else without waiting.
            targets = [device[block, layers] for block in copy.transfer.device_block_ids]
            sources = [host[block, layers] for block in copy.transfer.host_block_ids]
        self._copy_blocks(copy.transfer, targets, sources)

    def _hold_compute(self, part: CopyPart) -> None:
        part.hold_compute()
        self._held.append(part)

    def _wait(self, copies: Sequence[_Copy]) -> None:
        late = [copy for copy in copies if not copy.is_done]
        if not late:
            return
        started_s = time.perf_counter()
        for copy in late:
            copy.wait()
        self._waited_s += time.perf_counter() - started_s

    def _forget_step(self) -> None:
        self._awaited, self._last_parts, self._held, self._waited_s = {}, [], [], 0.0


@dataclass(slots=True, eq=False)
class _Copy:
    """A transfer that was started."""

    transfer: KVTransfer
    runs: Sequence[tuple[int, int, int]]
    parts: list[CopyPart]
    """In the order of their lane."""

    def wait(self) -> None:
        self.parts[-1].wait()

    @property
    def is_done(self) -> bool:
        return self.parts[-1].is_done

    @property
    def error(self) -> str | None:
        return next((part.error for part in self.parts if part.error is not None), None)

    @property
    def busy_s(self) -> float:
        return sum(part.busy_s for part in self.parts)


def _runs(transfer: KVTransfer) -> list[tuple[int, int, int]]:
    """Return (first device block, first host block, count), neighbours on both sides in one."""
    runs: list[tuple[int, int, int]] = []
    for device, host in zip(transfer.device_block_ids, transfer.host_block_ids, strict=True):
        if runs:
            first_device, first_host, count = runs[-1]
            if (device, host) == (first_device + count, first_host + count):
                runs[-1] = (first_device, first_host, count + 1)
                continue
        runs.append((device, host, 1))
    return runs
