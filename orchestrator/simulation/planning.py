"""`proserve plan`: the fewest nodes that meet a target on a trace."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from orchestrator.core.errors import ConfigError
from orchestrator.core.slo import Slo
from orchestrator.simulation.calibration import calibrate
from orchestrator.simulation.config import SimulationConfig, TraceConfig
from orchestrator.simulation.experiment import quick_version
from orchestrator.simulation.scenario import figures_of, make_seeded_workload, replay_workload
from orchestrator.simulation.workers import workers


@dataclass(frozen=True, slots=True)
class NodePlan:
    """How many nodes a policy needs on a trace."""

    trace: str
    policy: str
    num_nodes: int | None
    """None if even `max_nodes` are too few."""

    tried: dict[int, float]
    """Number of nodes -> the metric of the worst-served class, mean over seeds."""


_PlanTask = tuple[SimulationConfig, TraceConfig, Slo, str]
"""Configuration, trace, its objectives and the policy's name."""


def plan_nodes(
    config: SimulationConfig,
    *,
    quick: bool = False,
    num_processes: int = 2,
    console: Console | None = None,
) -> list[NodePlan]:
    """Return the fewest nodes for every trace and policy of a simulation with a `plan` section.

    The search takes for granted that more nodes never serve worse.

    Raises:
        ConfigError: the configuration has no `plan`.
    """
    if config.plan is None:
        raise ConfigError("there is no `plan` section that says what the nodes must achieve")
    if quick:
        config = quick_version(config)
    # Objectives are one node's, whatever the number of nodes; no knee is needed.
    rates = config.rates.model_copy(update={"unit": "requests_per_s"})
    config = config.model_copy(update={"rates": rates})
    with workers(num_processes, console or Console(stderr=True)) as pool:
        slos = pool.do("calibrate", _slo, [(config, trace) for trace in config.traces])
        tasks = [
            (config, trace, slo, policy)
            for trace, slo in zip(config.traces, slos, strict=True)
            for policy in config.policies
        ]
        return pool.do("plan", _plan, tasks)


def _slo(task: tuple[SimulationConfig, TraceConfig]) -> Slo:
    return calibrate(*task).slo


def _plan(task: _PlanTask) -> NodePlan:
    config, trace, _, policy = task
    assert config.plan is not None
    target, max_nodes = config.plan.target, config.plan.max_nodes
    tried: dict[int, float] = {}

    def is_enough(num_nodes: int) -> bool:
        tried[num_nodes] = _worst_class(task, num_nodes)
        return tried[num_nodes] >= target

    too_few, enough = 0, 1
    while not is_enough(enough):
        if enough == max_nodes:
            return NodePlan(trace.name, policy, None, tried)
        too_few, enough = enough, min(2 * enough, max_nodes)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
    return NodePlan(trace.name, policy, enough, tried)


def _worst_class(task: _PlanTask, num_nodes: int) -> float:
    config, trace, slo, policy = task
    assert config.plan is not None
    values: dict[str, list[float]] = {}
    engines = [config.engine] * num_nodes
    for seed in range(config.num_seeds):
        workload = make_seeded_workload(
            config, trace, slo=slo, requests_per_s=config.plan.requests_per_s, seed=seed
        )
        outcome = replay_workload(
            config, config.policies[policy], workload, engines=engines, seed=seed
        )
        for name, report in figures_of(config, workload, outcome).by_class.items():
            values.setdefault(name, []).append(getattr(report, config.plan.metric))
    return min(sum(v) / len(v) for v in values.values())
