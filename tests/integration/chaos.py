"""Streaming clients, and what is done to the nodes behind their backs.

`benchmarks/chaos.py` does the same for longer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from tests.integration.deployments import Deployment, write_deployment

MODEL = "smollm2-135m"
NUM_NODES = 3

SETTINGS: dict[str, Any] = {
    "engine": {"device_kv_bytes": "128MiB", "num_threads": 1},
    "restarts": {"max_restarts": 10_000, "first_pause_s": 0.1, "max_pause_s": 0.1},
    "router": {
        "max_attempts": 50,
        "stall_timeout_s": 5.0,
        "idempotency": {"keep_s": 0.01},
    },
}
"""Nodes come back as fast and as often as it takes; so may requests be sent on. Answers to requests
with a key are made anew when the request is repeated later, as they are behind a router that was
started anew."""


@dataclass(frozen=True)
class Answer:
    """What one client received."""

    text: str
    num_tokens: int
    """As the last event says."""

    finish_reason: str | None


RETRY_PAUSE_S = 0.2
"""Before a client repeats a request whose answer it has not got to the end."""

OnEvent = Callable[[], Awaitable[None]]
"""Called when a client has received something, before it reads on."""


async def go_on() -> None:
    """Do nothing."""


def chaos_deployment(directory: Path, engine_dir: Path, **changes: Any) -> Path:
    """Write the deployment file of three small nodes; return its path. Two of them plan ahead: a
    sequence may go on in the other loop than the one it was begun in."""
    path = write_deployment(directory, engine_dir, num_nodes=NUM_NODES, **SETTINGS, **changes)
    content = yaml.safe_load(path.read_text())
    for node in content["nodes"][1:]:
        node["plan_ahead"] = True
    path.write_text(yaml.safe_dump(content))
    return path


async def ask(
    client: openai.AsyncOpenAI,
    index: int,
    *,
    max_tokens: int,
    on_event: OnEvent = go_on,
    **parameters: Any,
) -> Answer:
    """Stream one completion of as many tokens as asked for, by default greedy, to its end."""
    stream = await client.completions.create(
        model=MODEL,
        prompt=f"Chapter {index}. The travellers had reached the",
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "max_wait_ms": 120_000},
        **{"temperature": 0.0, **parameters},
    )
    text, num_tokens, finish_reason = "", 0, None
    async for chunk in stream:
        await on_event()
        for choice in chunk.choices:
            text += choice.text
            finish_reason = choice.finish_reason or finish_reason
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    return Answer(text, num_tokens, finish_reason)


async def ask_until_whole(
    client: openai.AsyncOpenAI,
    index: int,
    key: str,
    *,
    max_tokens: int,
    on_event: OnEvent = go_on,
    **parameters: Any,
) -> tuple[Answer, int]:
    """Send a request with an idempotency key, again and again while the router or its nodes are
    away, until its answer is complete; return it, and how often it was sent."""
    for num_sent in itertools.count(1):
        try:
            answer = await ask(
                client,
                index,
                max_tokens=max_tokens,
                on_event=on_event,
                extra_headers={"Idempotency-Key": key},
                **parameters,
            )
        except (openai.APIConnectionError, httpx.TransportError):
            pass  # the latter in the middle of a stream
        except openai.InternalServerError as error:
            if error.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                raise
        else:
            return answer, num_sent
        await asyncio.sleep(RETRY_PAUSE_S)
    raise AssertionError("unreachable")


async def ask_all(
    client: openai.AsyncOpenAI,
    count: int,
    *,
    max_tokens: int,
    concurrency: int,
    on_event: OnEvent = go_on,
) -> list[Answer]:
    """Stream this many different completions, so many at a time; return them in order."""
    at_once = asyncio.Semaphore(concurrency)

    async def ask_in_turn(index: int) -> Answer:
        async with at_once:
            return await ask(client, index, max_tokens=max_tokens, on_event=on_event)

    return list(await asyncio.gather(*(ask_in_turn(index) for index in range(count))))


class Killer:
    """Kills a node, chosen at random among those that run, each time so many events went by."""

    def __init__(self, deployment: Deployment, *, every_events: int, seed: int) -> None:
        self._deployment = deployment
        self._every_events = every_events
        self._random = random.Random(seed)
        self._num_events = 0
        self.killed: list[int] = []
        """Nodes, in order."""

    async def note_event(self) -> None:
        """A client received something."""
        self._num_events += 1
        if self._num_events % self._every_events == 0:
            node = self._random.choice(running_nodes(self._deployment))
            os.kill(self._deployment.node_pid(node), signal.SIGKILL)
            self.killed.append(node)


def running_nodes(deployment: Deployment) -> Sequence[int]:
    """Return the nodes that say that they can serve."""
    return [node for node in range(NUM_NODES) if deployment.is_healthy(node)]
