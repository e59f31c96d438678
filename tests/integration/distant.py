"""A router and nodes on hosts of their own, as processes of their own, over `netlab`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.integration.deployments import until
from tests.integration.netlab import Host, hosts

NODE_PORT = 8101
ROUTER_PORT = 8000
LEASE_S = 3.0
SECRET = "sesame-sesame-sesame"
START_TIMEOUT_S = 100.0


@dataclass
class Token:
    """A piece of a streamed answer."""

    text: str
    at_s: float
    """On the monotonic clock."""


@dataclass
class Streamed:
    """A streamed answer."""

    tokens: list[Token] = field(default_factory=list)
    is_whole: bool = False
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


@dataclass
class DistantDeployment:
    """A router on this machine, and a node on each of the other hosts, which registers itself."""

    router: Host
    nodes: Sequence[Host]

    @property
    def url(self) -> str:
        return f"http://{self.router.address}:{ROUTER_PORT}"

    def node(self, endpoint_id: str) -> Host:
        """Return the host of a node."""
        return self.nodes[int(endpoint_id.removeprefix("node-"))]

    def node_metric(self, endpoint_id: str, name: str) -> float:
        """Return one sample of a node's /metrics, with the sum over its labels."""
        text = httpx.get(f"http://{self.node(endpoint_id).address}:{NODE_PORT}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def known_nodes(self) -> dict[str, str]:
        """Return what the router says of each node."""
        nodes: dict[str, str] = httpx.get(f"{self.url}/health").json()["nodes"]
        return nodes

    def are_all_used(self) -> bool:
        """Return whether the router can use every node."""
        return list(self.known_nodes().values()) == ["ready"] * len(self.nodes)

    def busy_node(self) -> str:
        """Return the one node that has a sequence."""
        text = httpx.get(f"{self.url}/metrics").text
        start = 'proserve_router_endpoint_sequences{endpoint_id="'
        counts = [line for line in text.splitlines() if line.startswith(start)]
        (busy,) = [line for line in counts if not line.endswith(" 0.0")]
        return busy.removeprefix(start).partition('"')[0]

    async def stream(
        self,
        http: httpx.AsyncClient,
        prompt: str,
        *,
        num_tokens: int,
        on_token: Callable[[int], None] = lambda _: None,
    ) -> Streamed:
        """Stream a greedy answer of so many tokens; `on_token` hears how many have come."""
        body = {
            "model": "smollm2-135m",
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "serving_summary": True,
            "max_wait_ms": 60_000,
        }
        streamed = Streamed()
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == httpx.codes.OK, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    streamed.is_whole = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                if event.get("usage"):
                    (streamed.summary,) = event["usage"]["serving_summary"]
                for choice in event["choices"]:
                    if choice["text"]:
                        streamed.tokens.append(Token(choice["text"], time.monotonic()))
                        on_token(len(streamed.tokens))
        return streamed

    def heal(self) -> None:
        """Have all links as they were, and wait until all nodes are used."""
        for host in self.nodes:
            host.link.is_cut = False
            host.link.delay_s = host.link.jitter_s = host.link.loss = 0.0
        until(self.are_all_used, "all nodes are used")


@contextlib.contextmanager
def distant_deployment(directory: Path, engine_dir: Path) -> Iterator[DistantDeployment]:
    """Run a router and two nodes, each on a host of its own, with the real small model."""
    secret = directory / "secret"
    secret.write_text(SECRET)
    with contextlib.ExitStack() as stack:
        router, *nodes = stack.enter_context(hosts(2))
        deployment = DistantDeployment(router, nodes)
        router_config = {
            "host": router.address,
            "port": ROUTER_PORT,
            "engine_dir": str(engine_dir),
            "model": "smollm2-135m",
            "policy": "round-robin",
            "registration": {"secret_file": str(secret), "lease_s": LEASE_S},
            "classes": [{"name": "normal", "weight": 1, "ttft_ms": 60_000, "tpot_ms": 60_000}],
            # Only a cut link is to be noticed, whatever else this machine is doing.
            "stall_timeout_s": 60.0,
        }
        stack.enter_context(_process(router, "router", router_config, directory / "router.yaml"))
        for number, host in enumerate(nodes):
            node_config = {
                "endpoint_id": f"node-{number}",
                "host": host.address,
                "port": NODE_PORT,
                "engine": {
                    "directory": str(engine_dir),
                    # Slow enough to be cut off before an answer is complete.
                    "dtype": "float32",
                    "device_kv_bytes": "64MiB",
                },
                "registration": {"router_urls": [deployment.url], "secret_file": str(secret)},
            }
            path = directory / f"node-{number}.yaml"
            stack.enter_context(_process(host, "node", node_config, path))
        until(lambda: _answers(deployment.url), "the router answers", START_TIMEOUT_S)
        until(lambda: len(deployment.known_nodes()) == 2, "both nodes register", START_TIMEOUT_S)
        until(deployment.are_all_used, "both nodes are used", START_TIMEOUT_S)
        yield deployment


@contextlib.contextmanager
def _process(host: Host, kind: str, config: dict[str, Any], path: Path) -> Iterator[None]:
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "orchestrator.command_line.main", kind, str(path)]
    with path.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            host.command(command),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/metrics").is_success
    except httpx.TransportError:
        return False
