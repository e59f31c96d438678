"""The fake does what the C++ executor is known to do, so that tests on it mean something."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from tests.scripted_engine import RAISE, REFUSE
from tests.trtllm.fake_executor import BINDINGS, FakeExecutor, RequestArguments
from tests.trtllm.stub_modules import Stubs, stub_modules


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    with stub_modules() as value:
        value.implement(f"{BINDINGS}.Request", RequestArguments)
        yield value


def make_executor(
    stubs: Stubs,
    *,
    num_blocks: int = 100,
    max_batch_size: int = 8,
    max_num_tokens: int = 64,
    step_s: float | None = None,
) -> FakeExecutor:
    """KV blocks of 4 tokens."""
    bindings = stubs.find(BINDINGS)
    config = bindings.ExecutorConfig(
        scheduler_config=bindings.SchedulerConfig(bindings.CapacitySchedulerPolicy.MAX_UTILIZATION),
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
    )
    return FakeExecutor(stubs, config, tokens_per_block=4, num_blocks=num_blocks, step_s=step_s)


def enqueue(stubs: Stubs, executor: FakeExecutor, *prompt: int, **options: Any) -> int:
    request = stubs.find(BINDINGS).Request(list(prompt), **({"max_tokens": 3} | options))
    return executor.enqueue_request(request)


def step(executor: FakeExecutor) -> dict[int, list[int]]:
    """Compute one iteration; return the tokens that it produced, by request."""
    responses = executor.await_responses(timedelta(0))
    return {r.request_id: r.result.output_token_ids[0] for r in responses}


def test_tokens_stream_and_the_last_one_comes_with_a_reason(stubs: Stubs) -> None:
    executor = make_executor(stubs)
    request_id = enqueue(stubs, executor, 5, 1)
    results = []
    for _ in range(3):
        (response,) = executor.await_responses(timedelta(0))
        assert response.request_id == request_id
        results.append(response.result)

    assert [r.output_token_ids for r in results] == [[[5]], [[6]], [[7]]]
    assert [r.is_final for r in results] == [False, False, True]
    assert results[-1].finish_reasons[0].name == "LENGTH"


def test_a_stop_word_ends_a_request_and_is_part_of_its_output(stubs: Stubs) -> None:
    executor = make_executor(stubs)
    enqueue(stubs, executor, 5, stop_words=[[6], [9]])
    step(executor)

    (response,) = executor.await_responses(timedelta(0))

    assert response.result.output_token_ids == [[6]]
    assert response.result.finish_reasons[0].name == "STOP_WORDS"


def test_a_long_prompt_is_computed_in_chunks(stubs: Stubs) -> None:
    """Ten tokens in steps of four: the third step produces the first token."""
    executor = make_executor(stubs, max_num_tokens=4)
    request_id = enqueue(stubs, executor, *range(10))

    assert [step(executor) for _ in range(3)] == [{}, {}, {request_id: [0]}]


def test_the_highest_priority_goes_first_and_equal_ones_in_order(stubs: Stubs) -> None:
    executor = make_executor(stubs, max_batch_size=1)
    ids = [
        enqueue(stubs, executor, 5, max_tokens=1, priority=priority)
        for priority in (0.5, 0.8, 0.5, 0.8)
    ]

    ended = [next(iter(step(executor))) for _ in ids]

    assert ended == [ids[1], ids[3], ids[0], ids[2]]


def test_a_higher_priority_is_activated_though_all_places_are_taken(stubs: Stubs) -> None:
    executor = make_executor(stubs, max_batch_size=1)
    enqueue(stubs, executor, 5, priority=0.5)
    step(executor)

    high = enqueue(stubs, executor, 50, priority=0.8)

    assert step(executor) == {high: [50]}


def test_short_of_blocks_the_lowest_and_youngest_is_paused_and_computed_again(
    stubs: Stubs,
) -> None:
    """Three requests with prompts of 4 tokens in 5 blocks of 4: each needs a second block for its
    second token. `low` is paused for `high`, `young` for `old`; both make it in the end."""
    executor = make_executor(stubs, num_blocks=5)
    low = enqueue(stubs, executor, 10, 1, 1, 1, priority=0.2)
    old = enqueue(stubs, executor, 20, 1, 1, 1, priority=0.5)
    young = enqueue(stubs, executor, 30, 1, 1, 1, priority=0.5)
    tokens: dict[int, list[int]] = {low: [], old: [], young: []}
    for _ in range(8):
        for request_id, new in step(executor).items():
            tokens[request_id] += new

    assert executor.pauses == [low]
    assert tokens == {low: [10, 11, 12], old: [20, 21, 22], young: [30, 31, 32]}


def test_a_cancelled_request_says_so_once_it_is_active(stubs: Stubs) -> None:
    executor = make_executor(stubs, max_batch_size=1)
    running, waiting = enqueue(stubs, executor, 5), enqueue(stubs, executor, 50)
    step(executor)
    executor.cancel_request(running)
    executor.cancel_request(waiting)

    reasons = {}
    for _ in range(3):
        for response in executor.await_responses(timedelta(0)):
            reasons[response.request_id] = response.result.finish_reasons[0].name

    assert reasons == {running: "CANCELLED", waiting: "CANCELLED"}


def test_a_broken_step_fails_all_that_are_active(stubs: Stubs) -> None:
    executor = make_executor(stubs)
    ids = [enqueue(stubs, executor, 5, 1), enqueue(stubs, executor, 50, RAISE)]

    responses = executor.await_responses(timedelta(0))

    assert [r.request_id for r in responses] == ids
    assert all(r.has_error() and "as the prompt asked" in r.error_msg for r in responses)


def test_a_refused_request_leaves_the_others_alone(stubs: Stubs) -> None:
    executor = make_executor(stubs)
    bad, good = enqueue(stubs, executor, 5, REFUSE), enqueue(stubs, executor, 50)

    responses = {r.request_id: r for r in executor.await_responses(timedelta(0))}

    assert responses[bad].has_error()
    assert responses[good].result.output_token_ids == [[50]]


def test_statistics_tell_of_blocks_and_pauses(stubs: Stubs) -> None:
    """One request of 4 tokens in 2 blocks: one is free; with the fifth token none is."""
    executor = make_executor(stubs, num_blocks=2)
    enqueue(stubs, executor, 5, 1, 1, 1)
    step(executor)
    step(executor)

    first, second = executor.get_latest_iteration_stats()

    assert (first.kv_cache_stats.max_num_blocks, first.kv_cache_stats.free_num_blocks) == (2, 1)
    assert first.inflight_batching_stats.num_ctx_tokens == 4
    assert second.kv_cache_stats.free_num_blocks == 0
    assert second.inflight_batching_stats.num_gen_requests == 1
    assert executor.get_latest_iteration_stats() == []


def test_a_thread_steps_while_others_hand_over_requests(stubs: Stubs) -> None:
    executor = make_executor(stubs, step_s=0.0)
    threads = [
        threading.Thread(target=lambda: enqueue(stubs, executor, 5, max_tokens=20))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    tokens: dict[int, list[int]] = {}
    while len(tokens) < 8 or any(len(t) < 20 for t in tokens.values()):
        responses = executor.await_responses(timedelta(seconds=20))
        assert responses, "the executor has stopped"
        for response in responses:
            tokens.setdefault(response.request_id, []).extend(response.result.output_token_ids[0])
    executor.shutdown()

    assert all(t == list(range(5, 25)) for t in tokens.values())
