"""`proserve render`: a deployment file in the words of what is to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Write what other tools need to run and watch a deployment.", no_args_is_help=True
)


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


@app.command()
def monitoring(
    output_dir: Annotated[Path, typer.Option(help="Where the files go.")] = Path("monitoring"),
) -> None:
    """Write a dashboard for Grafana and alert rules for Prometheus."""
    import json

    import yaml

    from orchestrator.command_line.monitoring import alert_rules, grafana_dashboard

    output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("grafana-dashboard.json", json.dumps(grafana_dashboard(), indent=2) + "\n"),
        ("alerts.yaml", yaml.safe_dump(alert_rules(), sort_keys=False, width=100)),
    ):
        (output_dir / name).write_text(text, encoding="utf-8")
        print(f"wrote {output_dir / name}")
