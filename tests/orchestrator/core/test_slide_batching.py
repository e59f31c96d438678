from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import SchedulerOutput
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from tests.factories import (
    make_capabilities,
    make_profile,
    make_request,
    make_scheduler,
    run_step,
)


def ids(plan: SchedulerOutput) -> list[str]:
    return [part.request_id for part in plan.scheduled]


def test_light_load_orders_by_deadline() -> None:
    """10 + 10 tokens take 20 ms of work; both deadlines are seconds away, so both are normal
    and the earlier deadline goes first though the other weighs more.
    """
    scheduler = make_scheduler(
        make_request("heavy", ttft_s=3.0, weight=9.0), make_request("soon", ttft_s=2.0)
    )

    plan = scheduler.schedule(now_s=0.0)

    assert ids(plan) == ["soon", "heavy"]
    assert plan.reasons.num_urgent == 0


def test_heavy_load_orders_by_density() -> None:
    """2,000 tokens take 2 s of work but both are due within 1.5 s: all urgent, so the request
    with the greater gain per second goes first though it is due later.
    """
    scheduler = make_scheduler(
        make_request("soon", num_prompt_tokens=1000, ttft_s=1.2),
        make_request("heavy", num_prompt_tokens=1000, ttft_s=1.5, weight=2.0),
    )

    plan = scheduler.schedule(now_s=0.0)

    assert ids(plan)[0] == "heavy"
    assert plan.reasons.num_urgent == 2


def test_more_load_never_makes_a_request_less_urgent() -> None:
    """The boundary slides one way: with each request added, the first stays or turns urgent."""
    was_urgent = False
    for num_others in range(0, 40, 4):
        others = [
            make_request(f"o{i}", num_prompt_tokens=200, ttft_s=5.0) for i in range(num_others)
        ]
        scheduler = make_scheduler(make_request("first", ttft_s=3.0), *others)

        is_urgent = scheduler.schedule(now_s=0.0).reasons.load_s > 3.0

        assert is_urgent or not was_urgent
        was_urgent = is_urgent
    assert was_urgent


def test_a_larger_alpha_never_makes_a_request_less_urgent() -> None:
    requests = [
        make_request(f"r{i}", num_prompt_tokens=100, ttft_s=1.0 + 0.5 * i) for i in range(20)
    ]
    num_urgent = []
    for alpha in (0.01, 0.3, 0.5, 0.8, 1.0, 2.0, 10.0):
        options = SlideBatchingOptions(alpha=alpha)
        scheduler = make_scheduler(*requests, options=options)
        num_urgent.append(scheduler.schedule(now_s=0.0).reasons.num_urgent)

    assert num_urgent == sorted(num_urgent)
    assert num_urgent[0] == 0
    assert num_urgent[-1] == len(requests)


def test_urgent_decodes_go_before_urgent_prefills_of_any_density() -> None:
    """The prefill earns 1000 a token, the decode 1; the decode still goes first (OC-5)."""
    scheduler = make_scheduler(make_request("decode", num_prompt_tokens=10, ttft_s=0.1))
    run_step(scheduler, 0.0)
    for i in range(2):
        scheduler.add_request(
            make_request(f"prefill{i}", num_prompt_tokens=500, weight=1000.0, ttft_s=0.6)
        )

    plan = scheduler.schedule(now_s=0.05)

    assert ids(plan)[0] == "decode"
    assert plan.reasons.num_urgent == 3


def test_step_time_is_bounded_by_the_tightest_deadline() -> None:
    """The decode's second token is due 300 ms after its first: the long prefill is cut so that
    the step ends before. B = 300 - 0 ms; 10 ms constant + 1 ms decode leave 289 tokens.
    """
    scheduler = make_scheduler(make_request("decode", tpot_s=0.300), profile=make_profile())
    _, now_s = run_step(scheduler, 0.0)
    scheduler.add_request(make_request("long", num_prompt_tokens=2000, ttft_s=9.0, arrival_s=now_s))

    plan = scheduler.schedule(now_s)

    assert plan.reasons.latency_budget_s == pytest.approx(0.300)
    assert {p.request_id: p.num_new_tokens for p in plan.scheduled} == {"decode": 1, "long": 289}
    assert plan.predicted_step_s == pytest.approx(0.300)


def test_a_request_that_cannot_be_in_time_does_not_shrink_the_budget() -> None:
    """`late` was due long ago; only `fine`, due in 400 ms, bounds the step (equation 18)."""
    scheduler = make_scheduler(
        make_request("late", ttft_s=0.1, arrival_s=-5.0), make_request("fine", ttft_s=0.4)
    )

    assert scheduler.schedule(now_s=0.0).reasons.latency_budget_s == pytest.approx(0.4)


def test_if_nobody_can_be_in_time_the_tightest_tpot_sets_the_pace() -> None:
    """OC-2: B = max(0.65 * 80 ms, 2 * 10 ms, 80 ms) = 80 ms."""
    scheduler = make_scheduler(make_request(ttft_s=0.1, tpot_s=0.080, arrival_s=-5.0))

    assert scheduler.schedule(now_s=0.0).reasons.latency_budget_s == pytest.approx(0.080)


def test_requests_without_objectives_run_in_bounded_steps() -> None:
    """No deadline anywhere: the step may last `max_step_s`, 490 tokens beside the constant."""
    scheduler = make_scheduler(
        make_request(num_prompt_tokens=1000, ttft_s=math.inf, tpot_s=math.inf)
    )

    plan = scheduler.schedule(now_s=0.0)

    assert plan.reasons.latency_budget_s == 0.5
    assert plan.num_new_tokens == 490


def test_a_weight_of_zero_still_gets_served() -> None:
    scheduler = make_scheduler(make_request("free", weight=0.0, max_tokens=2))

    now_s = 0.0
    while scheduler.has_requests:
        _, now_s = run_step(scheduler, now_s)

    assert now_s < 1.0


def test_an_empty_queue_gives_an_empty_step() -> None:
    plan = make_scheduler().schedule(now_s=0.0)

    assert plan.scheduled == ()
    assert plan.predicted_step_s == 0.0


def test_short_chunks_are_not_made_unless_they_finish_the_prompt() -> None:
    """B is 80 ms: 70 tokens fit. `tail` needs all 60 it has; `long` would get 10 of 500, fewer
    than the 50 worth a chunk, and is skipped with a reason.
    """
    scheduler = make_scheduler(
        make_request("tail", num_prompt_tokens=60, ttft_s=0.08, weight=9.0),
        make_request("long", num_prompt_tokens=500, ttft_s=9.0),
        options=SlideBatchingOptions(min_chunk_tokens=50),
    )

    plan = scheduler.schedule(now_s=0.0)

    assert ids(plan) == ["tail"]
    assert plan.reasons.skipped == {"long": "too little time or room in this step"}


def test_a_request_that_does_not_fit_does_not_block_the_next() -> None:
    """OC-7: `long` (due first) would get too short a chunk beside `first`; `short` still fits."""
    scheduler = make_scheduler(
        make_request("first", num_prompt_tokens=60, ttft_s=0.11),
        make_request("long", num_prompt_tokens=500, ttft_s=9.0),
        make_request("short", num_prompt_tokens=20, ttft_s=9.5),
        options=SlideBatchingOptions(min_chunk_tokens=50),
    )

    assert ids(scheduler.schedule(now_s=0.0)) == ["first", "short"]


def test_hopeless_prefills_go_last() -> None:
    """`hopeless` is denser but its 0.1 s are gone; nothing is earned by serving it (OC-6)."""
    requests = (
        make_request("hopeless", num_prompt_tokens=300, ttft_s=0.2, weight=50.0, arrival_s=-0.15),
        make_request("hopeful", num_prompt_tokens=300, ttft_s=0.8),
    )

    demoting = make_scheduler(*requests, options=SlideBatchingOptions(min_chunk_tokens=0))
    plain = make_scheduler(
        *requests, options=SlideBatchingOptions(min_chunk_tokens=0, demote_hopeless=False)
    )

    assert ids(demoting.schedule(now_s=0.0))[0] == "hopeful"
    assert ids(plain.schedule(now_s=0.0))[0] == "hopeless"


def test_a_starved_prefill_is_helped_within_its_quota() -> None:
    """In sustained overload by dense requests the starved one still ends, slowly."""
    scheduler = make_scheduler(
        make_request("starved", num_prompt_tokens=100, ttft_s=0.1, weight=0.001, max_tokens=1)
    )
    now_s = 0.0
    for step in range(200):
        scheduler.add_request(
            make_request(
                f"dense{step}",
                num_prompt_tokens=400,
                ttft_s=3.0,
                weight=10.0,
                arrival_s=now_s,
                max_tokens=1,
            )
        )
        plan, now_s = run_step(scheduler, now_s)
        if "starved" in ids(plan) and plan.reasons.num_starved:
            break

    assert now_s > 0.2, "it was helped before it was starved"
    assert step < 199, "it was never helped"


def test_starved_requests_take_no_more_than_their_share() -> None:
    """A hundred starved prefills of 100 ms each beside fresh work that fills every step: after
    T seconds, the starved ones were given at most a tenth of it, and one chunk.
    """
    scheduler = make_scheduler(
        *(
            make_request(
                f"s{i}",
                num_prompt_tokens=100,
                ttft_s=0.1,
                weight=0.001,
                arrival_s=-9.0,
                max_tokens=1,
            )
            for i in range(100)
        ),
        options=SlideBatchingOptions(min_chunk_tokens=0),
    )
    now_s, starved_s = 0.0, 0.0
    for step in range(100):
        scheduler.add_request(
            make_request(
                f"fresh{step}",
                num_prompt_tokens=600,
                ttft_s=1.2,
                weight=10.0,
                arrival_s=now_s,
                max_tokens=1,
            )
        )
        plan, now_s = run_step(scheduler, now_s)
        starved_s += sum(p.num_new_tokens * 0.001 for p in plan.scheduled if p.request_id[0] == "s")

    assert 0 < starved_s <= 0.1 * now_s + 0.1


def test_no_quota_means_no_help() -> None:
    scheduler = make_scheduler(
        make_request("starved", ttft_s=0.1, arrival_s=-9.0),
        options=SlideBatchingOptions(min_chunk_tokens=0, starvation_quota=0.0),
    )

    assert scheduler.schedule(now_s=0.0).reasons.num_starved == 0


def test_a_waiting_request_takes_the_slots_of_running_ones_with_slack() -> None:
    """Two sequences a step: the decodes are due in half a second, the newcomers in 100 ms."""
    scheduler = make_scheduler(
        *(make_request(f"relaxed{i}", tpot_s=0.5) for i in range(2)),
        capabilities=make_capabilities(max_num_seqs=2),
    )
    _, now_s = run_step(scheduler, 0.0)
    for i in range(2):
        scheduler.add_request(make_request(f"due{i}", ttft_s=0.1, arrival_s=now_s))

    assert ids(scheduler.schedule(now_s)) == ["due0", "due1"]


def test_kv_goes_to_the_more_valuable_request() -> None:
    """Ten blocks, all held by `low`, whose next token is due in 2 s. `high` is due before and
    earns four times as much per second of prompt.
    """
    scheduler = make_scheduler(
        make_request("low", num_prompt_tokens=150, max_tokens=10, tpot_s=2.0),
        capabilities=make_capabilities(num_device_blocks=10),
    )
    _, now_s = run_step(scheduler, 0.0)
    scheduler.add_request(
        make_request("high", num_prompt_tokens=150, weight=4.0, ttft_s=1.0, arrival_s=now_s)
    )

    plan = scheduler.schedule(now_s)

    assert ids(plan) == ["high"]
    assert plan.preempted_ids == ("low",)


def test_kv_stays_with_the_more_valuable_request() -> None:
    """As before, but the newcomer earns less: it waits, and `high` goes on."""
    scheduler = make_scheduler(
        make_request("high", num_prompt_tokens=150, max_tokens=10, tpot_s=2.0, weight=4.0),
        capabilities=make_capabilities(num_device_blocks=10),
    )
    _, now_s = run_step(scheduler, 0.0)
    scheduler.add_request(make_request("low", num_prompt_tokens=150, ttft_s=1.0, arrival_s=now_s))

    plan = scheduler.schedule(now_s)

    assert ids(plan) == ["high"]
    assert plan.reasons.skipped == {"low": "no KV blocks"}


def test_two_requests_never_take_turns_throwing_each_other_out() -> None:
    """Room for one of two equal requests: the first to start finishes, then the other."""
    scheduler = make_scheduler(
        *(make_request(f"r{i}", num_prompt_tokens=100, max_tokens=50) for i in range(2)),
        capabilities=make_capabilities(num_device_blocks=10),
    )
    now_s, num_preemptions = 0.0, 0
    while scheduler.has_requests:
        plan, now_s = run_step(scheduler, now_s)
        num_preemptions += len(plan.preempted_ids)

    assert num_preemptions <= 1


def test_a_preempted_decode_stays_a_decode() -> None:
    """OC-11: with ten tokens out, its next is due at 1 + 10 * 0.05 s, not at 1 s."""
    request = make_request(num_output_tokens=10, max_tokens=20)

    assert request.is_decoding
    assert request.next_token_deadline_s(SlideBatchingOptions().anchor) == pytest.approx(0.5)
    assert request.num_uncomputed_tokens == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0.0),
        ("max_step_s", math.inf),
        ("starvation_quota", 1.5),
        ("scan_limit", 0),
        ("min_budget_constants", 1.0),
    ],
)
def test_an_impossible_option_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        SlideBatchingOptions(**{name: value})  # type: ignore[arg-type]


def test_a_minimum_chunk_over_the_token_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="min_chunk_tokens is 50"):
        SlideBatchingScheduler(
            make_capabilities(max_num_batched_tokens=50), BatchLatencyModel(make_profile())
        )


@settings(max_examples=200)
@example(weights=[0.0] * 10 + [1.0, 0.0], seed=random.Random(0), now_s=0.75)
@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12),
    seed=st.randoms(use_true_random=False),
    now_s=st.floats(-1, 5),
)
def test_the_order_does_not_depend_on_how_requests_came_in(
    weights: list[float], seed: object, now_s: float
) -> None:
    """Invariant 4: a total order with the id as last key, so any insertion order gives one plan."""
    requests = [
        make_request(f"r{i}", num_prompt_tokens=10 * (i % 3 + 1), weight=w, ttft_s=1 + i % 2)
        for i, w in enumerate(weights)
    ]
    shuffled = list(requests)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]

    plans = [make_scheduler(*queue).schedule(now_s) for queue in (requests, shuffled)]

    assert ids(plans[0]) == ids(plans[1])
    assert plans[0].predicted_step_s == plans[1].predicted_step_s


def test_an_engine_that_reserves_prompts_gives_a_first_chunk_the_blocks_of_all() -> None:
    """A prompt of 400 tokens in steps of 100 takes 25 blocks of 16 at once, not 7. Of 40 blocks
    15 are left, so a second prompt of 400 tokens waits for them, chunk by chunk though it is."""
    capabilities = dataclasses.replace(
        make_capabilities(num_device_blocks=40, max_num_batched_tokens=100), reserves_prompts=True
    )
    scheduler = make_scheduler(
        make_request("first", num_prompt_tokens=400, max_tokens=2, ttft_s=5.0),
        make_request("second", num_prompt_tokens=400, max_tokens=2, ttft_s=6.0),
        capabilities=capabilities,
    )

    plan, now_s = run_step(scheduler, 0.0)
    free_after_first_chunk = scheduler.load().num_free_device_blocks
    while ids(plan) == ["first"]:
        plan, now_s = run_step(scheduler, now_s)

    assert free_after_first_chunk == 15
    assert not scheduler.load().num_decoding
    assert ids(plan) == ["second"]


def test_a_preempted_request_gets_the_blocks_of_its_output_with_its_prompts() -> None:
    """12 prompt tokens and 8 of output are 2 blocks of 16, taken with the first chunk of 10."""
    capabilities = dataclasses.replace(
        make_capabilities(num_device_blocks=9, max_num_batched_tokens=10), reserves_prompts=True
    )
    request = make_request(num_prompt_tokens=12, num_output_tokens=8, max_tokens=20)
    scheduler = make_scheduler(request, capabilities=capabilities)

    run_step(scheduler, 0.0)

    assert request.num_computed_tokens == 10
    assert scheduler.load().num_free_device_blocks == 7
