"""The report of an acceptance run, for people and for programs."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.trtllm.surface_diff import Difference, Severity

PACKAGES = ("tensorrt_llm", "tensorrt", "torch", "numpy", "transformers")
LOG_LINES = 40
"""Of a failed step's log, in the report; the log itself is beside it."""

_HEADINGS = {
    Severity.BREAKS: "May break what was written against the record",
    Severity.UNKNOWN: "Cannot be read off the installation",
    Severity.NEW: "New",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one step."""

    name: str
    is_ok: bool
    summary: str
    differences: tuple[Difference, ...] = ()
    failures: tuple[str, ...] = ()
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run."""

    environment: Mapping[str, str]
    steps: tuple[Step, ...]

    @property
    def is_ok(self) -> bool:
        """True if every step is."""
        return all(step.is_ok for step in self.steps)


def environment(root: Path) -> dict[str, str]:
    """Return versions and hardware of this machine, and the commit checked out at `root`."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    found["gpu"] = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    found["commit"] = commit.stdout.strip() or "unknown"
    return found


def write_report(report: Report, output_dir: Path) -> str:
    """Write `report.md` and `report.json`, and return the text of the former."""
    text = "\n".join(_markdown(report)) + "\n"
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    values = {"is_ok": report.is_ok, "environment": dict(report.environment)}
    values["steps"] = [asdict(step) for step in report.steps]
    content = json.dumps(values, indent=1, default=str)
    (output_dir / "report.json").write_text(content + "\n", encoding="utf-8")
    return text


def _markdown(report: Report) -> Iterator[str]:
    yield "# TensorRT-LLM acceptance"
    yield ""
    yield from ["| step | | |", "|---|---|---|"]
    for step in report.steps:
        yield f"| {step.name} | {'ok' if step.is_ok else '**failed**'} | {step.summary} |"
    yield ""
    yield from ["| | |", "|---|---|"]
    yield from (f"| {name} | {value} |" for name, value in report.environment.items())
    for step in report.steps:
        yield from _details(step)


def _details(step: Step) -> Iterator[str]:
    for severity, heading in _HEADINGS.items():
        found = [d for d in step.differences if d.severity is severity]
        if found:
            yield from ["", f"## {heading}", "", "| what | how | routes |", "|---|---|---|"]
            yield from (f"| `{d.name}` | {d.message} | {', '.join(d.routes)} |" for d in found)
    if step.failures:
        yield from ["", f"## Failed: {step.name}", ""]
        yield from (f"- {failure}" for failure in step.failures)
    if step.log is not None and not step.is_ok:
        lines = step.log.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from ["", f"## Last lines of {step.log.name}", "", "```"]
        yield from lines[-LOG_LINES:]
        yield "```"
