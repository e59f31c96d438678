"""`proserve up`, `down`, `status`, `logs` and `restart`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestrator.command_line.launch.state_dir import StateDir, default_parent
from orchestrator.core.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.command_line.launch.launcher import DeploymentStatus, Launcher

console = Console()

_STYLES = {
    "starting": "yellow",
    "healthy": "green",
    "draining": "yellow",
    "restarting": "red",
    "failed": "bold red",
}


class Place(StrEnum):
    """Where a deployment runs."""

    LOCAL = "local"
    RAY = "ray"
    KUBERNETES = "kubernetes"


Name = Annotated[
    str | None, typer.Option("--name", help="The deployment; by default the only one there is.")
]
Processes = Annotated[
    list[str] | None, typer.Argument(help="Names as `status` shows them; by default all.")
]


def up(
    file: Annotated[Path, typer.Argument(help="Deployment YAML.", metavar="FILE")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the deployment; by default the file's.")
    ] = None,
    on: Annotated[Place, typer.Option("--on", help="Where it is to run.")] = Place.LOCAL,
    start_timeout_s: Annotated[
        float, typer.Option(help="Seconds that a process may take to become healthy.")
    ] = 180.0,
) -> None:
    """Start a deployment in the background, or make a running one what the file says now."""
    from orchestrator.command_line.deployment import DeploymentConfig
    from orchestrator.yaml_config import load_yaml_model

    config = load_yaml_model(file, DeploymentConfig)
    directory = StateDir.of(name or file.stem)
    place = _place_of(directory)
    if place not in {None, on}:
        raise ConfigError(
            f"{directory.name} runs on {place} already, not on {on}; stop it with: proserve down "
            f"--name {directory.name}; or give this one another --name"
        )
    with _progress() as show:
        status = _launcher(on, directory, show).up(config, start_timeout_s=start_timeout_s)
    _print(status)


def status(
    name: Name = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the processes of a deployment."""
    import msgspec

    found = _existing_launcher(name).status()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        _print(found)


def logs(
    processes: Processes = None,
    name: Name = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on for ever.")] = False,
    num_lines: Annotated[int, typer.Option("-n", min=0, help="Lines of each to begin with.")] = 20,
) -> None:
    """Show what the processes of a deployment have said."""
    launcher = _existing_launcher(name)
    lines = launcher.logs(processes or (), num_lines=num_lines, follow=follow)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for line in lines:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def restart(processes: Processes = None, name: Name = None) -> None:
    """Replace processes of a deployment, one after the other; open requests do not notice."""
    with _progress() as show:
        found = _existing_launcher(name, show).restart(processes or ())
    _print(found)


def down(name: Name = None) -> None:
    """Let the open requests of a deployment end, and stop it."""
    _existing_launcher(name).down()
    console.print("down")


def supervise(
    directory: Annotated[Path, typer.Argument()],
    working_directory: Annotated[str, typer.Argument()],
) -> None:
    """Be the supervisor of a deployment; `up` starts it."""
    from orchestrator.command_line.launch.control import run_supervisor
    from orchestrator.command_line.logs import configure_logging

    configure_logging(component="supervisor")
    raise typer.Exit(run_supervisor(StateDir(directory), working_directory))


def add_commands(app: typer.Typer) -> None:
    """Add these commands to `proserve`."""
    for command in (up, status, logs, restart, down):
        app.command()(command)
    app.command(hidden=True)(supervise)


def _launcher(
    place: Place,
    directory: StateDir,
    on_status: Callable[[DeploymentStatus], None] | None = None,
) -> Launcher:
    match place:
        case Place.LOCAL:
            from orchestrator.command_line.launch.local import LocalLauncher

            return LocalLauncher(directory, on_status=on_status)
        case Place.RAY:
            from orchestrator.command_line.launch.ray_launcher import RayLauncher

            return RayLauncher(directory, on_status=on_status)
        case Place.KUBERNETES:
            from orchestrator.command_line.launch.kubernetes_launcher import KubernetesLauncher

            return KubernetesLauncher(directory, on_status=on_status)


def _existing_launcher(
    name: str | None, on_status: Callable[[DeploymentStatus], None] | None = None
) -> Launcher:
    """Return who runs the deployment with a name, or the only one.

    Raises:
        ConfigError: there is none, or more than one to choose from.
    """
    if name is not None:
        directory = StateDir.of(name)
        return _launcher(_place_of(directory) or Place.LOCAL, directory, on_status)
    parent = default_parent()
    names = sorted(path.name for path in parent.glob("*/") if _place_of(StateDir(path)))
    if not names:
        raise ConfigError(
            "no deployment runs here; start one with: proserve up FILE; --name NAME names one that "
            "has ended"
        )
    if len(names) > 1:
        raise ConfigError(f"{', '.join(names)} run here; choose one with: --name NAME")
    return _existing_launcher(names[0], on_status)


def _place_of(directory: StateDir) -> Place | None:
    """Return where a deployment runs; None if it does not."""
    for place, mark in (
        (Place.KUBERNETES, directory.kubernetes_file),
        (Place.RAY, directory.ray_file),
        (Place.LOCAL, directory.control_socket),
    ):
        if mark.exists():
            return place
    return None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[DeploymentStatus], None]]:
    """Give a function that shows what is being waited for."""
    from orchestrator.command_line.launch.launcher import ProcessState

    with console.status("starting") as spinner:

        def show(found: DeploymentStatus) -> None:
            busy = [p for p in found.processes if p.state is not ProcessState.HEALTHY]
            states = ", ".join(f"{p.name} is {p.state}" for p in busy[:3])
            num_healthy = len(found.processes) - len(busy)
            spinner.update(f"{num_healthy} of {len(found.processes)} healthy; {states}")

        yield show


def _print(found: DeploymentStatus) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("process", "state", "for", "pid", "restarts", "address", "last end", box=None)
    for process in found.processes:
        style = _STYLES[process.state]
        table.add_row(
            process.name,
            f"[{style}]{process.state}[/]",
            f"{process.for_s:,.0f} s",
            "" if process.pid is None else str(process.pid),
            str(process.num_restarts),
            process.address,
            escape(process.reason),
        )
    console.print(table)
    if not found.is_settled:
        console.print("being changed", style="yellow")
    if found.trouble:
        console.print(found.trouble, style="red", markup=False, highlight=False)
