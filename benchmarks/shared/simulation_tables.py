"""Prints the summary of a simulation as Markdown tables.

python -m benchmarks.shared.simulation_tables RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def tables(results: dict[str, Any]) -> str:
    """Return, per trace, a table of TDG_Ratio / SLO attainment by policy and rate."""
    summary = results["summary"]
    rates = results["config"]["rates"]["values"]
    parts = []
    for trace, calibration in results["calibrations"].items():
        cells = {(s["policy"], s["rate"]): s for s in summary if s["trace"] == trace}
        knee = calibration.get("knee_rate")
        parts.append(
            f"**{trace}**, knee {knee:.3g} requests/s\n" if knee is not None else f"**{trace}**\n"
        )
        parts.append("| policy | " + " | ".join(f"{rate:g} x" for rate in rates) + " |")
        parts.append("|---|" + "---|" * len(rates))
        for policy in results["config"]["policies"]:
            row = [_cell(cells[policy, rate]) for rate in rates]
            parts.append(f"| {policy} | " + " | ".join(row) + " |")
        bounds = [cells[next(iter(results["config"]["policies"])), r]["upper_bound"] for r in rates]
        if all(bounds):
            parts.append("| upper bound | " + " | ".join(f"{b['mean']:.3f}" for b in bounds) + " |")
        parts.append("")
    return "\n".join(parts)


def _cell(summary: dict[str, Any]) -> str:
    texts = []
    for name in ("tdg_ratio", "slo_attainment"):
        mean, half_width = summary[name]["mean"], summary[name]["half_width"]
        texts.append(f"{mean:.3f}" + ("" if half_width is None else f"±{half_width:.3f}"))
    return " / ".join(texts)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
