"""A deployment file: routers and their nodes, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from engines.manifest import read_manifest
from orchestrator.command_line.deployment_checks import MAX_GROUP_NODES, cross_problems
from orchestrator.command_line.kubernetes_config import (
    KubernetesConfig,
    LabelName,
    NodePodsConfig,
)
from orchestrator.config import NodeConfig, NodeSettings, Port
from orchestrator.core.errors import ConfigError
from orchestrator.peers import ServiceUrl
from orchestrator.yaml_config import Problem, problems_error
from router.config import EndpointConfig, Name, RouterConfig, RouterSettings


def local_url(host: str, port: int, *, is_secure: bool = False) -> str:
    """Return the address under which this machine reaches a service that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if is_secure else "http"
    return (
        f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"
    )


class RestartConfig(BaseModel):
    """What is done about a node, or the router, that ends."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_restarts: NonNegativeInt = 5
    """How often each is started again within `window_s`; if it ends once more, it stays down.
    0 starts none again."""

    window_s: PositiveFloat = 300.0
    """Ends that are longer ago are forgotten."""

    first_pause_s: PositiveFloat = 0.5
    """Pause before it is started again; twice as long for each further end in the window."""

    max_pause_s: PositiveFloat = 30.0
    """Longest such pause."""

    max_unhealthy_s: PositiveFloat = 90.0
    """A node whose health check has not succeeded for this long is killed and started again, for
    example because it is stopped or its engine hangs; of the router any answer will do."""

    max_drain_s: PositiveFloat = 60.0
    """A node or router that `proserve up`, `restart` or `down` replaces or stops lets open requests
    end for so long. Those that a node has left go on elsewhere; those of a router end with an
    error."""


class RayConfig(BaseModel):
    """The Ray cluster of `proserve up --on ray`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    address: Annotated[str, Field(min_length=1)] = "auto"
    """Address of the cluster's head, HOST:PORT; `auto` finds a cluster that this machine is part
    of."""

    router_url: ServiceUrl | None = None
    """Under which nodes on other hosts reach the router; by default its `host` and `port`."""


class NodeOnRayConfig(BaseModel):
    """What each node of a group asks of Ray, besides `num_gpus` and `num_cpus`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    resources: dict[str, PositiveFloat] = {}
    """Ray's custom resources, by name."""


class RouterSection(RouterSettings):
    """The routers of a deployment; all of them are the same."""

    num_replicas: PositiveInt = 1
    """Router processes, behind one address. They know nothing of each other, so limits of clients
    hold for each."""


class NodeGroupConfig(NodeSettings):
    """Nodes that are the same but for their names, NAME-0 and so on, and their ports."""

    name: LabelName
    """Begins the `endpoint_id` of each node."""

    num_nodes: Annotated[int, Field(ge=1, le=MAX_GROUP_NODES)] = 1
    """Nodes of the group."""

    first_port: Port
    """Port of the first node; the others have those that follow. On Kubernetes, where each node
    has an address of its own, all have this one."""

    num_gpus: NonNegativeInt | None = None
    """GPUs of each node; by default one with `device: cuda`, none with `cpu`. On one machine each
    node gets its own, in the order of the file."""

    num_cpus: PositiveFloat | None = None
    """Cores that each node asks for on Kubernetes."""

    memory_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Main memory of each node on Kubernetes, which it may not exceed: `host_kv_bytes` for each
    GPU, on a CPU the KV cache and the weights, and some GiB for the process."""

    kubernetes: NodePodsConfig = NodePodsConfig()
    """What Kubernetes has to be told on top."""

    ray: NodeOnRayConfig = NodeOnRayConfig()
    """What Ray has to be told on top."""

    @property
    def num_node_gpus(self) -> int:
        """Return how many GPUs one node has."""
        return default_num_gpus(self) if self.num_gpus is None else self.num_gpus

    def node(self, number: int, *, port: int | None = None) -> NodeConfig:
        """Return one of the nodes; by default its port is the first plus its number."""
        fields = set(NodeSettings.model_fields)
        template = self.model_dump(include=fields, exclude_unset=True)
        if port is None:
            port = self.first_port + number
        return NodeConfig(**template, endpoint_id=f"{self.name}-{number}", port=port)

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        problems = [*self._gpu_problems(), *self._size_problems()]
        if problems:
            raise problems_error(type(self), problems)
        return self

    def _gpu_problems(self) -> Iterator[Problem]:
        if (self.num_node_gpus > 0) != (self.engine.device == "cuda"):
            way_out = "leave it out" if self.engine.device == "cpu" else "give each node one"
            yield (
                ("num_gpus",),
                f"num_gpus is {self.num_gpus}, but the engine's device is {self.engine.device}; "
                f"{way_out}, or change the device",
            )

    def _size_problems(self) -> Iterator[Problem]:
        kv_bytes = self.engine.host_kv_bytes * max(1, self.num_node_gpus)
        if self.engine.device == "cpu":
            kv_bytes += self.engine.device_kv_bytes or 0
        if self.memory_bytes is not None and self.memory_bytes <= kv_bytes:
            yield (
                ("memory_bytes",),
                f"memory_bytes is {self.memory_bytes:,}, but KV blocks alone take {kv_bytes:,} "
                "(host_kv_bytes for each GPU, device_kv_bytes on a CPU); give more, or keep less",
            )
        scaling = self.kubernetes.autoscaling
        if scaling is not None and scaling.max_nodes < self.num_nodes:
            yield (
                ("kubernetes", "autoscaling", "max_nodes"),
                f"max_nodes is {scaling.max_nodes}, but num_nodes is already {self.num_nodes}; "
                "raise it, or lower num_nodes",
            )


def default_num_gpus(node: NodeSettings) -> int:
    """Return how many GPUs a node has that does not say it."""
    return 1 if node.engine.device == "cuda" else 0


@dataclass(frozen=True, slots=True)
class PlacedNode:
    """A node on this machine."""

    config: NodeConfig

    gpus: tuple[int, ...] | None
    """Which of the machine's GPUs are its own; None: it sees all of them."""

    group: NodeGroupConfig | None = None
    """None: it is described by itself."""


class DeploymentConfig(BaseModel):
    """Routers, nodes, and how they are kept running: `proserve serve` starts them on this machine,
    `proserve render kubernetes` writes what a cluster needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: Name | None = None
    """Name under which the model is served; by default what the engine directories say. With it,
    manifests can be rendered where there are no engine directories."""

    router: RouterSection = RouterSection()
    """The service that clients talk to. Which nodes it has and which model it serves follows
    from the rest of the file."""

    nodes: tuple[NodeConfig, ...] = ()
    """Nodes that are described one by one."""

    node_groups: tuple[NodeGroupConfig, ...] = ()
    """Nodes that are the same but for their names and ports."""

    restarts: RestartConfig = RestartConfig()
    """What is done about a node, or the router, that ends."""

    kubernetes: KubernetesConfig = KubernetesConfig()
    """What only Kubernetes has to be told."""

    ray: RayConfig = RayConfig()
    """What only `proserve up --on ray` has to be told."""

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: object, validate: ModelWrapValidatorHandler[Self]) -> Self:
        refused: ValidationError | None = None
        try:
            config = validate(data)
        except ValidationError as error:
            refused = error
        problems = list(cross_problems(data))
        if problems or refused is not None:
            raise problems_error(cls, problems, besides=refused)
        return config

    def placed_nodes(self) -> tuple[PlacedNode, ...]:
        """Return every node, those of groups too, as it runs on one machine."""
        placed = [PlacedNode(node, None) for node in self.nodes]
        next_gpu = 0
        for group in self.node_groups:
            for number in range(group.num_nodes):
                gpus = tuple(range(next_gpu, next_gpu + group.num_node_gpus))
                next_gpu += group.num_node_gpus
                placed.append(PlacedNode(group.node(number), gpus or None, group))
        return tuple(placed)

    def served_model(self) -> str:
        """Return the name of the model that all nodes serve.

        Raises:
            EngineDirectoryError: the engine directory of a node is missing or damaged.
            ConfigError: the nodes serve different models, or another one than the file says.
        """
        models = {
            placed.config.endpoint_id: read_manifest(
                placed.config.engine.directory, verify_files=False
            ).model_name
            for placed in self.placed_nodes()
        }
        served = ", ".join(f"{name} serves {model}" for name, model in models.items())
        if len(set(models.values())) > 1:
            raise ConfigError(f"the nodes of a deployment serve one model, but {served}")
        [model] = set(models.values())
        if self.model not in (None, model):
            raise ConfigError(
                f"model is {self.model!r}, but {served}; leave it out, or name other engines"
            )
        return model

    def router_config(self) -> RouterConfig:
        """Return the configuration of a router on this machine.

        Raises:
            EngineDirectoryError, ConfigError: as `served_model`.
        """
        nodes = [placed.config for placed in self.placed_nodes()]
        listed = tuple(
            EndpointConfig(endpoint_id=n.endpoint_id, url=local_url(n.host, n.port)) for n in nodes
        )
        return RouterConfig(
            **self.router_settings(),
            engine_dir=nodes[0].engine.directory,
            model=self.served_model(),
            nodes=listed if self.router.registry is None else (),
        )

    def router_settings(self) -> Mapping[str, Any]:
        """Return what the file says of a router, apart from how many there are."""
        return self.router.model_dump(exclude={"num_replicas"}, exclude_unset=True)
