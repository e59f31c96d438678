"""The loop over an engine that schedules by itself, on an engine whose news a test writes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.errors import EngineError, NodeUnavailable, RequestRejected
from orchestrator.core.ports import (
    EngineCapabilities,
    EngineIteration,
    RequestEvent,
    SchedulerLoad,
)
from orchestrator.core.request import FinishReason, RequestSpec, ResumePoint, SamplingParams
from orchestrator.executor import MAX_CONSECUTIVE_FAILURES
from orchestrator.request_loop import RequestLoop
from tests.factories import make_capabilities, make_profile, make_request
from tests.router.clocks import ManualClock


class WrittenEngine:
    """Implements `core.ports.RequestEngine`; says what is in `news` and `iterations`."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.specs: list[RequestSpec] = []
        self.cancelled: list[str] = []
        self.news: list[RequestEvent] = []
        self.iterations: list[EngineIteration] = []
        self.refusal: Exception | None = None

    @property
    def capabilities(self) -> EngineCapabilities:
        return make_capabilities(num_device_blocks=100)

    def start(self, spec: RequestSpec) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.started.append(spec.request_id)
        self.specs.append(spec)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def collect(self, timeout_s: float) -> list[RequestEvent]:
        news, self.news = self.news, []
        return news

    def take_iterations(self) -> list[EngineIteration]:
        iterations, self.iterations = self.iterations, []
        return iterations

    def close(self) -> None:
        pass


class Recorder:
    """A loop over the written engine, and all that came out of it."""

    def __init__(self) -> None:
        self.engine = WrittenEngine()
        self.events: list[RequestEvent] = []
        self.reports: list[tuple[EngineIteration, SchedulerLoad]] = []
        self.loop = RequestLoop(
            self.engine,
            latency_profile=make_profile(),
            clock=ManualClock(),
            emit=self.events.extend,
            report=lambda iteration, load: self.reports.append((iteration, load)),
        )

    def add(self, request_id: str, *, num_prompt_tokens: int = 10) -> None:
        request = make_request(request_id, num_prompt_tokens=num_prompt_tokens)
        self.loop.add(request.spec, arrival_s=0.0)

    def tell(self, *news: RequestEvent) -> None:
        self.engine.news += news
        self.loop.run_step()


def tokens(request_id: str, *token_ids: int, end: FinishReason | None = None) -> RequestEvent:
    return RequestEvent(request_id, token_ids, finish_reason=end)


def failure(request_id: str) -> RequestEvent:
    return RequestEvent(request_id, finish_reason=FinishReason.ERROR, error="out of luck")


def iteration(*, num_running: int = 1, num_free_device_blocks: int = 90) -> EngineIteration:
    return EngineIteration(
        step_id=1,
        step_s=0.01,
        num_scheduled=1,
        num_prefill_tokens=0,
        num_decode_tokens=1,
        num_preempted=0,
        num_running=num_running,
        num_free_device_blocks=num_free_device_blocks,
    )


def test_news_are_passed_on_until_the_last() -> None:
    recorder = Recorder()
    recorder.add("a")
    news = [tokens("a", 5), tokens("a", 6, end=FinishReason.STOP)]

    recorder.tell(news[0])
    assert recorder.loop.has_requests
    recorder.tell(news[1])

    assert recorder.events == news
    assert not recorder.loop.has_requests


def test_an_aborted_request_ends_at_once_and_says_nothing_more() -> None:
    """The engine may have said more before it learned of it."""
    recorder = Recorder()
    recorder.add("a")

    recorder.loop.abort("a")
    recorder.loop.abort("a")
    recorder.tell(tokens("a", 5, end=FinishReason.LENGTH))

    assert recorder.events == [RequestEvent("a", finish_reason=FinishReason.ABORT)]
    assert recorder.engine.cancelled == ["a"]


def test_a_resumed_request_asks_for_what_is_left_behind_what_was_delivered() -> None:
    recorder = Recorder()
    request = make_request(prompt_token_ids=[1, 2], max_tokens=8)

    point = ResumePoint(output_token_ids=(3, 4, 5), ttft_s=0.1)
    recorder.loop.add(request.spec, arrival_s=0.0, resume_from=point)

    (spec,) = recorder.engine.specs
    assert spec.prompt_token_ids == (1, 2, 3, 4, 5)
    assert spec.sampling.max_tokens == 5


def test_a_request_that_can_never_run_is_not_handed_over() -> None:
    recorder = Recorder()

    with pytest.raises(RequestRejected, match="8,192"):
        recorder.add("a", num_prompt_tokens=9000)
    assert recorder.engine.started == []


def test_a_grammar_is_refused_before_the_engine_is_asked() -> None:
    sampling = SamplingParams(max_tokens=2, seed=0, grammar="start: /a/", stop_token_ids=(2,))
    recorder = Recorder()

    with pytest.raises(RequestRejected, match="does not choose tokens by a grammar"):
        recorder.loop.add(make_request("a", sampling=sampling).spec, arrival_s=0.0)
    assert recorder.engine.started == []


def test_what_the_engine_refuses_is_not_open() -> None:
    recorder = Recorder()
    recorder.engine.refusal = RequestRejected("no", field="logprobs")

    with pytest.raises(RequestRejected, match="no"):
        recorder.add("a")
    assert not recorder.loop.has_requests


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    recorder = Recorder()
    recorder.add("a")

    with pytest.raises(RequestRejected, match="'a' is already in use"):
        recorder.add("a")
    recorder.tell(tokens("a", 5, end=FinishReason.STOP))
    recorder.add("a")

    assert recorder.engine.started == ["a", "a"]


def test_a_draining_loop_finishes_what_it_has_and_takes_nothing_new() -> None:
    recorder = Recorder()
    recorder.add("a")
    recorder.loop.is_draining = True

    with pytest.raises(NodeUnavailable, match="draining"):
        recorder.add("b")
    recorder.tell(tokens("a", 5, end=FinishReason.STOP))

    assert not recorder.loop.has_requests


def test_a_failed_request_ends_with_its_message_and_leaves_the_others_alone() -> None:
    recorder = Recorder()
    recorder.add("bad")
    recorder.add("good")

    recorder.tell(failure("bad"), tokens("good", 5))

    assert recorder.events[0].error == "out of luck"
    assert recorder.loop.has_requests


def test_an_engine_from_which_nothing_but_failures_comes_is_given_up() -> None:
    """Its last failures are told before."""
    recorder = Recorder()
    for index in range(MAX_CONSECUTIVE_FAILURES - 1):
        recorder.add(f"r{index}")
        recorder.tell(failure(f"r{index}"))
    recorder.add("last")

    with pytest.raises(EngineError, match=r"failed 3 times in a row.*out of luck"):
        recorder.tell(failure("last"))
    assert recorder.events[-1].request_id == "last"


def test_failures_with_tokens_between_do_not_add_up() -> None:
    recorder = Recorder()
    recorder.add("good")
    for index in range(2 * MAX_CONSECUTIVE_FAILURES):
        recorder.add(f"r{index}")
        recorder.tell(failure(f"r{index}"))
        recorder.tell(tokens("good", 5))

    assert recorder.loop.has_requests


def test_silence_is_no_failure_and_no_success() -> None:
    recorder = Recorder()
    for index in range(MAX_CONSECUTIVE_FAILURES - 1):
        recorder.add(f"r{index}")
        recorder.tell(failure(f"r{index}"))
        recorder.tell()
    recorder.add("last")

    with pytest.raises(EngineError):
        recorder.tell(failure("last"))


def test_the_load_counts_what_waits_and_what_decodes() -> None:
    """Three requests of 10 prompt tokens: the engine runs two, one of which has a token. That one
    no longer counts as queued, whatever of the others' prompts is computed."""
    recorder = Recorder()
    for name in "abc":
        recorder.add(name)
    recorder.engine.iterations = [iteration(num_running=2, num_free_device_blocks=40)]
    recorder.tell(tokens("a", 5))

    ((_, load),) = recorder.reports

    assert (load.num_waiting, load.num_running, load.num_decoding) == (1, 2, 1)
    assert load.num_queued_prompt_tokens == 20
    assert (load.num_free_device_blocks, load.num_device_blocks) == (40, 100)
    assert (load.kv_blocks.device_free, load.kv_blocks.device_used) == (40, 60)
    assert recorder.loop.load() == load


def test_the_queue_is_priced_by_the_profile_until_the_first_token() -> None:
    """Of 10, 4 and 2 + 3 tokens at 1 ms, the 4 have been computed and a token made of them. The
    fourth token of `resumed` is due 1 + 3 * 0.1 s after it arrived, 1.2 s from now."""
    recorder = Recorder()
    recorder.add("new")
    begun = make_request("begun", num_prompt_tokens=4, weight=2.0, tpot_s=0.1)
    resumed = make_request("resumed", prompt_token_ids=[1, 2], ttft_s=1.0, tpot_s=0.1)
    recorder.loop.add(begun.spec, arrival_s=0.0)
    point = ResumePoint(output_token_ids=(3, 4, 5), ttft_s=0.1)
    recorder.loop.add(resumed.spec, arrival_s=0.0, resume_from=point)
    recorder.tell(tokens("begun", 5))

    queue = recorder.loop.queue_summary(now_s=0.1)

    assert sorted(queue.work_s) == pytest.approx([0.005, 0.010])
    assert 1.2 in [pytest.approx(due) for due in queue.due_in_s if due is not None]
    assert queue.num_prefills == (1, 1)
    assert (queue.decode_context_tokens, queue.decode_weight) == (5, 2.0)
    assert (queue.min_decode_tpot_s, queue.max_weight) == (0.1, 2.0)


def test_an_idle_engine_is_empty_whatever_its_last_step_said() -> None:
    recorder = Recorder()
    recorder.add("a")
    recorder.engine.iterations = [iteration(num_free_device_blocks=40)]
    recorder.tell(tokens("a", 5, end=FinishReason.STOP))

    load = recorder.loop.load()

    assert (load.num_running, load.num_free_device_blocks) == (0, 100)


def test_steps_that_end_while_the_loop_is_idle_are_reported_too() -> None:
    recorder = Recorder()
    recorder.engine.iterations = [iteration(), iteration()]

    recorder.loop.load()

    assert len(recorder.reports) == 2


ACTIONS = st.tuples(
    st.sampled_from(["add", "abort", "token", "stop", "fail"]), st.sampled_from(["a", "b", "c"])
)


@given(st.lists(ACTIONS, max_size=40))
@example(
    [
        ("add", "a"),
        ("fail", "a"),
        ("add", "a"),
        ("fail", "a"),
        ("add", "a"),
        ("fail", "a"),
        ("token", "a"),
    ]
)  # the loop is asked again after it has given up
def test_every_accepted_request_ends_exactly_once(actions: Sequence[tuple[str, str]]) -> None:
    """Whatever clients do and the engine says, in whatever order, news of unknown requests among
    it; also where a loop gives its engine up in the middle."""
    recorder = Recorder()
    news = {
        "token": lambda name: tokens(name, 1),
        "stop": lambda name: tokens(name, 1, end=FinishReason.STOP),
        "fail": failure,
    }
    accepted: Counter[str] = Counter()
    for action, name in actions:
        with contextlib.suppress(RequestRejected, EngineError):
            if action == "add":
                recorder.add(name)
                accepted[name] += 1
            elif action == "abort":
                recorder.loop.abort(name)
            else:
                recorder.tell(news[action](name))
    for name in "abc":
        recorder.loop.abort(name)

    ends = Counter(e.request_id for e in recorder.events if e.finish_reason is not None)
    assert ends == accepted
    assert not recorder.loop.has_requests
