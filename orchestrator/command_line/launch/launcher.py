"""What every way of running a deployment has in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from orchestrator.core.errors import ProServeError

if TYPE_CHECKING:
    from orchestrator.command_line.deployment import DeploymentConfig


class LaunchFailed(ProServeError):
    """A deployment is not, or not wholly, as it should be; the text says why."""


class ProcessKind(StrEnum):
    """What a process of a deployment is."""

    NODE = "node"
    ROUTER = "router"


class ProcessState(StrEnum):
    """How a process is."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DRAINING = "draining"
    RESTARTING = "restarting"
    """It has ended by itself, and is started again after a pause."""

    FAILED = "failed"
    """It has ended, and stays down until the next `up` or `restart`."""


class ProcessStatus(msgspec.Struct, frozen=True):
    """One process, or one place for a process."""

    name: str
    kind: ProcessKind
    state: ProcessState
    address: str
    pid: int | None = None
    """None: it does not run, or not on this machine."""

    num_restarts: int = 0
    """How often it has ended by itself since it was asked for."""

    for_s: float = 0.0
    """How long it has been in this state."""

    reason: str = ""
    """Why it ended last; empty if it never did."""


class DeploymentStatus(msgspec.Struct, frozen=True):
    """All processes of a deployment."""

    name: str
    processes: tuple[ProcessStatus, ...]
    is_settled: bool = True
    """Nothing is being changed."""

    trouble: str = ""
    """Why the last change was given up; empty if it was not."""

    goal: int = 0
    """Number of the last change that was asked for."""


class Launcher(Protocol):
    """Runs one deployment somewhere. Every method may raise LaunchFailed or ConfigError."""

    def up(self, config: DeploymentConfig, *, start_timeout_s: float) -> DeploymentStatus:
        """Make the deployment what its file says, whatever it was before; return once it is.

        Requests that are open meanwhile do not fail, as long as there is another node or router
        for each that is replaced.
        """

    def status(self) -> DeploymentStatus:
        """Return how the deployment is now."""

    def logs(self, names: Sequence[str], *, num_lines: int, follow: bool) -> Iterator[str]:
        """Yield the last lines of these processes' logs, all of them without names; with `follow`
        also those that come, for ever."""

    def restart(self, names: Sequence[str]) -> DeploymentStatus:
        """Replace these processes, all of them without names, one after the other; return once
        they are healthy."""

    def down(self) -> None:
        """Let open requests end, and stop everything."""
