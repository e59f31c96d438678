"""What the processes of a deployment on this machine are started with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from orchestrator.command_line.deployment import DeploymentConfig, PlacedNode, local_url
from orchestrator.command_line.launch.launcher import ProcessKind
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.command_line.serve import node_environment
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError
from router.config import EndpointConfig, RegistrationConfig, RouterConfig


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens."""

    host: str
    port: int
    is_secure: bool = False

    @property
    def url(self) -> str:
        """Return how this machine reaches it."""
        return local_url(self.host, self.port, is_secure=self.is_secure)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process that there should be."""

    name: str
    kind: ProcessKind
    address: Address
    config: BaseModel
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of the supervisor's own."""

    @property
    def fingerprint(self) -> str:
        """Return a digest of all that a running process would have to be replaced for."""
        text = f"{self.kind} {self.config.model_dump_json()} {sorted(self.environment.items())}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def endpoint(self) -> EndpointConfig:
        """Return how routers know a node."""
        return EndpointConfig(endpoint_id=self.name, url=self.address.url)


def process_specs(
    config: DeploymentConfig, directory: StateDir, *, are_nodes_elsewhere: bool = False
) -> tuple[ProcessSpec, ...]:
    """Return every process of a deployment on this machine. Nodes that are elsewhere register
    themselves at the router, or in etcd.

    Raises:
        ConfigError: the deployment cannot run in this way.
        EngineDirectoryError: as `DeploymentConfig.served_model`.
    """
    router = config.router
    if router.num_workers > 1:
        raise ConfigError(
            f"router.num_workers is {router.num_workers}, but `proserve up` runs several routers "
            "behind one port by router.num_replicas; set num_workers to 1"
        )
    if router.registration is not None:
        raise ConfigError(
            "router.registration is set, but `proserve up` sees to it that routers know all nodes; "
            "remove it, or start routers by `proserve router`"
        )
    if are_nodes_elsewhere and router.num_replicas > 1 and router.registry is None:
        raise ConfigError(
            f"router.num_replicas is {router.num_replicas}, but nodes elsewhere register at one "
            "router; set it to 1, or have them meet in etcd (router.registry)"
        )
    placed = config.placed_nodes()
    ways: dict[str, object] = {}
    if router.registry is None and are_nodes_elsewhere:
        ways["registration"] = RegistrationConfig(secret_file=directory.secret_file)
    elif router.registry is None:
        ways["nodes_file"] = directory.nodes_file
    router_config = RouterConfig.model_validate(
        {
            **config.router_settings(),
            "engine_dir": placed[0].config.engine.directory,
            "model": config.served_model(),
            **ways,
        }
    )
    address = Address(router.host, router.port, is_secure=router.tls is not None)
    routers = (
        ProcessSpec(f"router-{number}", ProcessKind.ROUTER, address, router_config)
        for number in range(router.num_replicas)
    )
    nodes = () if are_nodes_elsewhere else map(_node, placed)
    specs = (*nodes, *routers)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"a node is called {twice!r}, as a router is; rename it")
    return specs


def _node(placed: PlacedNode) -> ProcessSpec:
    node: NodeConfig = placed.config
    return ProcessSpec(
        node.endpoint_id,
        ProcessKind.NODE,
        Address(node.host, node.port),
        node,
        node_environment(placed),
    )
