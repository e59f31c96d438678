"""Runs the nodes of a deployment on a Ray cluster, and its routers on this machine.

Each node is a detached actor, which Ray starts elsewhere when its host is lost. Nodes register
themselves; requests and tokens never go through Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from orchestrator.command_line.deployment import DeploymentConfig, PlacedNode, RayConfig
from orchestrator.command_line.launch.launcher import (
    DeploymentStatus,
    LaunchFailed,
    ProcessKind,
    ProcessState,
    ProcessStatus,
)
from orchestrator.command_line.launch.local import LocalLauncher
from orchestrator.command_line.launch.plan import Change, Found, Step, Wanted, plan
from orchestrator.command_line.launch.ray_node import NodeAssignment, RayNode
from orchestrator.command_line.launch.specs import Address, ProcessSpec
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.core.errors import ConfigError

try:
    import ray
    import ray.exceptions
    from ray.util import list_named_actors
except ImportError as error:
    raise ConfigError(
        f"`--on ray` needs Ray, which is not installed ({error}): pip install 'proserve[ray]'"
    ) from error

CALL_TIMEOUT_S = 10.0
"""A call to an actor on a host that is cut off hangs far longer than others take to notice."""

POLL_S = 0.2
START_TIMEOUT_S = 180.0
"""Of a node that is restarted."""

STOP_SLACK_S = 60.0
"""On top of the time that a node may drain."""

_LOST = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)


class RayLauncher:
    """The deployment of a state directory, with its nodes on a Ray cluster."""

    def __init__(
        self, directory: StateDir, *, on_status: Callable[[DeploymentStatus], None] | None = None
    ) -> None:
        """`on_status` is told how the deployment is while something waits for it."""
        self._directory = directory
        self._on_status = on_status or (lambda _: None)
        self._routers = LocalLauncher(directory, on_status=on_status)

    def up(self, config: DeploymentConfig, *, start_timeout_s: float) -> DeploymentStatus:
        """Make routers here, and nodes on the cluster, what the deployment's file says."""
        self._directory.create()
        self._connect(config.ray)
        secret = self._secret()
        self._directory.ray_file.write_text(config.ray.model_dump_json())
        self._routers.up(config, start_timeout_s=start_timeout_s, are_nodes_elsewhere=True)
        wanted = {
            placed.config.endpoint_id: (
                _assignment(config, placed, secret, start_timeout_s),
                _options(placed),
            )
            for placed in config.placed_nodes()
        }
        goal = [Wanted(n, ProcessKind.NODE, a.fingerprint) for n, (a, _) in wanted.items()]
        for step in plan(self._found(), goal):
            self._take(step, wanted, max_drain_s=config.restarts.max_drain_s)
        return self.status()

    def status(self) -> DeploymentStatus:
        """Return how routers and nodes are now."""
        routers = self._routers.status()
        self._connect_again()
        nodes = tuple(self._status_of(name) for name in self._names())
        return msgspec.structs.replace(routers, processes=(*nodes, *routers.processes))

    def logs(self, names: Sequence[str], *, num_lines: int, follow: bool) -> Iterator[str]:
        """Yield lines of nodes' and routers' logs; those of nodes are not followed."""
        self._connect_again()
        nodes = self._names()
        routers = [name for name in names if name not in nodes]
        for name in nodes:
            if not names or name in names:
                with contextlib.suppress(*_LOST):
                    lines = _call(self._actor(name).lines.remote(num_lines))
                    yield from (f"{name} | {line}" for line in lines)
        if routers or not names:
            yield from self._routers.logs(routers, num_lines=num_lines, follow=follow)

    def restart(self, names: Sequence[str]) -> DeploymentStatus:
        """Replace processes one after the other, nodes where they are."""
        self._connect_again()
        nodes = self._names()
        routers = [name for name in names if name not in nodes]
        for name in nodes:
            if not names or name in names:
                self._restart(name)
                self._wait_for(name, START_TIMEOUT_S)
        if routers or not names:
            self._routers.restart(routers)
        return self.status()

    def down(self) -> None:
        """Stop routers, then nodes."""
        self._connect_again()
        with contextlib.suppress(LaunchFailed):  # They are not there; nodes may be.
            self._routers.down()
        for name in self._names():
            self._stop(name, max_drain_s=0.0)
        self._directory.ray_file.unlink(missing_ok=True)

    def _connect(self, config: RayConfig) -> None:
        if ray.is_initialized():
            return
        try:
            ray.init(
                address=config.address,
                namespace=f"proserve-{self._directory.name}",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise LaunchFailed(
                f"the Ray cluster at {config.address} cannot be used: {error}. Is it running, and "
                "is RAY_AUTH_TOKEN the one of its head?"
            ) from error

    def _connect_again(self) -> None:
        path = self._directory.ray_file
        if not path.exists():
            raise LaunchFailed(
                f"deployment {self._directory.name!r} has nothing on Ray; start it with: proserve "
                "up FILE --on ray"
            )
        self._connect(RayConfig.model_validate_json(path.read_text()))

    def _secret(self) -> str:
        """Return the secret of routers and nodes, made at first."""
        path = self._directory.secret_file
        if not path.exists():
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        return path.read_text()

    def _names(self) -> list[str]:
        return sorted(list_named_actors())

    def _actor(self, name: str) -> Any:
        return ray.get_actor(name)

    def _found(self) -> dict[str, Found]:
        found = {}
        for name in self._names():
            try:
                fingerprint = str(_call(self._actor(name).fingerprint.remote()))
            except _LOST:
                fingerprint = "unknown"
            is_up = self._status_of(name).state is not ProcessState.FAILED
            found[name] = Found(ProcessKind.NODE, fingerprint, is_up)
        return found

    def _status_of(self, name: str) -> ProcessStatus:
        try:
            return msgspec.json.decode(_call(self._actor(name).status.remote()), type=ProcessStatus)
        except (*_LOST, ValueError) as error:
            reason = f"its actor does not answer: {type(error).__name__}"
            return ProcessStatus(name, ProcessKind.NODE, ProcessState.RESTARTING, "", reason=reason)

    def _take(
        self,
        step: Step,
        wanted: Mapping[str, tuple[NodeAssignment, dict[str, Any]]],
        *,
        max_drain_s: float,
    ) -> None:
        existing = self._names()
        for name in step.names:
            if name in existing:
                self._stop(name, max_drain_s=max_drain_s)
        if step.change is Change.STOP:
            return
        for name in step.names:
            assignment, options = wanted[name]
            actor = ray.remote(_Actor).options(name=name, **options)
            actor.remote(msgspec.json.encode(assignment))
        for name in step.names:
            self._wait_for(name, wanted[name][0].start_timeout_s)

    def _wait_for(self, name: str, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = self._status_of(name)
            self._on_status(DeploymentStatus(self._directory.name, (found,), is_settled=False))
            if found.state is ProcessState.HEALTHY:
                return
            if found.state is ProcessState.FAILED:
                last = "\n".join(_call(self._actor(name).lines.remote(5)))
                raise LaunchFailed(f"{name} does not start: {found.reason}\n{last}")
            if time.monotonic() > deadline_s:
                raise LaunchFailed(
                    f"{name} is not healthy after {timeout_s:g} s, it is {found.state}"
                    f"{found.reason and f' ({found.reason})'}; does the cluster have what it asks "
                    "for? `ray status` says so"
                )
            time.sleep(POLL_S)

    def _restart(self, name: str) -> None:
        try:
            ray.get(self._actor(name).restart.remote(), timeout=START_TIMEOUT_S)
        except _LOST as error:
            raise LaunchFailed(
                f"{name} cannot be restarted, its actor does not answer: {type(error).__name__}"
            ) from error

    def _stop(self, name: str, *, max_drain_s: float) -> None:
        actor = self._actor(name)
        with contextlib.suppress(*_LOST):
            ray.get(actor.close.remote(), timeout=max_drain_s + STOP_SLACK_S)
        ray.kill(actor, no_restart=True)
        while name in self._names():
            time.sleep(POLL_S)


class _Actor(RayNode):
    """A node where Ray has put it."""

    def __init__(self, assignment: bytes) -> None:
        super().__init__(assignment, str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]


def _call(reference: Any) -> Any:
    return ray.get(reference, timeout=CALL_TIMEOUT_S)


def _assignment(
    config: DeploymentConfig, placed: PlacedNode, secret: str, start_timeout_s: float
) -> NodeAssignment:
    node = placed.config.model_dump(mode="json", exclude_unset=True, exclude={"host", "port"})
    node["engine"]["directory"] = str(placed.config.engine.directory.absolute())
    if config.router.registry is not None:
        secret = ""
        node.get("registry", {}).pop("advertise_host", None)  # The host is Ray's choice.
    else:
        is_secure = config.router.tls is not None
        router = Address(config.router.host, config.router.port, is_secure=is_secure)
        node["registration"] = {"router_urls": [config.ray.router_url or router.url]}
    restarts = config.restarts.model_dump(mode="json", exclude_unset=True)
    options = str(sorted(_options(placed).items(), key=str))
    spec = ProcessSpec(
        placed.config.endpoint_id,
        ProcessKind.NODE,
        Address("", 0),
        placed.config,
        {"node": str(node), "restarts": str(restarts), "options": options, "secret": secret},
    )
    return NodeAssignment(spec.name, spec.fingerprint, node, restarts, start_timeout_s, secret)


def _options(placed: PlacedNode) -> dict[str, Any]:
    """Return how Ray is to place and keep a node's actor."""
    group = placed.group
    num_gpus = 1 if placed.config.engine.device == "cuda" else 0
    return {
        "lifetime": "detached",
        "max_restarts": -1,
        "max_concurrency": 8,
        # Not a placement group, which keeps Ray busy while it has nowhere to go.
        "scheduling_strategy": "SPREAD",
        "num_gpus": num_gpus if group is None else group.num_node_gpus,
        "num_cpus": 0 if group is None or group.num_cpus is None else group.num_cpus,
        "resources": {} if group is None else dict(group.ray.resources),
    }
