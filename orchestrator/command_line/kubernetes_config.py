"""What a deployment file says about Kubernetes; only `proserve render kubernetes` reads it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from orchestrator.command_line.deployment_checks import MAX_GROUP_NODES

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

LabelName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$")]
"""Short enough that with another of its kind and a number it is still a DNS label."""

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]

_GIB = 1024**3


class TolerationConfig(BaseModel):
    """A taint that pods put up with, in Kubernetes' own words."""

    model_config = _STRICT

    key: str
    """Of the taint."""

    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether any value will do."""

    value: str | None = None
    """The value, with `Equal`."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """What the taint does; None is any."""

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if (self.value is None) == (self.operator == "Equal"):
            raise ValueError(
                f"operator is {self.operator} and value is {self.value or 'not set'}; Equal needs "
                "a value, Exists takes none"
            )
        return self


class EngineVolumeConfig(BaseModel):
    """Where pods find the engine directory. It is mounted for reading only."""

    model_config = _STRICT

    claim: ObjectName | None = None
    """A PersistentVolumeClaim with it. Pods on several machines need one that many may read."""

    image: str | None = None
    """An image with it, which Kubernetes 1.33 or newer mounts as a volume."""

    sub_path: Annotated[str, Field(pattern=r"^[^/].*$")] | None = None
    """Path in the volume; by default all of it is the engine directory."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.claim is None) == (self.image is None):
            raise ValueError("set either claim or image, which say what the volume is")
        return self


class PodsConfig(BaseModel):
    """Where pods run, and what of."""

    model_config = _STRICT

    image: str | None = None
    """Image of these pods; by default that of the whole deployment."""

    node_selector: dict[str, str] = {}
    """Labels that a machine must have."""

    tolerations: tuple[TolerationConfig, ...] = ()
    """Taints of machines that do not matter."""


class AutoscalingConfig(BaseModel):
    """How Kubernetes changes the number of a group's nodes: between `num_nodes` and `max_nodes`,
    by a metric that a Prometheus adapter serves."""

    model_config = _STRICT

    max_nodes: Annotated[int, Field(ge=1, le=MAX_GROUP_NODES)]
    """Nodes at most. Routers know all of them from the beginning."""

    waiting_per_node: PositiveFloat = 4.0
    """Requests that wait for their first KV blocks, on average over the nodes: above, nodes are
    added."""

    scale_down_after_s: Annotated[int, Field(ge=0, le=3600)] = 600
    """A node is taken away once fewer have been enough for this long: loading an engine takes
    minutes."""


class NodePodsConfig(PodsConfig):
    """The pods of a group of nodes."""

    engine_volume: EngineVolumeConfig | None = None
    """The engine directory; by default that of the whole deployment."""

    start_timeout_s: PositiveFloat = 900.0
    """An engine that is not loaded after this long is started again."""

    max_drain_s: NonNegativeInt = 30
    """A node that is to stop takes nothing new and has this long to finish what it has; the rest
    goes on elsewhere."""

    autoscaling: AutoscalingConfig | None = None
    """How the number of nodes changes; None keeps it."""


class RouterPodsConfig(PodsConfig):
    """The pods of the routers."""

    num_cpus: PositiveFloat = 1.0
    """Cores that each asks for; a router uses one for each of its
    workers."""

    memory_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2 * _GIB)
    """Main memory of each, which it may not exceed."""

    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """How the service that clients talk to is reached."""


class MonitoringConfig(BaseModel):
    """A ServiceMonitor, for a cluster with the Prometheus operator."""

    model_config = _STRICT

    namespace: ObjectName = "monitoring"
    """Where Prometheus runs; pods there may read metrics."""

    labels: dict[str, str] = {}
    """Of the ServiceMonitor, as the operator's `serviceMonitorSelector` wants them."""

    interval_s: PositiveInt = 15
    """Pause between two scrapes."""


class KubernetesConfig(BaseModel):
    """What Kubernetes has to be told on top."""

    model_config = _STRICT

    name: LabelName = "proserve"
    """Begins the names of all objects."""

    namespace: ObjectName | None = None
    """Of all objects; None leaves it to `kubectl`."""

    image: str | None = None
    """Image of routers and nodes; by default `proserve` with the version that renders."""

    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Names of Secrets that open the images' registry."""

    clients_secret: ObjectName | None = None
    """Name of the Secret that holds the clients file, under its file name. Needed where
    `router.clients_file` is set: the file is never written to a manifest."""

    engine_volume: EngineVolumeConfig | None = None
    """The engine directory, where a group does not say otherwise; None: it is in the image, under
    the path that the node names."""

    router: RouterPodsConfig = RouterPodsConfig()
    """The routers' pods."""

    monitoring: MonitoringConfig | None = None
    """A ServiceMonitor; None makes none, and lets nobody but routers reach the nodes."""
