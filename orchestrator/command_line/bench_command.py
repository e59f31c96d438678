"""The command `proserve bench`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def add_bench_command(app: typer.Typer, console: Console) -> None:
    """Add the command to the command line."""

    @app.command()
    def bench(
        file: Annotated[Path, typer.Argument(help="Deployment file.", metavar="FILE")],
        trace: Annotated[Path, typer.Argument(help="Trace: CSV, gzipped.", metavar="TRACE")],
        *,
        scheduler: Annotated[
            list[str] | None, typer.Option(help="Of all nodes; repeat it to compare.")
        ] = None,
        policy: Annotated[
            list[str] | None, typer.Option(help="Of the router; repeat it to compare.")
        ] = None,
        output: Annotated[Path, typer.Option(help="The report.")] = Path("bench.html"),
        num_requests: Annotated[int, typer.Option(min=2)] = 100,
        requests_per_s: Annotated[float, typer.Option(help="Mean rate of the trace.")] = 2.0,
        max_model_len: Annotated[int, typer.Option(help="Longer prompts are cut.")] = 1024,
        max_output_tokens: Annotated[int, typer.Option(help="Longer outputs are cut.")] = 128,
        seed: Annotated[int, typer.Option(help="Of the requests' classes.")] = 0,
    ) -> None:
        """Run a trace against a deployment under several schedulers or policies; write a report."""
        from build_scripts.hardware import hardware_name
        from build_scripts.progress import work_progress
        from orchestrator.command_line.bench import make_load, run_variant, variants
        from orchestrator.command_line.bench_report import Conditions, html_report
        from orchestrator.command_line.deployment import DeploymentConfig
        from orchestrator.simulation.trace import read_trace
        from orchestrator.yaml_config import load_yaml_model

        found = variants(scheduler or (), policy or ())
        config = load_yaml_model(file, DeploymentConfig)
        load = make_load(
            config,
            read_trace(trace),
            num_requests=num_requests,
            requests_per_s=requests_per_s,
            max_model_len=max_model_len,
            max_output_tokens=max_output_tokens,
            seed=seed,
        )
        runs = []
        with work_progress(console) as progress:
            for variant in found:
                on_answer = _counting(progress.part(variant.name, num_requests))
                runs.append(run_variant(file, variant, load, on_answer=on_answer))
        conditions = Conditions(
            command=["proserve", *sys.argv[1:]],
            deployment=str(file),
            trace=f"{trace.name}, the first {num_requests:,} requests",
            load=f"{requests_per_s:g} requests/s on average, classes drawn with seed {seed}",
            machine=hardware_name("cpu"),
            made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        )
        output.write_text(html_report(runs, conditions), encoding="utf-8")
        console.print(f"report: {output}", highlight=False)


def _counting(advance: Callable[[float], None]) -> Callable[[], None]:
    """Return what tells a progress bar how often it was called."""
    numbers = itertools.count(1)
    return lambda: advance(next(numbers))
