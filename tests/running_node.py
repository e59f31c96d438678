"""A node's HTTP service over an executor process of its own, as tests use it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import httpx
import msgspec
import uvicorn

from orchestrator.core.request import ResumePoint, SamplingParams
from orchestrator.node_api import NodeService, create_node_app
from orchestrator.tracing import Tracing
from orchestrator.wire import GenerateRequest, NodeSnapshot, TokenEvent

WAIT_S = 60.0
"""Upper bound of every wait; reached only if something hangs."""


@dataclass
class Node:
    service: NodeService
    client: httpx.AsyncClient

    async def snapshot(self) -> NodeSnapshot:
        answer = await self.client.get("/v1/snapshot")
        assert answer.status_code == 200, answer.text
        return msgspec.json.decode(answer.content, type=NodeSnapshot)

    async def generate(self, body: GenerateRequest) -> list[TokenEvent]:
        answer = await self.client.post("/v1/generate", content=msgspec.json.encode(body))
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if line]
        return [msgspec.json.decode(line, type=TokenEvent) for line in lines]

    async def runs(self, num_requests: int) -> bool:
        """Whether so many requests are reported as running."""
        load = self.service.executor.last_load
        return load is not None and load.load.num_running == num_requests

    async def metric(self, name: str) -> float:
        text = (await self.client.get("/metrics")).text
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])


@contextlib.asynccontextmanager
async def running_node(*command: str, tracing: Tracing | None = None) -> AsyncIterator[Node]:
    """A node on a free port, over a real socket; `command` starts its executor."""
    service = NodeService("node-t", command, stall_timeout_s=5.0)
    service.tracing = tracing
    server = uvicorn.Server(
        uvicorn.Config(create_node_app(service), port=0, log_config=None, lifespan="on")
    )
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: _has_started(server), "the server has started")
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
            await asyncio.wait_for(service.executor.wait_until_loaded(), WAIT_S)
            yield Node(service, client)
    finally:
        server.should_exit = True
        await serving


async def _has_started(server: uvicorn.Server) -> bool:
    return server.started


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not await condition():
        assert time.monotonic() < deadline_s, f"waited in vain until {what}"
        await asyncio.sleep(0.01)


def body(
    request_id: str = "r",
    *prompt: int,
    max_tokens: int = 3,
    ttft_s: float = 1.0,
    weight: float = 1.0,
    heartbeat_s: float = 1.0,
    resume_from: ResumePoint | None = None,
    grammar: str | None = None,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt or (5, 1),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, grammar=grammar),
        priority_class="normal",
        weight=weight,
        ttft_s=ttft_s,
        heartbeat_s=heartbeat_s,
        resume_from=resume_from,
    )
