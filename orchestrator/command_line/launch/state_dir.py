"""Where a deployment on this machine keeps its files."""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.errors import ConfigError

MAX_SOCKET_PATH_BYTES = 107
"""Of Linux, for the address of a Unix socket."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,38}[a-z0-9])?", re.IGNORECASE)


def default_parent() -> Path:
    """Return where deployments are kept: `PROSERVE_STATE_DIR`, else where XDG says."""
    if own := os.environ.get("PROSERVE_STATE_DIR"):
        return Path(own).absolute()
    state_home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state_home).expanduser() / "proserve"


@dataclass(frozen=True, slots=True)
class StateDir:
    """The files of one deployment; only their owner may look into them."""

    path: Path

    @classmethod
    def of(cls, name: str, *, parent: Path | None = None) -> StateDir:
        """Return the place of a deployment, which need not be there yet.

        Raises:
            ConfigError: the name is none, or the place too deep for a socket.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a deployment: take 1 to 40 letters, digits, '.', '_' and "
                "'-', beginning and ending with a letter or digit; --name gives another one"
            )
        directory = cls((parent or default_parent()) / name)
        longest = directory.private_socket("router-99")
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"{longest} has {len(os.fsencode(longest))} bytes, a socket's path may have "
                f"{MAX_SOCKET_PATH_BYTES}; set PROSERVE_STATE_DIR to a shorter one"
            )
        return directory

    @property
    def name(self) -> str:
        """Return the deployment's name."""
        return self.path.name

    @property
    def control_socket(self) -> Path:
        """Return where the supervisor listens."""
        return self.path / "control.sock"

    @property
    def nodes_file(self) -> Path:
        """Return the list of nodes that routers follow."""
        return self.path / "nodes.json"

    @property
    def secret_file(self) -> Path:
        """Return the secret of routers and of nodes on other machines."""
        return self.path / "secret"

    @property
    def ray_file(self) -> Path:
        """Return which Ray cluster has the nodes, if one has."""
        return self.path / "ray.json"

    @property
    def manifests(self) -> Path:
        """Return the manifests that Kubernetes was given."""
        return self.path / "manifests"

    @property
    def kubernetes_file(self) -> Path:
        """Return where on Kubernetes the deployment is, if it is there."""
        return self.path / "kubernetes.json"

    @property
    def supervisor_log(self) -> Path:
        """Return where the supervisor says what it does."""
        return self.log("supervisor")

    def private_socket(self, process: str) -> Path:
        """Return where a router is asked for its health."""
        return self.path / f"{process}.sock"

    def config(self, process: str) -> Path:
        """Return the configuration that a process was started with."""
        return self.path / f"{process}.yaml"

    def log(self, process: str) -> Path:
        """Return the end of a process's output."""
        return self.path / "logs" / f"{process}.log"

    def create(self) -> None:
        """Make the directories."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.path / "logs").mkdir(mode=0o700, exist_ok=True)

    def lock(self) -> int | None:
        """Take the deployment for this process, until it ends; None if another one has it."""
        descriptor = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor
