from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from orchestrator.core.gain import GainTable, Outcome
from orchestrator.core.scheduler_factory import SchedulerName
from orchestrator.simulation.cluster import Replay, ReplayOptions, replay
from orchestrator.simulation.workload import Workload
from router.baselines import LeastLoadPolicy
from router.fleet import Flags, Fleet
from router.policy import RoutingDecision, RoutingRequest
from tests.factories import make_capabilities
from tests.orchestrator.simulation.workloads import make_node, make_trace, make_workload_of


def run(
    workload: Workload,
    *,
    scheduler: SchedulerName = "slide-batching",
    num_nodes: int = 1,
    num_device_blocks: int = 1000,
    max_drain_s: float = math.inf,
) -> Replay:
    return replay(
        workload,
        lambda index: make_node(
            workload,
            f"node-{index}",
            scheduler=scheduler,
            capabilities=make_capabilities(num_device_blocks=num_device_blocks),
        ),
        num_nodes=num_nodes,
        policy=LeastLoadPolicy(),
        options=ReplayOptions(max_drain_s=max_drain_s),
    )


def random_workload(num_requests: int, *, mean_gap_s: float, seed: int = 0) -> Workload:
    random = np.random.default_rng(seed)
    trace = make_trace(
        np.cumsum(random.exponential(mean_gap_s, num_requests)).tolist(),
        num_input_tokens=random.integers(1, 200, num_requests).tolist(),
        num_output_tokens=random.integers(1, 30, num_requests).tolist(),
    )
    return make_workload_of(trace, weights=random.choice([1.0, 2.0], num_requests).tolist())


def test_time_passes_as_the_steps_say() -> None:
    """A step takes 10 ms and 1 ms per token. Prefill of 10 from 1.0: token at 1.020.

    A decode is one token: 1.031 and 1.042. The second request comes during the first decode
    and is in the step from 1.031 on: 10 + 10 + 1 = 21 ms, tokens of both at 1.052.
    """
    workload = make_workload_of(make_trace([1.0, 1.025], num_output_tokens=[3, 1]))

    outcome = run(workload)

    assert outcome.records[0].token_times_s == pytest.approx([1.020, 1.031, 1.052])
    assert outcome.records[1].token_times_s == pytest.approx([1.052])
    assert outcome.end_s == pytest.approx(1.052)
    assert outcome.num_steps == 3


def test_an_idle_node_waits_for_the_next_request() -> None:
    workload = make_workload_of(make_trace([0.0, 100.0], num_output_tokens=1))

    outcome = run(workload)

    assert outcome.records[1].token_times_s == pytest.approx([100.020])
    assert outcome.busy_fraction == pytest.approx(0.040 / 100.020)


@pytest.mark.parametrize("scheduler", ["slide-batching", "fcfs"])
@pytest.mark.parametrize("num_nodes", [1, 3])
def test_every_request_gets_all_its_tokens_also_when_memory_is_short(
    scheduler: SchedulerName, num_nodes: int
) -> None:
    """20 blocks hold 320 tokens, little more than the largest request's 264."""
    workload = random_workload(60, mean_gap_s=0.01)

    outcome = run(workload, scheduler=scheduler, num_nodes=num_nodes, num_device_blocks=20)

    assert {record.outcome for record in outcome.records} == {Outcome.FINISHED}
    assert outcome.num_preemptions > 0


def test_equal_inputs_give_equal_results_to_the_last_bit() -> None:
    first, again = (run(random_workload(80, mean_gap_s=0.02), num_nodes=2) for _ in range(2))

    assert first == again


def test_requests_beyond_the_drain_limit_are_unfinished_and_counted() -> None:
    """2 s of work arrive at once, and 0.5 s later the account is closed."""
    workload = make_workload_of(make_trace([0.0] * 10, num_input_tokens=200, num_output_tokens=1))

    outcome = run(workload, max_drain_s=0.5)
    report = GainTable(outcome.records).report()

    assert report.num_requests == 10
    assert report.num_unfinished >= 7
    assert report.num_finished + report.num_unfinished == 10


def test_a_request_too_large_for_every_node_is_rejected_and_counted() -> None:
    """Ten blocks hold 160 tokens; the prompt alone has 200."""
    workload = make_workload_of(make_trace([0.0, 1.0], num_input_tokens=[200, 10]))

    outcome = run(workload, num_device_blocks=10)

    assert [r.outcome for r in outcome.records] == [Outcome.REJECTED, Outcome.FINISHED]
    assert GainTable(outcome.records).report().tdg_ratio == 0.5


@dataclass
class RecordingPolicy:
    """Sends everything to the first node and remembers what it was shown."""

    num_queued_tokens: list[list[float]] = field(default_factory=list)

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        self.num_queued_tokens.append(fleet.figures.num_queued_tokens.tolist())
        return RoutingDecision("node-0", None, "always the first")


def test_the_router_knows_dispatches_at_once_and_progress_at_the_next_snapshot() -> None:
    """Prompts of 10 at 0.000 and 0.015: the second sees the first as queued, as at its dispatch.

    The first has its token at 0.020. By the snapshot at 0.1 both have all three; the one at 0.15
    sees nothing queued.
    """
    workload = make_workload_of(make_trace([0.0, 0.015, 0.15]))
    policy = RecordingPolicy()

    replay(workload, lambda i: make_node(workload, f"node-{i}"), num_nodes=2, policy=policy)

    assert policy.num_queued_tokens == [[0, 0], [10, 0], [0, 0]]


def test_the_timeline_shows_more_urgent_requests_in_overload() -> None:
    relaxed = run(random_workload(100, mean_gap_s=2.0))
    overloaded = run(random_workload(100, mean_gap_s=0.001))

    def urgent_fraction(outcome: Replay) -> float:
        bins = outcome.timeline.values()
        num_urgent = sum(b.num_urgent for b in bins)
        return num_urgent / (num_urgent + sum(b.num_normal for b in bins))

    assert urgent_fraction(relaxed) < 0.2
    assert urgent_fraction(overloaded) > 0.5
