"""`proserve keys` and `proserve router` as processes: made, used, revoked, and never logged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from tests.integration.deployments import free_port, until
from tests.router.fake_node import FakeNode

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "orchestrator.command_line.main"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def proserve(*arguments: str, stdin: str = "", **environment: str) -> str:
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        check=True,
    )
    return done.stdout.strip()


@contextmanager
def running_router(
    directory: Path, engine_dir: Path, node: FakeNode, clients_file: Path
) -> Iterator[str]:
    """Run `proserve router`; yield its address. What it logs is in router.log."""
    port = free_port()
    config = {
        "engine_dir": str(engine_dir),
        "model": "tiny",
        "port": port,
        "nodes": [{"endpoint_id": node.endpoint_id, "url": node.url}],
        "clients_file": str(clients_file),
        "clients_poll_interval_s": 0.05,
    }
    path = directory / "router.yaml"
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    with (directory / "router.log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "router", str(path)], stdout=log, stderr=log, env=ENVIRONMENT
        )
    try:
        until(lambda: _answers(url), "the router answers")
        yield url
    finally:
        process.terminate()
        assert process.wait(30) == 0


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def status(url: str, token: str) -> int:
    answer = httpx.post(
        f"{url}/v1/completions",
        json={"model": "tiny", "prompt": "Hi"},
        headers={"authorization": f"Bearer {token}"},
    )
    return answer.status_code


def test_a_key_from_its_making_to_its_end(tmp_path: Path, engine_dir: Path, node: FakeNode) -> None:
    clients_file = tmp_path / "clients.yaml"
    first = proserve("keys", "add", str(clients_file), "acme", "--priority-class", "normal")

    with running_router(tmp_path, engine_dir, node, clients_file) as url:
        assert status(url, first) == 200
        second = proserve("keys", "add", str(clients_file), "acme")
        until(lambda: status(url, second) == 200, "the second key is known")
        proserve("keys", "revoke", str(clients_file), first.split("_")[1])
        until(lambda: status(url, first) == 401, "the first key is refused")
        assert status(url, second) == 200
        chat = proserve(
            "chat", "--url", url, "--max-tokens", "8", stdin="Hi\n\n", PROSERVE_API_KEY=second
        )
        assert "1 tokens" in chat

    assert {request.client_id for request in node.requests} == {"acme"}
    log = (tmp_path / "router.log").read_text()
    assert first.split("_")[1] in log
    for token in (first, second):
        assert token.split("_", 2)[2] not in log
