"""SlideBatching behind the PyTorch executor's scheduler interface, on the strict stubs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.trtllm_pytorch import (
    ExecutorLimits,
    PyTorchSchedulerOptions,
    ServiceClass,
    SlideBatchingRequestScheduler,
    install,
)
from orchestrator.core.errors import EngineError
from orchestrator.core.slide_batching import SlideBatchingOptions
from orchestrator.core.slo import Slo
from tests.factories import make_profile
from tests.trtllm.fake_pytorch_executor import SCHEDULER_MODULE, FakePyTorchExecutor
from tests.trtllm.stub_modules import Stubs, stub_modules

PYEXECUTOR = "tensorrt_llm._torch.pyexecutor"
STEP_S = 0.02

CLASSES = (
    ServiceClass(priority=0.5, weight=1.0, slo=Slo(ttft_s=1.0, tpot_s=0.1)),
    ServiceClass(priority=0.8, weight=4.0, slo=Slo(ttft_s=1.0, tpot_s=0.1)),
)


def make_options(
    classes: tuple[ServiceClass, ...] = CLASSES, **slide_batching: Any
) -> PyTorchSchedulerOptions:
    return PyTorchSchedulerOptions(
        latency_profile=make_profile(),
        classes=classes,
        slide_batching=SlideBatchingOptions(**({"min_chunk_tokens": 0} | slide_batching)),
    )


class Clock:
    """Moves by a step's duration with each look, so that every rank sees the same."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self.time_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.time_s += self.step_s
        return self.time_s


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    with stub_modules() as value:
        yield value


def make_scheduler(
    executor: FakePyTorchExecutor,
    options: PyTorchSchedulerOptions | None = None,
    now_s: Callable[[], float] | None = None,
) -> SlideBatchingRequestScheduler:
    limits = ExecutorLimits(
        max_batch_size=executor.max_batch_size,
        max_num_tokens=executor.max_num_tokens,
        chunk_unit_tokens=executor.chunk_unit_tokens,
    )
    return SlideBatchingRequestScheduler(
        executor.kv_cache, limits, options or make_options(), now_s=now_s or Clock()
    )


def run_all(executor: FakePyTorchExecutor, scheduler: SlideBatchingRequestScheduler) -> None:
    for _ in range(2000):
        if not executor.active:
            return
        executor.step(scheduler)
    raise AssertionError("the executor makes no progress")


def ids(requests: list[Any]) -> list[int]:
    return [request.request_id for request in requests]


# --- one request --------------------------------------------------------------------------


def test_a_prompt_is_computed_in_whole_units_and_then_generates(stubs: Stubs) -> None:
    """Thirty tokens at most twenty a step, in units of 8: 16, then the last 14; then two more
    output tokens after the first."""
    executor = FakePyTorchExecutor(stubs, max_num_tokens=20)
    request = executor.add(1, 30, 3)
    scheduler = make_scheduler(executor)

    first = executor.step(scheduler)
    assert (ids(first.context_requests), request.context_current_position) == ([1], 16)
    second = executor.step(scheduler)
    assert (ids(second.context_requests), request.context_chunk_size) == ([1], 14)
    third = executor.step(scheduler)
    assert (ids(third.context_requests), ids(third.generation_requests)) == ([], [1])
    executor.step(scheduler)

    assert executor.num_output_tokens == {1: 3}
    assert executor.active == []


def test_what_the_manager_knows_of_a_prompt_is_not_scheduled_again(stubs: Stubs) -> None:
    """Of 30 tokens 16 are found; the first chunk of 8 ends at 24, so 6 are left."""
    executor = FakePyTorchExecutor(stubs, max_num_tokens=10)
    request = executor.add(1, 30, 1, num_reused_tokens=16)
    scheduler = make_scheduler(executor)
    executor.step(scheduler)

    executor.step(scheduler)

    assert request.context_chunk_size == 6
    assert executor.num_output_tokens == {1: 1}


def test_what_the_manager_knows_of_a_prompt_is_work_that_is_done(stubs: Stubs) -> None:
    """Two prompts of 800 tokens, one of which is found but for its end. After the first step only
    that is left of it, little work for its gain, so it goes before the more valuable one."""
    executor = FakePyTorchExecutor(stubs, num_blocks=1000)
    executor.add(1, 800, 1, priority_value=0.5, num_reused_tokens=728)
    scheduler = make_scheduler(executor)
    executor.step(scheduler)
    executor.add(2, 800, 1, priority_value=0.8)

    output = executor.step(scheduler)

    assert ids(output.context_requests) == [2, 1]  # the last chunk of 1 comes last
    assert output.context_requests[1].context_chunk_size == 8


def test_requests_in_flight_are_left_alone(stubs: Stubs) -> None:
    executor = FakePyTorchExecutor(stubs)
    executor.add(1, 8, 3)
    executor.add(2, 8, 3)

    output = make_scheduler(executor).schedule_request(executor.active, {1})

    assert ids(output.context_requests) == [2]


def test_with_nothing_to_do_nothing_is_scheduled(stubs: Stubs) -> None:
    executor = FakePyTorchExecutor(stubs)

    output = make_scheduler(executor).schedule_request([], set())

    assert (output.context_requests, output.generation_requests) == ([], [])


# --- who goes first -----------------------------------------------------------------------


def test_under_load_the_more_valuable_request_goes_first(stubs: Stubs) -> None:
    """Both have 1,600 tokens to compute in a second: more than fits, so density decides."""
    executor = FakePyTorchExecutor(stubs, num_blocks=1000)
    executor.add(1, 800, 3, priority_value=0.5)
    executor.add(2, 800, 3, priority_value=0.8)

    output = executor.step(make_scheduler(executor))

    assert ids(output.context_requests)[0] == 2


@pytest.mark.parametrize(("priority", "expected"), [(0.0, 1), (0.64, 1), (0.66, 2), (1.0, 2)])
def test_a_request_is_of_the_nearest_class(stubs: Stubs, priority: float, expected: int) -> None:
    """Requests 1 and 2 are of the two classes; request 3 beats exactly those below its own, or
    comes after those of its own."""
    executor = FakePyTorchExecutor(stubs, num_blocks=1000)
    executor.add(1, 800, 3, priority_value=0.5)
    executor.add(2, 800, 3, priority_value=0.8)
    executor.add(3, 800, 3, priority_value=priority)
    scheduler = make_scheduler(executor)
    order: list[int] = []
    while executor.active:
        output = executor.step(scheduler)
        order += [i for i in ids(output.context_requests) if i not in order]

    assert order == ([2, 1, 3] if expected == 1 else [2, 3, 1])


def test_short_of_blocks_a_valuable_request_pauses_another(stubs: Stubs) -> None:
    """A hundred blocks of 4 tokens: the first request takes 75; the second needs 50, and its
    deadline is nearer. It gets them when the executor has carried the pause out."""
    executor = FakePyTorchExecutor(stubs, num_blocks=100, max_num_tokens=512)
    low = executor.add(1, 300, 50, priority_value=0.5)
    relaxed = ServiceClass(priority=0.5, weight=1.0, slo=Slo(ttft_s=10.0, tpot_s=10.0))
    scheduler = make_scheduler(executor, make_options((relaxed, CLASSES[1]), max_step_s=10.0))
    executor.step(scheduler)
    executor.add(2, 200, 3, priority_value=0.8)

    outputs = [executor.step(scheduler) for _ in range(3)]

    assert [ids(output.paused_requests) for output in outputs] == [[1], [], []]
    assert [ids(output.context_requests) for output in outputs[:2]] == [[], [2]]
    assert low.is_context_init_state
    run_all(executor, scheduler)
    assert executor.num_output_tokens == {1: 50, 2: 3}


def test_the_blocks_of_a_request_about_to_end_are_not_given_away_before(stubs: Stubs) -> None:
    """Five blocks of 4 tokens. In the second step request 2 holds two, though its last token is on
    its way; request 1 needs a second block for the token that nobody has seen yet, so one of the
    two free blocks is left, too few for the 8 tokens of request 3."""
    executor = FakePyTorchExecutor(stubs, num_blocks=5, is_overlapped=True)
    executor.add(1, 4, 5)
    executor.add(2, 8, 1)
    scheduler = make_scheduler(executor)
    executor.step(scheduler)
    executor.add(3, 8, 1)

    second = executor.step(scheduler)
    third = executor.step(scheduler)

    assert (ids(second.context_requests), ids(second.generation_requests)) == ([], [1])
    assert ids(third.context_requests) == [3]


def first_chunk_after(stubs: Stubs, *, idle_s: float) -> int:
    """Run a request, wait, and return the first chunk of the next one."""
    executor = FakePyTorchExecutor(stubs, num_blocks=1000, max_num_tokens=512)
    clock = Clock()
    scheduler = make_scheduler(executor, now_s=clock)
    executor.add(1, 8, 5)
    run_all(executor, scheduler)
    clock.time_s += idle_s
    request = executor.add(2, 2000, 1)
    scheduler.schedule_request(executor.active, set())
    return int(request.context_chunk_size)


def test_idle_time_is_not_taken_for_a_slow_step(stubs: Stubs) -> None:
    assert first_chunk_after(stubs, idle_s=100.0) == first_chunk_after(stubs, idle_s=0.0)


def test_slow_steps_make_chunks_smaller(stubs: Stubs) -> None:
    """The profile says 11 ms for a decode step; where it takes 44 ms, less is put into a step."""

    def second_chunk(step_s: float) -> int:
        executor = FakePyTorchExecutor(stubs, num_blocks=1000, max_num_tokens=512)
        scheduler = make_scheduler(executor, now_s=Clock(step_s))
        executor.add(1, 2000, 1)
        for _ in range(4):
            output = executor.step(scheduler)
        return int(output.context_requests[0].context_chunk_size)

    assert second_chunk(0.4) < second_chunk(0.1)


# --- what the executor relies on, for any requests ----------------------------------------

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 120),  # prompt
        st.integers(1, 30),  # output
        st.sampled_from([0.5, 0.8]),
        st.integers(0, 60),  # step of arrival
        st.integers(0, 12),  # blocks of the prompt that the manager knows
    ),
    min_size=1,
    max_size=12,
)


def run_workload(
    executor: FakePyTorchExecutor,
    scheduler: SlideBatchingRequestScheduler,
    requests: list[tuple[int, int, float, int, int]],
) -> list[tuple[list[int], ...]]:
    """Run all requests to their end; return what was scheduled in each step."""
    waiting = sorted(enumerate(requests), key=lambda item: (item[1][3], item[0]))
    scheduled = []
    for step in range(3000):
        while waiting and waiting[0][1][3] <= step:
            number, (prompt_len, max_new_tokens, priority, _, num_reused) = waiting.pop(0)
            executor.add(
                number,
                prompt_len,
                max_new_tokens,
                priority_value=priority,
                num_reused_tokens=min(num_reused * 4, (prompt_len - 1) // 4 * 4),
            )
        if executor.active:
            output = executor.step(scheduler)
            lists = (output.context_requests, output.generation_requests, output.paused_requests)
            scheduled.append(tuple(ids(requests) for requests in lists))
        elif not waiting:
            return scheduled
    raise AssertionError("the executor makes no progress")


@pytest.mark.parametrize("is_overlapped", [False, True])
@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, num_blocks=st.integers(38, 120), unit=st.sampled_from([4, 8, 16]))
def test_every_answer_can_be_carried_out_and_every_request_ends(
    *, is_overlapped: bool, requests: list[Any], num_blocks: int, unit: int
) -> None:
    """38 blocks of 4 tokens hold the longest request alone: 150 tokens. The fake executor checks
    every answer, and that it never runs out of blocks."""
    with stub_modules() as stubs:
        executor = FakePyTorchExecutor(
            stubs,
            num_blocks=num_blocks,
            max_batch_size=4,
            max_num_tokens=32,
            chunk_unit_tokens=unit,
            is_overlapped=is_overlapped,
        )
        run_workload(executor, make_scheduler(executor), requests)

        assert executor.num_output_tokens == {
            number: max_new_tokens for number, (_, max_new_tokens, *_) in enumerate(requests)
        }


def test_little_memory_makes_the_workload_pause(stubs: Stubs) -> None:
    """So that the property above is about pauses too."""
    executor = FakePyTorchExecutor(stubs, num_blocks=40, max_batch_size=4, max_num_tokens=32)
    requests = [(60, 30, (0.5, 0.8)[i % 2], 5 * i, 0) for i in range(8)]

    run_workload(executor, make_scheduler(executor), requests)

    assert executor.num_pauses > 0


@settings(max_examples=20, deadline=None)
@given(requests=REQUESTS)
def test_ranks_decide_the_same(requests: list[Any]) -> None:
    """Two ranks with their own copies of the requests and one clock's time."""
    schedules = []
    for _ in range(2):
        with stub_modules() as stubs:
            executor = FakePyTorchExecutor(stubs, num_blocks=40, max_batch_size=4)
            schedules.append(run_workload(executor, make_scheduler(executor), requests))

    assert schedules[0] == schedules[1]


# --- what it cannot do --------------------------------------------------------------------


def test_speculative_decoding_is_refused(stubs: Stubs) -> None:
    executor = FakePyTorchExecutor(stubs)
    executor.add(1, 8, 3, num_draft_tokens=2)

    with pytest.raises(EngineError, match="request 1 is in state CONTEXT_INIT with 2 draft tokens"):
        executor.step(make_scheduler(executor))


def test_a_unit_larger_than_a_step_is_refused(stubs: Stubs) -> None:
    with pytest.raises(EngineError, match="at least 128 tokens, max_num_tokens is 64; raise it"):
        make_scheduler(FakePyTorchExecutor(stubs, chunk_unit_tokens=128))


def test_options_without_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="classes is empty"):
        PyTorchSchedulerOptions(latency_profile=make_profile(), classes=())


def test_whether_requests_fit_now_can_be_asked(stubs: Stubs) -> None:
    """Two prompts of 20 tokens take 5 blocks of 4 each; there are 8."""
    executor = FakePyTorchExecutor(stubs, num_blocks=8)
    requests = [executor.add(number, 20, 3) for number in (1, 2)]
    scheduler = make_scheduler(executor)

    assert scheduler.can_schedule(requests[:1])
    assert not scheduler.can_schedule(requests)


# --- installation -------------------------------------------------------------------------


def creation_arguments(stubs: Stubs, executor: FakePyTorchExecutor, **changed: Any) -> Any:
    """The arguments with which py_executor_creator makes an executor."""
    types = stubs.find(f"{PYEXECUTOR}.resource_manager")
    manager = stubs.make(f"{PYEXECUTOR}.resource_manager.KVCacheManager", impl=executor.kv_cache)
    policy = stubs.find("tensorrt_llm.llmapi.llm_args.ContextChunkingPolicy")
    return {
        "dist": None,
        "resources": {types.ResourceManagerType.KV_CACHE_MANAGER: manager},
        "mapping": stubs.find("tensorrt_llm.mapping.Mapping")(),
        "pytorch_backend_config": None,
        "ctx_chunk_config": (policy.FIRST_COME_FIRST_SERVED, executor.chunk_unit_tokens),
        "model_engine": None,
        "start_worker": False,
        "sampler": None,
        "drafter": None,
        "max_batch_size": executor.max_batch_size,
        "max_num_tokens": executor.max_num_tokens,
    } | changed


def create(stubs: Stubs, executor: FakePyTorchExecutor, **changed: Any) -> Any:
    """Install, and make an executor as py_executor_creator does; return it and what was asked of
    the original function."""
    made = stubs.make(f"{PYEXECUTOR}.py_executor.PyExecutor", SimpleNamespace(start_worker=Mock()))
    stubs.implement(f"{PYEXECUTOR}._util.create_py_executor_instance", Mock(return_value=made))
    install(make_options())
    creator = stubs.find(f"{PYEXECUTOR}.py_executor_creator")
    return creator.create_py_executor_instance(**creation_arguments(stubs, executor, **changed))


def test_executors_get_our_scheduler_wherever_they_are_made(stubs: Stubs) -> None:
    fake = FakePyTorchExecutor(stubs)
    fake.add(1, 8, 2)

    executor = create(stubs, fake)
    run_all(fake, executor.scheduler)

    assert fake.num_output_tokens == {1: 2}
    assert isinstance(executor.scheduler, stubs.find(f"{SCHEDULER_MODULE}.RequestScheduler"))
    modules = [stubs.find(f"{PYEXECUTOR}.{name}") for name in ("_util", "py_executor_creator")]
    assert modules[0].create_py_executor_instance is modules[1].create_py_executor_instance


@pytest.mark.parametrize("start_worker", [False, True])
def test_a_worker_starts_only_once_it_has_the_scheduler(
    stubs: Stubs, *, start_worker: bool
) -> None:
    executor = create(stubs, FakePyTorchExecutor(stubs), start_worker=start_worker)

    name = f"{PYEXECUTOR}._util.create_py_executor_instance"
    assert stubs.calls_of(name)[0]["start_worker"] is False
    assert executor.stub_implementation.start_worker.called is start_worker


def test_several_ranks_go_by_rank_zeros_clock(stubs: Stubs) -> None:
    fake = FakePyTorchExecutor(stubs)
    fake.add(1, 8, 1)
    dist = stubs.make(
        "tensorrt_llm._torch.distributed.communicator.Distributed",
        SimpleNamespace(broadcast=Mock(return_value=7.0)),
    )
    mapping = stubs.find("tensorrt_llm.mapping.Mapping")(world_size=2, tp_size=2)

    executor = create(stubs, fake, dist=dist, mapping=mapping)
    run_all(fake, executor.scheduler)

    calls = stubs.calls_of("tensorrt_llm._torch.distributed.communicator.Distributed.broadcast")
    assert len(calls) == 1
    assert calls[0]["root"] == 0
    assert math.isfinite(calls[0]["obj"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"drafter": object()}, "with speculative decoding; turn it off"),
        ({"lora_config": object()}, "with LoRA"),
        ({"max_beam_width": 4}, r"with beam search \(max_beam_width\)"),
        ({"ctx_chunk_config": None}, "with prompts in one piece"),
        ({"max_num_tokens": None}, "max_num_tokens is not set"),
        ({"resources": {}}, "the KV cache is managed by NoneType.*leave use_kv_cache_manager_v2"),
    ],
)
def test_what_the_mirror_does_not_know_is_refused_when_an_executor_is_made(
    stubs: Stubs, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        create(stubs, FakePyTorchExecutor(stubs), **changed)


def test_pipeline_parallelism_is_refused(stubs: Stubs) -> None:
    mapping = stubs.find("tensorrt_llm.mapping.Mapping")(world_size=2, pp_size=2)

    with pytest.raises(EngineError, match="with pipeline parallelism"):
        create(stubs, FakePyTorchExecutor(stubs), mapping=mapping)
