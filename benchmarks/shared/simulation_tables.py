"""Prints a simulation as Markdown tables, and condenses its results to what a page needs.

    python -m benchmarks.shared.simulation_tables RESULTS.json [--summary SUMMARY.json]
        [--reference POLICY] [--leader POLICY]

`--reference` adds how much gain each policy misses, in units of what this one misses; `--leader`
how many points this policy is ahead of each other one, seed by seed.
`--summary` writes the configuration, the calibrations and the means over seeds, without the single
runs: those come out of the configuration again, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from orchestrator.simulation.results import Estimate

SUBJECT = "slide-batching"

IN_USE = ("vllm-fcfs", "sarathi-fcfs", "sarathi-priority", "weighted-vtc", "fair-batching")
"""Schedulers that people run or that the paper compares with; the others are single orders that
SlideBatching is made of (deadline, job length, density)."""

LOW_LOAD, OVERLOAD = 0.6, 1.2
"""In knees."""

Cells = dict[tuple[str, float], dict[str, Any]]


def tables(results: dict[str, Any]) -> str:
    """Return, per trace, a table of TDG_Ratio / SLO attainment by policy and rate."""
    rates, policies = results["config"]["rates"]["values"], list(results["config"]["policies"])
    parts = []
    for trace, calibration in results["calibrations"].items():
        cells = _cells(results, trace)
        knee, slo = calibration.get("knee_rate"), calibration["slo"]
        heading = "" if knee is None else f", knee {knee:.3g} requests/s"
        parts.append(
            f"**{trace}**{heading}; TTFT {slo['ttft_s']:.2f} s, TPOT {1e3 * slo['tpot_s']:.0f} ms\n"
        )
        parts.append("| policy | " + " | ".join(_load(results, rate) for rate in rates) + " |")
        parts.append("|---|" + "---|" * len(rates))
        for policy in policies:
            row = [_shown(cells[policy, rate]) for rate in rates]
            parts.append(f"| {policy} | " + " | ".join(row) + " |")
        bounds = [cells[policies[0], rate]["upper_bound"] for rate in rates]
        if all(bounds):
            parts.append("| upper bound | " + " | ".join(f"{b['mean']:.3f}" for b in bounds) + " |")
        parts.append("")
    return "\n".join(parts)


def findings(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, per trace, how SlideBatching stands: one flat row of figures."""
    config = results["config"]
    rates = config["rates"]["values"]
    others = [policy for policy in config["policies"] if policy != SUBJECT]
    in_use = [policy for policy in others if policy in IN_USE]
    rows = []
    for trace in results["calibrations"]:
        cells = _cells(results, trace)
        row: dict[str, Any] = {"trace": trace}
        for name in ("tdg_ratio", "slo_attainment"):
            row[f"{name}_over_in_use"] = _best_lead(cells, name, rates, in_use)
            row[f"{name}_over_all"] = _best_lead(cells, name, rates, others)
        row["points_over_sarathi_at_low_load"] = min(
            100 * (_mean(cells, SUBJECT, rate, name) - _mean(cells, "sarathi-fcfs", rate, name))
            for rate in rates
            if rate <= LOW_LOAD
            for name in ("tdg_ratio", "slo_attainment")
        )
        row["attainment_by_class_in_overload"] = _by_class(results, trace)
        rows.append(row)
    return rows


def findings_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the findings as a Markdown table."""
    lines = [
        "| trace | TDG_Ratio, best in use | TDG_Ratio, best of all | attainment, best in use | "
        "attainment, best of all | low load | high / low at 1.2 x |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        leads = [
            f"{100 * lead['relative']:+.1f} % at {lead['rate']:g} x ({lead['rival']})"
            for lead in (
                row["tdg_ratio_over_in_use"],
                row["tdg_ratio_over_all"],
                row["slo_attainment_over_in_use"],
                row["slo_attainment_over_all"],
            )
        ]
        classes = row["attainment_by_class_in_overload"]
        shares = " / ".join(f"{classes[name]:.3f}" for name in sorted(classes))
        low = row["points_over_sarathi_at_low_load"]
        lines.append(f"| {row['trace']} | " + " | ".join(leads) + f" | {low:+.1f} | {shares} |")
    return "\n".join(lines)


def misses(results: dict[str, Any], reference: str) -> str:
    """Return a table of (1 - TDG_Ratio) / (1 - TDG_Ratio of the reference), means over seeds;
    a dash where the reference misses less than a thousandth, too little to divide by."""
    rates, policies = results["config"]["rates"]["values"], list(results["config"]["policies"])
    columns = [(trace, rate) for trace in results["calibrations"] for rate in rates]
    lines = [
        "| policy | " + " | ".join(f"{trace}, {rate:g} x" for trace, rate in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for policy in policies:
        row = []
        for trace, rate in columns:
            cells = _cells(results, trace)
            least, missed = (
                1 - _mean(cells, name, rate, "tdg_ratio") for name in (reference, policy)
            )
            row.append(f"{missed / least:.2f}" if least >= 0.001 else "-")
        lines.append(f"| {policy} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def leads(results: dict[str, Any], leader: str) -> list[dict[str, Any]]:
    """Return, per trace, rival and rate, by how many points of TDG_Ratio the leader is ahead: the
    mean over seeds and the half width of its 95 % interval. Every seed's requests are the same for
    both, so the differences vary less than the values do."""
    ratios = {
        (run["trace"], run["policy"], run["rate"], run["seed"]): run["figures"]["report"][
            "tdg_ratio"
        ]
        for run in results["runs"]
    }
    rows = []
    for trace in results["calibrations"]:
        for rival in results["config"]["policies"]:
            for rate in results["config"]["rates"]["values"]:
                points = [
                    100 * (ratio - ratios[trace, rival, rate, seed])
                    for (of_trace, policy, of_rate, seed), ratio in ratios.items()
                    if (of_trace, policy, of_rate) == (trace, leader, rate)
                ]
                estimate = Estimate.of(points)
                row = {"trace": trace, "rival": rival, "rate": rate, "points": estimate.mean}
                rows.append({**row, "half_width": estimate.half_width})
    return [row for row in rows if row["rival"] != leader]


def leads_table(results: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """Return the leads as a Markdown table; bold where the interval is above or below zero."""
    rates = results["config"]["rates"]["values"]
    lines = [
        "| ahead of | " + " | ".join(_load(results, rate) for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    shown: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        half_width = row["half_width"]
        text = f"{row['points']:+.1f}" + ("" if half_width is None else f"±{half_width:.1f}")
        is_clear = half_width is not None and abs(row["points"]) > half_width
        shown[row["trace"], row["rival"]].append(f"**{text}**" if is_clear else text)
    lines += [f"| {rival} | " + " | ".join(texts) + " |" for (_, rival), texts in shown.items()]
    return "\n".join(lines)


def _load(results: dict[str, Any], rate: float) -> str:
    return f"{rate:g} x" if results["config"]["rates"]["unit"] == "knee" else f"{rate:g}/s"


def _cells(results: dict[str, Any], trace: str) -> Cells:
    return {(s["policy"], s["rate"]): s for s in results["summary"] if s["trace"] == trace}


def _mean(cells: Cells, policy: str, rate: float, name: str) -> float:
    value: float = cells[policy, rate][name]["mean"]
    return value


def _best_lead(cells: Cells, name: str, rates: list[float], rivals: list[str]) -> dict[str, Any]:
    """Return the lead over the best rival at the most favourable rate."""
    leads = []
    for rate in rates:
        rival = max(rivals, key=lambda policy: _mean(cells, policy, rate, name))
        ours, theirs = (_mean(cells, policy, rate, name) for policy in (SUBJECT, rival))
        leads.append({"relative": ours / theirs - 1, "rate": rate, "rival": rival})
    return max(leads, key=lambda lead: lead["relative"])


def _by_class(results: dict[str, Any], trace: str) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for run in results["runs"]:
        if (run["trace"], run["policy"], run["rate"]) == (trace, SUBJECT, OVERLOAD):
            for name, report in run["figures"]["by_class"].items():
                values[name].append(report["slo_attainment"])
    return {name: mean(of_seeds) for name, of_seeds in values.items()}


def _shown(summary: dict[str, Any]) -> str:
    texts = []
    for name in ("tdg_ratio", "slo_attainment"):
        middle, half_width = summary[name]["mean"], summary[name]["half_width"]
        texts.append(f"{middle:.3f}" + ("" if half_width is None else f"±{half_width:.3f}"))
    return " / ".join(texts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--reference", metavar="POLICY")
    parser.add_argument("--leader", metavar="POLICY")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    policies, rates = results["config"]["policies"], results["config"]["rates"]["values"]
    has_findings = {SUBJECT, *IN_USE} <= set(policies) and OVERLOAD in rates
    rows = findings(results) if has_findings else []
    if rows:
        print(findings_table(rows), end="\n\n")
    print(tables(results))
    if arguments.reference is not None:
        print(misses(results, arguments.reference))
    ahead = [] if arguments.leader is None else leads(results, arguments.leader)
    if ahead:
        print(leads_table(results, ahead))
    if arguments.summary is not None:
        kept = {name: results[name] for name in ("config", "calibrations", "summary")}
        text = json.dumps({**kept, "findings": rows, "leads": ahead}, indent=1)
        arguments.summary.write_text(text + "\n")


if __name__ == "__main__":
    main()
