"""A router with two workers as real processes, before a node in this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from orchestrator.command_line.processes import bound_socket
from orchestrator.command_line.router_workers import run_workers
from orchestrator.command_line.service import StartFailed
from orchestrator.wire import TokenEvent
from router.config import EndpointConfig, RouterConfig
from router.keys import NewKey, make_key
from tests.integration.deployments import START_TIMEOUT_S, free_port, until
from tests.router import sse
from tests.router.client_files import bearer, client, write_clients
from tests.router.fake_node import FakeNode, Stall, saying
from tests.tiny_tokenizer import write_tiny_tokenizer

COMPLETION = {"model": "tiny", "prompt": "Hi", "stream": True}


@dataclass
class RunningCommand:
    """`proserve router` with two workers, for one client that may have one answer at a time."""

    process: subprocess.Popen[bytes]
    port: int
    key: NewKey

    def post(self) -> httpx.Response:
        return httpx.post(self._url, json=COMPLETION, headers=bearer(self.key))

    def stream(self) -> contextlib.AbstractContextManager[httpx.Response]:
        return httpx.stream(
            "POST", self._url, json=COMPLETION, headers=bearer(self.key), timeout=60.0
        )

    def is_served(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.post().status_code == httpx.codes.OK
        return False

    def workers(self) -> list[int]:
        """Return the process ids of those that listen."""
        return sorted(_owners("0A", local_port=self.port, remote_port=0))

    def worker_of(self, answer: httpx.Response) -> int:
        """Return the process id of the one that sends an answer."""
        client_port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
        (pid,) = _owners("01", local_port=self.port, remote_port=client_port)
        return pid

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/completions"


def _owners(state: str, *, local_port: int, remote_port: int) -> set[int]:
    """Return the processes that have IPv4 sockets in a state, as Linux writes it, and with these
    ports."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.rpartition(":")[2], 16) for address in fields[1:3]]
        if ports == [local_port, remote_port] and fields[3] == state:
            inodes.add(f"socket:[{fields[9]}]")
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(link.readlink()) in inodes:
                found.add(int(link.parts[2]))
    return found


@pytest.fixture
def node() -> Iterator[FakeNode]:
    fake = FakeNode()
    with fake.serve() as server:
        fake.url = server.url
        yield fake


@pytest.fixture
def router(tmp_path: Path, node: FakeNode) -> Iterator[RunningCommand]:
    key, port = make_key(), free_port()
    limits = {"max_concurrent_sequences": 1}
    write_clients(tmp_path / "clients.yaml", client("acme", key, limits=limits))
    config = {
        "port": port,
        "num_workers": 2,
        "engine_dir": str(write_tiny_tokenizer(tmp_path)),
        "model": "tiny",
        "clients_file": str(tmp_path / "clients.yaml"),
        "nodes": [{"endpoint_id": node.endpoint_id, "url": node.url}],
    }
    path = tmp_path / "router.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator.command_line.main", "router", str(path)]
    ) as process:
        command = RunningCommand(process, port, key)
        try:
            until(lambda: len(command.workers()) == 2, "two workers listen", START_TIMEOUT_S)
            yield command
        finally:
            process.terminate()


def test_a_killed_worker_comes_back_and_what_it_held_too_and_all_drain_at_the_end(
    router: RunningCommand, node: FakeNode
) -> None:
    """acme may have one answer at a time: it stalls in a worker, which is killed. The other one
    goes on serving. In the end an answer under way is made to its end."""
    first_workers = router.workers()
    node.script = lambda _: [TokenEvent((65,)), Stall(), *saying([66])(_)]
    with router.stream() as answer:
        events = sse.arriving(answer)
        assert next(events)["choices"]
        assert router.post().status_code == 429
        killed = router.worker_of(answer)
        os.kill(killed, signal.SIGKILL)
        node.script = saying([65])
        until(router.is_served, "what the killed worker held is free")
    (survivor,) = {*first_workers} - {killed}
    until(lambda: len(router.workers()) == 2, "a worker is started again", START_TIMEOUT_S)
    assert survivor in router.workers()

    node.script = lambda _: [TokenEvent((65,)), Stall(), *saying([66])(_)]
    with router.stream() as answer:
        events = sse.arriving(answer)
        assert next(events)["choices"]
        router.process.send_signal(signal.SIGTERM)
        until(lambda: router.workers() == [], "nobody listens any more")
        node.release()
        assert list(events)[-1] == "[DONE]"

    assert router.process.wait(60) == 0


def test_a_port_on_which_another_router_listens_is_not_shared_with_it(tmp_path: Path) -> None:
    """The kernel would let us: workers of one router are told apart from another's by nothing."""
    with bound_socket("127.0.0.1", 0, is_shared=True) as other:
        other.listen()
        port = other.getsockname()[1]
        config = RouterConfig(
            port=port,
            num_workers=2,
            engine_dir=tmp_path,
            model="tiny",
            nodes=(EndpointConfig(endpoint_id="node-0", url="http://127.0.0.1:1"),),
        )

        with pytest.raises(StartFailed, match=f"cannot listen on 127.0.0.1 port {port}"):
            asyncio.run(run_workers(config))
