"""The report of `proserve bench`: one HTML file with everything in it."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from orchestrator.command_line.bench import VariantRun
from orchestrator.core.gain import GainReport, GainTable
from orchestrator.core.slo import GainWeights, token_deadline_s

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #bbb; }
th:first-child, td:first-child { text-align: left; }
pre { background: #8881; padding: .8rem; overflow-x: auto; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; background: #fff; }
:root { color-scheme: light dark; }
"""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the runs had in common, in words."""

    command: Sequence[str]
    deployment: str
    trace: str
    load: str
    machine: str
    made_at: str


def html_report(runs: Sequence[VariantRun], conditions: Conditions) -> str:
    """Return the page. It loads nothing from elsewhere."""
    tables = {run.variant.name: GainTable(run.records) for run in runs}
    best = max(tables, key=lambda name: tables[name].report().tdg_ratio)
    facts = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in (
            ("deployment", conditions.deployment),
            ("trace", conditions.trace),
            ("load", conditions.load),
            ("machine", conditions.machine),
            ("made", conditions.made_at),
        )
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>proserve bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><h1>{escape(" against ".join(tables))}</h1>
<p>Most gain: <strong>{escape(best)}</strong>.</p>
<h2>In numbers</h2>{_summary(tables)}
<h2>By class</h2>{_by_class(tables)}
<figure>{_svg(_bars(tables))}<figcaption>Captured of possible gain, and attainment, by class
</figcaption></figure>
<figure>{_svg(_gain_over_time(runs))}<figcaption>Gain over time</figcaption></figure>
<h2>Conditions</h2><table>{facts}</table>
<h2>To repeat it</h2><pre>{escape(shlex.join(conditions.command))}</pre>
</body></html>
"""


def _summary(tables: dict[str, GainTable]) -> str:
    rows = [(name, table.report()) for name, table in tables.items()]
    return _table(
        ("variant", "TDG ratio", "SLO attainment", "TTFT p50, s", "TTFT p99, s", "TPOT p50, s",
         "tokens/s", "failed"),
        [
            (
                name,
                f"{found.tdg_ratio:.3f}",
                f"{found.slo_attainment:.3f}",
                *_latencies(found),
                f"{found.tokens_per_s or 0:.1f}",
                f"{found.num_failed:,}",
            )
            for name, found in rows
        ],
    )  # fmt: skip


def _latencies(found: GainReport) -> tuple[str, str, str]:
    ttft, tpot = found.ttft_s, found.tpot_s
    return (
        "-" if ttft is None else f"{ttft.p50:.3f}",
        "-" if ttft is None else f"{ttft.p99:.3f}",
        "-" if tpot is None else f"{tpot.p50:.3f}",
    )


def _by_class(tables: dict[str, GainTable]) -> str:
    return _table(
        ("variant", "class", "requests", "TDG ratio", "SLO attainment"),
        [
            (name, each, f"{found.num_requests:,}", f"{found.tdg_ratio:.3f}",
             f"{found.slo_attainment:.3f}")
            for name, table in tables.items()
            for each, found in table.by_class().items()
        ],
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _bars(tables: dict[str, GainTable]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(tables)
    for place, (name, table) in enumerate(tables.items()):
        by_class = table.by_class()
        positions = np.arange(len(by_class)) + place * width
        for axis, values in zip(
            axes,
            (
                [found.tdg_ratio for found in by_class.values()],
                [found.slo_attainment for found in by_class.values()],
            ),
            strict=True,
        ):
            axis.bar(positions, values, width, label=name)
            axis.set_xticks(np.arange(len(by_class)) + 0.4 - width / 2, list(by_class))
    for axis, title in zip(axes, ("TDG ratio", "SLO attainment"), strict=True):
        axis.set(title=title, ylim=(0, 1.02))
    axes[0].legend()
    return figure


def _gain_over_time(runs: Sequence[VariantRun]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        started_s = min(record.arrival_s for record in run.records)
        earned = sorted(
            (at_s - started_s, record.weight * GainWeights().of_token(index))
            for record in run.records
            for index, at_s in enumerate(record.token_times_s)
            if at_s < token_deadline_s(record.slo, index, arrival_s=record.arrival_s)
        )
        times = np.array([0.0, *(at_s for at_s, _ in earned)])
        axis.step(times, np.cumsum([0.0, *(gain for _, gain in earned)]), label=run.variant.name)
    axis.set(xlabel="seconds", ylabel="gain captured", xlim=(0, None), ylim=(0, None))
    axis.legend()
    return figure


def _svg(figure: Figure) -> str:
    target = io.StringIO()
    # Text stays text, and the same figures give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "proserve"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
