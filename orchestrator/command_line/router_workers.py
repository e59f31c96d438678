"""A router as one process, or as several behind one port that are started, watched and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
from fastapi import FastAPI

from orchestrator.command_line import processes
from orchestrator.command_line.deployment import RestartConfig
from orchestrator.command_line.service import (
    Service,
    StartFailed,
    cancel_all,
    wait_until_all_healthy,
)
from orchestrator.command_line.supervisor import Announcer, keep_running
from router.app import create_app
from router.config import RouterConfig
from router.http_protocol import GuardedHttpProtocol
from router.shared_usage import SharedUsage
from router.workers import WorkerSeat

START_TIMEOUT_S = 120.0
"""Until a worker listens; it loads a tokenizer."""

_RESTARTS = RestartConfig(max_unhealthy_s=15.0)
"""A worker that hangs gets less time than a node: nobody else takes its new connections."""

_MEMORY_DIR = Path("/dev/shm")
"""Files of Linux that never reach a disk, which could keep the workers waiting."""

_log = structlog.get_logger("router")


def run_alone(config: RouterConfig) -> int:
    """Serve as the only process of a router; return an exit status."""
    return _serve(config, create_app(config))


def run_replica(config: RouterConfig, sockets: processes.Sockets, max_drain_s: float) -> int:
    """Serve as one of several routers that have a socket together; return an exit status."""
    return _serve(config, create_app(config), sockets=sockets, max_drain_s=max_drain_s)


def run_worker(config: RouterConfig, worker: int, directory: Path) -> int:
    """Serve as one of a router's workers, which meet in `directory`; return an exit status."""
    seat = WorkerSeat(worker, config.num_workers, directory)
    sockets = processes.Sockets(
        processes.bound_socket(config.host, config.port, is_shared=True), seat.socket_path(worker)
    )
    return _serve(config, create_app(config, seat=seat), sockets=sockets)


def _serve(
    config: RouterConfig,
    app: FastAPI,
    *,
    sockets: processes.Sockets | None = None,
    max_drain_s: float | None = None,
) -> int:
    if config.tls is not None:
        config.tls.check()
    return processes.serve_http(
        app,
        host=config.host,
        port=config.port,
        protocol=GuardedHttpProtocol,
        sockets=sockets,
        max_drain_s=max_drain_s,
        tls=config.tls,
    )


class _Worker(Service):
    """A worker; what it held when it ends is given back."""

    def __init__(self, seat: WorkerSeat, config_path: Path, usage: SharedUsage) -> None:
        command = [sys.executable, "-m", "orchestrator.command_line.main", "router"]
        command += [str(config_path), "--die-with-parent", "--worker", str(seat.index)]
        command += ["--worker-directory", str(seat.directory)]
        super().__init__(
            f"router worker {seat.index}",
            "http://worker",
            command,
            socket_path=seat.socket_path(seat.index),
        )
        self._usage = usage
        self._index = seat.index

    async def kill(self) -> None:
        """End the process at once, if it runs."""
        await super().kill()
        self._usage.give_up(self._index)


async def run_workers(config: RouterConfig) -> int:
    """Run the workers of a router until Ctrl-C or SIGTERM; return an exit status.

    A worker that ends is started again. One that ends too often ends the router: answers with
    some keys are only kept there.

    Raises:
        StartFailed: the port is taken, or a worker did not start.
    """
    stopping = processes.stop_signal()
    async with contextlib.AsyncExitStack() as stack:
        parent = _MEMORY_DIR if os.access(_MEMORY_DIR, os.W_OK) else None
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="proserve-router-", dir=parent))
        )
        port = stack.enter_context(_reserved_port(config))
        config_path = directory / "router.yaml"  # JSON is YAML
        settings = config.model_copy(update={"port": port}).model_dump(mode="json")
        config_path.write_text(json.dumps(settings))
        usage = SharedUsage.create(directory / "usage", num_workers=config.num_workers)
        workers = [
            _Worker(WorkerSeat(index, config.num_workers, directory), config_path, usage)
            for index in range(config.num_workers)
        ]
        stack.push_async_callback(_stop, workers)
        for worker in workers:
            await worker.start()
        running = asyncio.create_task(_keep_running(workers))
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                running.result()
                return 1
        finally:
            await cancel_all([running])
    return 0


@contextlib.contextmanager
def _reserved_port(config: RouterConfig) -> Iterator[int]:
    """Keep the router's port from others; the workers join in.

    Raises:
        StartFailed: another has it.
    """
    try:
        # Joining does not fail where another router of the same user listens in the same way.
        with processes.bound_socket(config.host, config.port, is_shared=False) as bound:
            port = bound.getsockname()[1]
        reserved = processes.bound_socket(config.host, port, is_shared=True)
    except OSError as error:
        raise StartFailed(
            f"the router cannot listen on {config.host} port {config.port}: {error.strerror}; stop "
            "what listens there, or choose another port"
        ) from error
    with reserved:
        yield port


async def _keep_running(workers: Sequence[_Worker]) -> None:
    """Start workers again whenever they end; return when one stays down.

    Raises:
        StartFailed: one did not become healthy at first.
    """
    await wait_until_all_healthy(workers, START_TIMEOUT_S)
    keeping = [
        asyncio.create_task(
            keep_running(
                worker,
                _RESTARTS,
                start_timeout_s=START_TIMEOUT_S,
                observer=Announcer(worker, _RESTARTS, _log.warning),
            )
        )
        for worker in workers
    ]
    try:
        done, _ = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel_all(keeping)


async def _stop(workers: Sequence[_Worker]) -> None:
    await asyncio.gather(*(worker.stop() for worker in workers))
