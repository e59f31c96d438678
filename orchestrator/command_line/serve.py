"""`proserve serve`: starts a router and its nodes on this machine and stops them cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import BaseModel
from rich.console import Console

from orchestrator.command_line.deployment import DeploymentConfig, local_url
from orchestrator.command_line.processes import CUT_GRACE_S, DRAIN_GRACE_S
from orchestrator.core.errors import ProServeError
from router.config import RouterConfig

HEALTH_POLL_S = 0.1
"""Pause between health checks while a service starts."""

HEALTH_WATCH_S = 2.0
"""Pause between health checks of a running service."""

STOP_GRACE_S = DRAIN_GRACE_S + CUT_GRACE_S + 12
"""Time a service has to end after SIGTERM before it is killed; longer than it lets streams run."""


class StartFailed(ProServeError):
    """A service ended, or became unhealthy for good, before the deployment was ready."""


@dataclass(slots=True)
class Service:
    """One process of the deployment."""

    name: str
    url: str
    process: asyncio.subprocess.Process


async def serve(config: DeploymentConfig, *, start_timeout_s: float, console: Console) -> int:
    """Run the deployment until Ctrl-C or SIGTERM; return an exit status.

    Raises:
        StartFailed: a service did not become healthy.
    """
    started_s = time.monotonic()
    _check_ports_are_free(config)
    router_config = config.router_config()
    stopping = _stop_signal()
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proserve-serve-")))
        services = []
        for node in config.nodes:
            url = local_url(node.host, node.port)
            service = _run("node", node.endpoint_id, url, node, directory)
            services.append(await stack.enter_async_context(service))
        url = local_url(router_config.host, router_config.port)
        router = await stack.enter_async_context(
            _run("router", "router", url, router_config, directory)
        )
        # The router ends first, so that no request is routed to a node that is going.
        ready = asyncio.create_task(_wait_until_healthy([*services, router], start_timeout_s))
        await _first_of(ready, stopping)
        if stopping.done():
            ready.cancel()
            return 0
        ready.result()
        greeting = _greeting(url, router_config, time.monotonic() - started_s)
        console.print(greeting, soft_wrap=True, highlight=False)
        ended = await _wait_for_end(services, router, stopping)
        if ended is not None:
            console.print(f"[red]{ended} is gone[/], its log says why; stopping")
            return 1
        console.print("stopping")
    return 0


@contextlib.asynccontextmanager
async def _run(
    command: str, name: str, url: str, config: BaseModel, directory: Path
) -> AsyncIterator[Service]:
    path = directory / f"{name}.yaml"  # JSON is YAML
    path.write_text(json.dumps(config.model_dump(mode="json")))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "orchestrator.command_line.main",
        command,
        str(path),
        "--die-with-parent",
        start_new_session=True,  # Ctrl-C reaches us alone; we stop the services in order
    )
    try:
        yield Service(name, url, process)
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_GRACE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _wait_until_healthy(services: list[Service], timeout_s: float) -> None:
    """Return when all services answer their health check with 200."""
    deadline_s = time.monotonic() + timeout_s
    async with httpx.AsyncClient(timeout=5.0) as client:
        for service in services:
            reason = "it does not answer"
            while True:
                if service.process.returncode is not None:
                    raise StartFailed(
                        f"{service.name} ended with status {service.process.returncode}; "
                        "its log above says why"
                    )
                if time.monotonic() > deadline_s:
                    raise StartFailed(
                        f"{service.name} is not healthy after {timeout_s:.0f} s: {reason}"
                    )
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(f"{service.url}/health")
                    if answer.status_code == httpx.codes.OK:
                        break
                    reason = answer.text
                    if _is_final(answer):
                        raise StartFailed(f"{service.name} cannot start: {_message(answer)}")
                await asyncio.sleep(HEALTH_POLL_S)


async def _wait_for_end(
    nodes: list[Service], router: Service, stopping: asyncio.Future[None]
) -> str | None:
    """Return None when told to stop, or the name of what ended that cannot be done without."""
    services = {asyncio.create_task(_wait_for(s)): s for s in [*nodes, router]}
    alive = {service.name for service in nodes}
    try:
        while True:
            done, _ = await asyncio.wait({stopping, *services}, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                return None
            for task in [task for task in services if task in done]:
                service = services.pop(task)
                alive.discard(service.name)
                if service is router or not alive:
                    return service.name
    finally:
        for task in services:
            task.cancel()


async def _wait_for(service: Service) -> None:
    """Return when the process has ended, or says that it will never be healthy again."""
    async with httpx.AsyncClient(timeout=5.0) as client:
        while service.process.returncode is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_WATCH_S):
                    await service.process.wait()
            with contextlib.suppress(httpx.TransportError):
                if _is_final(await client.get(f"{service.url}/health")):
                    return


def _is_final(answer: httpx.Response) -> bool:
    """Return whether a health check says that waiting will not help."""
    return answer.status_code != httpx.codes.OK and bool(answer.json().get("is_final"))


def _message(answer: httpx.Response) -> str:
    return str(answer.json()["message"])


def _check_ports_are_free(config: DeploymentConfig) -> None:
    for name, host, port in [
        *((node.endpoint_id, node.host, node.port) for node in config.nodes),
        ("router", config.router.host, config.router.port),
    ]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise StartFailed(
                    f"{name} cannot listen on {host} port {port}: {error.strerror}; stop what "
                    "listens there, or choose another in the deployment file"
                ) from error


def _stop_signal() -> asyncio.Future[None]:
    """Return a future that is done once this process was asked to stop."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if not stopping.done():
            stopping.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return stopping


async def _first_of(*futures: asyncio.Future[None]) -> None:
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
