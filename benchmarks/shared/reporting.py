"""What all benchmarks share: their flags, the conditions of a run, and the line of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="finish within a minute")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results to benchmarks/results/FILE"
    )
    return parser


def report(figures: Mapping[str, Any], *, file_name: str | None) -> None:
    """Print the figures and the conditions they were measured under as one line of JSON."""
    script = Path(sys.argv[0]).resolve().relative_to(BENCHMARKS.parent).with_suffix("")
    result = {
        "command": " ".join(["python -m", ".".join(script.parts), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **figures,
    }
    line = json.dumps(result)
    if file_name is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / file_name).write_text(json.dumps(result, indent=2) + "\n")
    print(line)


def _commit() -> str:
    """Return the commit of this checkout, "+" behind it if files differ. A copy of the files
    alone, as on a borrowed GPU machine, is told by the environment variable COMMIT."""
    if commit := os.environ.get("COMMIT"):
        return commit
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s") else "")


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    return result.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
