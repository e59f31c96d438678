from __future__ import annotations

import pytest

from orchestrator.core.baselines import SarathiOptions
from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.deadline_scheduler import DeadlineOptions
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities, SchedulerOutput
from orchestrator.core.request import Request
from orchestrator.core.scheduler_factory import SchedulerName, SchedulerOptions, make_scheduler
from orchestrator.core.slide_batching import SlideBatchingOptions
from tests.factories import make_capabilities, make_profile, make_request, run_step

NO_CHUNK_MINIMUM = DeadlineOptions(min_chunk_tokens=0)


def make(
    name: SchedulerName,
    *requests: Request,
    options: SchedulerOptions | None = None,
    capabilities: EngineCapabilities | None = None,
) -> BatchScheduler:
    scheduler = make_scheduler(
        name, options, capabilities or make_capabilities(), BatchLatencyModel(make_profile())
    )
    for request in requests:
        scheduler.add_request(request)
    return scheduler


def ids(plan: SchedulerOutput) -> list[str]:
    return [part.request_id for part in plan.scheduled]


def decoding(scheduler: BatchScheduler, *requests: Request) -> float:
    """Bring the requests to their first token; return the time then."""
    for request in requests:
        scheduler.add_request(request)
    _, now_s = run_step(scheduler, 0.0)
    return now_s


def test_first_come_first_served_ignores_weight_and_deadline() -> None:
    scheduler = make(
        "fcfs",
        make_request("young", weight=9.0, ttft_s=0.01, arrival_s=1.0),
        make_request("old", arrival_s=0.0),
        capabilities=make_capabilities(max_num_seqs=1),
    )

    assert ids(scheduler.schedule(now_s=1.0)) == ["old"]


def test_first_come_first_served_preempts_the_latest() -> None:
    """Two of three blocks are `old`'s; at its 33rd token it takes the third from `young`."""
    scheduler = make("fcfs", capabilities=make_capabilities(num_device_blocks=3))
    now_s = decoding(
        scheduler,
        make_request("old", num_prompt_tokens=32, max_tokens=4),
        make_request("young", num_prompt_tokens=8, arrival_s=0.1),
    )

    plan = scheduler.schedule(now_s)

    assert ids(plan) == ["old"]
    assert plan.preempted_ids == ("young",)


def test_old_vllm_lets_whole_prompts_stop_all_decodes() -> None:
    scheduler = make("vllm-fcfs")
    now_s = decoding(scheduler, make_request("decode"))
    scheduler.add_request(make_request("prompt", num_prompt_tokens=500, arrival_s=now_s))

    with_prompt, now_s = run_step(scheduler, now_s)
    without_prompt, _ = run_step(scheduler, now_s)

    assert ids(with_prompt) == ["prompt"]
    assert with_prompt.num_new_tokens == 500
    assert ids(without_prompt) == ["decode", "prompt"]


def test_old_vllm_never_cuts_a_prompt_that_one_step_could_hold() -> None:
    """Steps of 600 tokens: 400 fit, then 400 more do not, although 200 tokens are left."""
    scheduler = make(
        "vllm-fcfs",
        *(make_request(f"r{i}", num_prompt_tokens=400) for i in range(2)),
        capabilities=make_capabilities(max_num_batched_tokens=600),
    )

    assert ids(scheduler.schedule(now_s=0.0)) == ["r0"]


def test_admission_stops_when_kv_memory_is_nearly_full() -> None:
    """97 of 100 blocks are in use, more than 95 %: the newcomer waits though it would fit."""
    scheduler = make("sarathi-fcfs", options=SarathiOptions(token_budget=2000),
                     capabilities=make_capabilities(num_device_blocks=100))  # fmt: skip
    now_s = decoding(scheduler, make_request("big", num_prompt_tokens=16 * 97 - 8))
    scheduler.add_request(make_request("small", arrival_s=now_s))

    plan = scheduler.schedule(now_s)

    assert ids(plan) == ["big"]
    assert plan.reasons.skipped == {"small": "KV memory is nearly full"}


def test_sarathi_takes_decodes_then_half_done_then_new_prompts() -> None:
    """A budget of 100 tokens: `half` got 90 of 150 beside the decode's prompt of 10."""
    scheduler = make("sarathi-fcfs", options=SarathiOptions(token_budget=100))
    now_s = decoding(
        scheduler,
        make_request("decode", num_prompt_tokens=10),
        make_request("half", num_prompt_tokens=150, arrival_s=0.1),
    )
    scheduler.add_request(make_request("new", num_prompt_tokens=90, arrival_s=-1.0))

    plan = scheduler.schedule(now_s)

    assert [(p.request_id, p.num_new_tokens) for p in plan.scheduled] == [
        ("decode", 1),
        ("half", 60),
        ("new", 39),
    ]


def test_sarathi_profiles_its_budget_from_the_tightest_tpot() -> None:
    """210.5 ms TPOT less 10 ms constant at 1 ms a token: 200 tokens."""
    scheduler = make("sarathi-fcfs", make_request(num_prompt_tokens=900, tpot_s=0.2105))

    assert scheduler.schedule(now_s=0.0).num_new_tokens == 200


def test_sarathi_priority_orders_each_group_by_weight() -> None:
    scheduler = make(
        "sarathi-priority", make_request("a"), make_request("b", weight=2.0, arrival_s=0.5)
    )

    assert ids(scheduler.schedule(now_s=0.5)) == ["b", "a"]


def test_strict_priority_puts_heavy_prompts_before_light_decodes() -> None:
    scheduler = make("strict-priority")
    now_s = decoding(scheduler, make_request("light"))
    scheduler.add_request(make_request("heavy", weight=2.0, arrival_s=now_s))

    assert ids(scheduler.schedule(now_s)) == ["heavy", "light"]


def test_the_client_served_least_per_weight_goes_first() -> None:
    """Both clients start together: `a` is charged 40 prompt tokens and 2 for its output, `b` 2
    and 2, so the prompt of `b` goes first though it came later.
    """
    scheduler = make("weighted-vtc", options=SarathiOptions(token_budget=100))
    now_s = decoding(
        scheduler,
        make_request("a0", num_prompt_tokens=40, client_id="a"),
        make_request("b0", num_prompt_tokens=2, client_id="b"),
    )
    scheduler.add_request(make_request("a1", client_id="a", arrival_s=now_s))
    scheduler.add_request(make_request("b1", client_id="b", arrival_s=now_s + 1))

    order = ids(scheduler.schedule(now_s + 1))
    assert order.index("b1") < order.index("a1")


def test_an_idle_client_saves_up_no_claim() -> None:
    """`b` comes when `a` was charged 42: it is lifted there, so arrival decides."""
    scheduler = make("weighted-vtc", options=SarathiOptions(token_budget=100))
    now_s = decoding(scheduler, make_request("a0", num_prompt_tokens=40, client_id="a"))
    scheduler.add_request(make_request("a1", client_id="a", arrival_s=now_s))
    scheduler.add_request(make_request("b1", client_id="b", arrival_s=now_s + 1))

    order = ids(scheduler.schedule(now_s + 1))
    assert order.index("a1") < order.index("b1")


def test_fair_batching_lets_decodes_with_slack_wait_for_prompts() -> None:
    """Three early tokens put the decode's deadline almost 4 TPOT of 1 s away, farther than this
    step and one TPOT; the prompt goes before it.
    """
    scheduler = make("fair-batching", options=NO_CHUNK_MINIMUM)
    now_s = decoding(scheduler, make_request("decode", tpot_s=1.0))
    scheduler.add_request(make_request("first", ttft_s=0.3, arrival_s=now_s))
    close, now_s = run_step(scheduler, now_s)
    for _ in range(2):
        _, now_s = run_step(scheduler, now_s)
    scheduler.add_request(make_request("second", ttft_s=0.3, arrival_s=now_s))

    relaxed = scheduler.schedule(now_s)

    assert ids(close) == ["decode", "first"]
    assert ids(relaxed).index("second") < ids(relaxed).index("decode")


@pytest.mark.parametrize(
    ("name", "first"),
    [("edf", "soon"), ("sjf", "short"), ("density", "heavy"), ("decode-first-edf", "soon"),
     ("decode-first-density", "heavy"), ("urgency-priority", "soon")],
)  # fmt: skip
def test_each_order_has_its_favourite(name: SchedulerName, first: str) -> None:
    """10 tokens of weight 1 due in 0.9 s; 5 tokens of weight 0.4; 20 tokens of weight 9."""
    scheduler = make(
        name,
        make_request("soon", num_prompt_tokens=10, ttft_s=0.9),
        make_request("short", num_prompt_tokens=5, weight=0.4, ttft_s=2.0),
        make_request("heavy", num_prompt_tokens=20, weight=9.0, ttft_s=2.0),
        options=NO_CHUNK_MINIMUM,
    )

    assert ids(scheduler.schedule(now_s=0.0))[0] == first


@pytest.mark.parametrize("name", ["decode-first-edf", "decode-first-density"])
def test_decode_first_means_it(name: SchedulerName) -> None:
    scheduler = make(name, options=NO_CHUNK_MINIMUM)
    now_s = decoding(scheduler, make_request("decode", tpot_s=1.0, weight=0.001))
    scheduler.add_request(make_request("prompt", ttft_s=0.1, weight=900.0, arrival_s=now_s))

    assert ids(scheduler.schedule(now_s)) == ["decode", "prompt"]


def test_without_latency_awareness_a_step_takes_its_tokens_whatever_the_deadlines() -> None:
    """The paper's ablation: 500 tokens take 510 ms though the decode is due in 50 ms."""
    scheduler = make(
        "slide-batching", options=SlideBatchingOptions(min_chunk_tokens=0, token_budget=500)
    )
    now_s = decoding(scheduler, make_request("decode"))
    scheduler.add_request(make_request("long", num_prompt_tokens=900, arrival_s=now_s, ttft_s=9.0))

    plan = scheduler.schedule(now_s)

    assert plan.num_new_tokens == 500
    assert plan.predicted_step_s > 0.5


def test_options_of_another_scheduler_are_refused() -> None:
    with pytest.raises(ValueError, match="scheduler edf does not take SarathiOptions"):
        make("edf", options=SarathiOptions())
