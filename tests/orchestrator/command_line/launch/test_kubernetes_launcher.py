"""What `kubectl` is told; a stand-in takes its place, as there is no cluster here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.launch.kubernetes_launcher import KubernetesLauncher
from orchestrator.command_line.launch.launcher import LaunchFailed, ProcessState
from orchestrator.command_line.launch.state_dir import StateDir

STAND_IN = Path(__file__).with_name("kubectl_stand_in.py")
FILE = """\
model: tiny
node_groups:
  - name: chat
    num_nodes: 2
    first_port: 8101
    engine: {directory: engine, device_kv_bytes: 64MiB}
  - name: long
    first_port: 8201
    engine: {directory: engine, device_kv_bytes: 64MiB}
kubernetes: {namespace: serving}
"""


class Kubectl:
    """The stand-in, first on the PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program = directory / "kubectl"
        program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
        program.chmod(0o755)
        self.answer("get", {"items": []})

    def answer(self, verb: str, content: object) -> None:
        (self.directory / f"{verb}.json").write_text(json.dumps(content))

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls since the last look."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def words(self) -> list[str]:
        """Return the arguments of the calls since the last look, without the namespace."""
        called = [call["arguments"] for call in self.calls()]
        assert all(words[:2] == ["--namespace", "serving"] for words in called)
        return [" ".join(words[2:]) for words in called]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    return Kubectl(directory)


@pytest.fixture
def launcher(tmp_path: Path) -> KubernetesLauncher:
    return KubernetesLauncher(StateDir.of("demo", parent=tmp_path / "state"))


def config_of(text: str) -> DeploymentConfig:
    return DeploymentConfig.model_validate(yaml.safe_load(text))


def pod(name: str, component: str, **status: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": component}
    return {"metadata": {"name": name, "labels": labels}, "status": status}


def test_a_life_of_a_deployment(kubectl: Kubectl, launcher: KubernetesLauncher) -> None:
    launcher.up(config_of(FILE), start_timeout_s=60.0)
    first, *rest = kubectl.calls()
    kinds = [found["kind"] for found in yaml.safe_load_all(first["content"])]
    assert kinds.count("StatefulSet") == 2
    assert kinds.count("Deployment") == 1
    assert [" ".join(call["arguments"][2:]) for call in rest] == [
        "rollout status deployment/proserve-router --timeout=60s",
        "rollout status statefulset/proserve-chat --timeout=60s",
        "rollout status statefulset/proserve-long --timeout=60s",
        "get pods -l app.kubernetes.io/instance=proserve -o json",
    ]

    shorter = config_of(FILE[: FILE.index("  - name: long")] + FILE[FILE.index("kubernetes") :])
    launcher.up(shorter, start_timeout_s=60.0)
    [delete] = [call for call in kubectl.words() if call.startswith("delete")]
    assert delete.startswith("delete --ignore-not-found -f ")
    assert delete.endswith("/manifests/nodes-long.yaml")

    launcher.restart([])
    launcher.restart(["proserve-chat-0"])
    list(launcher.logs([], num_lines=5, follow=False))
    list(launcher.logs(["proserve-chat-0"], num_lines=5, follow=True))
    launcher.down()
    rollouts = [
        "rollout status deployment/proserve-router",
        "rollout status statefulset/proserve-chat",
    ]
    get = "get pods -l app.kubernetes.io/instance=proserve -o json"
    *words, last = kubectl.words()
    assert words == [
        "rollout restart deployment/proserve-router statefulset/proserve-chat",
        *rollouts,
        get,
        "delete pod/proserve-chat-0",
        *rollouts,
        get,
        "logs -l app.kubernetes.io/instance=proserve --max-log-requests=100 --prefix --tail=5",
        "logs pod/proserve-chat-0 --prefix --tail=5 --follow",
    ]
    assert last.startswith("delete --ignore-not-found -f ")
    assert last.endswith("/manifests")
    with pytest.raises(LaunchFailed, match="was not applied from here"):
        launcher.status()


def test_pods_have_states(kubectl: Kubectl, launcher: KubernetesLauncher) -> None:
    ready = {"ready": True, "restartCount": 2, "state": {"running": {}}}
    crashed = {
        "ready": False,
        "restartCount": 3,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    }
    loading = {"ready": False, "restartCount": 0, "state": {"running": {}}}
    leaving = pod("c-2", "node", phase="Running", containerStatuses=[ready])
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    kubectl.answer(
        "get",
        {
            "items": [
                pod("r", "router", phase="Running", podIP="10.1.0.1", containerStatuses=[ready]),
                pod("c-0", "node", phase="Running", containerStatuses=[crashed]),
                pod("c-1", "node", phase="Running", containerStatuses=[loading]),
                leaving,
                pod("c-3", "node", phase="Pending"),
                pod("c-4", "node", phase="Failed"),
            ]
        },
    )
    found = launcher.up(config_of(FILE), start_timeout_s=60.0).processes

    assert [(p.name, p.state, p.num_restarts) for p in found] == [
        ("r", ProcessState.HEALTHY, 2),
        ("c-0", ProcessState.RESTARTING, 3),
        ("c-1", ProcessState.STARTING, 0),
        ("c-2", ProcessState.DRAINING, 2),
        ("c-3", ProcessState.STARTING, 0),
        ("c-4", ProcessState.FAILED, 0),
    ]
    assert found[0].address == "10.1.0.1"
    assert found[1].reason == "CrashLoopBackOff"


def test_what_kubectl_refuses_is_said(kubectl: Kubectl, launcher: KubernetesLauncher) -> None:
    (kubectl.directory / "apply.refused").write_text("forbidden: no such namespace\n")

    with pytest.raises(LaunchFailed, match="kubectl apply -f -: forbidden: no such namespace"):
        launcher.up(config_of(FILE), start_timeout_s=60.0)


def test_what_never_becomes_healthy_can_be_deleted(
    kubectl: Kubectl, launcher: KubernetesLauncher
) -> None:
    (kubectl.directory / "rollout.refused").write_text("timed out waiting for the condition\n")
    with pytest.raises(LaunchFailed, match="timed out"):
        launcher.up(config_of(FILE), start_timeout_s=60.0)

    launcher.down()

    assert kubectl.words()[-1].endswith("/manifests")


def test_without_kubectl_the_launcher_says_so(
    launcher: KubernetesLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LaunchFailed, match="needs kubectl, which is not on the PATH"):
        launcher.up(config_of(FILE), start_timeout_s=60.0)
