"""`proserve render`: a deployment file in the words of what is to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write what a cluster needs to run a deployment.", no_args_is_help=True)


@app.callback()
def _render() -> None:
    """Keep `kubernetes` a command of its own, though it is the only one."""


@app.command()
def kubernetes(
    file: Annotated[Path, typer.Argument(help="Deployment file.", metavar="FILE")],
    output_dir: Annotated[Path, typer.Option(help="Where the manifests go.")] = Path("manifests"),
) -> None:
    """Write a deployment as manifests, for `kubectl apply -f`."""
    from orchestrator.command_line.deployment import DeploymentConfig
    from orchestrator.command_line.kubernetes.render import render, write
    from orchestrator.yaml_config import load_yaml_model

    files = render(load_yaml_model(file, DeploymentConfig))
    for path in write(files, output_dir):
        print(f"removed {path}, which is not part of the deployment any more")
    for name in files:
        print(f"wrote {output_dir / name}")
