"""Several ranks of an engine as one: rank 0 tells the others each step and waits for them.

Each rank has its part of every KV block and makes every copy with it. What one rank has computed
goes into what the others compute, inside the engine: a rank that fails alone leaves the others
waiting for it, so such a step is the engine's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from engines.kv_copies import CopyReport
from engines.trtllm.packing import StepArrays
from engines.trtllm.rank_lines import FollowerLines
from engines.trtllm.rank_messages import RankReport, RankStep
from engines.trtllm.rank_worker import RankWorker
from orchestrator.core.errors import EngineLost
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import CopyFigures


@dataclass(slots=True)
class _SharedCopy:
    """A transfer that every rank makes."""

    transfer: KVTransfer
    ranks: set[int]
    """Those that have not reported it."""

    busy_s: float = 0.0
    error: str | None = None


class RankGroup:
    """The copies and the computation of all ranks, in place of those of rank 0 alone.

    A copy has ended when it has on every rank, and has failed if it has on any. The calls of a
    step are those of `engines.step_runner.StepCopies`, with `enqueue` between them.
    """

    def __init__(self, worker: RankWorker, lines: FollowerLines) -> None:
        """`worker` is rank 0, `lines` lead to all others, which wait for steps."""
        self._worker, self._lines = worker, lines
        self._copies: dict[int, _SharedCopy] = {}  # by transfer id
        # Of the current step:
        self._transfers: tuple[KVTransfer, ...] = ()
        self._waits_for_transfers = False
        self._is_begun = self._is_told = False
        self._answers: Mapping[int, RankReport] = {}

    @property
    def in_flight(self) -> tuple[KVTransfer, ...]:
        """What was started and not yet reported."""
        return tuple(copy.transfer for copy in self._copies.values())

    def start(self, transfers: Iterable[KVTransfer]) -> None:
        """Begin a step with these copies, on all ranks."""
        self._transfers, self._waits_for_transfers = tuple(transfers), False
        self._is_begun, self._is_told, self._answers = True, False, {}
        for transfer in self._transfers:
            ranks = {0, *self._lines.ranks}
            self._copies[transfer.transfer_id] = _SharedCopy(transfer, ranks)
        self._worker.copies.start(self._transfers)

    def hold_compute(self) -> None:
        """Let the computation wait for all copies of this step."""
        self._waits_for_transfers = True
        self._worker.copies.hold_compute()

    def enqueue(self, arrays: StepArrays) -> torch.Tensor:
        """Compute a step on all ranks; return rank 0's logits once the others are done, which is
        as good as being done: no rank can be far ahead.

        Raises:
            EngineLost: another rank has ended or failed.
            RuntimeError, ValueError: TensorRT refuses the step on this rank.
        """
        self._tell(arrays)
        logits = self._worker.enqueue(arrays)
        # Before anything waits for the device: it would wait forever for a rank that has ended.
        self._listen()
        return logits

    def broken_onboards(self) -> list[KVTransfer]:
        """Return the onboards of this step that failed on any rank."""
        broken = {transfer.transfer_id for transfer in self._worker.copies.broken_onboards()}
        for answer in self._answers.values():
            broken.update(answer.copies.failed)
        return [
            transfer
            for transfer in self._transfers
            if transfer.direction is TransferDirection.ONBOARD and transfer.transfer_id in broken
        ]

    def wait_for_one(self) -> None:
        """Return when every rank has something to report, or nothing in flight."""
        self._tell(None, waits_for_one=True)
        self._worker.copies.wait_for_one()

    def finish_step(self) -> CopyReport:
        """Return the onboards, and the offloads that have ended on all ranks by now.

        Raises:
            EngineLost: another rank has ended or failed.
        """
        if not self._is_told:
            self._tell(None)
        self._listen()
        own = self._worker.copies.finish_step()
        self._is_begun = False
        refused = {i: error for i, error in own.failed.items() if i not in self._copies}
        reports = {0: own} | {rank: answer.copies for rank, answer in self._answers.items()}
        for rank, report in reports.items():
            for transfer_id in (*report.completed, *(report.failed.keys() - refused.keys())):
                copy = self._copies[transfer_id]
                copy.ranks.discard(rank)
                copy.busy_s = max(copy.busy_s, report.busy_s.get(transfer_id, 0.0))
                copy.error = copy.error or report.failed.get(transfer_id)
        ended = {i: copy for i, copy in self._copies.items() if not copy.ranks}
        for transfer_id in ended:
            del self._copies[transfer_id]
        completed = {i: copy.busy_s for i, copy in ended.items() if copy.error is None}
        return CopyReport(
            completed=tuple(completed),
            failed=refused | {i: c.error for i, c in ended.items() if c.error is not None},
            busy_s=completed,
            figures=CopyFigures(
                offloaded_bytes=sum(r.figures.offloaded_bytes for r in reports.values()),
                onboarded_bytes=sum(r.figures.onboarded_bytes for r in reports.values()),
                copy_s=own.figures.copy_s,
                exposed_s=own.figures.exposed_s,
            ),
        )

    def give_up_step(self, transfers: Iterable[KVTransfer], reason: str) -> None:
        """End a step that failed before it began; the next report tells of these transfers.

        Raises:
            EngineLost: the step had begun.
        """
        if self._is_begun:
            raise EngineLost(f"{reason}; the other ranks wait for this one, and cannot go on")
        self._worker.copies.give_up_step(transfers, reason)

    def _tell(self, arrays: StepArrays | None, *, waits_for_one: bool = False) -> None:
        self._is_told = True
        self._lines.send(
            RankStep(
                transfers=self._transfers,
                waits_for_transfers=self._waits_for_transfers,
                waits_for_one=waits_for_one,
                arrays=None if arrays is None else arrays.narrowed(),
            )
        )

    def _listen(self) -> None:
        """Take the answers, unless that was done.

        Raises:
            EngineLost: another rank has ended or failed, or this rank's device has: the others
                then wait for it inside the engine, and never answer.
        """
        if self._answers:
            return
        try:
            self._answers = self._lines.receive(RankReport, check=self._worker.check_device)
        except RuntimeError as error:
            raise EngineLost(f"rank 0's device has failed: {error}") from error
