"""What all schedulers share: requests, KV blocks, filling a step, preemption, accounting.

A scheduler differs from another by its order, its time budget and whom it may preempt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from orchestrator.core.admission import check_request
from orchestrator.core.errors import KVIntegrityError, RequestRejected
from orchestrator.core.kv_cache import KVCacheManager
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import (
    EngineCapabilities,
    RequestEvent,
    ScheduleReasons,
    SchedulerLoad,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import FinishReason, Request, RequestStatus
from orchestrator.core.step_builder import StepBuilder


@dataclass(frozen=True, slots=True)
class ScheduleOrder:
    """Who goes first in one step, and how long the step may take."""

    requests: Sequence[Request]
    """Every live request, most important first."""

    budget_s: float
    load_s: float = 0.0
    num_urgent: int = 0
    starved_ids: frozenset[str] = field(default_factory=frozenset)


class BatchScheduler(ABC):
    """Implements `core.ports.Scheduler` around an order that subclasses decide."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        *,
        min_chunk_tokens: int = 0,
        scan_limit: int = 64,
    ) -> None:
        if min_chunk_tokens >= capabilities.max_num_batched_tokens:
            raise ValueError(
                f"min_chunk_tokens is {min_chunk_tokens}, it must be below max_num_batched_tokens "
                f"({capabilities.max_num_batched_tokens}), or no long prompt could ever start"
            )
        self._capabilities = capabilities
        self._model = model
        self._min_chunk_tokens = min_chunk_tokens
        self._scan_limit = scan_limit
        self._kv = KVCacheManager(
            num_device_blocks=capabilities.num_device_blocks,
            block_size_tokens=capabilities.block_size_tokens,
        )
        self._requests: dict[str, Request] = {}
        self._finished_ids: list[str] = []
        self._next_step_id = 0

    @abstractmethod
    def _order(self, now_s: float) -> ScheduleOrder:
        """Return the order and the budget of the next step."""

    @abstractmethod
    def _may_preempt(self, candidate: Request, victim: Request, now_s: float) -> bool:
        """Return whether `victim`, ranked after `candidate`, may lose its blocks to it."""

    def _spent(self, request: Request, cost_s: float) -> None:
        """Learn that a part was scheduled; for schedulers that keep accounts."""

    @final
    def add_request(self, request: Request) -> None:
        """Take in a new request. See `core.ports.Scheduler`."""
        check_request(request.spec, self._capabilities)
        if request.request_id in self._requests:
            raise RequestRejected(
                f"request id {request.request_id!r} is already in use on this node",
                field="request_id",
            )
        self._requests[request.request_id] = request

    @final
    def abort_request(self, request_id: str) -> RequestEvent | None:
        """End a request and free its blocks; None if it is unknown or has already ended."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request)
        return RequestEvent(request_id, finish_reason=FinishReason.ABORT)

    @final
    def schedule(self, now_s: float) -> SchedulerOutput:
        """Plan the next step. See `core.ports.Scheduler`."""
        order = self._order(now_s)
        step = StepBuilder(
            self._model,
            self._capabilities,
            budget_s=order.budget_s,
            min_chunk_tokens=self._min_chunk_tokens,
        )
        preempted_ids: list[str] = []
        skipped: dict[str, str] = {}
        for position, request in enumerate(order.requests):
            if step.is_full or len(skipped) >= self._scan_limit:
                break
            if request.request_id in preempted_ids:
                continue
            num_tokens = step.num_fitting_tokens(request)
            if num_tokens == 0:
                skipped[request.request_id] = "too little time or room in this step"
                continue
            victims = self._victims(order, position, num_tokens, now_s)
            if victims is None:
                skipped[request.request_id] = "no KV blocks"
                continue
            preempted_ids += [self._preempt(victim) for victim in victims]
            self._place(step, request, num_tokens)
        if not step.scheduled and order.requests:
            preempted_ids += self._force_first(step, order)
        return self._plan(step, order, preempted_ids, skipped)

    @final
    def update_from_output(
        self, plan: SchedulerOutput, output: StepOutput, now_s: float
    ) -> list[RequestEvent]:
        """Account for a finished step and return the news, in scheduling order."""
        events: list[RequestEvent] = []
        for part in plan.scheduled:
            request = part.request
            if request.status is RequestStatus.FINISHED:
                continue
            error = output.failed.get(request.request_id)
            if error is not None:
                self._finish(request)
                events.append(
                    RequestEvent(request.request_id, finish_reason=FinishReason.ERROR, error=error)
                )
                continue
            is_sampled = part.is_sampled
            request.num_computed_tokens += part.num_new_tokens
            if is_sampled:
                events.append(self._accept_tokens(request, output, now_s))
        return events

    @final
    def load(self) -> SchedulerLoad:
        """Return what is queued and running now."""
        requests = self._requests.values()
        num_running = sum(self._kv.num_owned_blocks(r.request_id) > 0 for r in requests)
        return SchedulerLoad(
            num_waiting=len(requests) - num_running,
            num_running=num_running,
            num_decoding=sum(r.is_decoding for r in requests),
            num_queued_prompt_tokens=sum(
                r.num_uncomputed_tokens for r in requests if not r.is_decoding
            ),
            num_free_device_blocks=self._kv.num_free_device_blocks,
            num_device_blocks=self._kv.num_device_blocks,
        )

    @property
    def has_requests(self) -> bool:
        """True while any request has not ended."""
        return bool(self._requests)

    def check_integrity(self) -> None:
        """Prove the accounting: blocks add up, and each live request holds what it computed.

        Raises:
            KVIntegrityError: something contradicts itself.
        """
        self._kv.check_integrity()
        for request in self._requests.values():
            num_computed = request.num_computed_tokens
            if not 0 <= num_computed <= request.num_tokens:
                raise KVIntegrityError(
                    f"request {request.request_id} has computed {num_computed} of "
                    f"{request.num_tokens} tokens"
                )
            if self._kv.num_missing_blocks(request.request_id, num_computed) > 0:
                raise KVIntegrityError(
                    f"request {request.request_id} has computed {num_computed} tokens, more than "
                    "its blocks hold"
                )

    def _victims(
        self, order: ScheduleOrder, position: int, num_tokens: int, now_s: float
    ) -> list[Request] | None:
        """Return whom to preempt so that the request at `position` gets its blocks.

        Empty if there is room; None if preempting everyone allowed would not make enough.
        """
        candidate = order.requests[position]
        num_short = self._num_short_blocks(candidate, num_tokens)
        victims: list[Request] = []
        tail = len(order.requests) - 1
        while num_short > 0 and tail > position:
            victim = order.requests[tail]
            num_owned = self._kv.num_owned_blocks(victim.request_id)
            if num_owned > 0 and self._may_preempt(candidate, victim, now_s):
                victims.append(victim)
                num_short -= num_owned
            tail -= 1
        return victims if num_short <= 0 else None

    def _num_short_blocks(self, request: Request, num_new_tokens: int) -> int:
        num_missing = self._kv.num_missing_blocks(
            request.request_id, request.num_computed_tokens + num_new_tokens
        )
        return num_missing - self._kv.num_free_device_blocks

    def _force_first(self, step: StepBuilder, order: ScheduleOrder) -> list[str]:
        """Put the first request into an empty step, whomever it displaces; return these ids.

        The queue always moves: `check_request` promised that each request fits alone.
        """
        first = order.requests[0]
        num_tokens = step.num_forced_tokens(first)
        preempted_ids: list[str] = []
        for victim in reversed(order.requests[1:]):
            if self._num_short_blocks(first, num_tokens) <= 0:
                break
            if self._kv.num_owned_blocks(victim.request_id):
                preempted_ids.append(self._preempt(victim))
        self._place(step, first, num_tokens)
        return preempted_ids

    def _place(self, step: StepBuilder, request: Request, num_new_tokens: int) -> None:
        block_ids = self._kv.allocate(
            request.request_id, request.num_computed_tokens + num_new_tokens
        )
        assert block_ids is not None, "room was made before"
        request.status = RequestStatus.RUNNING
        self._spent(request, step.add(request, num_new_tokens, block_ids))

    def _preempt(self, request: Request) -> str:
        """Take all KV from a request, which will be computed again; return its id."""
        self._kv.free(request.request_id)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        return request.request_id

    def _plan(
        self,
        step: StepBuilder,
        order: ScheduleOrder,
        preempted_ids: Sequence[str],
        skipped: dict[str, str],
    ) -> SchedulerOutput:
        plan = SchedulerOutput(
            step_id=self._next_step_id,
            scheduled=tuple(step.scheduled),
            preempted_ids=tuple(preempted_ids),
            finished_ids=tuple(self._finished_ids),
            transfers=(),
            predicted_step_s=step.predicted_s,
            reasons=ScheduleReasons(
                latency_budget_s=order.budget_s,
                load_s=order.load_s,
                num_urgent=order.num_urgent,
                num_normal=len(order.requests) - order.num_urgent,
                num_starved=len(order.starved_ids),
                skipped=skipped,
            ),
        )
        self._finished_ids = []
        self._next_step_id += 1
        return plan

    def _accept_tokens(self, request: Request, output: StepOutput, now_s: float) -> RequestEvent:
        token_ids = output.new_token_ids[request.request_id]
        sampling = request.spec.sampling
        finish_reason: FinishReason | None = None
        for token_id in token_ids:
            request.append_output_token(token_id, now_s)
            if token_id in sampling.stop_token_ids:
                finish_reason = FinishReason.STOP
            elif request.num_output_tokens == sampling.max_tokens:
                finish_reason = FinishReason.LENGTH
        if finish_reason is not None:
            self._finish(request)
        return RequestEvent(
            request.request_id,
            new_token_ids=tuple(token_ids),
            logprobs=tuple(output.logprobs.get(request.request_id, ())),
            finish_reason=finish_reason,
        )

    def _finish(self, request: Request) -> None:
        self._kv.free(request.request_id)
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]
        self._finished_ids.append(request.request_id)
