"""`proserve up --on ray` on a real cluster of several raylets, one of which is killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.launch.launcher import DeploymentStatus
from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.yaml_config import load_yaml_model
from tests.integration.deployments import free_port, until

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")

from ray import cluster_utils  # noqa: E402 - if it is there

from orchestrator.command_line.launch.ray_launcher import RayLauncher  # noqa: E402

pytestmark = pytest.mark.slow

NUM_REQUESTS = 6
PATIENCE_S = 120.0
"""Upper bound of every wait: Ray and nodes start many processes."""

NUM_TOKENS = 120


@dataclass
class OnRay:
    """A deployment file for a cluster, and the command line."""

    cluster: Any
    file: Path
    environment: dict[str, str]

    @property
    def url(self) -> str:
        port = yaml.safe_load(self.file.read_text())["router"]["port"]
        return f"http://127.0.0.1:{port}"

    @property
    def launcher(self) -> RayLauncher:
        """Return what the command line uses."""
        parent = Path(self.environment["PROSERVE_STATE_DIR"])
        return RayLauncher(StateDir.of(self.file.stem, parent=parent))

    def up(self) -> DeploymentStatus:
        config = load_yaml_model(self.file, DeploymentConfig)
        return self.launcher.up(config, start_timeout_s=PATIENCE_S)

    def run(self, *arguments: str) -> None:
        """Run a command that succeeds."""
        command = [sys.executable, "-m", "orchestrator.command_line.main", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def are_both_used(self) -> bool:
        """Return whether the router can use both nodes."""
        nodes = httpx.get(f"{self.url}/health").json()["nodes"]
        return bool(nodes == {"chat-0": "ready", "chat-1": "ready"})

    def are_both_busy(self) -> bool:
        """Return whether both nodes have been sent something that has not ended."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        counts = [line for line in lines if line.startswith("proserve_router_endpoint_sequences{")]
        return len(counts) == 2 and not any(line.endswith(" 0.0") for line in counts)

    def lose_a_host(self) -> None:
        """Kill a raylet that has a node, and with it all that it has started."""
        self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)


@pytest.fixture
def on_ray(engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnRay]:
    """A head without room for nodes, and two raylets with room for two each."""
    settings = {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PROSERVE_STATE_DIR": str(tmp_path / "state"),
        # How soon Ray notices that a host is gone; not so soon that a busy one seems to be.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "4000",
        "RAY_health_check_failure_threshold": "5",
    }
    for name, setting in settings.items():
        monkeypatch.setenv(name, setting)
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, resources={"engine": 2})
    content = {
        "router": {"port": free_port(), "policy": "round-robin"},
        "node_groups": [
            {
                "name": "chat",
                "num_nodes": 2,
                "first_port": 8101,  # Of no meaning where Ray chooses the host.
                "engine": {"directory": str(engine_dir), "device_kv_bytes": "64MiB"},
                "ray": {"resources": {"engine": 1}},
            }
        ],
        "ray": {"address": cluster.address},
    }
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(content))
    value = OnRay(cluster, file, dict(os.environ))
    try:
        yield value
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Answer:
    text: str
    num_retries: int


async def ask(http: httpx.AsyncClient, index: int) -> Answer:
    body = {
        "model": "smollm2-135m",
        "prompt": f"Chapter {index}. The travellers had reached the",
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "max_wait_ms": 60_000,
        "serving_summary": True,
    }
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    [summary] = answer["usage"]["serving_summary"]
    assert summary["tokens"] == NUM_TOKENS
    return Answer(answer["choices"][0]["text"], summary["retries"])


async def test_a_host_that_is_lost_costs_no_request_and_its_node_comes_back_elsewhere(
    on_ray: OnRay,
) -> None:
    on_ray.run("up", str(on_ray.file), "--on", "ray", "--start-timeout-s", str(2 * PATIENCE_S))
    before = on_ray.launcher.status()
    assert [process.name for process in before.processes] == ["chat-0", "chat-1", "router-0"]
    until(on_ray.are_both_used, "the router knows both nodes", PATIENCE_S)

    async with httpx.AsyncClient(base_url=on_ray.url, timeout=PATIENCE_S) as http:
        calm = await asyncio.gather(*(ask(http, index) for index in range(NUM_REQUESTS)))
        under_way = [asyncio.create_task(ask(http, index)) for index in range(NUM_REQUESTS)]
        await asyncio.to_thread(until, on_ray.are_both_busy, "both nodes have requests", PATIENCE_S)
        await asyncio.to_thread(on_ray.lose_a_host)
        disturbed = await asyncio.gather(*under_way)
    assert [answer.text for answer in disturbed] == [answer.text for answer in calm]
    assert sum(answer.num_retries for answer in disturbed) > 0

    until(on_ray.are_both_used, "both nodes are back", PATIENCE_S)
    after = on_ray.launcher.status()
    pids = [(old.pid, new.pid) for old, new in zip(before.processes, after.processes, strict=True)]
    assert sum(old != new for old, new in pids) == 1

    on_ray.file.write_text(on_ray.file.read_text().replace("num_nodes: 2", "num_nodes: 1"))
    node, router = on_ray.up().processes
    assert (node.name, router.pid) == ("chat-0", after.processes[2].pid)
    restarted, _ = await asyncio.to_thread(lambda: on_ray.launcher.restart(["chat-0"]).processes)
    assert restarted.pid != node.pid
    lines = on_ray.launcher.logs(["chat-0"], num_lines=20, follow=False)
    assert sum("executor started" in line for line in lines) == 2
    on_ray.run("down")
