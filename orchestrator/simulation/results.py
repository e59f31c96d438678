"""The results of a simulation, and the files they are kept in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.core.gain import GainReport, Percentiles
from orchestrator.simulation.calibration import Calibration
from orchestrator.simulation.config import SimulationConfig
from orchestrator.simulation.scenario import RunFigures


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one workload."""

    trace: str
    policy: str
    rate: float
    """In the configured unit."""

    requests_per_s: float
    seed: int
    figures: RunFigures


@dataclass(frozen=True, slots=True)
class Bound:
    """What no policy can exceed on one workload."""

    trace: str
    rate: float
    seed: int
    tdg_ratio: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Of its 95 % confidence interval (Student's t); None with a single seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from one value per seed."""
        num_values = len(values)
        mean = float(np.mean(values))
        if num_values < 2:
            return cls(mean, None)
        from scipy.special import stdtrit

        error = float(np.std(values, ddof=1)) / num_values**0.5
        return cls(mean, float(stdtrit(num_values - 1, 0.975)) * error)


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a simulation found."""

    config: SimulationConfig
    calibrations: dict[str, Calibration]
    """By the trace's name."""

    runs: tuple[Run, ...]
    bounds: tuple[Bound, ...]
    """Empty if they were not asked for."""

    def estimate(
        self, figure: Callable[[RunFigures], float], *, trace: str, policy: str, rate: float
    ) -> Estimate:
        """Return a figure's mean over the seeds of one point of the sweep."""
        return Estimate.of(
            [
                figure(run.figures)
                for run in self.runs
                if (run.trace, run.policy, run.rate) == (trace, policy, rate)
            ]
        )

    def bound(self, *, trace: str, rate: float) -> Estimate | None:
        """Return the mean upper bound of one point of the sweep; None if there is none."""
        ratios = [b.tdg_ratio for b in self.bounds if (b.trace, b.rate) == (trace, rate)]
        return Estimate.of(ratios) if ratios else None


def tdg_ratio(figures: RunFigures) -> float:
    """Return the captured share of the obtainable gain."""
    return figures.report.tdg_ratio


def slo_attainment(figures: RunFigures) -> float:
    """Return the share of requests whose objectives were met."""
    return figures.report.slo_attainment


def write_results(results: Results, output_dir: Path) -> None:
    """Write `results.json` (everything) and `runs.csv` (one line per run and class)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    config = results.config.model_dump(mode="json")
    content = {
        "config": config,
        "calibrations": {name: asdict(c) for name, c in results.calibrations.items()},
        "summary": list(_summary(results)),
        "bounds": [asdict(bound) for bound in results.bounds],
        "runs": [asdict(run) for run in results.runs],
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    (output_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    rows = list(_csv_rows(results.runs))
    with (output_dir / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _summary(results: Results) -> Iterator[dict[str, Any]]:
    for trace in results.calibrations:
        for rate in results.config.rates.values:
            bound = results.bound(trace=trace, rate=rate)
            for policy in results.config.policies:
                ratio = results.estimate(tdg_ratio, trace=trace, policy=policy, rate=rate)
                attained = results.estimate(slo_attainment, trace=trace, policy=policy, rate=rate)
                yield {
                    "trace": trace,
                    "rate": rate,
                    "policy": policy,
                    "tdg_ratio": asdict(ratio),
                    "slo_attainment": asdict(attained),
                    "upper_bound": None if bound is None else asdict(bound),
                    "share_of_bound": None if bound is None else ratio.mean / bound.mean,
                }


def _csv_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        figures = run.figures
        for name, report in {"all": figures.report, **figures.by_class}.items():
            yield {
                "trace": run.trace,
                "policy": run.policy,
                "rate": run.rate,
                "requests_per_s": run.requests_per_s,
                "seed": run.seed,
                "class": name,
                **_columns(report),
                "num_steps": figures.num_steps,
                "num_preemptions": figures.num_preemptions,
                "num_computed_tokens": figures.num_computed_tokens,
                **asdict(figures.copies),
                "busy_fraction": figures.busy_fraction,
            }


def _columns(report: GainReport) -> dict[str, Any]:
    """Return a report with its percentiles spread over columns, empty where there are none."""
    columns: dict[str, Any] = {}
    for f in fields(report):
        value = getattr(report, f.name)
        if f.name in ("ttft_s", "tpot_s", "tbt_s"):
            for part in fields(Percentiles):
                part_name = f"{part.name}_{f.name}"
                columns[part_name] = "" if value is None else getattr(value, part.name)
        else:
            columns[f.name] = "" if value is None else value
    return columns
