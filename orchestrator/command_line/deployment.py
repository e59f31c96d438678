"""A deployment file: one router and its nodes on this machine."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    model_validator,
)

from engines.manifest import read_manifest
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError
from router.config import EndpointConfig, RouterConfig, RouterSettings


def local_url(host: str, port: int) -> str:
    """Return the address under which this machine reaches a service that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


class RestartConfig(BaseModel):
    """What is done about a node that ends."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_restarts: NonNegativeInt = 5
    """How often a node is started again within `window_s`; if it ends once more, it stays down.
    0 starts none again."""

    window_s: PositiveFloat = 300.0
    """Ends that are longer ago are forgotten."""

    first_pause_s: PositiveFloat = 0.5
    """Pause before a node is started again; twice as long for each further end in the window."""

    max_pause_s: PositiveFloat = 30.0
    """Longest such pause."""

    max_unhealthy_s: PositiveFloat = 90.0
    """A node whose health check has not succeeded for this long is killed and started again, for
    example because it is stopped or its engine hangs."""


class DeploymentConfig(BaseModel):
    """Everything `proserve serve` starts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    router: RouterSettings = RouterSettings()
    """The service that clients talk to. Which nodes it has and which model it serves follows
    from `nodes`."""

    nodes: Annotated[tuple[NodeConfig, ...], Field(min_length=1)]
    """The nodes to start."""

    restarts: RestartConfig = RestartConfig()
    """What is done about a node that ends."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.router.port == 0:
            raise ValueError("router.port is 0; a deployment needs to know it, choose a free one")
        places = [(node.host, node.port) for node in self.nodes]
        places.append((self.router.host, self.router.port))
        endpoint_ids = [node.endpoint_id for node in self.nodes]
        if len(set(endpoint_ids)) < len(endpoint_ids):
            raise ValueError(f"each endpoint_id may be used once, got {', '.join(endpoint_ids)}")
        for host, port in places:
            if places.count((host, port)) > 1:
                raise ValueError(f"address {host}:{port} is given to more than one service")
        return self

    def router_config(self) -> RouterConfig:
        """Return the router's own configuration.

        Raises:
            EngineDirectoryError: the engine directory of a node is missing or damaged.
            ConfigError: the nodes serve different models.
        """
        models = {
            node.endpoint_id: read_manifest(node.engine.directory, verify_files=False).model_name
            for node in self.nodes
        }
        if len(set(models.values())) > 1:
            served = ", ".join(f"{name} serves {model}" for name, model in models.items())
            raise ConfigError(f"the nodes of a deployment serve one model, but {served}")
        first = self.nodes[0]
        return RouterConfig(
            **self.router.model_dump(),
            engine_dir=first.engine.directory,
            model=models[first.endpoint_id],
            nodes=tuple(
                EndpointConfig(endpoint_id=n.endpoint_id, url=local_url(n.host, n.port))
                for n in self.nodes
            ),
        )
