"""`proserve up` and what belongs to it, with real processes under traffic."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import pytest
import yaml

from orchestrator.command_line.launch.launcher import DeploymentStatus, ProcessState, ProcessStatus
from orchestrator.command_line.launch.local import LocalLauncher
from orchestrator.command_line.launch.state_dir import StateDir
from tests.integration.deployments import WAIT_S, free_port, is_alive, until

pytestmark = pytest.mark.slow

NUM_CLIENTS = 2
NUM_TOKENS = 12
PAUSE_S = 0.2
"""Of a client between two requests, so that its connection is idle at times."""

BODY = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Count to twenty."}],
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "max_wait_ms": 60_000,
}


@dataclass
class Launched:
    """A deployment file, and the command line."""

    file: Path
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.read()['router']['port']}"

    def read(self) -> dict[str, dict[str, int]]:
        content: dict[str, dict[str, int]] = yaml.safe_load(self.file.read_text())
        return content

    def edit(self, *, num_nodes: int, num_replicas: int) -> None:
        """Change the two numbers of the file."""
        text = self.file.read_text()
        for key, value in {"num_nodes": num_nodes, "num_replicas": num_replicas}.items():
            (line,) = [line for line in text.splitlines() if key in line]
            text = text.replace(line, f"{line.partition(':')[0]}: {value}")
        self.file.write_text(text)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator.command_line.main", *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )

    async def do(self, *arguments: str) -> None:
        """Run a command that succeeds, while other tasks go on."""
        done = await asyncio.to_thread(self.run, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self) -> DeploymentStatus:
        parent = Path(self.environment["PROSERVE_STATE_DIR"])
        return LocalLauncher(StateDir.of(self.file.stem, parent=parent)).status()

    def process(self, name: str) -> ProcessStatus:
        return next(p for p in self.status().processes if p.name == name)

    def pids(self) -> dict[str, int]:
        found = {process.name: process.pid for process in self.status().processes}
        return {name: pid for name, pid in found.items() if pid is not None}


@pytest.fixture
def launched(engine_dir: Path, tmp_path: Path) -> Iterator[Launched]:
    first_port, *_ = (free_port() for _ in range(3))
    content = {
        "router": {"port": free_port(), "num_replicas": 1},
        "node_groups": [
            {
                "name": "chat",
                "num_nodes": 1,
                "first_port": first_port,
                "engine": {"directory": str(engine_dir), "device_kv_bytes": "64MiB"},
            }
        ],
        "restarts": {"first_pause_s": 0.1},
    }
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PROSERVE_STATE_DIR": str(tmp_path / "state"),
    }
    value = Launched(file, environment)
    yield value
    value.run("down")


@dataclass
class Traffic:
    """Clients that send one request after the other."""

    url: str
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Have requests under way, at least one of each client at the beginning and the end."""
        ending = asyncio.Event()
        clients = [asyncio.create_task(self._send(i, ending)) for i in range(NUM_CLIENTS)]
        await self.go_on()
        yield
        await self.go_on()
        ending.set()
        await asyncio.gather(*clients)

    async def go_on(self) -> None:
        """Wait until each client has had another answer."""
        num_before = self.num_done
        while self.num_done < num_before + 2 * NUM_CLIENTS and not self.failures:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), WAIT_S)

    async def _send(self, index: int, ending: asyncio.Event) -> None:
        """Every other client streams; all keep their connections, and none tries anything again."""
        async with httpx.AsyncClient(base_url=self.url, timeout=WAIT_S) as http:
            while not ending.is_set():
                try:
                    if index % 2:
                        await self._stream(http)
                    else:
                        response = await http.post("/v1/chat/completions", json=BODY)
                        assert response.status_code == httpx.codes.OK, response.text
                        assert response.json()["usage"]["completion_tokens"] == NUM_TOKENS
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(repr(error))
                    self._news.set()
                    return
                self.num_done += 1
                self._news.set()
                await asyncio.sleep(PAUSE_S)

    async def _stream(self, http: httpx.AsyncClient) -> None:
        body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines
        usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == NUM_TOKENS


async def test_a_deployment_grows_is_replaced_and_shrinks_under_traffic(launched: Launched) -> None:
    await launched.do("up", str(launched.file))
    shown = msgspec.json.decode(launched.run("status", "--json").stdout, type=DeploymentStatus)
    assert [(p.name, p.state) for p in shown.processes] == [
        ("chat-0", ProcessState.HEALTHY),
        ("router-0", ProcessState.HEALTHY),
    ]
    traffic = Traffic(launched.url)
    async with traffic.flowing():
        launched.edit(num_nodes=3, num_replicas=2)
        await launched.do("up", str(launched.file))
        grown = launched.pids()
        await traffic.go_on()

        await launched.do("restart")
        replaced = launched.pids()
        await traffic.go_on()

        launched.edit(num_nodes=2, num_replicas=1)
        await launched.do("up", str(launched.file))
    assert traffic.failures == []
    assert set(grown) == {"chat-0", "chat-1", "chat-2", "router-0", "router-1"}
    assert replaced.keys() == grown.keys()
    assert not set(replaced.values()) & set(grown.values())
    assert set(launched.pids()) == {"chat-0", "chat-1", "router-0"}

    for name in ("chat-1", "router-0"):
        os.kill(launched.pids()[name], signal.SIGKILL)
        until(lambda name=name: launched.process(name).num_restarts == 1, f"{name} was missed")  # type: ignore[misc]
    until(
        lambda: {p.state for p in launched.status().processes} == {ProcessState.HEALTHY},
        "all are back",
    )
    last = launched.pids()
    await launched.do("down")
    assert not any(is_alive(pid) for pid in [*grown.values(), *replaced.values(), *last.values()])
    assert "no deployment runs here" in launched.run("status").stderr


def test_what_cannot_be_done_changes_nothing(launched: Launched) -> None:
    assert launched.run("up", str(launched.file)).returncode == 0
    before = launched.pids()
    text = launched.file.read_text()

    launched.file.write_text(text.replace("num_replicas: 1", "num_replicas: none"))
    assert "num_replicas" in launched.run("up", str(launched.file)).stderr
    port = launched.read()["router"]["port"]
    taken = {"endpoint_id": "own", "port": port}
    content = yaml.safe_load(text) | {"router": {"port": free_port()}}
    content["nodes"] = [content["node_groups"][0] | taken]
    for key in ("name", "num_nodes", "first_port"):
        del content["nodes"][0][key]
    launched.file.write_text(yaml.safe_dump(content))
    refused = launched.run("up", str(launched.file))
    assert "first router-0, which has it, or choose another port" in " ".join(
        refused.stderr.split()
    )
    assert (
        "there is no process 'chat-7', only chat-0, router-0"
        in launched.run("restart", "chat-7").stderr
    )

    assert launched.pids() == before
