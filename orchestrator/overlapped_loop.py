"""The executor loop that plans a step while the engine runs the one before.

The engine runs in a thread. Steps follow each other as in the plain loop, each begun when the
tokens of the one before are known. All that happens between two of them is to account for those
tokens and to take out of the next step what they have ended, which the engine's thread does itself,
as waking another one would take as long:

    engine's thread   | step n ........................ | settle n, revise n+1 | step n+1 .......
    loop's thread       tell n-1 | listen | plan n+1 | wait ..................... | tell n | listen

An engine that `LaunchesAhead` is given step n+1 when it is planned, and begins it without the host
when step n ends; what is done between the two steps is then done beside step n+1.

A request that arrives after step n+1 was planned waits for step n+2. So the plan is made as late as
it can be, by the predicted end of step n: see `slack_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.core.ports import (
    AheadScheduler,
    Clock,
    Engine,
    LaunchesAhead,
    RequestEvent,
    SchedulerOutput,
)
from orchestrator.executor import EngineStep, ExecutorLoop, StepFigures

_EARLY_SHARE = 0.25
"""Planning begins when this share of the predicted step is left: only a step that is shorter by
more than that has to wait for the next one's plan."""

_EARLY_PLANNINGS = 3.0
"""Planning begins when so many times the duration of the last planning, and launching ahead, are
left, if that is earlier."""


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A step that the engine's thread runs, or is about to."""

    plan: SchedulerOutput
    future: Future[EngineStep]


@dataclass(frozen=True, slots=True)
class _Running:
    """A submitted step that the scheduler knows has begun."""

    future: Future[EngineStep]
    planning_s: float
    free_since_s: float
    """When the engine could have begun it, if it was free."""

    predicted_s: float
    expected_end_s: float


@dataclass(frozen=True, slots=True)
class _Changeover:
    """From a step that has ended to the next one."""

    step: EngineStep
    events: Sequence[RequestEvent]
    next: _Submitted | None


class OverlappedLoop(ExecutorLoop):
    """Runs one engine under one scheduler; `run_step` returns while a step runs."""

    def __init__(
        self,
        scheduler: AheadScheduler,
        engine: Engine,
        *,
        clock: Clock,
        emit: Callable[[Sequence[RequestEvent]], None],
        report: Callable[[StepFigures], None],
        on_step_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_step_end` is called, from any thread, when `slack_s` has become 0 as a step ended."""
        super().__init__(scheduler, engine, clock=clock, emit=emit, report=report)
        self._planner = scheduler
        self._on_step_end = on_step_end
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._running: _Running | None = None
        self._planning_s = 0.0
        self._lead_s = 0.0
        """What has to be done before a step ends took so long the last time."""

    @property
    def has_requests(self) -> bool:
        """True while any accepted request has not ended, or a step runs."""
        return self._running is not None or super().has_requests

    def slack_s(self) -> float:
        """Return how long `run_step` may still be put off for the sake of news from outside."""
        running = self._running
        if running is None or running.future.done():
            return 0.0
        early_s = max(_EARLY_SHARE * running.predicted_s, _EARLY_PLANNINGS * self._lead_s)
        return max(0.0, running.expected_end_s - early_s - self._clock.now_s())

    def run_step(self) -> None:
        """Plan the next step; when the one that runs has ended, account for it, start the next
        and emit the news. If none runs, only start one.

        Raises:
            EngineError: the engine is lost, or failed too often in a row to go on.
        """
        running = self._running
        started_s = self._clock.now_s()
        begins_s = started_s if running is None else max(started_s, running.expected_end_s)
        plan = self._planner.schedule(begins_s)
        self._planning_s = self._lead_s = self._clock.now_s() - started_s
        if running is None:
            self._begin(self._submit(plan), started_s)
            return
        is_launched = isinstance(self._engine, LaunchesAhead) and self._engine.launch_ahead(plan)
        ready_s = self._clock.now_s()
        self._lead_s = ready_s - started_s
        self._running = None
        launched_s = ready_s if is_launched else None
        change = self._thread.submit(self._change_over, running.future, plan, launched_s).result()
        if change.next is not None:
            self._begin(change.next, change.step.ended_s)
        self._tell(
            change.step,
            change.events,
            planning_s=running.planning_s,
            free_since_s=running.free_since_s,
        )

    def close(self) -> None:
        """Wait for a step that still runs. No call follows."""
        self._thread.shutdown()

    def _change_over(
        self, ended: Future[EngineStep], plan: SchedulerOutput, launched_s: float | None
    ) -> _Changeover:
        """Account for a step that has ended and submit what is left of the plan for the next one,
        which the engine may have got at `launched_s`. Meanwhile the loop's thread waits."""
        step = ended.result()
        events = self._planner.update_from_output(step.plan, step.output, step.ended_s)
        revised = self._planner.revise(plan)
        began_s = None if launched_s is None else max(launched_s, step.ended_s)
        following = None if revised is None else self._submit(revised, began_s)
        return _Changeover(step, events, following)

    def _submit(self, plan: SchedulerOutput, began_s: float | None = None) -> _Submitted:
        return _Submitted(plan, self._thread.submit(self._run_engine, plan, began_s))

    def _begin(self, step: _Submitted, free_since_s: float) -> None:
        predicted_s = step.plan.predicted_step_s
        expected_end_s = self._clock.now_s() + predicted_s
        self._planner.begin(step.plan, expected_end_s)
        self._running = _Running(
            step.future, self._planning_s, free_since_s, predicted_s, expected_end_s
        )
        step.future.add_done_callback(lambda _: self._on_step_end())
