"""Runs a deployment on this machine, by a supervisor in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.launch.control import Accepted, Failure, Restart, Up
from orchestrator.command_line.launch.launcher import DeploymentStatus, LaunchFailed
from orchestrator.command_line.launch.log_files import follow as new_lines
from orchestrator.command_line.launch.log_files import last_lines
from orchestrator.command_line.launch.state_dir import StateDir

CALL_TIMEOUT_S = 30.0
"""The supervisor answers at once; it may have to wait for a core."""

SUPERVISOR_START_S = 30.0
POLL_S = 0.1

T = TypeVar("T")


class LocalLauncher:
    """The deployment of a state directory."""

    def __init__(
        self, directory: StateDir, *, on_status: Callable[[DeploymentStatus], None] | None = None
    ) -> None:
        """`on_status` is told how the deployment is while something waits for it."""
        self._directory = directory
        self._on_status = on_status or (lambda _: None)

    def up(
        self, config: DeploymentConfig, *, start_timeout_s: float, are_nodes_elsewhere: bool = False
    ) -> DeploymentStatus:
        """Make the deployment what its file says; start a supervisor if there is none."""
        self._directory.create()
        here = str(Path.cwd())
        has_started = not self._is_running()
        if has_started:
            self._start_supervisor(here)
        settings = config.model_dump(mode="json", exclude_unset=True)
        up = Up(settings, here, start_timeout_s, are_nodes_elsewhere)
        try:
            return self._wait_for(self._ask("PUT", "/deployment", Accepted, up).goal)
        except LaunchFailed:
            if has_started and not self.status().processes:
                self.down()
            raise

    def status(self) -> DeploymentStatus:
        """Return how the deployment is now."""
        return self._ask("GET", "/status", DeploymentStatus)

    def logs(self, names: Sequence[str], *, num_lines: int, follow: bool) -> Iterator[str]:
        """Yield lines of the processes' logs, also of a deployment that does not run any more."""
        known = {path.stem: path for path in sorted(self._directory.log("x").parent.glob("*.log"))}
        if not known:
            raise LaunchFailed(f"deployment {self._directory.name!r} has no logs")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise LaunchFailed(f"there is no log of {unknown[0]!r}, only of {', '.join(known)}")
        chosen = {name: known[name] for name in names or known}
        width = max(map(len, chosen))
        for name, path in chosen.items():
            for line in last_lines(path, num_lines):
                yield f"{name:{width}} | {line}"
        if follow:
            yield from (f"{name:{width}} | {line}" for name, line in new_lines(chosen))

    def restart(self, names: Sequence[str]) -> DeploymentStatus:
        """Replace processes one after the other."""
        return self._wait_for(self._ask("POST", "/restart", Accepted, Restart(tuple(names))).goal)

    def down(self) -> None:
        """Stop everything, the supervisor too."""
        self._send("POST", "/down")
        while self._is_locked():
            time.sleep(POLL_S)

    def _wait_for(self, goal: int) -> DeploymentStatus:
        while True:
            status = self.status()
            self._on_status(status)
            if status.goal != goal:
                raise LaunchFailed(
                    f"something else was asked of deployment {status.name!r} meanwhile; see "
                    "`proserve status`"
                )
            if status.is_settled:
                if status.trouble:
                    raise LaunchFailed(f"{status.trouble}; see `proserve logs`")
                return status
            time.sleep(POLL_S)

    def _start_supervisor(self, here: str) -> None:
        command = [sys.executable, "-m", "orchestrator.command_line.main", "supervise"]
        with self._directory.supervisor_log.open("ab") as log:
            process = subprocess.Popen(
                [*command, str(self._directory.path), here],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + SUPERVISOR_START_S
        while not self._is_running():
            # One that ends with 0 has found another one, which was started at the same time.
            if process.poll() not in {None, 0} or time.monotonic() > deadline_s:
                last = "\n".join(last_lines(self._directory.supervisor_log, 5))
                raise LaunchFailed(f"the supervisor does not start:\n{last}")
            time.sleep(POLL_S)

    def _is_running(self) -> bool:
        try:
            self.status()
        except LaunchFailed:
            return False
        return True

    def _is_locked(self) -> bool:
        """Return whether the supervisor's process is still there."""
        if not self._directory.path.exists():
            return False
        lock = self._directory.lock()
        if lock is not None:
            os.close(lock)
        return lock is None

    def _ask(
        self, method: str, path: str, answer: type[T], body: msgspec.Struct | None = None
    ) -> T:
        return msgspec.json.decode(self._send(method, path, body), type=answer)

    def _client(self) -> httpx.Client:
        return httpx.Client(
            # Without `verify`, which is not read here, it would look for certificates each time.
            transport=httpx.HTTPTransport(uds=str(self._directory.control_socket), verify=False),
            base_url="http://supervisor",
            timeout=CALL_TIMEOUT_S,
        )

    def _send(self, method: str, path: str, body: msgspec.Struct | None = None) -> bytes:
        try:
            with self._client() as http:
                content = None if body is None else msgspec.json.encode(body)
                response = http.request(method, path, content=content)
        except httpx.TransportError as error:
            raise LaunchFailed(
                f"no deployment {self._directory.name!r} runs here; start it with: proserve up FILE"
            ) from error
        if response.status_code == httpx.codes.BAD_REQUEST:
            raise LaunchFailed(msgspec.json.decode(response.content, type=Failure).message)
        if response.is_error:
            raise LaunchFailed(f"the supervisor answers {response.status_code}: {response.text}")
        return response.content
