"""What it costs a router to choose a node among 128, and to keep the books that it decides by.

    python -m benchmarks.router_decision

Every node is loaded: it decodes, and some prompts wait, more of them in a second fleet. A decision
is `offer` and `pick`, without the HTTP around it. Keeping the books is `begin_dispatch` with
`note_first_token` and `end_dispatch` of each request, and `see` of each snapshot, each with what
the next reader pays for it: a node's figures are written when somebody reads them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.shared.reporting import argument_parser, report
from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import EngineCapabilities, QueueSummary, SchedulerLoad
from orchestrator.core.slo import Slo
from router.fleet import EndpointSnapshot, Fleet
from router.gorouting import GainEstimate, GoRoutingOptions, GoRoutingPolicy
from router.policy import RoutingDecision, RoutingPolicy, RoutingRequest
from router.routing_config import PolicyName, RoutingConfig

NUM_NODES = 128
CLASS_WEIGHTS = {"high": 4.0, "normal": 2.0, "low": 1.0}
NOW_S = 1000.0

# A 7B model on a large GPU; each node is up to 20 % slower or faster.
PROFILE = LatencyProfile(
    prefill_quadratic_s=5.1e-10,
    prefill_context_s=1.02e-9,
    prefill_token_s=2.2e-5,
    prefill_cached_s=1.3e-8,
    decode_context_s=1.7e-8,
    decode_token_s=1.1e-5,
    mixed_step_s=4.7e-3,
    decode_step_s=3.8e-3,
)
CAPABILITIES = EngineCapabilities(
    block_size_tokens=16,
    num_device_blocks=100_000,
    num_host_blocks=0,
    max_num_batched_tokens=2048,
    max_num_seqs=256,
    max_model_len=32_768,
)

OTHER_POLICIES: tuple[PolicyName, ...] = (
    "least-load",
    "least-request",
    "round-robin",
    "random",
    "power-of-two",
    "prefix-aware",
    "static-partition",
    "llumnix",
    "slo-aware",
    "highest-load-feasible",
)


def make_snapshot(draw: random.Random, num_queued: int) -> EndpointSnapshot:
    """Return a node with so many waiting prompts, due within two seconds."""
    speed = draw.uniform(0.8, 1.2)
    profile = LatencyProfile(**{k: v * speed for k, v in PROFILE.to_dict().items()})
    num_tokens = [draw.randrange(50, 1000) for _ in range(num_queued)]
    return EndpointSnapshot(
        instance_id="0",
        capabilities=CAPABILITIES,
        load=SchedulerLoad(num_queued, 64, 64, sum(num_tokens), 50_000, 100_000),
        queue=QueueSummary(
            due_in_s=tuple(sorted(draw.uniform(0.0, 2.0) for _ in num_tokens)),
            weight=tuple(draw.choice((1.0, 2.0, 4.0)) for _ in num_tokens),
            work_s=tuple(profile.prefill_s(tokens, 0) for tokens in num_tokens),
            num_prefills=(1,) * num_queued,
            decode_context_tokens=64_000,
            decode_weight=128.0,
            min_decode_tpot_s=0.05,
            max_weight=4.0,
            latency_budget_s=0.05,
            latency_profile=profile,
        ),
        taken_at_s=NOW_S - 0.05,
        complete_until_s=NOW_S - 0.05,
    )


def make_fleet(num_queued: int, num_nodes: int) -> Fleet:
    """Return a fleet whose nodes all may be used, with so many prompts waiting at each."""
    draw = random.Random(0)
    fleet = Fleet(f"node-{index:03d}" for index in range(num_nodes))
    for endpoint_id in fleet.endpoint_ids:
        fleet.see(endpoint_id, make_snapshot(draw, num_queued))
        fleet.allow(endpoint_id, until_s=NOW_S + 10)
    return fleet


def make_request(index: int) -> RoutingRequest:
    """Return a request; its length, class and objective go with its number."""
    name = ("high", "normal", "low")[index % 3]
    return RoutingRequest(
        request_id=str(index),
        prompt_token_ids=tuple(range(100 + 97 * index % 3000)),
        max_tokens=256,
        priority_class=name,
        weight=CLASS_WEIGHTS[name],
        slo=Slo(ttft_s=0.5 + index % 4, tpot_s=0.05),
        arrival_s=NOW_S,
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of one call."""

    median: float
    p99: float

    @classmethod
    def of(cls, times_s: list[float]) -> Cost:
        """Return the cost from single times."""
        ordered = sorted(times_s)
        return cls(1e6 * statistics.median(ordered), 1e6 * ordered[int(0.99 * len(ordered))])


def timed(call: Callable[[int], object], num_calls: int) -> Cost:
    """Return what a call with its number costs."""
    times_s = []
    for index in range(num_calls):
        started_s = time.perf_counter()
        call(index)
        times_s.append(time.perf_counter() - started_s)
    return Cost.of(times_s)


def decision_cost(policy: RoutingPolicy, fleet: Fleet, num_calls: int) -> Cost:
    """Return what one decision costs."""
    requests = [make_request(index) for index in range(num_calls)]

    def decide(index: int) -> RoutingDecision:
        request = requests[index]
        offered = fleet.offer(NOW_S, request.max_size)
        return policy.pick(request, fleet, offered, NOW_S)

    return timed(decide, num_calls)


def bookkeeping_costs(fleet: Fleet, num_queued: int, num_calls: int) -> dict[str, Cost]:
    """Return what the three events of a request cost together, and what a snapshot does."""
    draw = random.Random(1)
    snapshots = [make_snapshot(draw, num_queued) for _ in range(32)]
    requests = [make_request(index) for index in range(num_calls)]
    endpoint_ids = fleet.endpoint_ids

    def live(index: int) -> None:
        dispatch = fleet.begin_dispatch(
            endpoint_ids[index % len(endpoint_ids)], requests[index], NOW_S
        )
        fleet.note_first_token(dispatch)
        fleet.end_dispatch(dispatch)
        _ = fleet.figures

    def see(index: int) -> None:
        fleet.see(endpoint_ids[index % len(endpoint_ids)], snapshots[index % len(snapshots)])
        _ = fleet.figures

    return {"request": timed(live, num_calls), "snapshot": timed(see, num_calls)}


def main() -> None:
    """Run the benchmark."""
    arguments = argument_parser(__doc__).parse_args()
    num_calls = 300 if arguments.quick else 5000
    figures: dict[str, float] = {}

    def note(name: str, cost: Cost) -> None:
        figures[f"{name}_us_median"] = round(cost.median, 1)
        figures[f"{name}_us_p99"] = round(cost.p99, 1)
        print(f"{name:40} {cost.median:8.1f} us median {cost.p99:8.1f} us p99")

    for num_queued in (16, 64):
        fleet = make_fleet(num_queued, NUM_NODES)
        name = f"gorouting_{NUM_NODES}_nodes_{num_queued}_queued"
        note(name, decision_cost(GoRoutingPolicy(), fleet, num_calls))
        by_position = GoRoutingPolicy(GoRoutingOptions(estimate=GainEstimate.POSITION))
        note(f"{name}_by_position", decision_cost(by_position, fleet, num_calls))
        for event, cost in bookkeeping_costs(fleet, num_queued, num_calls).items():
            note(f"{event}_{num_queued}_queued", cost)
    few = make_fleet(16, num_nodes=4)
    note("gorouting_4_nodes_16_queued", decision_cost(GoRoutingPolicy(), few, num_calls))
    fleet = make_fleet(16, NUM_NODES)
    for name in OTHER_POLICIES:
        policy = RoutingConfig(policy=name).make_policy(CLASS_WEIGHTS)
        note(name.replace("-", "_"), decision_cost(policy, fleet, num_calls))
    with_prefixes = GoRoutingPolicy(GoRoutingOptions(prefix_reuse=True))
    note("gorouting_with_prefixes", decision_cost(with_prefixes, fleet, num_calls))
    report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
