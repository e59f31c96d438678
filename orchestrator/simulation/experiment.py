"""`proserve simulate`: every policy on every trace at every rate with every seed, in parallel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orchestrator.simulation.calibration import Calibration, calibrate
from orchestrator.simulation.config import SimulationConfig
from orchestrator.simulation.plots import write_plots
from orchestrator.simulation.results import Bound, Results, Run, write_results
from orchestrator.simulation.scenario import (
    figures_of,
    make_seeded_workload,
    replay_workload,
    upper_bound_of,
)
from orchestrator.simulation.workers import workers

QUICK_REQUESTS = 300
"""Per run of a quick simulation."""


@dataclass(frozen=True, slots=True)
class _Scene:
    """What is the same for all policies: a workload and the nodes."""

    config: SimulationConfig
    trace_index: int
    calibration: Calibration
    rate: float
    """In the configured unit."""

    seed: int

    @property
    def requests_per_s(self) -> float:
        knee_rate = self.calibration.knee_rate
        return self.rate if knee_rate is None else self.rate * knee_rate


def run_simulation(
    config: SimulationConfig,
    output_dir: Path,
    *,
    quick: bool = False,
    num_processes: int = 2,
    console: Console | None = None,
) -> Results:
    """Run a simulation, write `results.json`, `runs.csv` and plots, and return the results.

    What is written depends on the configuration and this code alone. `quick` shortens the
    simulation to one seed, three rates and a few hundred requests.

    Raises:
        ConfigError: a trace cannot be read or a scheduler's options do not fit the engine.
    """
    if quick:
        config = quick_version(config)
    traces = list(enumerate(config.traces))
    with workers(num_processes, console or Console(stderr=True)) as pool:
        calibrations = pool.do("calibrate", _calibrate, [(config, i) for i, _ in traces])
        scenes = [
            _Scene(config, index, calibrations[index], rate, seed)
            for index, _ in traces
            for rate in config.rates.values
            for seed in range(config.num_seeds)
        ]
        bounds = []
        if config.metrics.has_upper_bound:
            bounds = pool.do("upper bounds", _bound, scenes)
        runs = pool.do("simulate", _run, [(s, name) for s in scenes for name in config.policies])
    results = Results(
        config=config,
        calibrations={trace.name: calibrations[index] for index, trace in traces},
        runs=tuple(runs),
        bounds=tuple(bounds),
    )
    write_results(results, output_dir)
    write_plots(results, output_dir)
    return results


def quick_version(config: SimulationConfig) -> SimulationConfig:
    """Return a simulation of the same shape that is done within a minute or two."""
    rates = config.rates.values
    few_rates = sorted({rates[0], rates[len(rates) // 2], rates[-1]})
    few_requests = [min(t.num_requests or QUICK_REQUESTS, QUICK_REQUESTS) for t in config.traces]
    return config.model_copy(
        update={
            "num_seeds": 1,
            "rates": config.rates.model_copy(update={"values": tuple(few_rates)}),
            "traces": tuple(
                trace.model_copy(update={"num_requests": num_requests})
                for trace, num_requests in zip(config.traces, few_requests, strict=True)
            ),
        }
    )


def _calibrate(task: tuple[SimulationConfig, int]) -> Calibration:
    config, trace_index = task
    return calibrate(config, config.traces[trace_index])


def _bound(scene: _Scene) -> Bound:
    config, trace = scene.config, scene.config.traces[scene.trace_index]
    workload = make_seeded_workload(
        config,
        trace,
        slo=scene.calibration.slo,
        requests_per_s=scene.requests_per_s,
        seed=scene.seed,
    )
    bound = upper_bound_of(config, workload)
    return Bound(trace.name, scene.rate, scene.seed, bound.tdg_ratio)


def _run(task: tuple[_Scene, str]) -> Run:
    scene, policy_name = task
    config, trace = scene.config, scene.config.traces[scene.trace_index]
    workload = make_seeded_workload(
        config,
        trace,
        slo=scene.calibration.slo,
        requests_per_s=scene.requests_per_s,
        seed=scene.seed,
    )
    policy = config.policies[policy_name]
    outcome = replay_workload(config, policy, workload, engines=config.engines(), seed=scene.seed)
    figures = figures_of(config, workload, outcome)
    return Run(trace.name, policy_name, scene.rate, scene.requests_per_s, scene.seed, figures)
