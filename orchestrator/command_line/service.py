"""One process of a deployment, started, watched and stopped from outside."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from orchestrator.command_line.launch.log_files import RotatingLog, copy_output
from orchestrator.command_line.processes import CUT_GRACE_S, DRAIN_GRACE_S
from orchestrator.core.errors import ProServeError

HEALTH_POLL_S = 0.1
"""Pause between health checks while a service starts."""

HEALTH_WATCH_S = 2.0
"""Pause between health checks of a running service."""

HEALTH_TIMEOUT_S = 5.0

STOP_GRACE_S = DRAIN_GRACE_S + CUT_GRACE_S + 12
"""Time a service has to end after SIGTERM before it is killed; longer than it lets streams run."""


LAST_WORDS_S = 1.0
"""Until the output of a process that has ended is read to its end."""


class StartFailed(ProServeError):
    """A service ended, or became unhealthy for good, before it was ready."""


class Service:
    """A command that serves HTTP and answers GET /health; runs at most once at a time."""

    def __init__(
        self,
        name: str,
        url: str,
        command: Sequence[str],
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        needs_others: bool = False,
        socket_path: Path | None = None,
        inherited: Sequence[int] = (),
        log: RotatingLog | None = None,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        """`environment` is what the process has on top of ours. One that `needs_others` is as
        healthy as they are: a router without nodes answers 503 and is none the worse for it. With
        `socket_path` it is asked for its health through that Unix socket. It inherits these file
        descriptors; what it says goes to `log`, or where ours goes. Told to stop, it is killed
        after `stop_grace_s`."""
        self._needs_others = needs_others
        self._inherited = tuple(inherited)
        self._log = log
        self._stop_grace_s = stop_grace_s
        self._copying: asyncio.Task[None] | None = None
        self._socket_path = None if socket_path is None else str(socket_path)
        self.name = name
        self.url = url
        self._command = tuple(command)
        self._environment = os.environ | environment
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; the one before has been stopped."""
        # In a session of its own Ctrl-C does not reach it: services are stopped in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            start_new_session=True,
            env=self._environment,
            pass_fds=self._inherited,
            stdout=None if self._log is None else asyncio.subprocess.PIPE,
            stderr=None if self._log is None else asyncio.subprocess.STDOUT,
        )
        if self._log is not None and self._process.stdout is not None:
            # Until all of its processes have ended, which may be after this one.
            self._copying = asyncio.create_task(copy_output(self._process.stdout, self._log))

    async def stop(self) -> None:
        """End the process, with time for what it has to finish, if it runs."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._stop_grace_s):
                await process.wait()
        await self.kill()

    async def kill(self) -> None:
        """End the process at once, if it runs."""
        process = self._process
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def end_log(self) -> None:
        """Read what the stopped process has said last; what still runs of it is not waited for."""
        if self._copying is not None:
            await asyncio.wait({self._copying}, timeout=LAST_WORDS_S)
            await cancel_all([self._copying])

    @property
    def pid(self) -> int | None:
        """Return the process id; None if it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def wait_until_healthy(self, timeout_s: float) -> None:
        """Return when the health check is answered with 200.

        Raises:
            StartFailed: it ended, will never be healthy, or is not within `timeout_s`.
        """
        await self._wait_until(self._is_healthy, timeout_s)

    async def wait_until_well(self, timeout_s: float) -> None:
        """Return when nothing is wrong with the service itself, others aside.

        Raises:
            StartFailed: as `wait_until_healthy`.
        """
        await self._wait_until(self._is_well, timeout_s)

    async def _wait_until(
        self, is_reached: Callable[[httpx.Response], bool], timeout_s: float
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        reason = "it does not answer"
        async with self._http_client() as client:
            while True:
                if (status := self._running().returncode) is not None:
                    raise StartFailed(
                        f"{self.name} ended with status {status}; its log above says why"
                    )
                if time.monotonic() > deadline_s:
                    raise StartFailed(
                        f"{self.name} is not healthy after {timeout_s:.0f} s: {reason}"
                    )
                answer = await self._check(client)
                if answer is not None:
                    if is_reached(answer):
                        return
                    if _is_final(answer):
                        raise StartFailed(f"{self.name} cannot start: {_message(answer)}")
                    reason = answer.text
                await asyncio.sleep(HEALTH_POLL_S)

    async def wait_for_end(self, *, max_unhealthy_s: float = math.inf) -> str:
        """Return, once the service will not serve any more, what has become of it.

        Its process has ended, or says that it will never be healthy again, or has not been
        well for `max_unhealthy_s`.
        """
        process = self._running()
        healthy_at_s = time.monotonic()
        async with self._http_client() as client:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEALTH_WATCH_S):
                        await process.wait()
                if process.returncode is not None:
                    return f"ended with status {process.returncode}"
                answer = await self._check(client)
                if answer is not None and self._is_well(answer):
                    healthy_at_s = time.monotonic()
                elif answer is not None and _is_final(answer):
                    return f"cannot serve any more: {_message(answer)}"
                elif time.monotonic() - healthy_at_s > max_unhealthy_s:
                    reason = "it does not answer" if answer is None else answer.text
                    return f"has not been healthy for {max_unhealthy_s:g} s: {reason}"

    def _is_healthy(self, answer: httpx.Response) -> bool:
        return answer.status_code == httpx.codes.OK

    def _is_well(self, answer: httpx.Response) -> bool:
        return self._is_healthy(answer) or (self._needs_others and not _is_final(answer))

    def _http_client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=self._socket_path) if self._socket_path else None
        # Its certificate is for its clients, who call it by a name; this is our own process.
        return httpx.AsyncClient(transport=transport, timeout=HEALTH_TIMEOUT_S, verify=False)

    async def _check(self, client: httpx.AsyncClient) -> httpx.Response | None:
        with contextlib.suppress(httpx.TransportError):
            return await client.get(f"{self.url}/health")
        return None

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "it was started"
        return self._process


def _is_final(answer: httpx.Response) -> bool:
    """Return whether a health check says that waiting will not help."""
    return answer.status_code != httpx.codes.OK and bool(answer.json().get("is_final"))


def _message(answer: httpx.Response) -> str:
    return str(answer.json()["message"])


async def wait_until_all_healthy(services: Sequence[Service], timeout_s: float) -> None:
    """Return when all services are healthy.

    Raises:
        StartFailed: one is not, as `Service.wait_until_healthy`.
    """
    waiting = [asyncio.create_task(service.wait_until_healthy(timeout_s)) for service in services]
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await cancel_all(waiting)


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and return when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
