"""The `proserve` command."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from orchestrator.command_line.bench_command import add_bench_command
from orchestrator.command_line.config_commands import app as config_app
from orchestrator.command_line.keys import app as keys_app
from orchestrator.command_line.launch.commands import add_commands
from orchestrator.command_line.render_commands import app as render_app
from orchestrator.command_line.watch import add_watch_commands
from orchestrator.core.errors import ProServeError

app = typer.Typer(
    name="proserve",
    help="Serve language models by service gain: tokens in time, weighted by priority.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
app.add_typer(config_app, name="config")
app.add_typer(render_app, name="render")
add_commands(app)
console = Console()
add_watch_commands(app, console)
add_bench_command(app, console)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", metavar="FILE")]
DieWithParent = Annotated[
    bool, typer.Option("--die-with-parent", help="End when the starting process ends.", hidden=True)
]


@app.command()
def serve(
    file: ConfigFile,
    start_timeout_s: Annotated[
        float, typer.Option(help="Seconds until all services must be healthy.")
    ] = 180.0,
) -> None:
    """Start the router and the nodes of a deployment file; Ctrl-C stops them."""
    from orchestrator.command_line.deployment import DeploymentConfig
    from orchestrator.command_line.serve import serve as run
    from orchestrator.yaml_config import load_yaml_model

    config = load_yaml_model(file, DeploymentConfig)
    raise typer.Exit(asyncio.run(run(config, start_timeout_s=start_timeout_s, console=console)))


@app.command()
def node(file: ConfigFile, *, die_with_parent: DieWithParent = False) -> None:
    """Run one node: an engine behind an executor loop and an HTTP service."""
    from orchestrator.command_line import processes
    from orchestrator.command_line.logs import configure_logging
    from orchestrator.config import NodeConfig
    from orchestrator.node_api import NodeService, create_node_app
    from orchestrator.tracing import tracing_of
    from orchestrator.yaml_config import load_yaml_model

    if die_with_parent:
        processes.die_with_parent()
    config = load_yaml_model(file, NodeConfig)
    configure_logging(component=config.endpoint_id)
    executor = (sys.executable, "-m", "orchestrator.command_line.executor")
    service = NodeService(
        config.endpoint_id,
        (*executor, config.model_dump_json()),
        stall_timeout_s=config.stall_timeout_s,
    )
    service.tracing = tracing_of(config.tracing, service_name="proserve-node")
    if config.registration is not None:
        from orchestrator.registrar import Registrar
        from orchestrator.wire import NodeRegistration

        service.registrar = Registrar(
            NodeRegistration(config.endpoint_id, service.instance_id, config.advertised_url()),
            config.registration.router_urls,
            config.registration.read_secret(),
            service.metrics,
        )
    if config.registry is not None:
        from orchestrator.etcd_registrar import EtcdRegistrar
        from orchestrator.wire import NodeRegistration

        service.registrar = EtcdRegistrar(
            config.registry,
            NodeRegistration(config.endpoint_id, service.instance_id, config.advertised_url()),
            service.metrics,
        )
    sockets = processes.Sockets(_node_socket(config.host, config.port))
    raise typer.Exit(
        processes.serve_http(
            create_node_app(service), host=config.host, port=config.port, sockets=sockets
        )
    )


def _node_socket(host: str, port: int) -> socket.socket:
    """Return where a node listens. The connections that come by it inherit its options, so a node
    notices routers that are cut off, and works for nobody no longer than two seconds."""
    from orchestrator.command_line.processes import bound_socket
    from orchestrator.command_line.service import StartFailed
    from router.upstream_socket import probe_other_end

    try:
        listening = bound_socket(host, port, is_shared=False)
    except OSError as error:
        raise StartFailed(
            f"the node cannot listen on {host} port {port}: {error.strerror}; stop what listens "
            "there, or choose another port"
        ) from error
    probe_other_end(listening)
    return listening


@app.command()
def router(
    file: ConfigFile,
    *,
    die_with_parent: DieWithParent = False,
    worker: Annotated[
        int | None, typer.Option(help="Be this one of the router's workers.", hidden=True)
    ] = None,
    worker_directory: Annotated[
        Path | None, typer.Option(help="Where its workers meet.", hidden=True)
    ] = None,
    socket_fd: Annotated[
        int | None, typer.Option(help="Listen on this inherited socket.", hidden=True)
    ] = None,
    private_socket: Annotated[
        Path | None, typer.Option(help="Listen on this Unix socket as well.", hidden=True)
    ] = None,
    max_drain_s: Annotated[
        float, typer.Option(help="Let open requests end for so long.", hidden=True)
    ] = 60.0,
) -> None:
    """Run one router: the OpenAI-compatible service in front of the nodes."""
    from orchestrator.command_line import processes, router_workers
    from orchestrator.command_line.logs import configure_logging
    from orchestrator.yaml_config import load_yaml_model
    from router.config import RouterConfig

    if die_with_parent:
        processes.die_with_parent()
    config = load_yaml_model(file, RouterConfig)
    if worker is not None and worker_directory is not None:
        configure_logging(component=f"router-{worker}")
        raise typer.Exit(router_workers.run_worker(config, worker, worker_directory))
    configure_logging(component="router")
    if socket_fd is not None and private_socket is not None:
        sockets = processes.Sockets(socket.socket(fileno=socket_fd), private_socket)
        raise typer.Exit(router_workers.run_replica(config, sockets, max_drain_s))
    if config.num_workers > 1:
        raise typer.Exit(asyncio.run(router_workers.run_workers(config)))
    raise typer.Exit(router_workers.run_alone(config))


@app.command()
def drain(
    url: Annotated[str, typer.Argument(help="Address of a node.", metavar="URL")],
    max_wait_s: Annotated[
        float, typer.Option(help="Return after so long, whatever is left.")
    ] = 30.0,
) -> None:
    """Have a node take nothing new and finish what it has; then it can be stopped."""
    import httpx

    from orchestrator.command_line.drain import CALL_TIMEOUT_S
    from orchestrator.command_line.drain import drain as wait_until_drained

    with httpx.Client(base_url=url, timeout=CALL_TIMEOUT_S) as http:
        num_open = wait_until_drained(http, max_wait_s=max_wait_s)
    print(f"{num_open} requests are left" if num_open else "drained")


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.", metavar="RECIPE")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Engine directory to make instead of the recipe's.")
    ] = None,
    *,
    force: Annotated[bool, typer.Option(help="Build even if nothing has changed.")] = False,
    matrix: Annotated[bool, typer.Option(help="Build every variant of a trtllm recipe.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print the commands of a trtllm recipe, run none.")
    ] = False,
) -> None:
    """Turn a model into a prebuilt engine directory; unchanged input is a no-op."""
    from build_scripts.build_engine import run

    run(recipe, output_dir, force=force, matrix=matrix, dry_run=dry_run)


@app.command()
def simulate(
    file: ConfigFile,
    output_dir: Annotated[
        Path, typer.Option(help="Where results.json, runs.csv and plots go.")
    ] = Path("simulation_results"),
    *,
    quick: Annotated[bool, typer.Option(help="One seed, three rates, few requests.")] = False,
    num_processes: Annotated[int, typer.Option(help="Simulations at the same time.")] = 2,
) -> None:
    """Replay request traces under several schedulers in virtual time."""
    from orchestrator.simulation.config import SimulationConfig
    from orchestrator.simulation.experiment import run_simulation
    from orchestrator.yaml_config import load_yaml_model

    config = load_yaml_model(file, SimulationConfig)
    run_simulation(config, output_dir, quick=quick, num_processes=num_processes, console=console)
    console.print(f"results: {output_dir}", highlight=False)


@app.command()
def plan(
    file: ConfigFile,
    *,
    quick: Annotated[bool, typer.Option(help="One seed, few requests.")] = False,
    num_processes: Annotated[int, typer.Option(help="Simulations at the same time.")] = 2,
) -> None:
    """Find the fewest nodes that serve a trace within its objectives."""
    from rich.table import Table

    from orchestrator.simulation.config import SimulationConfig
    from orchestrator.simulation.planning import plan_nodes
    from orchestrator.yaml_config import load_yaml_model

    config = load_yaml_model(file, SimulationConfig)
    table = Table("trace", "policy", "nodes")
    for answer in plan_nodes(config, quick=quick, num_processes=num_processes, console=console):
        nodes = "more than tried" if answer.num_nodes is None else str(answer.num_nodes)
        table.add_row(answer.trace, answer.policy, nodes)
    console.print(table)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Address of the service.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model; by default the only one.")] = None,
    priority: Annotated[str | None, typer.Option(help="Service class of each turn.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PROSERVE_API_KEY", help="Your key, where the service has clients."),
    ] = None,
) -> None:
    """Chat with a running service in the terminal; shows TTFT and tokens/s."""
    from orchestrator.command_line.chat import ChatOptions
    from orchestrator.command_line.chat import chat as talk

    talk(ChatOptions(url, model, priority, max_tokens, temperature, api_key), console)


def main() -> None:
    """Run the command line; errors of ours become one line and exit status 2."""
    try:
        app()
    except ProServeError as error:
        line = Text.assemble(("proserve: ", "bold red"), str(error))
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
