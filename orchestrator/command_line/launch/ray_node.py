"""One node of a deployment as a Ray actor. Needs nothing of Ray."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from orchestrator.command_line.deployment import RestartConfig
from orchestrator.command_line.launch.launcher import ProcessKind
from orchestrator.command_line.launch.log_files import last_lines
from orchestrator.command_line.launch.member import Member
from orchestrator.command_line.launch.specs import Address, ProcessSpec
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.config import NodeConfig

T = TypeVar("T")


class NodeAssignment(msgspec.Struct, frozen=True):
    """What an actor is to run. On which host, and therefore where the node listens, Ray decides."""

    name: str
    fingerprint: str
    node: dict[str, Any]
    """The node's configuration, but for host and port."""

    restarts: dict[str, Any]
    start_timeout_s: float
    secret: str
    """Of the router, where the node has a `registration`; empty elsewhere."""


class RayNode:
    """Keeps one node running on the host where the actor is, as a local supervisor does.

    Ray calls the constructor again, on another host, when it has lost this one.
    """

    def __init__(self, assignment: bytes, host: str) -> None:
        """`assignment` is a `NodeAssignment`, `host` the address of this one in the cluster."""
        found = self._assignment = msgspec.json.decode(assignment, type=NodeAssignment)
        self._directory = StateDir(Path(tempfile.mkdtemp(prefix="proserve-")))
        self._directory.create()
        self._spec = self._spec_on(host)
        self._log = self._directory.log(found.name)
        # Ray calls methods in threads of its own, which come and go.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._member = self._run(self._begin())

    def fingerprint(self) -> str:
        """Return that of the assignment."""
        return self._assignment.fingerprint

    def status(self) -> bytes:
        """Return a `ProcessStatus`."""
        return msgspec.json.encode(self._member.status())

    def lines(self, num_lines: int) -> list[str]:
        """Return the last lines of the node's log."""
        return last_lines(self._log, num_lines)

    def close(self) -> None:
        """Let the node finish what it has, stop it, and leave nothing behind. No call follows."""
        self._run(self._member.stop())
        shutil.rmtree(self._directory.path)

    def restart(self) -> None:
        """Replace the node's process, after it has finished what it has."""
        self._run(self._member.stop())
        self._member = self._run(self._begin())

    def _spec_on(self, host: str) -> ProcessSpec:
        found = self._assignment
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        node = found.node | {"host": host, "port": port}
        if node.get("registration"):
            self._directory.secret_file.touch(mode=0o600)
            self._directory.secret_file.write_text(found.secret)
            secret = {"secret_file": str(self._directory.secret_file)}
            node["registration"] = node["registration"] | secret
        config = NodeConfig.model_validate(node)
        return ProcessSpec(found.name, ProcessKind.NODE, Address(host, port), config)

    async def _begin(self) -> Member:
        found = self._assignment
        restarts = RestartConfig.model_validate(found.restarts)
        member = Member(
            self._spec, found.fingerprint, self._directory, restarts, public_socket=None
        )
        self._starting = asyncio.create_task(member.start(found.start_timeout_s))
        self._starting.add_done_callback(lambda task: task.exception())  # The status tells it.
        return member

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
