from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest

from orchestrator.core.errors import EngineError, EngineLost
from orchestrator.core.ports import RequestEvent, SchedulerOutput, StepOutput
from orchestrator.core.request import FinishReason
from orchestrator.core.slide_batching import SlideBatchingScheduler
from orchestrator.executor import MAX_CONSECUTIVE_FAILURES, ExecutorLoop, StepFigures
from orchestrator.overlapped_loop import OverlappedLoop
from tests.factories import make_capabilities, make_request, make_scheduler
from tests.scripted_engine import LOSE, RAISE, REFUSE, ScriptedEngine

WAIT_S = 30.0


class HeldEngine(ScriptedEngine):
    """Ends a step when it is let go, if it is held."""

    def __init__(self) -> None:
        super().__init__(make_capabilities())
        self.has_begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.is_held = True

    def step(self, plan: SchedulerOutput) -> StepOutput:
        self.has_begun.release()
        assert not self.is_held or self.may_end.acquire(timeout=WAIT_S)
        return super().step(plan)


class EagerEngine(HeldEngine):
    """Ends each step when the next one has been launched behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[SchedulerOutput] = []

    def launch_ahead(self, plan: SchedulerOutput) -> bool:
        self.launched.append(plan)
        self.may_end.release()
        return bool(plan.scheduled)


class SlowPlanning:
    """A clock on which nothing but planning takes time: a second each."""

    def __init__(self, scheduler: SlideBatchingScheduler) -> None:
        self.time_s = 0.0
        self.before_planning: Callable[[], object] = lambda: None
        self.on_planned: Callable[[], object] = lambda: None
        schedule = scheduler.schedule

        def slowly(now_s: float) -> SchedulerOutput:
            self.before_planning()
            self.time_s += 1.0
            plan = schedule(now_s)
            self.on_planned()
            return plan

        scheduler.schedule = slowly  # type: ignore[method-assign, misc]

    def now_s(self) -> float:
        return self.time_s


class Recorder:
    """A loop over the scripted engine, and all that came out of it."""

    def __init__(
        self,
        loop_class: Callable[..., ExecutorLoop] = OverlappedLoop,
        engine: HeldEngine | None = None,
    ) -> None:
        self.events: list[RequestEvent] = []
        self.figures: list[StepFigures] = []
        self.engine = engine or HeldEngine()
        self.engine.is_held = False
        self.scheduler = make_scheduler()
        self.clock = SlowPlanning(self.scheduler)
        self.has_ended = threading.Event()
        if loop_class is OverlappedLoop:
            loop_class = partial(OverlappedLoop, on_step_end=self.has_ended.set)
        self.loop = loop_class(
            self.scheduler,
            self.engine,
            clock=self.clock,
            emit=self.events.extend,
            report=self.figures.append,
        )

    def add(self, request_id: str, *prompt: int, max_tokens: int = 3, stop: int = 999) -> None:
        request = make_request(
            request_id, prompt_token_ids=prompt, max_tokens=max_tokens, stop_token_ids=(stop,)
        )
        self.loop.add(request.spec, arrival_s=0.0)

    def run(self) -> None:
        while self.loop.has_requests:
            self.loop.run_step()

    def of(self, request_id: str) -> list[RequestEvent]:
        return [e for e in self.events if e.request_id == request_id]

    def hold(self) -> None:
        """Start a step that does not end before it is let go."""
        self.engine.is_held = True
        self.loop.run_step()
        assert self.engine.has_begun.acquire(timeout=WAIT_S)

    def run_in_step_with_planning(self) -> None:
        """Run until all is done; each step has begun when the next one is planned, and ends when
        that is done."""
        self.clock.before_planning = self.clock.on_planned = lambda: None
        self.hold()
        self.engine.has_begun.release()
        self.clock.before_planning = partial(self.engine.has_begun.acquire, timeout=WAIT_S)
        self.clock.on_planned = self.engine.may_end.release
        self.run()

    def let_go(self) -> None:
        self.engine.is_held = False
        self.engine.may_end.release()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    value = Recorder()
    yield value
    value.loop.close()


def test_both_loops_tell_the_same() -> None:
    told = []
    for loop_class in (ExecutorLoop, OverlappedLoop):
        recorder = Recorder(loop_class)
        recorder.add("long", 10, 1, 2, max_tokens=9)
        recorder.add("stops", 20, 1, max_tokens=9, stop=23)
        recorder.add("refused", 30, REFUSE)
        recorder.add("one", 40, max_tokens=1)
        recorder.run()
        recorder.loop.close()
        told.append({name: recorder.of(name) for name in ("long", "stops", "refused", "one")})

    assert told[0] == told[1]
    assert [e.new_token_ids[0] for e in told[1]["stops"]] == [20, 21, 22, 23]
    assert told[1]["stops"][-1].finish_reason is FinishReason.STOP


def test_planning_and_telling_hide_under_the_step_that_runs() -> None:
    """Only the first step waits for its plan: nothing ran beside that."""
    plain, overlapped = Recorder(ExecutorLoop), Recorder(OverlappedLoop)
    plain.add("a", 5, max_tokens=4)
    plain.run()
    overlapped.add("a", 5, max_tokens=4)
    overlapped.run_in_step_with_planning()
    overlapped.loop.close()

    assert [figures.exposed_s for figures in plain.figures] == [1.0, 1.0, 1.0, 1.0]
    assert [figures.exposed_s for figures in overlapped.figures] == [1.0, 0.0, 0.0, 0.0]


def test_a_step_can_be_launched_while_the_one_before_runs() -> None:
    """Then even what is done between the two, here a second for `revise`, keeps nobody waiting;
    what that leaves of the plan is what the engine is asked for."""
    engine = EagerEngine()
    recorder = Recorder(engine=engine)
    revise = recorder.scheduler.revise

    def revise_slowly(plan: SchedulerOutput) -> SchedulerOutput | None:
        recorder.clock.time_s += 1.0
        return revise(plan)

    recorder.scheduler.revise = revise_slowly  # type: ignore[method-assign, misc]
    recorder.add("stops", 20, max_tokens=9, stop=20)
    recorder.add("goes on", 40)
    recorder.hold()
    recorder.run()
    recorder.loop.close()

    def named(plans: Sequence[SchedulerOutput]) -> list[list[str]]:
        return [sorted(part.request_id for part in plan.scheduled) for plan in plans]

    assert named(engine.launched) == [["goes on", "stops"], ["goes on"], []]
    assert named(engine.steps) == [["goes on", "stops"], ["goes on"], ["goes on"]]
    assert [figures.exposed_s for figures in recorder.figures] == [1.0, 0.0, 0.0]


def test_time_without_requests_is_not_exposed(recorder: Recorder) -> None:
    for name in ("a", "b"):
        recorder.clock.time_s += 1000.0
        recorder.add(name, 5, max_tokens=1)
        recorder.run_in_step_with_planning()

    assert [figures.exposed_s for figures in recorder.figures] == [1.0, 1.0]


def test_a_request_that_comes_while_a_step_runs_is_in_the_next_one(recorder: Recorder) -> None:
    recorder.add("a", 5)
    recorder.hold()

    recorder.add("b", 50)
    recorder.let_go()
    recorder.loop.run_step()
    recorder.run()

    _, second = recorder.engine.steps[:2]
    assert {part.request_id for part in second.scheduled} == {"a", "b"}


def test_a_request_aborted_while_its_step_runs_is_told_nothing_more(recorder: Recorder) -> None:
    recorder.add("a", 5)
    recorder.hold()

    recorder.loop.abort("a")
    assert recorder.loop.has_requests, "its step runs"
    recorder.let_go()
    recorder.run()

    assert recorder.of("a") == [RequestEvent("a", finish_reason=FinishReason.ABORT)]
    assert recorder.loop.load().num_free_device_blocks == 1000
    assert len(recorder.engine.steps) == 1, "nothing was left to do in the step planned ahead"


def test_the_loop_can_be_put_off_while_a_step_has_long_to_run(recorder: Recorder) -> None:
    assert recorder.loop.slack_s() == 0.0
    recorder.scheduler.schedule = _lasting(recorder.scheduler, 1000.0)  # type: ignore[method-assign, misc, assignment]
    recorder.add("a", 5)
    recorder.hold()

    assert 700.0 < recorder.loop.slack_s() <= 750.0, "planned when a quarter of it is left"

    recorder.let_go()
    assert recorder.has_ended.wait(WAIT_S)
    assert recorder.loop.slack_s() == 0.0


def _lasting(scheduler: SlideBatchingScheduler, predicted_s: float) -> object:
    schedule = scheduler.schedule
    return lambda now_s: replace(schedule(now_s), predicted_step_s=predicted_s)


def test_an_engine_that_fails_every_step_is_given_up(recorder: Recorder) -> None:
    def fail() -> None:
        for index in range(MAX_CONSECUTIVE_FAILURES):
            recorder.add(f"r{index}", 5, RAISE)
            recorder.run()

    with pytest.raises(EngineError, match=r"3 steps failed in a row.*as the prompt asked"):
        fail()
    assert [e.finish_reason for e in recorder.events] == [FinishReason.ERROR] * 2


def test_a_lost_engine_is_given_up_at_once(recorder: Recorder) -> None:
    recorder.add("a", 5, LOSE)

    with pytest.raises(EngineLost, match=r"^as the prompt asked$"):
        recorder.run()


def test_closing_waits_for_the_step_that_runs(recorder: Recorder) -> None:
    recorder.add("a", 5)
    recorder.hold()
    threading.Timer(0.05, recorder.let_go).start()

    recorder.loop.close()

    assert len(recorder.engine.steps) == 1
