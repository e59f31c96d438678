"""The executor loop: schedule, step the engine, account, tell.

This is the plain loop, in sequence; it is the readable specification of what an executor does.
It knows no socket and no message format: `executor_process` feeds it commands and carries its
news away. It imports nothing but the standard library and the core, so that it runs on machines
that have only torch and numpy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.core.errors import EngineError, EngineLost, NodeUnavailable
from orchestrator.core.latency_correction import StepErrors
from orchestrator.core.ports import (
    Clock,
    Engine,
    QueueSummary,
    RequestEvent,
    Scheduler,
    SchedulerLoad,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import FinishReason, Request, RequestSpec, ResumePoint

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
"""Steps that may fail in a row before the engine is given up. A GPU whose context is broken
fails every step at once: going on would swallow all requests that a router sends here."""


class MonotonicClock:
    """This machine's monotonic clock, shared by all its processes."""

    def now_s(self) -> float:
        """Return seconds since an arbitrary moment."""
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One finished step, as reported to metrics."""

    plan: SchedulerOutput
    output: StepOutput
    schedule_s: float
    """Time spent planning and accounting, outside the engine."""

    load: SchedulerLoad
    """After the step."""

    errors: tuple[StepErrors, ...]
    """Of recent predictions, this one included."""


class ExecutorLoop:
    """Runs one engine under one scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        *,
        clock: Clock,
        emit: Callable[[Sequence[RequestEvent]], None],
        report: Callable[[StepFigures], None],
    ) -> None:
        """`emit` receives the news of requests, in order; `report` the figures of each step."""
        self._scheduler = scheduler
        self._engine = engine
        self._clock = clock
        self._emit = emit
        self._report = report
        self._num_failures = 0
        self.is_draining = False

    @property
    def has_requests(self) -> bool:
        """True while any accepted request has not ended."""
        return self._scheduler.has_requests

    def add(
        self, spec: RequestSpec, arrival_s: float, resume_from: ResumePoint | None = None
    ) -> None:
        """Accept a request that arrived at `arrival_s` on the loop's clock.

        With `resume_from`, it has been served by another node up to there.

        Raises:
            RequestRejected: the request can never run here.
            NodeUnavailable: the loop is draining.
        """
        if self.is_draining:
            raise NodeUnavailable("the node is draining and takes no new requests")
        self._scheduler.add_request(Request.received(spec, resume_from, arrival_s=arrival_s))

    def abort(self, request_id: str, error: str | None = None) -> None:
        """End a request, if it has not ended; `error` makes it a failure."""
        event = self._scheduler.abort_request(request_id)
        if event is None:
            return
        if error is not None:
            event = RequestEvent(request_id, finish_reason=FinishReason.ERROR, error=error)
        self._emit([event])

    def load(self) -> SchedulerLoad:
        """Return what is queued and running now."""
        return self._scheduler.load()

    def queue_summary(self, now_s: float) -> QueueSummary:
        """Return what one more request would meet now."""
        return self._scheduler.queue_summary(now_s)

    def run_step(self) -> None:
        """Plan one step, run it, account for it and emit the news.

        Raises:
            EngineError: the engine is lost, or failed too often in a row to go on.
        """
        started_s = self._clock.now_s()
        plan = self._scheduler.schedule(started_s)
        planned_s = self._clock.now_s()
        output = self._run_engine(plan)
        stepped_s = self._clock.now_s()
        events = self._scheduler.update_from_output(plan, output, stepped_s)
        if events:
            self._emit(events)
        if plan.scheduled or plan.transfers or output.completed_transfers:
            schedule_s = (planned_s - started_s) + (self._clock.now_s() - stepped_s)
            load, errors = self._scheduler.load(), self._scheduler.step_errors()
            self._report(StepFigures(plan, output, schedule_s, load, errors))

    def _run_engine(self, plan: SchedulerOutput) -> StepOutput:
        """Step the engine; an exception of any kind ends this step's requests, not the loop."""
        try:
            output = self._engine.step(plan)
        except EngineLost:
            raise
        except Exception as error:
            self._num_failures += 1
            logger.error("engine step %d failed: %s", plan.step_id, error, exc_info=error)
            if self._num_failures >= MAX_CONSECUTIVE_FAILURES:
                raise EngineError(
                    f"{self._num_failures} steps failed in a row, the last one with: {error}"
                ) from error
            message = f"the engine failed: {error}"
            return StepOutput(
                step_id=plan.step_id,
                new_token_ids={},
                step_s=0.0,
                failed={part.request_id: message for part in plan.scheduled},
            )
        self._num_failures = 0
        return output
