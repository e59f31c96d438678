"""What all schedulers share: requests, KV blocks, filling a step, preemption, accounting.

A scheduler differs from another by its ranking, the rules of a step, and whom it may preempt.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import final

import numpy as np

from orchestrator.core.admission import check_request
from orchestrator.core.errors import KVIntegrityError, RequestRejected
from orchestrator.core.kv_cache import KVCacheManager
from orchestrator.core.kv_options import RECOMPUTE, KVCacheOptions
from orchestrator.core.kv_planner import Claim, Claims, KVPlanner, KVStep
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import BatchLatencyModel, BatchShape
from orchestrator.core.latency_correction import StepErrors
from orchestrator.core.ports import (
    EngineCapabilities,
    QueueSummary,
    RequestEvent,
    ScheduleReasons,
    SchedulerLoad,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.queue_summary import scheduler_load, summarise
from orchestrator.core.ranking import Ranking, RankOrder
from orchestrator.core.request import FinishReason, Request, RequestStatus
from orchestrator.core.request_table import Flags, Floats, RequestTable
from orchestrator.core.slo import DeadlineAnchor
from orchestrator.core.step_builder import StepBuilder, is_decode_step
from orchestrator.core.step_progress import ProgressListener, StepProgress


class BatchScheduler(ABC):
    """Implements `core.ports.Scheduler` around a ranking that subclasses decide."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        *,
        anchor: DeadlineAnchor = DeadlineAnchor.FIXED,
        scan_limit: int = 64,
    ) -> None:
        """`anchor` is what later tokens' deadlines are counted from; at most `scan_limit`
        requests are passed over in one step because they do not fit. `model` is only read: what
        the scheduler learns from its steps stays in a copy of its own."""
        self._capabilities = capabilities
        self._model = model.fresh()
        self._scan_limit = scan_limit
        self._table = RequestTable(anchor)
        self._use(self._make_kv_planner(RECOMPUTE, None))
        self._finished_ids: list[str] = []
        self._next_step_id = 0
        self._budget_s = math.inf

    @final
    def use_kv_options(self, options: KVCacheOptions, copies: CopyProfile | None) -> None:
        """Keep, share and copy KV by these options from now on; before the first request.

        Until then, nothing is kept: what a request loses is computed again. `copies` says how
        long copies take; without, and on engines without host blocks, none are made.
        """
        assert not self.has_requests, "KV options are set before the first request"
        self._use(self._make_kv_planner(options, copies))

    def _make_kv_planner(self, options: KVCacheOptions, copies: CopyProfile | None) -> KVPlanner:
        return KVPlanner(
            self._capabilities,
            self._table,
            self._model,
            options=options,
            copies=copies,
            claims=Claims(self._claim, self._may_claim),
        )

    def _use(self, kv_planner: KVPlanner) -> None:
        self._kv_planner = kv_planner
        listener = ProgressListener(self._on_output, self._finish)
        self._progress = StepProgress(self._table, kv_planner, self._model, listener)

    @property
    def _kv(self) -> KVCacheManager:
        return self._kv_planner.kv

    @abstractmethod
    def _rank(self, now_s: float) -> Ranking:
        """Return the ranking of all rows of the table, which has at least one."""

    @abstractmethod
    def _standing(self, request: Request) -> tuple[float, ...]:
        """Return how strong a request's claim to KV blocks is; lower is stronger, ties by
        arrival, then id.

        It must not change while the request lives. Only weaker requests lose blocks to
        stronger ones, so no two ever take turns in throwing each other out, and the strongest
        always gets on.
        """

    def _may_claim(self, request: Request, now_s: float) -> bool:
        """Return whether a request may take others' blocks at all now."""
        return True

    def _on_prefill(self, request: Request, num_new_tokens: int, cost_s: float) -> None:
        """Learn that a prefill piece was scheduled; for schedulers that keep accounts."""

    def _on_output(self, request: Request, num_new_tokens: int) -> None:
        """Learn that tokens were produced; for schedulers that keep accounts."""

    def _on_arrival(self, request: Request) -> None:
        """Learn of a new request, before it is in the table; for schedulers that keep accounts."""

    @final
    def add_request(self, request: Request) -> None:
        """Take in a new request. See `core.ports.Scheduler`."""
        check_request(request.spec, self._capabilities)
        if request.request_id in self._table or self._progress.gets_last(request.request_id):
            raise RequestRejected(
                f"request id {request.request_id!r} is already in use on this node",
                field="request_id",
            )
        self._on_arrival(request)
        self._table.add(request)
        self._kv_planner.note_arrival(len(self._table) - 1)

    @final
    def abort_request(self, request_id: str) -> RequestEvent | None:
        """End a request and free its blocks; None if it is unknown or has already ended."""
        request = self._table.get(request_id) or self._progress.take_last(request_id)
        if request is None:
            return None
        self._finish(request)
        return RequestEvent(request_id, finish_reason=FinishReason.ABORT)

    @final
    def schedule(self, now_s: float) -> SchedulerOutput:
        """Plan the next step. See `core.ports.Scheduler`."""
        if not len(self._table):
            return self._plan(None, ScheduleReasons())
        ranking = self._rank(now_s)
        self._budget_s = ranking.rules.budget_s
        step = StepBuilder(self._model, self._capabilities, ranking.rules)
        order = RankOrder(self._table, ranking.group, ranking.key)
        kv = self._kv_planner
        kv.begin_step(order, now_s, min(ranking.rules.budget_s, step.longest_s))
        skipped: dict[str, str] = {}
        is_decode = self._table.is_decode_step
        num_reserved = (1 - ranking.rules.admission_kv_fraction) * self._kv.num_device_blocks
        for row in self._one_by_one(step, order, is_decode):
            if step.is_full:
                break
            request = self._table.requests[row]
            if request.request_id in kv.step.preempted_ids:
                continue
            obstacle: str | None = "KV memory is nearly full"
            if self._kv.num_free_device_blocks >= num_reserved or self._table.num_blocks[row]:
                place = self._place_decode if is_decode[row] else self._place_prefill
                obstacle = place(step, row, len(skipped))
            if obstacle is not None:
                skipped[request.request_id] = obstacle
                if len(skipped) == self._scan_limit:
                    break
        # Who waits for a copy has been promised room; forcing somebody in would take it.
        if not step.scheduled and not kv.step.is_waiting and not kv.step.transfers:
            self._force_first(step, order)
        kv.offload_ahead(step.predicted_s, (part.request_id for part in step.scheduled))
        reasons = ScheduleReasons(
            latency_budget_s=ranking.rules.budget_s,
            load_s=ranking.load_s,
            num_urgent=ranking.num_urgent,
            num_normal=len(self._table) - ranking.num_urgent,
            num_starved=len(ranking.starved_ids),
            skipped=skipped,
            copy_budget_blocks=kv.step.copy_budget_blocks,
            num_prefix_tokens=kv.step.num_prefix_tokens,
            num_kept_tokens=kv.step.num_kept_tokens,
            num_recomputed_tokens=kv.step.num_recomputed_tokens,
        )
        return self._plan(step, reasons)

    @final
    def update_from_output(
        self, plan: SchedulerOutput, output: StepOutput, now_s: float
    ) -> list[RequestEvent]:
        """Account for a finished step and return the news, in scheduling order."""
        return self._progress.settle(plan, output, now_s)

    @final
    def begin(self, plan: SchedulerOutput, expected_end_s: float) -> None:
        """Take a step as done but for its tokens' values. See `core.ports.AheadScheduler`."""
        self._progress.begin(plan, expected_end_s)

    @final
    def revise(self, plan: SchedulerOutput) -> SchedulerOutput | None:
        """Return what is left of a plan made ahead. See `core.ports.AheadScheduler`."""
        plan = self._progress.revise(plan)
        if plan.scheduled or plan.transfers or plan.preempted_ids:
            return plan
        self._finished_ids = [*plan.finished_ids, *self._finished_ids]
        return None

    @final
    def load(self) -> SchedulerLoad:
        """Return what is queued and running now."""
        return scheduler_load(self._table, self._kv, num_last=self._progress.num_last)

    @final
    def queue_summary(self, now_s: float) -> QueueSummary:
        """Return what one more request would meet. See `core.ports.Scheduler`."""
        return summarise(self._table, self._model, now_s, latency_budget_s=self._budget_s)

    @final
    def step_errors(self) -> tuple[StepErrors, ...]:
        """Return how far off recent predictions were. See `core.ports.Scheduler`."""
        return self._model.errors()

    @property
    def has_requests(self) -> bool:
        """True while any request has not ended."""
        return len(self._table) + self._progress.num_last > 0

    def check_integrity(self) -> None:
        """Prove the accounting: blocks add up, each live request holds what it computed, and the
        table says what the requests say.

        Raises:
            KVIntegrityError: something contradicts itself.
        """
        self._kv.check_integrity()
        for row, request in enumerate(self._table.requests):
            name, num_computed = request.request_id, request.num_computed_tokens
            if not 0 <= num_computed <= request.num_tokens:
                raise KVIntegrityError(
                    f"request {name} has computed {num_computed} of {request.num_tokens} tokens"
                )
            if self._kv.num_missing_blocks(name, num_computed) > 0:
                raise KVIntegrityError(
                    f"request {name} has computed {num_computed} tokens, more than its blocks hold"
                )
            self._table.check_row(row, num_blocks=self._kv.num_owned_blocks(name))

    def _one_by_one(self, step: StepBuilder, order: RankOrder, is_decode: Flags) -> Iterator[int]:
        """Yield rows in order; a run of decodes is put into the step on the way, as far as each
        fits as it is, and only the rest of it is yielded."""
        for head in order.sorted_parts():
            is_decode_here = is_decode[head]
            bounds = [0, *(np.flatnonzero(np.diff(is_decode_here)) + 1).tolist(), len(head)]
            for start, end in pairwise(bounds):
                rows = head[start:end]
                if is_decode_here[start] and not self._kv_planner.step.preempted_ids:
                    rows = rows[self._place_decodes(step, rows) :]
                yield from rows

    def _place_decodes(self, step: StepBuilder, rows: list[int]) -> int:
        """Put as many of these decodes into the step, from the first on, as fit without
        preempting anybody; return how many."""
        num_computed = self._table.num_computed_tokens[rows]
        num_computed = num_computed[: step.num_fitting_decodes(num_computed)]
        needs_block = num_computed % self._kv.block_size_tokens == 0
        num_needed = np.cumsum(needs_block)
        num_placed = int(np.searchsorted(num_needed, self._kv.num_free_device_blocks, side="right"))
        if num_placed == 0:
            return 0
        for position in np.flatnonzero(needs_block[:num_placed]).tolist():
            self._kv_planner.allocate(rows[position], int(num_computed[position]) + 1)
        requests = [self._table.requests[row] for row in rows[:num_placed]]
        block_ids = [self._kv.block_ids(request.spec.request_id) for request in requests]
        step.add_decodes(requests, num_computed[:num_placed], block_ids)
        return num_placed

    def _place_decode(self, step: StepBuilder, row: int, num_skipped: int) -> str | None:
        """Put a decode token into the step; return why it does not fit, or None."""
        request = self._table.requests[row]
        num_computed = request.num_computed_tokens
        cost_s = step.decode_cost_if_fits_s(num_computed)
        if cost_s is None:
            return _NO_ROOM
        block_ids: Sequence[int] | None
        if num_computed % self._kv.block_size_tokens:
            block_ids = self._kv.block_ids(request.spec.request_id)  # its last block has room
        else:
            block_ids = self._kv_planner.blocks(row, num_computed + 1)
        if block_ids is None:
            return self._no_blocks()
        request.status = RequestStatus.RUNNING
        step.add_decode(request, cost_s, block_ids)
        return None

    def _place_prefill(self, step: StepBuilder, row: int, num_skipped: int) -> str | None:
        """Put a prefill piece into the step; return why none fits, or None."""
        request, kv = self._table.requests[row], self._kv_planner
        restored = kv.restorable(row)
        if restored is None:
            return self._no_blocks()
        if kv.is_parked(row, restored, num_skipped + len(step.scheduled)):
            kv.park(row, restored)
            return "the rest of its KV is still on the host"
        num_cached = request.num_computed_tokens
        num_cached += restored.num_blocks * self._kv.block_size_tokens
        stall_s = kv.stall_s(restored)
        num_wanted = request.num_tokens - num_cached
        num_tokens = step.num_fitting_tokens(num_wanted, num_cached, stall_s)
        if num_tokens == 0:
            return _NO_ROOM
        block_ids = kv.blocks(row, num_cached + num_tokens, restored)
        if block_ids is None:
            return self._no_blocks()
        request.status = RequestStatus.RUNNING
        cost_s = step.add_prefill(request, num_tokens, block_ids, stall_s)
        kv.note_scheduled(request, num_tokens)
        self._on_prefill(request, num_tokens, cost_s)
        return None

    def _no_blocks(self) -> str:
        return (
            "its KV blocks are still being copied"
            if self._kv_planner.step.is_waiting
            else ("no KV blocks")
        )

    def _work_s(self) -> Floats:
        """Return the predicted cost of everything before each request's next token (17)."""
        return self._table.work_s(self._model)

    def _claim(self, request: Request) -> Claim:
        return self._standing(request), request.arrival_s, request.request_id

    def _force_first(self, step: StepBuilder, order: RankOrder) -> None:
        """Put one request into an empty step, whomever it displaces.

        The first in order if it has room; else the one with the strongest claim, so that the
        queue always moves: `check_request` promised that each request fits alone.
        """
        requests = self._table.requests
        first = next(iter(order))
        if self._num_short_blocks(first, num_tokens := self._num_forced(step, first)) > 0:
            first = min(range(len(requests)), key=lambda row: self._claim(requests[row]))
            num_tokens = self._num_forced(step, first)
        weakest_first = sorted(
            self._kv_planner.holders().tolist(),
            key=lambda row: self._claim(requests[row]),
            reverse=True,
        )
        for row in weakest_first:
            if self._num_short_blocks(first, num_tokens) <= 0:
                break
            if row != first:
                self._kv_planner.preempt(requests[row])
        if self._num_short_blocks(first, num_tokens) > 0:
            return  # until the copies of what others lost have ended
        request = requests[first]
        needed = request.num_computed_tokens + num_tokens
        block_ids = self._kv_planner.allocate(first, needed)
        request.status = RequestStatus.RUNNING
        if is_decode_step(request):
            step.add_decode(request, self._model.decode_s(request.num_computed_tokens), block_ids)
        else:
            cost_s = step.add_prefill(request, num_tokens, block_ids)
            self._kv_planner.note_scheduled(request, num_tokens)
            self._on_prefill(request, num_tokens, cost_s)

    def _num_forced(self, step: StepBuilder, row: int) -> int:
        request = self._table.requests[row]
        return 1 if is_decode_step(request) else step.num_forced_tokens(request)

    def _num_short_blocks(self, row: int, num_new_tokens: int) -> int:
        num_tokens = self._table.requests[row].num_computed_tokens + num_new_tokens
        num_missing = self._kv_planner.num_missing_blocks(row, num_tokens)
        return num_missing - self._kv.num_free_device_blocks

    def _plan(self, step: StepBuilder | None, reasons: ScheduleReasons) -> SchedulerOutput:
        kv_step = self._kv_planner.step if step else KVStep()
        plan = SchedulerOutput(
            step_id=self._next_step_id,
            scheduled=tuple(step.scheduled) if step else (),
            preempted_ids=tuple(sorted(kv_step.preempted_ids)),
            finished_ids=tuple(self._finished_ids),
            transfers=tuple(kv_step.transfers),
            predicted_step_s=step.predicted_s if step else 0.0,
            reasons=reasons,
            shape=step.shape if step else BatchShape(),
            waits_for_transfers=self._kv_planner.is_synchronous,
        )
        self._finished_ids = []
        self._next_step_id += 1
        return plan

    def _finish(self, request: Request) -> None:
        self._kv_planner.forget(request)
        request.status = RequestStatus.FINISHED
        self._table.remove(request)
        self._finished_ids.append(request.request_id)


_NO_ROOM = "too little time or room in this step"
