"""Real deployments for tests: `proserve serve` in a process of its own, on free ports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

START_TIMEOUT_S = 200.0
WAIT_S = 120.0
"""Upper bound of every wait; reached only if something hangs."""

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = iter(range(20_000 + 1_000 * _WORKER, 21_000 + 1_000 * _WORKER))
"""Each process of a parallel test run has its own."""


@dataclass
class Deployment:
    """A running deployment."""

    process: subprocess.Popen[bytes]
    url: str
    node_urls: Sequence[str]
    log: Path

    def node_metric(self, name: str, *, node: int = 0) -> float:
        """Return one sample of a node's /metrics; `name` includes its labels."""
        return _metric(self.node_urls[node], name)

    def router_metric(self, name: str) -> float:
        """Return one sample of the router's /metrics; `name` includes its labels."""
        return _metric(self.url, name)

    def engine_pid(self, node: int) -> int:
        """Return the process id of a node's executor."""
        return self._pid_with(f'"endpoint_id":"node-{node}"')

    def node_pid(self, node: int) -> int:
        """Return the process id of a node's HTTP service."""
        return self._pid_with(f"/node-{node}.yaml")

    def router_pid(self) -> int:
        """Return the process id of the router."""
        return self._pid_with("/router.yaml")

    def children(self) -> list[int]:
        """Return the ids of all processes below the command, deepest first."""
        return _descendants(self.process.pid)

    def is_healthy(self, node: int) -> bool:
        """Return whether a node says that it can serve."""
        return _answers_well(self.node_urls[node])

    def has_healthy_router(self) -> bool:
        """Return whether the router says that it can serve."""
        return _answers_well(self.url)

    def _pid_with(self, argument: str) -> int:
        (pid,) = [pid for pid in self.children() if argument in _command_line(pid)]
        return pid


def free_port() -> int:
    """Return a port that nobody listens on now, and that is given to nobody else: not to another
    caller, nor to an outgoing connection, which get theirs above 32,767."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports of this test process are taken")


def write_deployment(
    directory: Path,
    engine_dir: Path,
    *,
    num_nodes: int = 1,
    node: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    router: Mapping[str, Any] | None = None,
    restarts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a deployment file with generous objectives; return its path."""
    content = {
        "router": {"port": free_port()} | dict(router or {}),
        "nodes": [
            {
                "endpoint_id": f"node-{index}",
                "port": free_port(),
                "engine": {"directory": str(engine_dir), "device_kv_bytes": "512MiB"}
                | dict(engine or {}),
            }
            | dict(node or {})
            for index in range(num_nodes)
        ],
        "restarts": dict(restarts or {}),
    }
    path = directory / "deployment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@contextlib.contextmanager
def running(path: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Deployment]:
    """Start `proserve serve PATH`, wait until it is healthy, and stop it at the end.

    `environment` is that of its processes, if not this one's with our packages on the path.
    """
    content = yaml.safe_load(path.read_text())
    log = path.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.command_line.main", "serve", str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment or os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    deployment = Deployment(
        process,
        url=f"http://127.0.0.1:{content['router']['port']}",
        node_urls=[f"http://127.0.0.1:{node['port']}" for node in content["nodes"]],
        log=log,
    )
    try:
        until(lambda: _is_healthy(deployment), "the deployment is healthy", START_TIMEOUT_S)
        yield deployment
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Return when the condition holds; fail after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain until {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _is_healthy(deployment: Deployment) -> bool:
    assert deployment.process.poll() is None, deployment.log.read_text()
    return all(_answers_well(url) for url in [*deployment.node_urls, deployment.url])


def _answers_well(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    return False


def _metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:  # it has just ended
        return ""


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    found: list[int] = []
    for child in map(int, children):
        found += [*_descendants(child), child]
    return found
