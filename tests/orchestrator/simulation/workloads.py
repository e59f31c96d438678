"""Short ways to make what tests of the simulation need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.simulated import SimulatedEngine
from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.scheduler_factory import SchedulerName, make_scheduler
from orchestrator.core.slo import PriorityClass, Slo
from orchestrator.simulation.cluster import Node
from orchestrator.simulation.trace import Trace
from orchestrator.simulation.workload import Workload
from tests.factories import make_capabilities, make_profile


def make_trace(
    arrival_s: Sequence[float],
    *,
    num_input_tokens: Sequence[int] | int = 10,
    num_output_tokens: Sequence[int] | int = 3,
    clients: Sequence[str] | None = None,
) -> Trace:
    shape = (len(arrival_s),)
    return Trace(
        np.array(arrival_s, dtype=np.float64),
        np.broadcast_to(np.array(num_input_tokens, dtype=np.int64), shape).copy(),
        np.broadcast_to(np.array(num_output_tokens, dtype=np.int64), shape).copy(),
        clients=tuple(clients or [""] * len(arrival_s)),
    )


def make_workload_of(
    trace: Trace,
    *,
    slo: Slo | None = None,
    weights: Sequence[float] | None = None,
    max_tokens: int = 64,
) -> Workload:
    """One class per request, of its own weight; by default all 1, due in 1 s and each 50 ms."""
    classes = tuple(
        PriorityClass(f"class-{i}", weight, slo or Slo(1.0, 0.050))
        for i, weight in enumerate(weights or [1.0] * len(trace))
    )
    return Workload(
        trace,
        max_tokens=np.full(len(trace), max_tokens),
        classes=classes,
        class_index=np.arange(len(trace)),
    )


def make_node(
    workload: Workload,
    endpoint_id: str = "node-0",
    *,
    scheduler: SchedulerName = "slide-batching",
    profile: LatencyProfile | None = None,
    capabilities: EngineCapabilities | None = None,
) -> Node:
    profile = profile or make_profile()
    capabilities = capabilities or make_capabilities()
    return Node(
        endpoint_id,
        make_scheduler(scheduler, None, capabilities, BatchLatencyModel(profile)),
        SimulatedEngine(
            capabilities, BatchLatencyModel(profile), output_lengths=workload.output_lengths()
        ),
    )
