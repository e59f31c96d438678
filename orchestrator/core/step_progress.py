"""What steps do to requests: what is assumed of one that runs, and what came out of it.

The next step can be planned while one runs. Until its tokens are known, each of its requests is
taken to get one, which counts as a token without a value (`Request.has_pending_token`). Wrong can
only be that a request ends, fails or loses its KV; `revise` then takes its part out of the plan
that was made in the meantime, before that is started.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.core.kv_planner import KVPlanner
from orchestrator.core.latency import BatchLatencyModel, BatchShape
from orchestrator.core.ports import RequestEvent, ScheduledRequest, SchedulerOutput, StepOutput
from orchestrator.core.request import FinishReason, Request, RequestStatus
from orchestrator.core.request_table import RequestTable


@dataclass(frozen=True, slots=True)
class ProgressListener:
    """What a scheduler wants to know of its requests' progress."""

    on_output: Callable[[Request, int], None]
    """So many tokens were produced."""

    on_finish: Callable[[Request], None]
    """It has ended, and is in the table."""


class StepProgress:
    """The progress of one scheduler's requests."""

    def __init__(
        self,
        table: RequestTable,
        kv_planner: KVPlanner,
        model: BatchLatencyModel,
        listener: ProgressListener,
    ) -> None:
        self._table, self._kv_planner, self._model = table, kv_planner, model
        self._listener = listener
        self._begun_step_id: int | None = None
        self._last: dict[str, Request] = {}
        """Requests that get their last token from the step that runs. They keep their blocks, but
        are not in the table, so that nobody plans anything for them."""

    @property
    def num_last(self) -> int:
        """Requests that get their last token from the step that runs."""
        return len(self._last)

    def gets_last(self, request_id: str) -> bool:
        """Return whether a request gets its last token from the step that runs."""
        return request_id in self._last

    def begin(self, plan: SchedulerOutput, expected_end_s: float) -> None:
        """Take a step as done but for the values of its tokens. See `core.ports.AheadScheduler`."""
        self._begun_step_id = plan.step_id
        decoded_ids: list[str] = []
        for part in plan.scheduled:
            request, is_sampled = part.request, part.is_sampled
            is_plain_decode = part.num_new_tokens == 1 and is_sampled and request.is_decoding
            request.num_computed_tokens += part.num_new_tokens
            if is_sampled:
                request.expect_token(expected_end_s)
            if is_sampled and request.num_output_tokens == request.spec.sampling.max_tokens:
                self._table.remove(request)
                self._last[request.request_id] = request
            elif is_plain_decode:
                decoded_ids.append(request.spec.request_id)
            else:
                self._table.refresh(request)
        self._table.advance_decodes(decoded_ids)

    def take_last(self, request_id: str) -> Request | None:
        """Put a request that gets its last token back into the table, to be ended or computed
        again; None if it is not one."""
        request = self._last.pop(request_id, None)
        if request is not None:
            self._table.add(request)
        return request

    def settle(self, plan: SchedulerOutput, output: StepOutput, now_s: float) -> list[RequestEvent]:
        """Account for a finished step and return the news, in scheduling order."""
        was_begun = plan.step_id == self._begun_step_id
        for request_id in list(self._last):
            self.take_last(request_id)
        lost_ids = self._kv_planner.end_transfers(
            output.completed_transfers, output.failed_transfers
        )
        # A step that failed, wholly or in part, did not do the work that was priced; nor is
        # waiting for copies part of it.
        computed_s = output.step_s - output.copies.exposed_s
        if not output.failed and not lost_ids and 0 < computed_s < math.inf:
            self._model.observe(plan.shape, computed_s)
        events: list[RequestEvent] = []
        decoded_ids: list[str] = []
        has_keys = self._kv_planner.kv.has_keys
        for part in plan.scheduled:
            request = part.request
            if request.status is RequestStatus.FINISHED:
                continue
            request_id = request.spec.request_id
            # Asked before the new token is known: a sampled part reaches the last one.
            is_sampled, is_decoding = part.is_sampled, bool(request.output_token_ids)
            request.expect_nothing()
            if lost_ids and request_id in lost_ids:
                self._table.refresh(request)
                continue
            if output.failed and request_id in output.failed:
                self._listener.on_finish(request)
                error = output.failed[request_id]
                events.append(RequestEvent(request_id, (), (), FinishReason.ERROR, error))
                continue
            if not was_begun:
                request.num_computed_tokens += part.num_new_tokens
            if has_keys:
                self._kv_planner.kv.name_full_blocks(request)
            if is_sampled:
                event = self._accept_tokens(request, output, now_s)
                events.append(event)
                if event.finish_reason is not None:
                    continue
            if part.num_new_tokens > 1 or not is_sampled or not is_decoding:
                self._table.refresh(request)
            elif not was_begun:
                decoded_ids.append(request_id)
        self._table.advance_decodes(decoded_ids)
        return events

    def revise(self, plan: SchedulerOutput) -> SchedulerOutput:
        """Return what is left of a plan that was made before the step before had ended."""
        parts = [part for part in plan.scheduled if _is_valid(part)]
        if len(parts) == len(plan.scheduled):
            return plan
        shape = BatchShape()
        for part in parts:
            shape += _shape_of(part)
        predicted_s = self._model.predict_s(shape) if parts else 0.0
        return replace(plan, scheduled=tuple(parts), shape=shape, predicted_step_s=predicted_s)

    def _accept_tokens(self, request: Request, output: StepOutput, now_s: float) -> RequestEvent:
        request_id = request.spec.request_id
        token_ids = output.new_token_ids[request_id]
        sampling = request.spec.sampling
        finish_reason: FinishReason | None = None
        for token_id in token_ids:
            request.append_output_token(token_id, now_s)
            if token_id in sampling.stop_token_ids:
                finish_reason = FinishReason.STOP
            elif len(request.output_token_ids) == sampling.max_tokens:
                finish_reason = FinishReason.LENGTH
        self._listener.on_output(request, len(token_ids))
        if finish_reason is not None:
            self._listener.on_finish(request)
        return RequestEvent(
            request_id,
            new_token_ids=token_ids,
            logprobs=output.logprobs.get(request_id, ()) if output.logprobs else (),
            finish_reason=finish_reason,
        )


def _is_valid(part: ScheduledRequest) -> bool:
    """Return whether a request is where its part begins: it has neither ended nor lost its KV."""
    request = part.request
    return (
        request.status is not RequestStatus.FINISHED
        and request.num_computed_tokens == part.num_computed_tokens
    )


def _shape_of(part: ScheduledRequest) -> BatchShape:
    if part.request.is_decoding and part.is_sampled and part.num_new_tokens == 1:
        return BatchShape.of_decode(part.num_computed_tokens)
    return BatchShape.of_prefill(part.num_new_tokens, part.num_computed_tokens)
