"""Writes docs/reference/cli.md and metrics.md from the code.

python -m orchestrator.command_line.reference
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from prometheus_client import CollectorRegistry

from orchestrator.command_line.declared_metrics import declared_metrics
from orchestrator.command_line.main import app
from orchestrator.metrics import NodeMetrics
from router.metrics import RouterMetrics

DIRECTORY = Path("docs/reference")


def cli_reference() -> str:
    """Return all commands with their arguments and options, as Markdown."""
    lines = ["# Commands", "", "Made from the code. Every command has `--help`.", ""]
    command = typer.main.get_command(app)
    lines += _commands(command, "proserve")
    return "\n".join(lines).rstrip() + "\n"


def metrics_reference() -> str:
    """Return all metrics of routers and nodes, as Markdown."""
    lines = [
        "# Metrics",
        "",
        "Made from the code. Routers and nodes serve these at `/metrics`.",
        "",
    ]
    for title, registry in (
        ("Router", RouterMetrics().registry),
        ("Node", NodeMetrics().registry),
    ):
        lines += [f"## {title}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|"]
        lines += [*_metrics(registry), ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, path: str) -> Iterator[str]:
    """Yield the lines of a command of Typer's, whose own classes are not public."""
    if hasattr(command, "commands"):
        for name in sorted(command.commands):
            if not command.commands[name].hidden:
                yield from _commands(command.commands[name], f"{path} {name}")
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join([path, *(p.metavar or p.name.upper() for p in arguments)])
    yield from (f"## {path}", "", " ".join((command.help or "").split()), "", f"`{usage}`", "")
    shown = [option for option in options if option.name != "help"]
    if shown:
        yield from ("| option | meaning |", "|---|---|")
        for option in shown:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            yield f"| {names} | {_cell(option.help or '')} |"
        yield ""


def _metrics(registry: CollectorRegistry) -> Iterator[str]:
    for metric in sorted(declared_metrics(registry), key=lambda each: each.name):
        suffix = {"counter": "_total", "info": "_info"}.get(metric.kind, "")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        meaning = _cell(metric.documentation)
        yield f"| `{metric.name}{suffix}` | {metric.kind} | {labels} | {meaning} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write both files."""
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / "cli.md").write_text(cli_reference(), encoding="utf-8")
    (DIRECTORY / "metrics.md").write_text(metrics_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
