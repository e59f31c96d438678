"""Runs a deployment on Kubernetes: what `render` writes, in the hands of `kubectl`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import yaml

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.kubernetes.render import render, write
from orchestrator.command_line.kubernetes_config import KubernetesConfig
from orchestrator.command_line.launch.launcher import (
    DeploymentStatus,
    LaunchFailed,
    ProcessKind,
    ProcessState,
    ProcessStatus,
)
from orchestrator.command_line.launch.state_dir import StateDir

WORKLOADS = ("Deployment", "StatefulSet")

_INSTANCE = "app.kubernetes.io/instance"
_COMPONENT = "app.kubernetes.io/component"
_ENDS_BY_ITSELF = ("CrashLoopBackOff", "Error", "OOMKilled")


class _Applied(msgspec.Struct, frozen=True):
    """What was given to the cluster last."""

    name: str
    namespace: str | None
    workloads: tuple[str, ...]
    """As KIND/NAME."""


class KubernetesLauncher:
    """The deployment of a state directory, which keeps the manifests that were applied."""

    def __init__(
        self, directory: StateDir, *, on_status: Callable[[DeploymentStatus], None] | None = None
    ) -> None:
        """`on_status` is told how the deployment is while something waits for it."""
        self._directory = directory
        self._on_status = on_status or (lambda _: None)

    def up(self, config: DeploymentConfig, *, start_timeout_s: float) -> DeploymentStatus:
        """Apply the manifests, wait until they are rolled out, and delete what is surplus."""
        files = render(config)
        applied = _applied(config.kubernetes, files)
        self._kubectl(applied, "apply", "-f", "-", content="---\n".join(files.values()))
        self._note(applied, files)
        for workload in applied.workloads:
            self._wait_for(applied, workload, start_timeout_s)
        directory = self._directory.manifests
        for path in sorted(directory.glob("*.yaml")):
            if path.name not in files:
                self._kubectl(applied, "delete", "--ignore-not-found", "-f", str(path))
        write(files, directory)
        return self.status()

    def status(self) -> DeploymentStatus:
        """Return how the pods are now."""
        applied = self._read_applied()
        answer = self._kubectl(applied, "get", "pods", "-l", _selector(applied), "-o", "json")
        pods = msgspec.json.decode(answer)["items"]
        now = datetime.now(UTC)
        return DeploymentStatus(self._directory.name, tuple(_status_of(pod, now) for pod in pods))

    def logs(self, names: Sequence[str], *, num_lines: int, follow: bool) -> Iterator[str]:
        """Yield lines of the pods' logs."""
        applied = self._read_applied()
        flags = ["--prefix", f"--tail={num_lines}", *(["--follow"] if follow else [])]
        every = ["-l", _selector(applied), "--max-log-requests=100"]
        for which in [[f"pod/{name}"] for name in names] or [every]:
            command = [*_command(applied), "logs", *which, *flags]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None, "it was asked for"
                yield from (line.rstrip("\n") for line in process.stdout)

    def restart(self, names: Sequence[str]) -> DeploymentStatus:
        """Roll all workloads, or have these pods made anew."""
        applied = self._read_applied()
        if names:
            self._kubectl(applied, "delete", *(f"pod/{name}" for name in names))
        else:
            self._kubectl(applied, "rollout", "restart", *applied.workloads)
        for workload in applied.workloads:
            self._wait_for(applied, workload, None)
        return self.status()

    def down(self) -> None:
        """Delete everything that was applied."""
        applied = self._read_applied()
        path = str(self._directory.manifests)
        self._kubectl(applied, "delete", "--ignore-not-found", "-f", path)
        self._directory.kubernetes_file.unlink()

    def _note(self, applied: _Applied, files: Mapping[str, str]) -> None:
        """Remember what is in the cluster from now on, surplus of before included, also if it never
        becomes healthy."""
        self._directory.create()
        self._directory.manifests.mkdir(exist_ok=True)
        for name, text in files.items():
            (self._directory.manifests / name).write_text(text)
        self._directory.kubernetes_file.write_bytes(msgspec.json.encode(applied))

    def _wait_for(self, applied: _Applied, workload: str, timeout_s: float | None) -> None:
        self._on_status(DeploymentStatus(self._directory.name, (), is_settled=False))
        limit = () if timeout_s is None else (f"--timeout={timeout_s:g}s",)
        self._kubectl(applied, "rollout", "status", workload, *limit)

    def _read_applied(self) -> _Applied:
        path = self._directory.kubernetes_file
        if not path.exists():
            raise LaunchFailed(
                f"deployment {self._directory.name!r} was not applied from here; do so with: "
                "proserve up FILE --on kubernetes"
            )
        return msgspec.json.decode(path.read_bytes(), type=_Applied)

    def _kubectl(self, applied: _Applied, *arguments: str, content: str | None = None) -> str:
        done = subprocess.run(
            [*_command(applied), *arguments],
            input=content,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            what = " ".join(arguments)
            raise LaunchFailed(f"kubectl {what}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def _applied(settings: KubernetesConfig, files: Mapping[str, str]) -> _Applied:
    objects = [found for text in files.values() for found in yaml.safe_load_all(text)]
    workloads = tuple(
        f"{found['kind'].lower()}/{found['metadata']['name']}"
        for found in objects
        if found["kind"] in WORKLOADS
    )
    return _Applied(settings.name, settings.namespace, workloads)


def _command(applied: _Applied) -> list[str]:
    if shutil.which("kubectl") is None:
        raise LaunchFailed("`--on kubernetes` needs kubectl, which is not on the PATH")
    return ["kubectl", *(["--namespace", applied.namespace] if applied.namespace else [])]


def _selector(applied: _Applied) -> str:
    return f"{_INSTANCE}={applied.name}"


def _status_of(pod: Mapping[str, Any], now: datetime) -> ProcessStatus:
    metadata, status = pod["metadata"], pod.get("status", {})
    containers = status.get("containerStatuses", [])
    reason, last_reason = "", ""
    for container in containers:
        reason = container.get("state", {}).get("waiting", {}).get("reason", reason)
        last = container.get("lastState", {}).get("terminated", {})
        last_reason = last.get("reason", last_reason)
    began = status.get("startTime")
    age_s = (now - datetime.fromisoformat(began)).total_seconds() if began else 0.0
    return ProcessStatus(
        name=metadata["name"],
        kind=ProcessKind(metadata["labels"][_COMPONENT]),
        state=_state_of(metadata, status, reason),
        address=status.get("podIP", ""),
        num_restarts=sum(container.get("restartCount", 0) for container in containers),
        for_s=age_s,
        reason=reason or last_reason,
    )


def _state_of(metadata: Mapping[str, Any], status: Mapping[str, Any], reason: str) -> ProcessState:
    containers = status.get("containerStatuses", [])
    if "deletionTimestamp" in metadata:
        return ProcessState.DRAINING
    if status.get("phase") == "Failed":
        return ProcessState.FAILED
    if reason in _ENDS_BY_ITSELF:
        return ProcessState.RESTARTING
    is_ready = bool(containers) and all(container.get("ready") for container in containers)
    return ProcessState.HEALTHY if is_ready else ProcessState.STARTING
