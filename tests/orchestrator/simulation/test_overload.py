"""Overload that lasts: nobody is forgotten, and helping the late costs little."""

from __future__ import annotations

import numpy as np

from engines.simulated import SimulatedEngine
from orchestrator.core.gain import GainTable, Outcome
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from orchestrator.simulation.cluster import Node, Replay, replay
from orchestrator.simulation.workload import Workload
from router.baselines import LeastLoadPolicy
from tests.factories import make_capabilities, make_profile
from tests.orchestrator.simulation.workloads import make_trace, make_workload_of

PREFILL_TOKEN_S, DECODE_TOKEN_S, OVERLOAD_S = 2e-4, 4e-4, 60.0
PROFILE = make_profile(
    prefill_token_s=PREFILL_TOKEN_S, decode_token_s=DECODE_TOKEN_S, step_constant_s=5e-3
)


def overload(factor: float) -> Workload:
    """60 s in which `factor` seconds of work arrive each second, not counting step constants."""
    random = np.random.default_rng(7)
    num_input, num_output = random.integers(50, 500, 4000), random.integers(5, 60, 4000)
    work_s = np.cumsum(num_input * PREFILL_TOKEN_S + num_output * DECODE_TOKEN_S)
    num_requests = int(np.searchsorted(work_s, factor * OVERLOAD_S))
    arrival_s = np.sort(random.uniform(0.0, OVERLOAD_S, num_requests))
    trace = make_trace(
        arrival_s.tolist(),
        num_input_tokens=num_input[:num_requests].tolist(),
        num_output_tokens=num_output[:num_requests].tolist(),
    )
    return make_workload_of(trace, weights=random.choice([1.0, 2.0], num_requests).tolist())


def run(workload: Workload, *, starvation_quota: float) -> Replay:
    def make_node(index: int) -> Node:
        capabilities = make_capabilities(num_device_blocks=4000)
        options = SlideBatchingOptions(starvation_quota=starvation_quota)
        return Node(
            f"node-{index}",
            SlideBatchingScheduler(capabilities, BatchLatencyModel(PROFILE), options),
            SimulatedEngine(
                capabilities, BatchLatencyModel(PROFILE), output_lengths=workload.output_lengths()
            ),
        )

    return replay(workload, make_node, num_nodes=1, policy=LeastLoadPolicy())


def longest_wait_s(outcome: Replay) -> float:
    return max(record.token_times_s[0] - record.arrival_s for record in outcome.records)


def test_a_minute_of_twice_the_load_costs_no_request_and_little_gain() -> None:
    workload = overload(2.0)
    default_quota = SlideBatchingOptions().starvation_quota

    helped = run(workload, starvation_quota=default_quota)
    unhelped = run(workload, starvation_quota=0.0)

    for outcome in (helped, unhelped):
        assert {record.outcome for record in outcome.records} == {Outcome.FINISHED}
        for index, record in enumerate(outcome.records):
            assert len(record.token_times_s) == workload.trace.num_output_tokens[index]
    gain = GainTable(helped.records).report().tdg_ratio
    gain_unhelped = GainTable(unhelped.records).report().tdg_ratio
    assert gain_unhelped < 0.95, "this is no overload"
    assert gain > gain_unhelped - 0.05
    # The quota is not for nothing: whoever waits longest waits less.
    assert longest_wait_s(helped) < longest_wait_s(unhelped)
