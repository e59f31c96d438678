"""Moves KV blocks between device and host memory while the model computes.

Offloads and onboards have a lane each, so that neither waits for the other. Onboards come in
layer groups: all blocks' first layers, then all blocks' next ones, so that the first layer can
begin when a part of the copy is done. Each group is put on its lane when the computation gets to
the group before it: the host's time for it passes while the device computes.

Source: ProServe, layer-wise reload (section 4.3 of this project's specification).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from engines.batch_copies import fastest_copies
from engines.block_copies import BlockPieces, CopyBlocks
from engines.copy_lanes import CopyLane, CopyPart, make_lane
from engines.kv_pool import KVPool
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import CopyFigures

# How much larger than the one before a layer group may be. The copy of a group hides under the
# computation of those before it if all of it takes at most 1 / 1.5 of the step's computation.
_MAX_GROWTH = 1.5


def layer_groups(num_layers: int, num_groups: int) -> list[slice]:
    """Return the layers of each group; but for rounding, each is larger than the one before by the
    same factor, since the computation has to wait for the first one in any case.

    `num_groups` is at most `num_layers`.
    """

    def first_size(growth: float) -> float:
        return num_layers / sum(growth**i for i in range(num_groups))

    low, high = 1.0, _MAX_GROWTH
    if first_size(high) < 1:
        # The largest factor by which the first group still has a layer; 50 halvings are exact.
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if first_size(middle) < 1 else (middle, high)
        high = low
    size = first_size(high)
    ends = itertools.accumulate(size * high**i for i in range(num_groups))
    bounds = [0]
    for index, end in enumerate(ends):
        most = num_layers - (num_groups - 1 - index)  # a layer for each that follows
        bounds.append(min(max(round(end), bounds[-1] + 1), most))
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


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
        self, pool: KVPool, *, num_layer_groups: int, copy_blocks: CopyBlocks | None = None
    ) -> None:
        """`num_layer_groups` is at most the number of layers. Without `copy_blocks`, the machine's
        fastest way is taken."""
        device = pool.blocks.device
        self._pool, self._copy_blocks = pool, copy_blocks or fastest_copies(device)
        self._offload_lane: CopyLane = make_lane("kv-offload", device)
        self._onboard_lane: CopyLane = make_lane("kv-onboard", device)
        self._groups = layer_groups(pool.layout.num_layers, num_layer_groups)
        self._offloads: list[_Copy] = []  # oldest first
        self._onboards: list[_Copy] = []
        self._refused: dict[int, str] = {}
        # Of the current step:
        self._awaited: dict[int, CopyPart] = {}  # first layer of a group -> its last part
        self._arriving: list[_Copy] = []
        self._next_groups: list[slice] = []  # not on the lane yet
        self._parts: list[CopyPart] = []
        self._last_parts: dict[TransferDirection, CopyPart] = {}
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
        of = {direction: list[_Copy]() for direction in TransferDirection}
        for transfer in transfers:
            of[transfer.direction].append(_Copy(transfer, []))
        # First, since it is what the computation waits for.
        if onboards := of[TransferDirection.ONBOARD]:
            self._arriving, self._next_groups = onboards, self._groups[:]
            self._put_next_group()
            self._onboards += onboards
        for copy in of[TransferDirection.OFFLOAD]:
            work = partial(self._offload, copy.transfer)
            self._put(copy, self._offload_lane.submit(work))
            self._offloads.append(copy)

    def before_layer(self, layer: int) -> None:
        """Let what is computed from here on wait for the onboarded blocks of this layer."""
        part = self._awaited.get(layer)
        if part is not None:
            if self._next_groups:
                self._put_next_group()
            part.hold_compute()

    def hold_compute(self) -> None:
        """Let what is computed from here on wait for all copies of this step, whole."""
        self._put_all_groups()
        self._awaited = {}
        for part in self._last_parts.values():
            part.hold_compute()

    def broken_onboards(self) -> list[KVTransfer]:
        """Return the onboards of this step that failed; may wait for those that have not ended."""
        self._put_all_groups()
        return [copy.transfer for copy in self._onboards if copy.error is not None]

    def wait_for_one(self) -> None:
        """Return when there is something to report, or nothing is in flight."""
        if self._offloads and not self._onboards and not self._refused:
            self._wait(self._offloads[:1])

    def finish_step(self) -> CopyReport:
        """Wait for the onboards and return them, and the offloads that have ended by now.

        The step's computation has ended.
        """
        self._put_all_groups()
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
        exposed_s = self._waited_s + sum(part.held_s for part in self._parts)
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
        self._put_all_groups()
        self._wait(self._onboards)
        self._forget_step()

    def close(self) -> None:
        """Return when nothing is copied any more; what has not begun is left undone."""
        self._onboard_lane.close()
        self._offload_lane.close()

    def _put_all_groups(self) -> None:
        while self._next_groups:
            self._put_next_group()

    def _put_next_group(self) -> None:
        layers = self._next_groups.pop(0)
        for copy in self._arriving:
            work = partial(self._onboard, copy.transfer, layers)
            # Blocks are read until the step before has ended; this step's computation waits.
            part = self._onboard_lane.submit(work, follows_compute=layers.start == 0)
            self._put(copy, part)
        self._awaited[layers.start] = self._arriving[-1].parts[-1]

    def _put(self, copy: _Copy, part: CopyPart) -> None:
        copy.parts.append(part)
        self._parts.append(part)
        self._last_parts[copy.transfer.direction] = part

    def _offload(self, transfer: KVTransfer) -> None:
        pool = self._pool
        pieces = BlockPieces(
            sources=pool.blocks,
            source_ids=transfer.device_block_ids,
            targets=pool.host_blocks,
            target_ids=transfer.host_block_ids,
            layers=slice(0, pool.layout.num_layers),
        )
        self._copy_blocks(transfer, pieces)

    def _onboard(self, transfer: KVTransfer, layers: slice) -> None:
        pool = self._pool
        pieces = BlockPieces(
            sources=pool.host_blocks,
            source_ids=transfer.host_block_ids,
            targets=pool.blocks,
            target_ids=transfer.device_block_ids,
            layers=layers,
        )
        self._copy_blocks(transfer, pieces)

    def _wait(self, copies: Sequence[_Copy]) -> None:
        late = [copy for copy in copies if not copy.is_done]
        if not late:
            return
        started_s = time.perf_counter()
        for copy in late:
            copy.wait()
        self._waited_s += time.perf_counter() - started_s

    def _forget_step(self) -> None:
        self._awaited, self._arriving, self._next_groups = {}, [], []
        self._parts, self._last_parts, self._waited_s = [], {}, 0.0


@dataclass(slots=True, eq=False)
class _Copy:
    """A transfer that was started."""

    transfer: KVTransfer
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
