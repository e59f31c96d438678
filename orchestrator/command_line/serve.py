"""`proserve serve`: starts a router and its nodes on this machine and stops them cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from orchestrator.command_line.deployment import DeploymentConfig, PlacedNode, local_url
from orchestrator.command_line.processes import bound_socket, stop_signal
from orchestrator.command_line.service import (
    Service,
    StartFailed,
    cancel_all,
    wait_until_all_healthy,
)
from orchestrator.command_line.supervisor import Announcer, keep_running
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError
from router.config import RouterConfig, RouterSettings

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


async def serve(config: DeploymentConfig, *, start_timeout_s: float, console: Console) -> int:
    """Run the deployment until Ctrl-C or SIGTERM; return an exit status.

    Raises:
        StartFailed: a service did not become healthy.
    """
    started_s = time.monotonic()
    if config.router.num_replicas > 1:
        raise ConfigError(
            f"router.num_replicas is {config.router.num_replicas}, but `proserve serve` starts one "
            "router; set it to 1 here, or start the deployment with `proserve up`"
        )
    placed_nodes = config.placed_nodes()
    _check_ports_are_free([placed.config for placed in placed_nodes], config.router)
    router_config = config.router_config()
    stopping = stop_signal()
    announce = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proserve-serve-")))
        nodes = [_node_service(placed, directory) for placed in placed_nodes]
        is_secure = router_config.tls is not None
        url = local_url(router_config.host, router_config.port, is_secure=is_secure)
        router = _service("router", "router", url, router_config, directory)
        # The router ends first, so that no request is routed to a node that is going.
        for service in [*nodes, router]:
            stack.push_async_callback(service.stop)
            await service.start()
        ready = asyncio.create_task(wait_until_all_healthy([*nodes, router], start_timeout_s))
        await _first_of(ready, stopping)
        if stopping.done():
            ready.cancel()
            return 0
        ready.result()
        greeting = _greeting(url, router_config, time.monotonic() - started_s)
        console.print(greeting, soft_wrap=True, highlight=False)
        supervising = [
            asyncio.create_task(
                keep_running(
                    service,
                    config.restarts,
                    start_timeout_s=start_timeout_s,
                    observer=Announcer(service, config.restarts, announce),
                )
            )
            for service in [router, *nodes]
        ]
        stack.push_async_callback(cancel_all, supervising)
        ended = await _wait_for_end(supervising[0], supervising[1:], stopping)
        if ended is not None:
            announce(f"{ended}; stopping")
            return 1
        announce("stopping")
    return 0


def _node_service(placed: PlacedNode, directory: Path) -> Service:
    node = placed.config
    url = local_url(node.host, node.port)
    environment = node_environment(placed)
    return _service("node", node.endpoint_id, url, node, directory, environment)


def node_environment(placed: PlacedNode) -> dict[str, str]:
    """Return what a node's process finds in its environment on top of ours.

    Raises:
        ConfigError: it is to have GPUs that are not there for us.
    """
    if placed.gpus is None:
        return {}
    visible = visible_gpus(placed.gpus, os.environ.get(VISIBLE_GPUS))
    if visible is None:
        raise ConfigError(
            f"{placed.config.endpoint_id} is to have GPUs {', '.join(map(str, placed.gpus))} of "
            f"those in {VISIBLE_GPUS}, {os.environ[VISIBLE_GPUS]!r}, which has fewer; name more "
            "there, or lower num_nodes or num_gpus"
        )
    return {VISIBLE_GPUS: visible}


def visible_gpus(gpus: Sequence[int], visible: str | None) -> str | None:
    """Return the names of the GPUs with these numbers among those that `visible`, as CUDA reads
    it, leaves; None if it leaves fewer. `visible` None leaves all there are."""
    if visible is None:
        return ",".join(map(str, gpus))
    names = visible.split(",")
    return ",".join(names[gpu] for gpu in gpus) if max(gpus) < len(names) else None


def _service(
    command: str,
    name: str,
    url: str,
    config: BaseModel,
    directory: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Service:
    path = directory / f"{name}.yaml"  # JSON is YAML
    path.write_text(json.dumps(config.model_dump(mode="json")))
    main = (sys.executable, "-m", "orchestrator.command_line.main")
    arguments = (*main, command, str(path), "--die-with-parent")
    return Service(name, url, arguments, environment, needs_others=command == "router")


async def _wait_for_end(
    keeping_router: asyncio.Task[None],
    keeping_nodes: Sequence[asyncio.Task[None]],
    stopping: asyncio.Future[None],
) -> str | None:
    """Return None when told to stop, or what has ended that cannot be done without."""
    no_node_left = asyncio.create_task(_wait_for_all(keeping_nodes))
    try:
        await _first_of(stopping, keeping_router, no_node_left)
        if stopping.done():
            return None
        if keeping_router.done():
            keeping_router.result()
            return "the router stays down"
        no_node_left.result()
        return "no node is left"
    finally:
        await cancel_all([no_node_left])


async def _wait_for_all(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        await task


def _check_ports_are_free(nodes: Sequence[NodeConfig], router: RouterSettings) -> None:
    for name, host, port in [
        *((node.endpoint_id, node.host, node.port) for node in nodes),
        ("router", router.host, router.port),
    ]:
        try:
            bound_socket(host, port, is_shared=False).close()
        except OSError as error:
            raise StartFailed(
                f"{name} cannot listen on {host} port {port}: {error.strerror}; stop what "
                "listens there, or choose another in the deployment file"
            ) from error


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _greeting(url: str, config: RouterConfig, seconds: float) -> str:
    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 64,
        "stream": True,
    }
    key = ""
    if config.clients_file is None:
        body["priority"] = "high"
    else:
        key = ' -H "Authorization: Bearer $PROSERVE_API_KEY"'
    return (
        f"\n[bold green]{config.model} is served at {url}/v1[/] (ready after {seconds:.1f} s)\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{json.dumps(body)}'\n\n"
        f"  proserve chat --url {url}\n\nCtrl-C stops it.\n"
    )
