"""What all objects that we render have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel

from orchestrator.command_line.kubernetes_config import (
    EngineVolumeConfig,
    KubernetesConfig,
    PodsConfig,
)
from orchestrator.tracing import TracingConfig

Object = dict[str, Any]
"""One object of Kubernetes, as its YAML."""

CONFIG_DIR = Path("/etc/proserve")
ENGINE_DIR = Path("/engine")
PORT_NAME = "http"
"""Of every service: its API, health and metrics are on one port."""

USER_ID = 10001
"""The user of our images; any other would do."""

DNS_PORTS: Sequence[Object] = tuple({"protocol": name, "port": 53} for name in ("UDP", "TCP"))

SET_LABEL = "proserve/node-set"
CONFIG_ANNOTATION = "proserve/config-sha256"
"""On pods: they are started anew when their configuration changes."""

_UNITS = (("Gi", 1024**3), ("Mi", 1024**2), ("Ki", 1024))


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod with one container of an image of ours."""

    settings: PodsConfig
    container: Object
    volumes: Sequence[Object]
    config: str
    """What of its ConfigMap concerns every pod; a change of it starts them anew."""

    grace_s: int
    """Time to end after it was told to, what it does before SIGTERM included."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Names, labels and settings that hold for a whole deployment."""

    settings: KubernetesConfig

    def name(self, part: str) -> str:
        """Return the name of the objects of a part: the routers, or a set of nodes."""
        return f"{self.settings.name}-{part}"

    def object(self, kind: str, part: str, labels: Mapping[str, str], **content: Any) -> Object:
        """Return an object; `kind` is `API/VERSION Kind`."""
        api_version, _, name = kind.partition(" ")
        metadata = {"name": self.name(part), "labels": dict(labels)}
        if self.settings.namespace is not None:
            metadata["namespace"] = self.settings.namespace
        return {"apiVersion": api_version, "kind": name, "metadata": metadata, **content}

    def labels(self, component: str) -> dict[str, str]:
        """Return the labels of all that belongs to `router` or `node`."""
        return {
            "app.kubernetes.io/name": "proserve",
            "app.kubernetes.io/instance": self.settings.name,
            "app.kubernetes.io/component": component,
        }

    def pod_template(self, part: str, labels: Mapping[str, str], pod: Pod) -> Object:
        """Return the template of the pods of a part, with its ConfigMap at CONFIG_DIR."""
        pods = pod.settings
        spec: Object = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": pod.grace_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": dict(labels)},
                }
            ],
            "containers": [
                {
                    "image": pods.image or self.settings.image or f"proserve:{version('proserve')}",
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
                | pod.container
            ],
            "volumes": [
                {"name": "config", "configMap": {"name": self.name(part)}},
                {"name": "tmp", "emptyDir": {}},
                *pod.volumes,
            ],
        }
        if self.settings.image_pull_secrets:
            spec["imagePullSecrets"] = [{"name": n} for n in self.settings.image_pull_secrets]
        if pods.node_selector:
            spec["nodeSelector"] = dict(pods.node_selector)
        if pods.tolerations:
            spec["tolerations"] = [t.model_dump(exclude_none=True) for t in pods.tolerations]
        digest = hashlib.sha256(pod.config.encode()).hexdigest()
        annotations = {CONFIG_ANNOTATION: digest}
        return {"metadata": {"labels": dict(labels), "annotations": annotations}, "spec": spec}

    def disruption_budget(self, part: str, labels: Mapping[str, str]) -> Object:
        """Return a budget by which machines are emptied one pod after the other."""
        spec = {"maxUnavailable": 1, "selector": {"matchLabels": dict(labels)}}
        return self.object("policy/v1 PodDisruptionBudget", part, labels, spec=spec)


# Home and temporary files: the rest of the root file system is for reading only.
TMP_ENV = [{"name": "HOME", "value": "/tmp"}]
TMP_MOUNTS = [
    {"name": "config", "mountPath": str(CONFIG_DIR), "readOnly": True},
    {"name": "tmp", "mountPath": "/tmp"},
]


def engine_mount(volume: EngineVolumeConfig | None) -> tuple[list[Object], list[Object]]:
    """Return the volumes and the mounts of an engine directory; none if it is in the image."""
    if volume is None:
        return [], []
    if volume.claim is not None:
        source: Object = {"persistentVolumeClaim": {"claimName": volume.claim, "readOnly": True}}
    else:
        source = {"image": {"reference": volume.image, "pullPolicy": "IfNotPresent"}}
    mount = {"name": "engine", "mountPath": str(ENGINE_DIR), "readOnly": True}
    if volume.sub_path is not None:
        mount["subPath"] = volume.sub_path
    return [{"name": "engine", **source}], [mount]


def probe(path: str, *, period_s: int, num_failures: int) -> Object:
    """Return a probe that asks the container's service; 5 s is more than a busy one takes."""
    return {
        "httpGet": {"path": path, "port": PORT_NAME},
        "periodSeconds": period_s,
        "failureThreshold": num_failures,
        "timeoutSeconds": 5,
    }


def resources(num_cpus: float | None, memory_bytes: int | None, num_gpus: int = 0) -> Object:
    """Return what a container asks for and may use: any core that is free, its memory, its GPUs."""
    requests: Object = {}
    limits: Object = {}
    if num_cpus is not None:
        requests["cpu"] = f"{num_cpus * 1000:.0f}m" if num_cpus % 1 else f"{num_cpus:.0f}"
    if memory_bytes is not None:
        requests["memory"] = limits["memory"] = quantity(memory_bytes)
    if num_gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = num_gpus
    named = {"requests": requests, "limits": limits}
    return {name: amounts for name, amounts in named.items() if amounts}


def quantity(num_bytes: int) -> str:
    """Return a size as Kubernetes writes it, in the largest unit that is exact."""
    for name, size in _UNITS:
        if num_bytes % size == 0:
            return f"{num_bytes // size}{name}"
    return str(num_bytes)


def config_text(config: BaseModel) -> str:
    """Return the YAML of a router or node: what was set, and no defaults."""
    return dump_yaml(config.model_dump(mode="json", exclude_unset=True))


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and everything anew where it is repeated."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: object) -> str:
    """Return a value as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)


def egress_to_collector(tracing: TracingConfig | None) -> list[Object]:
    """Return the rules by which pods reach the collector of their spans, wherever it is."""
    if tracing is None:
        return []
    address = urlsplit(tracing.endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    return [{"ports": list(DNS_PORTS)}, {"ports": [{"protocol": "TCP", "port": port}]}]
