"""Makes the processes on this machine those of a deployment, and keeps them so."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from orchestrator.command_line.deployment import DeploymentConfig, RestartConfig
from orchestrator.command_line.launch.launcher import DeploymentStatus, ProcessKind
from orchestrator.command_line.launch.member import Member
from orchestrator.command_line.launch.plan import Change, Found, Step, Wanted, plan
from orchestrator.command_line.launch.specs import Address, ProcessSpec, process_specs
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.command_line.processes import bound_socket
from orchestrator.command_line.service import StartFailed, cancel_all
from orchestrator.core.errors import ConfigError
from router.nodes_file import POLL_INTERVAL_S

LISTEN_BACKLOG = 2048
"""Connections that wait for a router; as many as uvicorn has by itself."""

_log = structlog.get_logger("supervisor")


@dataclass(frozen=True, slots=True)
class _Goal:
    specs: Mapping[str, ProcessSpec]
    restarts: RestartConfig
    start_timeout_s: float


class Reconciler:
    """The processes of one deployment. Belongs to one event loop.

    Goals are reached one step at a time; behind each step the rest is planned anew, so the latest
    goal counts, whenever it comes.
    """

    def __init__(self, directory: StateDir) -> None:
        self._directory = directory
        self._goal = _Goal({}, RestartConfig(), 0.0)
        self._goal_number = 0
        self._editions: dict[str, int] = {}
        """How often each process was asked to be replaced without any other change."""

        self._members: dict[str, Member] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._sockets: dict[Address, socket.socket] = {}
        """Where routers listen. Here, so that no connection is refused or lost while one of them
        stops or starts."""

        self._has_news = asyncio.Event()
        self._has_settled = asyncio.Event()
        self._has_settled.set()
        self._trouble = ""
        self._running = asyncio.create_task(self._run(), name="reconcile")
        self._running.add_done_callback(self._note_end)

    def pursue(
        self, config: DeploymentConfig, *, start_timeout_s: float, are_nodes_elsewhere: bool = False
    ) -> int:
        """Set a new goal, as `process_specs` says; return its number.

        Raises:
            ConfigError: it cannot be reached; nothing has changed.
            EngineDirectoryError: as `process_specs`.
        """
        all_specs = process_specs(config, self._directory, are_nodes_elsewhere=are_nodes_elsewhere)
        specs = {spec.name: spec for spec in all_specs}
        self._check_addresses(specs)
        return self._set(_Goal(specs, config.restarts, start_timeout_s))

    def restart(self, names: Sequence[str]) -> int:
        """Have processes replaced, all of them without names; return the number of the goal.

        Raises:
            ConfigError: there is no such process.
        """
        unknown = [name for name in names if name not in self._goal.specs]
        if unknown:
            raise ConfigError(
                f"there is no process {unknown[0]!r}, only {', '.join(self._goal.specs)}"
            )
        for name in names or self._goal.specs:
            self._editions[name] = self._editions.get(name, 0) + 1
        return self._set(self._goal)

    def status(self) -> DeploymentStatus:
        """Return how everything is now."""
        order = {name: index for index, name in enumerate(self._goal.specs)}
        members = sorted(self._members.values(), key=lambda m: order.get(m.spec.name, len(order)))
        return DeploymentStatus(
            name=self._directory.name,
            processes=tuple(member.status() for member in members),
            is_settled=self._has_settled.is_set(),
            trouble=self._trouble,
            goal=self._goal_number,
        )

    async def close(self) -> None:
        """Stop everything, routers first."""
        self._set(_Goal({}, self._goal.restarts, 0.0))
        await self._has_settled.wait()
        await cancel_all([self._running])

    def _set(self, goal: _Goal) -> int:
        self._goal = goal
        self._goal_number += 1
        self._trouble = ""
        self._has_settled.clear()
        self._has_news.set()
        for name, task in self._starting.items():
            spec = goal.specs.get(name)
            if spec is None or self._fingerprint(spec) != self._members[name].fingerprint:
                task.cancel()
        return self._goal_number

    def _check_addresses(self, specs: Mapping[str, ProcessSpec]) -> None:
        """Raise ConfigError if something listens already where a process is to."""
        held = {(m.spec.name, m.spec.address) for m in self._members.values()}
        for spec in specs.values():
            is_router = spec.kind is ProcessKind.ROUTER
            if (spec.name, spec.address) in held or (is_router and spec.address in self._sockets):
                continue
            address = spec.address
            try:
                bound_socket(address.host, address.port, is_shared=False).close()
            except OSError as error:
                holder = next((name for name, place in held if place == address), None)
                what = "what listens there" if holder is None else f"first {holder}, which has it,"
                raise ConfigError(
                    f"{spec.name} cannot listen on {address.host} port {address.port}: "
                    f"{error.strerror}; stop {what} or choose another port"
                ) from error

    async def _run(self) -> None:
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            try:
                while steps := self._plan():
                    await self._take(steps[0])
                self._close_unused_sockets()
            except (StartFailed, OSError) as error:
                _log.error("given_up", reason=str(error))
                if not self._has_news.is_set():
                    self._trouble = str(error)
            if not self._has_news.is_set():
                self._has_settled.set()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Leave nobody waiting for a goal that a bug keeps from being reached."""
        if not task.cancelled():
            self._trouble = f"the supervisor has failed: {task.exception()!r}"
            self._has_settled.set()

    def _plan(self) -> tuple[Step, ...]:
        found = {
            name: Found(member.spec.kind, member.fingerprint, member.is_up)
            for name, member in self._members.items()
        }
        return plan(
            found,
            [Wanted(s.name, s.kind, self._fingerprint(s)) for s in self._goal.specs.values()],
        )

    def _fingerprint(self, spec: ProcessSpec) -> str:
        return f"{spec.fingerprint} {self._editions.get(spec.name, 0)}"

    async def _take(self, step: Step) -> None:
        _log.info("step", change=step.change.value, processes=step.names)
        match step.change:
            case Change.START | Change.REPLACE:
                await self._start(step.names)
            case Change.STOP:
                await self._stop(step.names)

    async def _start(self, names: Sequence[str]) -> None:
        """Put new processes at the places with these names, which may have old ones.

        Raises:
            StartFailed: one is not well in time. The others are, but for those called off.
        """
        goal = self._goal
        await asyncio.gather(*(self._members[n].stop() for n in names if n in self._members))
        for name in names:
            spec = goal.specs[name]
            public = self._listen(spec.address) if spec.kind is ProcessKind.ROUTER else None
            self._members[name] = Member(
                spec,
                self._fingerprint(spec),
                self._directory,
                goal.restarts,
                public_socket=public,
            )
            starting = self._members[name].start(goal.start_timeout_s)
            self._starting[name] = asyncio.create_task(starting, name=f"start {name}")
        tasks = list(self._starting.values())
        await asyncio.wait(tasks)
        self._starting.clear()
        self._write_nodes()
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _stop(self, names: Sequence[str]) -> None:
        members = [self._members[name] for name in names]
        if any(member.spec.kind is ProcessKind.NODE for member in members):
            self._write_nodes(besides=names)
            await asyncio.sleep(2 * POLL_INTERVAL_S)  # Until no router sends them anything.
        await asyncio.gather(*(member.stop() for member in members))
        for name in names:
            del self._members[name]

    def _write_nodes(self, *, besides: Sequence[str] = ()) -> None:
        """Tell the routers all nodes, at once for whoever reads."""
        nodes = [
            member.spec.endpoint.model_dump()
            for name, member in self._members.items()
            if member.spec.kind is ProcessKind.NODE and member.is_up and name not in besides
        ]
        path = self._directory.nodes_file
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"nodes": nodes}))
        new.replace(path)

    def _listen(self, address: Address) -> int:
        """Return the descriptor of the socket that routers listen on together."""
        if address not in self._sockets:
            listening = bound_socket(address.host, address.port, is_shared=False)
            listening.listen(LISTEN_BACKLOG)
            listening.setblocking(False)
            self._sockets[address] = listening
        return self._sockets[address].fileno()

    def _close_unused_sockets(self) -> None:
        used = {member.spec.address for member in self._members.values()}
        for address in [address for address in self._sockets if address not in used]:
            self._sockets.pop(address).close()
