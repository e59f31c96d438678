"""One process of a running deployment."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import httpx
import structlog

from orchestrator.command_line.deployment import RestartConfig
from orchestrator.command_line.drain import CALL_TIMEOUT_S, drain
from orchestrator.command_line.launch.launcher import ProcessKind, ProcessState, ProcessStatus
from orchestrator.command_line.launch.log_files import RotatingLog
from orchestrator.command_line.launch.specs import ProcessSpec
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.command_line.processes import CUT_GRACE_S
from orchestrator.command_line.service import STOP_GRACE_S, Service, StartFailed, cancel_all
from orchestrator.command_line.supervisor import keep_running
from orchestrator.core.errors import NodeUnavailable

_log = structlog.get_logger("supervisor")


class Member:
    """A process that is kept running from `start` until `stop`."""

    def __init__(
        self,
        spec: ProcessSpec,
        fingerprint: str,
        directory: StateDir,
        restarts: RestartConfig,
        *,
        public_socket: int | None,
    ) -> None:
        """`public_socket` is the descriptor of the socket that a router listens on."""
        self.spec = spec
        self.fingerprint = fingerprint
        self._restarts = restarts
        self._log = RotatingLog(directory.log(spec.name))
        path = directory.config(spec.name)
        path.write_text(json.dumps(spec.config.model_dump(mode="json")))  # JSON is YAML
        command = [sys.executable, "-m", "orchestrator.command_line.main", spec.kind.value]
        command += [str(path), "--die-with-parent"]
        inherited: tuple[int, ...] = ()
        private_socket, stop_grace_s = None, STOP_GRACE_S
        if public_socket is not None:
            inherited, private_socket = (public_socket,), directory.private_socket(spec.name)
            command += ["--socket-fd", str(public_socket), "--private-socket", str(private_socket)]
            command += ["--max-drain-s", str(restarts.max_drain_s)]
            stop_grace_s = restarts.max_drain_s + CUT_GRACE_S + STOP_GRACE_S
        self._service = Service(
            spec.name,
            spec.address.url if private_socket is None else "http://router",
            command,
            spec.environment,
            needs_others=spec.kind is ProcessKind.ROUTER,
            socket_path=private_socket,
            inherited=inherited,
            log=self._log,
            stop_grace_s=stop_grace_s,
        )
        self._keeping: asyncio.Task[None] | None = None
        self._num_restarts = 0
        self._reason = ""
        self._enter(ProcessState.STARTING)

    @property
    def is_up(self) -> bool:
        """Return whether it serves, or will after a while."""
        return self.state is not ProcessState.FAILED

    def status(self) -> ProcessStatus:
        """Return how it is now."""
        return ProcessStatus(
            name=self.spec.name,
            kind=self.spec.kind,
            state=self.state,
            address=self.spec.address.url,
            pid=self._service.pid,
            num_restarts=self._num_restarts,
            for_s=round(time.monotonic() - self._since_s, 3),
            reason=self._reason,
        )

    async def start(self, timeout_s: float) -> None:
        """Start it, return once it is well, and keep it so.

        Raises:
            StartFailed: it is not within `timeout_s`; it has been stopped.
        """
        _log.info("starting", process=self.spec.name)
        await self._service.start()
        try:
            await self._service.wait_until_well(timeout_s)
        except StartFailed as error:
            await self._service.kill()
            self._fail(str(error))
            raise
        except asyncio.CancelledError:
            await self._service.kill()
            self._fail("it was called off while it started")
            raise
        self._enter(ProcessState.HEALTHY)
        self._keeping = asyncio.create_task(
            keep_running(self._service, self._restarts, start_timeout_s=timeout_s, observer=self)
        )
        self._keeping.add_done_callback(_raise_what_failed)

    async def stop(self) -> None:
        """Let it finish what it has, and stop it."""
        if self._keeping is not None:
            await cancel_all([self._keeping])
        if self._service.pid is not None:
            _log.info("stopping", process=self.spec.name)
            self._enter(ProcessState.DRAINING)
            if self.spec.kind is ProcessKind.NODE:
                await asyncio.to_thread(self._drain)
            await self._service.stop()
        await self._service.end_log()
        self._log.close()

    def restarts(self, end: str, pause_s: float) -> None:
        """It has ended, and is started again."""
        _log.warning("ended", process=self.spec.name, reason=end, pause_s=pause_s)
        self._num_restarts += 1
        self._reason = end
        self._enter(ProcessState.RESTARTING)

    def is_back(self) -> None:
        """It is well again."""
        _log.info("back", process=self.spec.name)
        self._enter(ProcessState.HEALTHY)

    def stays_down(self, end: str) -> None:
        """It has ended too often."""
        self._fail(f"{end}, after {self._num_restarts} restarts")

    def _drain(self) -> None:
        with httpx.Client(base_url=self.spec.address.url, timeout=CALL_TIMEOUT_S) as http:
            try:
                drain(http, max_wait_s=self._restarts.max_drain_s)
            except NodeUnavailable as error:  # Stopping will do.
                _log.warning("not_drained", process=self.spec.name, reason=str(error))

    def _fail(self, reason: str) -> None:
        _log.error("stays_down", process=self.spec.name, reason=reason)
        self._reason = reason
        self._enter(ProcessState.FAILED)

    def _enter(self, state: ProcessState) -> None:
        self.state = state
        self._since_s = time.monotonic()


def _raise_what_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.result()
