"""The objects of routers: a Deployment and what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.kubernetes.nodes import NodeSet
from orchestrator.command_line.kubernetes.objects import (
    CONFIG_DIR,
    DNS_PORTS,
    PORT_NAME,
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
from orchestrator.command_line.service import STOP_GRACE_S
from orchestrator.core.errors import ConfigError
from router.config import EndpointConfig, RouterConfig

CLIENTS_DIR = Path("/etc/proserve-clients")
"""A folder of its own: Kubernetes brings changes of a Secret only into whole folders, and nothing
can be mounted inside a ConfigMap."""

LEAVE_S = 5
"""A router that is to stop goes on for so long: it takes a moment until nobody sends to it."""

_FILE = "router.yaml"
_PART = "router"


def router_objects(
    frame: Frame, deployment: DeploymentConfig, sets: Sequence[NodeSet], model: str
) -> Sequence[Object]:
    """Return the objects of the routers, which know every node that the sets may ever have.

    Raises:
        ConfigError: a clients file is named without its Secret, or the other way round.
    """
    labels = frame.labels(_PART)
    config = _router_config(frame, deployment, sets, model)
    text = config_text(config)
    service = {
        "type": frame.settings.router.service_type,
        "selector": labels,
        "ports": [{"name": PORT_NAME, "port": config.port, "targetPort": PORT_NAME}],
    }
    controller = {
        "replicas": deployment.router.num_replicas,
        "selector": {"matchLabels": labels},
        "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": _pod_template(frame, config, sets[0], text),
    }
    return [
        frame.object("v1 ConfigMap", _PART, labels, data={_FILE: text}),
        frame.object("v1 Service", _PART, labels, spec=service),
        frame.object("apps/v1 Deployment", _PART, labels, spec=controller),
        frame.disruption_budget(_PART, labels),
        _network_policy(frame, labels, config),
    ]


def monitoring_objects(frame: Frame) -> Sequence[Object]:
    """Return what tells the Prometheus operator to scrape routers and nodes; none if not wanted."""
    monitoring = frame.settings.monitoring
    if monitoring is None:
        return []
    labels = frame.labels(_PART)
    common = {key: labels[key] for key in labels if not key.endswith("/component")}
    spec = {
        "selector": {"matchLabels": common},
        "endpoints": [
            {"port": PORT_NAME, "path": "/metrics", "interval": f"{monitoring.interval_s}s"}
        ],
    }
    kind = "monitoring.coreos.com/v1 ServiceMonitor"
    return [frame.object(kind, "metrics", common | monitoring.labels, spec=spec)]


def _router_config(
    frame: Frame, deployment: DeploymentConfig, sets: Sequence[NodeSet], model: str
) -> RouterConfig:
    engine_dir = sets[0].config(0).engine.directory
    settings: dict[str, Any] = dict(deployment.router_settings())
    file, secret = deployment.router.clients_file, frame.settings.clients_secret
    if file is not None and secret is None:
        raise ConfigError(
            f"router.clients_file is {file}, but kubernetes.clients_secret does not say which "
            "Secret holds it; name one, and make it with: kubectl create secret generic NAME "
            f"--from-file={file}"
        )
    if file is None and secret is not None:
        raise ConfigError(
            f"kubernetes.clients_secret is {secret}, but there is no router.clients_file, whose "
            "name is the Secret's key; set it, or leave the Secret out"
        )
    if file is not None:
        settings["clients_file"] = CLIENTS_DIR / file.name
    return RouterConfig(
        **settings | {"host": "0.0.0.0", "port": deployment.router.port},
        engine_dir=engine_dir,
        model=model,
        nodes=tuple(
            EndpointConfig(endpoint_id=node.endpoint_id, url=node_set.url(frame, number))
            for node_set in sets
            for number, node in enumerate(node_set.nodes)
        ),
    )


def _pod_template(frame: Frame, config: RouterConfig, first: NodeSet, text: str) -> Object:
    pods = frame.settings.router
    volumes, mounts = engine_mount(first.engine_volume)  # for the tokenizer
    if config.clients_file is not None:
        volumes.append({"name": "clients", "secret": {"secretName": frame.settings.clients_secret}})
        mounts.append({"name": "clients", "mountPath": str(CLIENTS_DIR), "readOnly": True})
    container = {
        "name": "router",
        "args": ["router", str(CONFIG_DIR / _FILE)],
        "env": TMP_ENV,
        "ports": [{"name": PORT_NAME, "containerPort": config.port}],
        "resources": resources(pods.num_cpus, pods.memory_bytes),
        "startupProbe": probe("/metrics", period_s=2, num_failures=60),
        # It answers 503 while it reaches no node; others may.
        "readinessProbe": probe("/health", period_s=2, num_failures=3),
        # Not /health: a router is not to be killed because all nodes are away.
        "livenessProbe": probe("/metrics", period_s=10, num_failures=3),
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_S}}},
        "volumeMounts": [*TMP_MOUNTS, *mounts],
    }
    grace_s = LEAVE_S + math.ceil(STOP_GRACE_S)
    pod = Pod(pods, container, volumes, text, grace_s)
    return frame.pod_template(_PART, frame.labels(_PART), pod)


def _network_policy(frame: Frame, labels: dict[str, str], config: RouterConfig) -> Object:
    policy = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"protocol": "TCP", "port": PORT_NAME}]}],
        "egress": [
            {"to": [{"podSelector": {"matchLabels": frame.labels("node")}}]},
            {"ports": list(DNS_PORTS)},
            *egress_to_collector(config.tracing),
        ],
    }
    return frame.object("networking.k8s.io/v1 NetworkPolicy", _PART, labels, spec=policy)
