"""One run: a part of a trace at a rate under a policy, from configuration to figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.host_link import HostLink
from engines.simulated import SimulatedEngine
from orchestrator.core.gain import GainReport, GainTable, MeasurementWindow
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.scheduler_factory import make_scheduler
from orchestrator.core.slo import Slo
from orchestrator.simulation.cluster import (
    TIMELINE_BIN_S,
    CopyTotals,
    Node,
    Replay,
    ReplayOptions,
    TimelineBin,
    replay,
)
from orchestrator.simulation.config import SimulationConfig, TraceConfig
from orchestrator.simulation.engine_config import EngineConfig
from orchestrator.simulation.policy_config import PolicyConfig
from orchestrator.simulation.trace import (
    Trace,
    at_rate,
    capped,
    part_of,
    read_trace,
    with_bursts,
)
from orchestrator.simulation.upper_bound import UpperBound, gain_upper_bound
from orchestrator.simulation.workload import SharedPrefix, Workload, make_workload

_TIMELINESS = {True: "in_time", False: "late"}


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """The state of the nodes in one stretch of time."""

    start_s: float
    urgent_fraction: float
    """Share of the queues on the urgent side of the boundary, over all steps."""

    mean_num_requests: float
    """Live requests per node and step."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What one run gave."""

    report: GainReport
    by_class: dict[str, GainReport]
    by_client: dict[str, GainReport]
    """Empty where the trace knows no clients."""

    end_s: float
    num_steps: int
    num_preemptions: int
    num_computed_tokens: int
    copies: CopyTotals
    predictions: dict[str, int]
    """What the router expected of first tokens and what came, `in_time/late` for example ->
    requests that got one; empty if the router does not estimate."""

    busy_fraction: float
    timeline: tuple[TimelinePoint, ...]


def load_part(config: SimulationConfig, trace_config: TraceConfig, seed: int) -> tuple[Trace, int]:
    """Return a seed's part of a trace with capped lengths, and how many requests were capped."""
    trace = read_trace(trace_config.file)
    num_requests = min(trace_config.num_requests or len(trace), len(trace))
    # Another stream than the priorities', so that neither changes with the other.
    random = np.random.default_rng([seed, 0])
    start = int(random.integers(len(trace) - num_requests + 1))
    return capped(
        part_of(trace, num_requests, start),
        max_model_len=config.engine.max_model_len,
        max_output_tokens=trace_config.max_output_tokens,
    )


def make_seeded_workload(
    config: SimulationConfig,
    trace_config: TraceConfig,
    *,
    slo: Slo,
    requests_per_s: float,
    seed: int,
) -> Workload:
    """Return the requests of one run; the same for every policy."""
    trace, _ = load_part(config, trace_config, seed)
    workload = make_workload(
        with_bursts(at_rate(trace, requests_per_s), config.bursts),
        config.priorities.shares(slo),
        per=config.priorities.per,
        max_model_len=config.engine.max_model_len,
        max_output_tokens=trace_config.max_output_tokens,
        random=np.random.default_rng([seed, 1]),
    )
    shared = trace_config.shared_prefix
    if shared is None:
        return workload
    drawn = np.random.default_rng([seed, 2]).integers(shared.num_prefixes, size=len(workload))
    return replace(workload, shared_prefix=SharedPrefix(drawn, shared.num_tokens))


def replay_workload(
    config: SimulationConfig,
    policy: PolicyConfig,
    workload: Workload,
    *,
    engines: Sequence[EngineConfig],
    seed: int,
) -> Replay:
    """Run a workload under a policy on new nodes, one for each of `engines`."""
    output_lengths = workload.output_lengths()
    max_drain_s = config.metrics.max_drain_s
    routing = config.routing_of(policy)

    def make_node(index: int) -> Node:
        engine = engines[index]
        capabilities, model = engine.capabilities(), BatchLatencyModel(engine.profile)
        scheduler = make_scheduler(policy.scheduler, policy.options, capabilities, model)
        scheduler.use_kv_options(policy.kv_cache, engine.copies)
        return Node(
            endpoint_id=f"node-{index:03d}",
            scheduler=scheduler,
            engine=SimulatedEngine(
                capabilities,
                BatchLatencyModel(engine.profile),
                output_lengths=output_lengths,
                # Every node of every run draws its own noise, the same under every policy.
                error=replace(engine.error, seed=engine.error.seed + 1000 * seed + index),
                link=None if engine.copies is None else HostLink(engine.copies),
            ),
        )

    return replay(
        workload,
        make_node,
        num_nodes=len(engines),
        policy=routing.make_policy(config.class_weights),
        options=ReplayOptions(
            snapshot_interval_s=config.router.snapshot_interval_s,
            drain=routing.estimates,
            max_drain_s=math.inf if max_drain_s is None else max_drain_s,
        ),
    )


def counted_window(config: SimulationConfig, workload: Workload) -> MeasurementWindow:
    """Return the arrivals that count; the same for every policy."""
    return MeasurementWindow.of_arrivals(
        workload.trace.arrival_s,
        warmup_fraction=config.metrics.warmup_fraction,
        drain_fraction=config.metrics.drain_fraction,
    )


def figures_of(config: SimulationConfig, workload: Workload, outcome: Replay) -> RunFigures:
    """Return the figures of a replayed workload."""
    table = GainTable(outcome.records, config.metrics.gain_weights)
    window = counted_window(config, workload)
    has_clients = any(workload.trace.clients)
    return RunFigures(
        report=table.report(window),
        by_class=table.by_class(window),
        by_client=table.by_client(window) if has_clients else {},
        end_s=outcome.end_s,
        num_steps=outcome.num_steps,
        num_preemptions=outcome.num_preemptions,
        num_computed_tokens=outcome.num_computed_tokens,
        copies=outcome.copies,
        predictions={
            f"{_TIMELINESS[predicted]}/{_TIMELINESS[actual]}": count
            for (predicted, actual), count in sorted(outcome.predictions.items())
        },
        busy_fraction=outcome.busy_fraction,
        timeline=_timeline_points(sorted(outcome.timeline.items())),
    )


def upper_bound_of(config: SimulationConfig, workload: Workload) -> UpperBound:
    """Return what no policy can exceed on the counted requests of a workload; nodes are alike."""
    window = counted_window(config, workload)
    arrival_s = workload.trace.arrival_s
    profile = config.engine.profile
    bias = config.engine.error.bias
    return gain_upper_bound(
        workload,
        # What the engine truly takes.
        type(profile)(**{name: value * bias for name, value in profile.to_dict().items()}),
        config.engine.capabilities(),
        num_nodes=len(config.engines()),
        is_counted=(window.start_s <= arrival_s) & (arrival_s <= window.end_s),
        gain_weights=config.metrics.gain_weights,
    )


def _timeline_points(bins: Sequence[tuple[int, TimelineBin]]) -> tuple[TimelinePoint, ...]:
    points = []
    for index, step_bin in bins:
        num_requests = step_bin.num_urgent + step_bin.num_normal
        points.append(
            TimelinePoint(
                start_s=index * TIMELINE_BIN_S,
                urgent_fraction=step_bin.num_urgent / num_requests if num_requests else 0.0,
                mean_num_requests=num_requests / step_bin.num_steps,
            )
        )
    return tuple(points)
