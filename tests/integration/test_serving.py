"""What an operator sees: many streams at once, clients that vanish, processes that die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration.deployments import (
    Deployment,
    is_alive,
    running,
    until,
    write_deployment,
)

MODEL = "smollm2-135m"
OWNED_BLOCKS = 'proserve_node_kv_blocks{place="device",state="used"}'


async def stream_text(client: openai.AsyncOpenAI, index: int, max_tokens: int) -> tuple[str, int]:
    """Return the text of one streamed completion and its completion tokens."""
    stream = await client.completions.create(
        model=MODEL,
        prompt=f"Story number {index}: once upon a time",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"priority": ("high", "normal", "low")[index % 3], "ignore_eos": True},
    )
    text, num_tokens = "", 0
    async for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    return text, num_tokens


async def test_64_concurrent_streams_finish(deployment: Deployment) -> None:
    """Each gets its 16 tokens, and what it would have got alone."""
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="x") as client:
        results = await asyncio.gather(*(stream_text(client, i, 16) for i in range(64)))
        alone = await stream_text(client, 5, 16)

    assert [num_tokens for _, num_tokens in results] == [16] * 64
    assert results[5] == alone
    until(lambda: deployment.node_metric(OWNED_BLOCKS) == 0, "all blocks are free")


def test_a_client_killed_in_mid_stream_returns_its_blocks(deployment: Deployment) -> None:
    """A raw socket, reset without a goodbye, as when the client's process is killed."""
    aborted = 'proserve_node_requests_total{finish_reason="abort"}'
    before = deployment.node_metric(aborted)
    body = (
        b'{"model": "%s", "prompt": "Once", "max_tokens": 2000, "stream": true,'
        b' "ignore_eos": true}' % MODEL.encode()
    )
    url = httpx.URL(deployment.url)
    with socket.create_connection((url.host, url.port or 80)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert client.recv(4096)
        until(lambda: deployment.node_metric(OWNED_BLOCKS) > 0, "the request holds blocks")
        # Reset instead of a polite end.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    until(lambda: deployment.node_metric(OWNED_BLOCKS) == 0, "the blocks are free")
    assert deployment.node_metric(aborted) == before + 1


@pytest.fixture
def own_deployment_file(engine_dir: Path, tmp_path: Path) -> Path:
    """For tests that end it."""
    return write_deployment(tmp_path, engine_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_everything_cleanly(own_deployment_file: Path, number: signal.Signals) -> None:
    with running(own_deployment_file) as deployment:
        children = deployment.children()
        deployment.process.send_signal(number)
        status = deployment.process.wait(60)

    assert status == 0
    assert len(children) == 3, "router, node and its executor"
    assert not any(map(is_alive, children))
    assert "Traceback" not in deployment.log.read_text()


def test_nothing_survives_a_killed_serve(own_deployment_file: Path) -> None:
    with running(own_deployment_file) as deployment:
        children = deployment.children()
        deployment.process.kill()
        until(lambda: not any(map(is_alive, children)), "its processes have ended")


async def test_stopping_lets_no_stream_end_without_a_word(own_deployment_file: Path) -> None:
    """Far more tokens than the grace allows: after it the client hears why its stream ended."""
    with running(own_deployment_file) as deployment:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 8000, "stream": True}
        async with (
            httpx.AsyncClient(base_url=deployment.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer,
        ):
            lines = answer.aiter_lines()
            assert "text_completion" in await anext(lines)
            deployment.process.terminate()
            last_words = [line async for line in lines if line][-1]
        status = deployment.process.wait(60)

    assert "shutting down" in last_words
    assert status == 0
    assert "Traceback" not in deployment.log.read_text()


def test_a_service_without_nodes_does_not_linger(engine_dir: Path, tmp_path: Path) -> None:
    """Its only node may not be started again."""
    path = write_deployment(tmp_path, engine_dir, restarts={"max_restarts": 0})
    with running(path) as deployment:
        os.kill(deployment.engine_pid(0), signal.SIGKILL)

        assert deployment.process.wait(60) == 1
    log = deployment.log.read_text()
    assert "node-0 cannot serve any more: the engine process ended with status -9" in log
    assert "it stays down after 0 restarts within 300 s" in log
    assert "no node is left; stopping" in log


@pytest.mark.parametrize(
    ("node", "words"),
    [({"max_num_batched_tokens": 40}, "min_chunk_tokens"), ({"max_model_len": 9999}, "8,192")],
)
def test_a_node_that_can_never_start_ends_serve_at_once(
    engine_dir: Path, tmp_path: Path, node: dict[str, int], words: str
) -> None:
    path = write_deployment(tmp_path, engine_dir, node=node)

    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.command_line.main", "serve", str(path)],
        capture_output=True, text=True, check=False, timeout=100, cwd=Path(__file__).parents[2],
    )  # fmt: skip

    assert result.returncode == 2
    assert "node-0 cannot start" in result.stderr
    assert words in result.stderr.splitlines()[-1]


def test_a_second_serve_on_the_same_ports_is_refused(deployment: Deployment) -> None:
    path = deployment.log.with_suffix(".yaml")

    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.command_line.main", "serve", str(path)],
        capture_output=True, text=True, check=False, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip

    assert result.returncode == 2
    assert "node-0 cannot listen" in result.stderr
