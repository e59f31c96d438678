"""In which order the processes of a deployment become what they should be. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from orchestrator.command_line.launch.launcher import ProcessKind


class Change(Enum):
    """What is done to a process."""

    START = "start"
    REPLACE = "replace"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A process that there should be."""

    name: str
    kind: ProcessKind
    fingerprint: str
    """Equal for two processes that do the same in the same way."""


@dataclass(frozen=True, slots=True)
class Found:
    """A process that there is."""

    kind: ProcessKind
    fingerprint: str
    is_up: bool
    """It serves, or will after a while; one that is not has been given up."""


@dataclass(frozen=True, slots=True)
class Step:
    """Changes that are made at the same time; the next step waits for their end."""

    change: Change
    names: tuple[str, ...]


def plan(found: Mapping[str, Found], wanted: Sequence[Wanted]) -> tuple[Step, ...]:
    """Return the steps from what there is to what there should be.

    What is new starts before anything else is touched, so that what is replaced, one process at a
    time, and what is stopped, last, leaves others to do its work. Nodes come before the routers
    that need them and go after those that use them.
    """
    nodes = [process for process in wanted if process.kind is ProcessKind.NODE]
    routers = [process for process in wanted if process.kind is ProcessKind.ROUTER]
    steps = [
        Step(Change.START, tuple(p.name for p in group if not _is_up(found, p)))
        for group in (nodes, routers)
    ]
    for process in [*nodes, *routers]:
        if _is_up(found, process) and found[process.name].fingerprint != process.fingerprint:
            steps.append(Step(Change.REPLACE, (process.name,)))
    names = {process.name for process in wanted}
    surplus = {name: process for name, process in found.items() if name not in names}
    for kind in (ProcessKind.ROUTER, ProcessKind.NODE):
        gone = tuple(name for name, process in surplus.items() if process.kind is kind)
        steps.append(Step(Change.STOP, gone))
    return tuple(step for step in steps if step.names)


def _is_up(found: Mapping[str, Found], process: Wanted) -> bool:
    return process.name in found and found[process.name].is_up
