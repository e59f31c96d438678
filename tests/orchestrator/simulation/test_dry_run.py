"""The simulator schedules what a node's executor loop would (specification 10.11)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from engines.simulated import SimulatedEngine
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import Scheduler, SchedulerOutput, StepOutput
from orchestrator.core.scheduler_factory import SchedulerName, make_scheduler
from orchestrator.executor import ExecutorLoop
from orchestrator.simulation.cluster import Node, replay
from orchestrator.simulation.workload import Workload
from router.baselines import LeastLoadPolicy
from tests.factories import make_capabilities, make_profile
from tests.orchestrator.simulation.test_cluster import random_workload

CAPABILITIES = make_capabilities(num_device_blocks=60)  # short, so that requests are preempted

Plan = tuple[tuple[str, ...], tuple[tuple[str, int, int, tuple[int, ...]], ...]]


@dataclass
class VirtualClock:
    time_s: float = 0.0

    def now_s(self) -> float:
        return self.time_s


class RecordingEngine(SimulatedEngine):
    """Writes down what it is asked, and lets the time of its steps pass."""

    def __init__(self, workload: Workload, clock: VirtualClock) -> None:
        super().__init__(
            CAPABILITIES,
            BatchLatencyModel(make_profile()),
            output_lengths=workload.output_lengths(),
        )
        self._clock = clock
        self.plans: list[Plan] = []

    def step(self, plan: SchedulerOutput) -> StepOutput:
        parts = [
            (p.request_id, p.num_computed_tokens, p.num_new_tokens, tuple(p.block_ids))
            for p in plan.scheduled
        ]
        self.plans.append((plan.preempted_ids, tuple(parts)))
        output = super().step(plan)
        self._clock.time_s += output.step_s
        return output


def scheduler_of(name: SchedulerName) -> Scheduler:
    return make_scheduler(name, None, CAPABILITIES, BatchLatencyModel(make_profile()))


def plans_of_the_simulator(workload: Workload, name: SchedulerName) -> list[Plan]:
    engine = RecordingEngine(workload, VirtualClock())
    node = Node("node-0", scheduler_of(name), engine)
    replay(workload, lambda _: node, num_nodes=1, policy=LeastLoadPolicy())
    return engine.plans


def plans_of_the_loop(workload: Workload, name: SchedulerName) -> list[Plan]:
    clock = VirtualClock()
    engine = RecordingEngine(workload, clock)
    loop = ExecutorLoop(
        scheduler_of(name), engine, clock=clock, emit=lambda _: None, report=lambda _: None
    )
    arrivals = [workload.request(index) for index in range(len(workload))]
    while arrivals or loop.has_requests:
        if not loop.has_requests:
            clock.time_s = max(clock.time_s, arrivals[0].arrival_s)
        while arrivals and arrivals[0].arrival_s <= clock.time_s:
            request = arrivals.pop(0)
            loop.add(request.spec, request.arrival_s)
        loop.run_step()
    return engine.plans


@pytest.mark.parametrize("scheduler", ["slide-batching", "sarathi-priority", "weighted-vtc"])
def test_the_same_requests_get_the_same_steps_in_simulator_and_loop(
    scheduler: SchedulerName,
) -> None:
    workload = random_workload(150, mean_gap_s=0.05, seed=3)

    simulated = plans_of_the_simulator(workload, scheduler)
    looped = plans_of_the_loop(workload, scheduler)

    assert any(preempted_ids for preempted_ids, _ in simulated), "memory was not short"
    assert simulated == looped
