"""The executor loop: schedule, step the engine, account, tell.

This is the plain loop, in sequence; it is the readable specification of what an executor does.
`overlapped_loop` plans a step while the one before runs. Loops know no socket and no message
format: `executor_process` feeds them commands and carries their news away. They import nothing but
the standard library and the core, so that they run on machines that have only torch and numpy.
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
    began_s: float
    """When the engine began it, on the loop's clock."""

    schedule_s: float
    """Time spent planning and accounting, outside the engine."""

    exposed_s: float
    """Time before the step in which the engine had nothing to run although there was work."""

    load: SchedulerLoad
    """After the step."""

    errors: tuple[StepErrors, ...]
    """Of recent predictions, this one included."""


@dataclass(frozen=True, slots=True)
class EngineStep:
    """A step that the engine has run."""

    plan: SchedulerOutput
    output: StepOutput
    began_s: float
    """On the loop's clock."""

    ended_s: float


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
        self._free_since_s: float | None = None
        """When the engine ended its last step; None if there was no more to do then."""

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

    def slack_s(self) -> float:
        """Return how long `run_step` may still be put off for the sake of news from outside."""
        return 0.0

    def run_step(self) -> None:
        """Plan one step, run it, account for it and emit the news.

        Raises:
            EngineError: the engine is lost, or failed too often in a row to go on.
        """
        started_s = self._clock.now_s()
        plan = self._scheduler.schedule(started_s)
        step = self._run_engine(plan)
        events = self._scheduler.update_from_output(plan, step.output, step.ended_s)
        self._tell(step, events, planning_s=step.began_s - started_s, free_since_s=started_s)

    def close(self) -> None:
        """Wait for a step that still runs. No call follows."""

    def _tell(
        self,
        step: EngineStep,
        events: Sequence[RequestEvent],
        *,
        planning_s: float,
        free_since_s: float,
    ) -> None:
        """Emit the news of a step and report its figures. `free_since_s` is when the engine could
        have begun it, if it was not busy with another one."""
        if events:
            self._emit(events)
        if self._free_since_s is not None:
            free_since_s = self._free_since_s
        self._free_since_s = step.ended_s if self._scheduler.has_requests else None
        plan, output = step.plan, step.output
        if plan.scheduled or plan.transfers or output.completed_transfers:
            load, errors = self._scheduler.load(), self._scheduler.step_errors()
            schedule_s = planning_s + self._clock.now_s() - step.ended_s
            exposed_s = step.began_s - free_since_s
            self._report(
                StepFigures(plan, output, step.began_s, schedule_s, exposed_s, load, errors)
            )

    def _run_engine(self, plan: SchedulerOutput, began_s: float | None = None) -> EngineStep:
        """Step the engine; an exception of any kind ends this step's requests, not the loop.
        `began_s` is when the engine began, if it has."""
        if began_s is None:
            began_s = self._clock.now_s()
        output = self._output_of(plan)
        return EngineStep(plan, output, began_s, self._clock.now_s())

    def _output_of(self, plan: SchedulerOutput) -> StepOutput:
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
