"""The plots of a simulation, as PNG and SVG; the only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.simulation.results import Results, slo_attainment, tdg_ratio
from orchestrator.simulation.scenario import RunFigures

RATE_LABELS = {"knee": "rate, in times of the knee", "requests_per_s": "rate, requests/s"}


def write_plots(results: Results, output_dir: Path) -> None:
    """Write, for each trace, a sweep, bars per class and a timeline."""
    # A fixed salt and no date: equal results give equal files.
    with mpl.rc_context({"svg.hashsalt": "proserve", "svg.fonttype": "none"}):
        for trace in results.calibrations:
            _save(_sweep(results, trace), output_dir / f"{trace}-sweep")
            _save(_classes(results, trace), output_dir / f"{trace}-classes")
            _save(_timeline(results, trace), output_dir / f"{trace}-timeline")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=120, metadata={"Software": None})
    figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})


def _sweep(results: Results, trace: str) -> Figure:
    """Gain ratio and SLO attainment over the rate, one line per policy with 95 % intervals."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    rates = results.config.rates.values
    for axis, figure_of, label in (
        (axes[0], tdg_ratio, "TDG ratio"),
        (axes[1], slo_attainment, "SLO attainment"),
    ):
        for policy in results.config.policies:
            _line(axis, results, trace, policy, figure_of)
        axis.set(xlabel=RATE_LABELS[results.config.rates.unit], ylabel=label, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    bounds = [results.bound(trace=trace, rate=rate) for rate in rates]
    means = [bound.mean for bound in bounds if bound is not None]
    if means:
        axes[0].plot(rates, means, color="black", linestyle=":", label="upper bound")
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{trace}. {results.config.description}".strip(), fontsize="medium")
    return figure


def _line(
    axis: Axes,
    results: Results,
    trace: str,
    policy: str,
    figure_of: Callable[[RunFigures], float],
) -> None:
    rates = results.config.rates.values
    points = [results.estimate(figure_of, trace=trace, policy=policy, rate=r) for r in rates]
    axis.errorbar(
        rates,
        [point.mean for point in points],
        yerr=[point.half_width or 0.0 for point in points],
        marker="o",
        markersize=3,
        capsize=2,
        label=policy,
    )


def _classes(results: Results, trace: str) -> Figure:
    """SLO attainment of each service class under each policy, one panel per rate."""
    config = results.config
    names = [c.name for c in config.priorities.classes]
    rates = config.rates.values
    figure = Figure(figsize=(2.2 * len(rates) + 2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    width = 0.8 / len(names)
    for axis, rate in zip(panels, rates, strict=True):
        for offset, name in enumerate(names):

            def attained(figures: RunFigures, name: str = name) -> float:
                report = figures.by_class.get(name)
                return 1.0 if report is None else report.slo_attainment

            points = [
                results.estimate(attained, trace=trace, policy=policy, rate=rate)
                for policy in config.policies
            ]
            axis.bar(
                [position + offset * width for position in range(len(points))],
                [point.mean for point in points],
                width,
                yerr=[point.half_width or 0.0 for point in points],
                label=name,
            )
        middle = width * (len(names) - 1) / 2
        axis.set_xticks([p + middle for p in range(len(config.policies))])
        axis.set_xticklabels(list(config.policies), rotation=90, fontsize="small")
        axis.set(title=f"{rate:g}", ylim=(0, 1.02))
    panels[0].set_ylabel("SLO attainment")
    panels[0].legend(fontsize="small")
    title = f"{trace}: by class, panels by {RATE_LABELS[config.rates.unit]}"
    figure.suptitle(title, fontsize="medium")
    return figure


def _timeline(results: Results, trace: str) -> Figure:
    """Queue length and urgent share over time at the highest rate, first seed."""
    config = results.config
    figure = Figure(figsize=(10, 5), layout="constrained")
    queue, urgent = figure.subplots(2, 1, sharex=True)
    for run in results.runs:
        if (run.trace, run.rate, run.seed) != (trace, config.rates.values[-1], 0):
            continue
        points = run.figures.timeline
        start_s = [point.start_s for point in points]
        queue.plot(start_s, [p.mean_num_requests for p in points], label=run.policy)
        # Only schedulers that place a boundary have anybody urgent.
        if any(point.urgent_fraction > 0 for point in points):
            urgent.plot(start_s, [p.urgent_fraction for p in points], label=run.policy)
    for burst in config.bursts:
        for axis in (queue, urgent):
            axis.axvspan(burst.start_s, burst.start_s + burst.duration_s, alpha=0.15)
    queue.set(ylabel="live requests per node")
    queue.legend(fontsize="small")
    urgent.set(ylabel="share urgent", xlabel="seconds", ylim=(-0.02, 1.02))
    rate = config.rates.values[-1]
    title = f"{trace}: the sliding boundary, {RATE_LABELS[config.rates.unit]}: {rate:g}"
    figure.suptitle(title, fontsize="medium")
    return figure
