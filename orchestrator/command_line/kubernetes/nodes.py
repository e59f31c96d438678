"""The objects of nodes: one StatefulSet, and what belongs to it, for each set of equal nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.command_line.deployment import DeploymentConfig, default_num_gpus
from orchestrator.command_line.kubernetes.objects import (
    CONFIG_DIR,
    ENGINE_DIR,
    PORT_NAME,
    SET_LABEL,
    TMP_ENV,
    TMP_MOUNTS,
    Frame,
    Object,
    Pod,
    config_text,
    egress_to_collector,
    engine_mount,
    probe,
    resources,
)
from orchestrator.command_line.kubernetes_config import EngineVolumeConfig, NodePodsConfig
from orchestrator.command_line.service import STOP_GRACE_S
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError

WAITING_METRIC = "proserve_node_open_requests"
"""Of nodes; with state `waiting`, the requests that have no KV blocks yet."""

MAX_SET_NAME = 52
"""Kubernetes puts it into labels of 63 characters, with a hash of 10 behind it."""

_START_PERIOD_S = 5
_HEALTH_PERIOD_S = 10
_SHARED_MEMORY = "1Gi"
"""For the messages between the processes of an engine on several GPUs; NCCL takes far less."""


@dataclass(frozen=True, slots=True)
class NodeSet:
    """Nodes that one StatefulSet runs."""

    name: str
    nodes: tuple[NodeConfig, ...]
    """Every node that there may ever be, by its number."""

    num_nodes: int
    """How many there are to begin with."""

    num_gpus: int
    num_cpus: float | None
    memory_bytes: int | None
    pods: NodePodsConfig
    engine_volume: EngineVolumeConfig | None

    @property
    def port(self) -> int:
        """Return the port that all of them have: each pod has an address of its own."""
        return self.nodes[0].port

    def pod_name(self, frame: Frame, number: int) -> str:
        """Return the name that a StatefulSet gives to a pod."""
        return f"{frame.name(self.name)}-{number}"

    def url(self, frame: Frame, number: int) -> str:
        """Return the address of a node, which its set's headless service gives it."""
        return f"http://{self.pod_name(frame, number)}.{frame.name(self.name)}:{self.port}"

    def config(self, number: int) -> NodeConfig:
        """Return the configuration of a node as it is in its pod."""
        node = self.nodes[number]
        changes: dict[str, object] = {"host": "0.0.0.0"}
        if self.engine_volume is not None:
            changes["engine"] = node.engine.model_copy(update={"directory": ENGINE_DIR})
        return node.model_copy(update=changes)


def node_sets(config: DeploymentConfig) -> tuple[NodeSet, ...]:
    """Return the sets of a deployment: each node that is described alone, then each group.

    Raises:
        ConfigError: a name cannot be one in Kubernetes.
    """
    default_volume = config.kubernetes.engine_volume
    sets = [
        NodeSet(
            node.endpoint_id, (node,), 1, default_num_gpus(node), None, None, NodePodsConfig(),
            default_volume,
        )
        for node in config.nodes
    ]  # fmt: skip
    for group in config.node_groups:
        scaling = group.kubernetes.autoscaling
        max_nodes = group.num_nodes if scaling is None else scaling.max_nodes
        sets.append(
            NodeSet(
                group.name,
                tuple(group.node(n, port=group.first_port) for n in range(max_nodes)),
                group.num_nodes,
                group.num_node_gpus,
                group.num_cpus,
                group.memory_bytes,
                group.kubernetes,
                group.kubernetes.engine_volume or default_volume,
            )
        )
    for node_set in sets:
        _check_name(node_set.name, config.kubernetes.name)
    return tuple(sets)


def node_objects(frame: Frame, node_set: NodeSet, max_unhealthy_s: float) -> Sequence[Object]:
    """Return the objects of a set of nodes. A node is started again after `max_unhealthy_s`."""
    labels = frame.labels("node") | {SET_LABEL: node_set.name}
    files = {
        f"{node_set.pod_name(frame, number)}.yaml": config_text(node_set.config(number))
        for number in range(len(node_set.nodes))
    }
    selector = {"matchLabels": labels}
    service = {
        "clusterIP": "None",
        # Routers find out themselves whether a node can be used; names must not come and go.
        "publishNotReadyAddresses": True,
        "selector": labels,
        "ports": [{"name": PORT_NAME, "port": node_set.port, "targetPort": PORT_NAME}],
    }
    first = next(iter(files.values()))
    stateful_set: Object = {
        "serviceName": frame.name(node_set.name),
        "selector": selector,
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "RollingUpdate"},
        "template": _pod_template(frame, node_set, labels, first, max_unhealthy_s),
    }
    scaling = _autoscaler(frame, node_set, labels)
    if not scaling:  # what an autoscaler has decided is not to be undone by the next `apply`
        stateful_set = {"replicas": node_set.num_nodes} | stateful_set
    part = node_set.name
    return [
        frame.object("v1 ConfigMap", part, labels, data=files),
        frame.object("v1 Service", part, labels, spec=service),
        frame.object("apps/v1 StatefulSet", part, labels, spec=stateful_set),
        frame.disruption_budget(part, labels),
        _network_policy(frame, node_set, labels),
        *scaling,
    ]


def _pod_template(
    frame: Frame, node_set: NodeSet, labels: dict[str, str], config: str, max_unhealthy_s: float
) -> Object:
    pods = node_set.pods
    volumes, mounts = engine_mount(node_set.engine_volume)
    num_starts = math.ceil(pods.start_timeout_s / _START_PERIOD_S)
    if node_set.num_gpus > 1:
        shared = {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}
        volumes.append({"name": "shared-memory", "emptyDir": shared})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    drain = ["proserve", "drain", f"http://127.0.0.1:{node_set.port}"]
    container = {
        "name": "node",
        "args": ["node", f"{CONFIG_DIR}/$(POD_NAME).yaml"],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            *TMP_ENV,
        ],
        "ports": [{"name": PORT_NAME, "containerPort": node_set.port}],
        "resources": resources(node_set.num_cpus, node_set.memory_bytes, node_set.num_gpus),
        # It answers 503 until the engine is loaded, and when that hangs or has failed.
        "startupProbe": probe("/health", period_s=_START_PERIOD_S, num_failures=num_starts),
        "readinessProbe": probe("/health", period_s=5, num_failures=1),
        "livenessProbe": probe(
            "/health",
            period_s=_HEALTH_PERIOD_S,
            num_failures=math.ceil(max_unhealthy_s / _HEALTH_PERIOD_S),
        ),
        "lifecycle": {
            "preStop": {"exec": {"command": [*drain, "--max-wait-s", str(pods.max_drain_s)]}}
        },
        "volumeMounts": [*TMP_MOUNTS, *mounts],
    }
    grace_s = pods.max_drain_s + math.ceil(STOP_GRACE_S)
    pod = Pod(pods, container, volumes, config, grace_s)
    return frame.pod_template(node_set.name, labels, pod)


def _network_policy(frame: Frame, node_set: NodeSet, labels: dict[str, str]) -> Object:
    sources: list[Object] = [{"podSelector": {"matchLabels": frame.labels("router")}}]
    monitoring = frame.settings.monitoring
    if monitoring is not None:
        namespace = {"kubernetes.io/metadata.name": monitoring.namespace}
        sources.append({"namespaceSelector": {"matchLabels": namespace}})
    policy = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": sources, "ports": [{"protocol": "TCP", "port": PORT_NAME}]}],
        # A node answers and, but for this, asks nobody.
        "egress": egress_to_collector(node_set.nodes[0].tracing),
    }
    return frame.object("networking.k8s.io/v1 NetworkPolicy", node_set.name, labels, spec=policy)


def _autoscaler(frame: Frame, node_set: NodeSet, labels: dict[str, str]) -> list[Object]:
    scaling = node_set.pods.autoscaling
    if scaling is None:
        return []
    target = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "name": frame.name(node_set.name),
    }
    metric = {
        "type": "Pods",
        "pods": {
            "metric": {
                "name": WAITING_METRIC,
                "selector": {"matchLabels": {"state": "waiting"}},
            },
            "target": {
                "type": "AverageValue",
                "averageValue": f"{scaling.waiting_per_node * 1000:.0f}m",
            },
        },
    }
    scaler = {
        "scaleTargetRef": target,
        "minReplicas": node_set.num_nodes,
        "maxReplicas": scaling.max_nodes,
        "metrics": [metric],
        "behavior": {
            "scaleDown": {
                "stabilizationWindowSeconds": scaling.scale_down_after_s,
                "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
            }
        },
    }
    kind = "autoscaling/v2 HorizontalPodAutoscaler"
    return [frame.object(kind, node_set.name, labels, spec=scaler)]


def _check_name(name: str, prefix: str) -> None:
    if name == "router":
        raise ConfigError(
            "a group or node of the name 'router' cannot be told from the routers; rename it"
        )
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
        raise ConfigError(
            f"{name!r} cannot be part of a name in Kubernetes; use small letters, digits and -"
        )
    if len(f"{prefix}-{name}") > MAX_SET_NAME:
        raise ConfigError(
            f"{prefix}-{name} has {len(prefix) + len(name) + 1} characters, a StatefulSet's name "
            f"may have {MAX_SET_NAME}; shorten kubernetes.name or that of the nodes"
        )
