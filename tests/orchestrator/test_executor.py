from __future__ import annotations

import pytest

from orchestrator.core.errors import EngineError, EngineLost, NodeUnavailable, RequestRejected
from orchestrator.core.ports import RequestEvent
from orchestrator.core.request import FinishReason, ResumePoint
from orchestrator.executor import MAX_CONSECUTIVE_FAILURES, ExecutorLoop, StepFigures
from tests.factories import make_capabilities, make_request, make_scheduler
from tests.scripted_engine import LOSE, RAISE, REFUSE, ScriptedEngine


class ManualClock:
    """Stands still unless a test moves it."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s


class Recorder:
    """An executor loop over the scripted engine, and all that came out of it."""

    def __init__(self) -> None:
        self.events: list[RequestEvent] = []
        self.figures: list[StepFigures] = []
        self.engine = ScriptedEngine(make_capabilities())
        self.loop = ExecutorLoop(
            make_scheduler(),
            self.engine,
            clock=ManualClock(),
            emit=self.events.extend,
            report=self.figures.append,
        )

    def add(self, request_id: str, *prompt: int, max_tokens: int = 3) -> None:
        request = make_request(request_id, prompt_token_ids=prompt, max_tokens=max_tokens)
        self.loop.add(request.spec, arrival_s=0.0)

    def run(self) -> None:
        while self.loop.has_requests:
            self.loop.run_step()

    def of(self, request_id: str) -> list[RequestEvent]:
        return [e for e in self.events if e.request_id == request_id]


def test_tokens_come_in_order_and_end_once() -> None:
    """First token 5 (the prompt's first id), then 6 and 7, the third with the reason."""
    recorder = Recorder()
    recorder.add("a", 5, 1, 2)

    recorder.run()

    assert [e.new_token_ids for e in recorder.of("a")] == [(5,), (6,), (7,)]
    assert [e.finish_reason for e in recorder.of("a")] == [None, None, FinishReason.LENGTH]


def test_a_resumed_request_computes_what_was_delivered_and_goes_on_behind_it() -> None:
    """Prompt of 3 and 2 of 4 tokens delivered: the first step computes all 5 and draws the third.

    It is decoding, and its deadlines go on from the original arrival and first token.
    """
    recorder = Recorder()
    spec = make_request("a", prompt_token_ids=(5, 1, 2), max_tokens=4).spec

    recorder.loop.add(spec, 10.0, ResumePoint((5, 6), ttft_s=0.5))
    load = recorder.loop.load()
    recorder.run()

    assert (load.num_decoding, load.num_queued_prompt_tokens) == (1, 0)
    assert [e.new_token_ids for e in recorder.of("a")] == [(7,), (8,)]
    assert recorder.of("a")[-1].finish_reason is FinishReason.LENGTH
    (first, _) = recorder.engine.steps
    (part,) = first.scheduled
    assert part.token_ids == [5, 1, 2, 5, 6]
    assert part.request.first_token_s == 10.5


def test_an_engine_exception_ends_the_requests_of_its_step_alone() -> None:
    recorder = Recorder()
    recorder.add("bad", 5, RAISE)
    recorder.loop.run_step()
    recorder.add("good", 50)

    recorder.run()

    (bad,) = recorder.of("bad")
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.error == "the engine failed: as the prompt asked"
    assert recorder.of("good")[-1].finish_reason is FinishReason.LENGTH


def test_a_request_the_engine_gives_up_leaves_the_others_of_its_step_alone() -> None:
    recorder = Recorder()
    recorder.add("bad", 5, REFUSE)
    recorder.add("good", 50)

    recorder.run()

    assert recorder.of("bad") == [
        RequestEvent("bad", finish_reason=FinishReason.ERROR, error="as the prompt asked")
    ]
    assert [e.new_token_ids for e in recorder.of("good")] == [(50,), (51,), (52,)]


def test_an_engine_that_fails_every_step_is_given_up() -> None:
    recorder = Recorder()
    for index in range(MAX_CONSECUTIVE_FAILURES - 1):
        recorder.add(f"r{index}", 5, RAISE)
        recorder.loop.run_step()
    recorder.add("last", 5, RAISE)

    with pytest.raises(EngineError, match=r"3 steps failed in a row.*as the prompt asked"):
        recorder.loop.run_step()


def test_a_lost_engine_is_given_up_at_once() -> None:
    recorder = Recorder()
    recorder.add("a", 5, LOSE)

    with pytest.raises(EngineLost, match=r"^as the prompt asked$"):
        recorder.loop.run_step()


def test_failures_with_successes_between_do_not_add_up() -> None:
    recorder = Recorder()
    for index in range(2 * MAX_CONSECUTIVE_FAILURES):
        recorder.add(f"bad{index}", 5, RAISE)
        recorder.loop.run_step()
        recorder.add(f"good{index}", 5, max_tokens=1)
        recorder.loop.run_step()

    assert not recorder.loop.has_requests


def test_an_aborted_request_ends_with_abort_and_frees_its_blocks() -> None:
    recorder = Recorder()
    recorder.add("a", 5)
    recorder.loop.run_step()

    recorder.loop.abort("a")
    recorder.loop.abort("a")

    assert recorder.of("a")[-1].finish_reason is FinishReason.ABORT
    assert len(recorder.of("a")) == 2
    assert recorder.loop.load().num_free_device_blocks == 1000


def test_the_engine_learns_of_requests_that_ended() -> None:
    recorder = Recorder()
    recorder.add("a", 5, max_tokens=1)
    recorder.run()
    recorder.add("b", 5)

    recorder.loop.run_step()

    assert recorder.engine.steps[-1].finished_ids == ("a",)


def test_a_draining_loop_finishes_what_it_has_and_takes_nothing_new() -> None:
    recorder = Recorder()
    recorder.add("a", 5)
    recorder.loop.is_draining = True

    with pytest.raises(NodeUnavailable, match="draining"):
        recorder.add("b", 5)
    recorder.run()

    assert recorder.of("a")[-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_can_never_run_is_refused_at_once() -> None:
    with pytest.raises(RequestRejected, match="8,192"):
        Recorder().add("a", *range(9000))


def test_every_step_reports_its_figures() -> None:
    recorder = Recorder()
    recorder.add("a", 5, 6, 7)

    recorder.run()

    assert [f.plan.num_new_tokens for f in recorder.figures] == [3, 1, 1]
    assert recorder.figures[0].load.num_running == 1
    assert recorder.figures[-1].load.num_running == 0
