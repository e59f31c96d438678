"""What a scheduler tells routers. A prompt costs 1 ms per token and a step 10 ms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.ports import QueueSummary
from orchestrator.core.queue_summary import MAX_ENTRIES, with_received
from orchestrator.core.request import Request, ResumePoint
from tests.factories import make_profile, make_queue_summary, make_request, make_scheduler, run_step


def test_waiting_prompts_are_listed_by_deadline_with_what_is_left_of_them() -> None:
    scheduler = make_scheduler(
        make_request("late", num_prompt_tokens=30, ttft_s=3.0, weight=2.0),
        make_request("soon", num_prompt_tokens=20, ttft_s=0.5, weight=4.0),
        make_request("relaxed", num_prompt_tokens=10, ttft_s=math.inf),
    )

    summary = scheduler.queue_summary(now_s=1.0)

    assert summary.due_in_s == (-0.5, 2.0, None)
    assert summary.weight == (4.0, 2.0, 1.0)
    assert summary.work_s == pytest.approx((0.020, 0.030, 0.010))
    assert summary.num_prefills == (1, 1, 1)
    assert summary.max_weight == 4.0
    assert (summary.decode_context_tokens, summary.decode_weight) == (0, 0.0)
    assert (summary.min_decode_tpot_s, summary.latency_budget_s) == (None, None)


def test_what_is_computed_of_a_prompt_is_no_longer_work() -> None:
    """The step may take 0.1 s, the deadline: 90 of the 500 tokens."""
    scheduler = make_scheduler(make_request(num_prompt_tokens=500, ttft_s=0.1 + 0.51))
    scheduler.add_request(make_request("tight", num_prompt_tokens=10, ttft_s=0.1))

    _, now_s = run_step(scheduler, 0.0)

    summary = scheduler.queue_summary(now_s)
    assert summary.work_s == pytest.approx((0.420,))
    assert summary.decode_context_tokens == 10


def test_running_requests_are_summed_up() -> None:
    scheduler = make_scheduler(
        make_request("a", num_prompt_tokens=10, weight=2.0, tpot_s=0.1),
        make_request("b", num_prompt_tokens=20, weight=3.0, tpot_s=0.2),
    )

    _, now_s = run_step(scheduler, 0.0)

    summary = scheduler.queue_summary(now_s)
    assert summary.due_in_s == ()
    assert summary.decode_context_tokens == 30
    assert summary.decode_weight == 5.0
    assert summary.min_decode_tpot_s == 0.1
    assert summary.max_weight == 3.0
    assert summary.latency_budget_s is not None
    assert summary.latency_budget_s > 0


def test_the_profile_is_the_one_that_predictions_use_now() -> None:
    """Every step takes twice its prediction: after 300 of them the profile says so."""
    scheduler = make_scheduler(make_request(max_tokens=1000))
    now_s = 0.0
    for _ in range(300):
        plan = scheduler.schedule(now_s)
        _, now_s = run_step(scheduler, now_s, step_s=0.022)
        assert plan.scheduled

    profile = scheduler.queue_summary(now_s).latency_profile

    assert profile.decode_step_s + profile.decode_token_s == pytest.approx(0.022, rel=1e-3)


def test_what_another_node_has_begun_is_queued_until_its_kv_is_computed() -> None:
    """20 + 3 tokens at 1 ms; the fourth token is due 1 + 3 * 0.1 s after arrival, wherever it is:
    on its way or taken in."""
    spec = make_request(num_prompt_tokens=20, ttft_s=1.0, tpot_s=0.1, weight=2.0).spec
    resumed = Request.received(spec, ResumePoint((7, 8, 9), ttft_s=1.0), arrival_s=0.0)
    scheduler = make_scheduler()

    load, coming = with_received(
        scheduler.load(), scheduler.queue_summary(1.1), [resumed], now_s=1.1
    )
    scheduler.add_request(resumed)
    taken_in = scheduler.queue_summary(1.1)

    for queue in (coming, taken_in):
        assert queue.work_s == pytest.approx((0.023,))
        assert queue.due_in_s == pytest.approx((0.2,))
        assert (queue.weight, queue.decode_weight) == ((2.0,), 0.0)
    assert (load.num_decoding, load.num_queued_prompt_tokens) == (1, 0)
    _, now_s = run_step(scheduler, 1.1)
    computed = scheduler.queue_summary(now_s)
    assert (computed.due_in_s, computed.decode_weight) == ((), 2.0)


def check_sums(summary: QueueSummary, *, num: int, weight: float, work_s: float) -> None:
    assert sum(summary.num_prefills) == num
    assert sum(summary.weight) == pytest.approx(weight)
    assert sum(summary.work_s) == pytest.approx(work_s)


def test_many_prompts_share_entries_and_nothing_is_lost() -> None:
    """100 are overdue, in one entry; 1,000 are not, in 63, each with the deadline of its first."""
    scheduler = make_scheduler(
        *(make_request(f"o{i}", num_prompt_tokens=5, ttft_s=0.001 * (i + 1)) for i in range(100)),
        *(
            make_request(f"r{i}", num_prompt_tokens=7, ttft_s=2.0 + i, weight=2.0)
            for i in range(1000)
        ),
    )

    summary = scheduler.queue_summary(now_s=1.0)

    assert len(summary.due_in_s) == MAX_ENTRIES
    assert summary.num_prefills[0] == 100
    assert {15, 16} == set(summary.num_prefills[1:])
    assert summary.due_in_s[:3] == pytest.approx((-0.999, 1.0, 1.0 + summary.num_prefills[1]))
    check_sums(summary, num=1100, weight=2100.0, work_s=7.5)


@given(
    listed=st.lists(st.floats(-5, 5), max_size=MAX_ENTRIES),
    received=st.lists(st.floats(0.001, 10), max_size=80),
)
def test_requests_on_their_way_are_added_to_the_queue(
    listed: list[float], received: list[float]
) -> None:
    """Each of the received has 10 tokens, weight 3 and arrived at 100; the summary is of 101."""
    scheduler = make_scheduler(make_request())
    summary = make_queue_summary(*((due_in_s, 1.0, 0.5) for due_in_s in sorted(listed)))
    specs = [make_request(f"r{i}", weight=3.0, ttft_s=t).spec for i, t in enumerate(received)]
    requests = [Request.received(spec, None, arrival_s=100.0) for spec in specs]

    load, queue = with_received(scheduler.load(), summary, requests, 101.0)

    assert load.num_waiting == 1 + len(received)
    assert load.num_queued_prompt_tokens == 10 + 10 * len(received)
    num = len(listed) + len(received)
    check_sums(
        queue,
        num=num,
        weight=len(listed) + 3.0 * len(received),
        work_s=0.5 * len(listed) + make_profile().prefill_s(10, 0) * len(received),
    )
    assert len(queue.due_in_s) <= max(MAX_ENTRIES, len(listed))
    dues = [due for due in queue.due_in_s if due is not None]
    assert dues == sorted(dues)
    if num:
        assert dues[0] == pytest.approx(min([*listed, *(t - 1.0 for t in received)]))
    assert queue.max_weight == (3.0 if received else float(bool(listed)))
