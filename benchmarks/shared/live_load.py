"""Requests with deadlines, sent over HTTP to a real server at their times, and what clients saw."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import yaml

from benchmarks.shared.reporting import BENCHMARKS
from orchestrator.core.gain import GainTable, Outcome, RequestRecord
from orchestrator.core.slo import PriorityClass, Slo

ROOT = BENCHMARKS.parent
ENGINE_DIR = ROOT / "built_engines/smollm2-135m"

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, KV_BYTES = 32, 2048, 1 << 30

AT_ONCE = 1e6
"""Requests a second."""

WARM_UP_INDEX = 1_000_000
"""Of the first request that only warms up; a request's tokens follow from its index."""

ROUTER_PORT, NODE_PORT = 18300, 18301

# Twice the paper's "high : low"; objectives that two CPU cores can keep at moderate load.
CLASSES = (
    PriorityClass("high", weight=2.0, slo=Slo(ttft_s=3.0, tpot_s=0.4)),
    PriorityClass("low", weight=1.0, slo=Slo(ttft_s=6.0, tpot_s=0.8)),
)


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """One request of the list."""

    at_s: float
    """After the start, at a rate of one request a second."""

    num_prompt_tokens: int
    num_output_tokens: int
    priority: PriorityClass


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal number of tokens, cut at both ends."""

    log_mean: float
    log_deviation: float
    least: int
    most: int

    def draw(self, draw: random.Random) -> int:
        """Return one."""
        length = int(draw.lognormvariate(self.log_mean, self.log_deviation))
        return min(max(length, self.least), self.most)


PROMPT, OUTPUT = Lengths(4.8, 0.8, 8, 800), Lengths(3.0, 0.6, 4, 80)
"""Fit for the small model."""


def make_requests(
    count: int,
    seed: int,
    *,
    prompt: Lengths = PROMPT,
    output: Lengths = OUTPUT,
    classes: Sequence[PriorityClass] = CLASSES,
) -> list[LiveRequest]:
    """Return Poisson arrivals, one a second, each of any of the classes."""
    draw = random.Random(seed)
    requests, at_s = [], 0.0
    for _ in range(count):
        at_s += draw.expovariate(1.0)
        num_prompt_tokens, num_output_tokens = prompt.draw(draw), output.draw(draw)
        requests.append(
            LiveRequest(at_s, num_prompt_tokens, num_output_tokens, draw.choice(classes))
        )
    return requests


@contextlib.contextmanager
def serving(
    scheduler: str,
    directory: Path,
    *,
    classes: Sequence[PriorityClass] = CLASSES,
    engine: Mapping[str, Any] = {},
    node: Mapping[str, Any] = {},
) -> Iterator[str]:
    """Serve the model under a scheduler; yield the address. `engine` and `node` are further
    settings of the node."""
    deployment = {
        "router": {
            "port": ROUTER_PORT,
            "classes": [
                {
                    "name": c.name,
                    "weight": c.weight,
                    "ttft_ms": c.slo.ttft_s * 1000,
                    "tpot_ms": c.slo.tpot_s * 1000,
                }
                for c in classes
            ],
            "default_class": classes[-1].name,
        },
        "nodes": [
            {
                "endpoint_id": "node-0",
                "port": NODE_PORT,
                "scheduler": scheduler,
                "max_num_seqs": MAX_NUM_SEQS,
                "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
                "engine": {
                    "directory": str(ENGINE_DIR),
                    "device_kv_bytes": KV_BYTES,
                    **engine,
                },
                **node,
            }
        ],
    }
    path = directory / f"{scheduler}.yaml"
    path.write_text(yaml.safe_dump(deployment))
    url = f"http://127.0.0.1:{ROUTER_PORT}"
    with (directory / f"{scheduler}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.command_line.main", "serve", str(path)],
            cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        while not is_healthy(url):
            if process.poll() is not None:
                sys.exit((directory / f"{scheduler}.log").read_text())
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_healthy(url: str) -> bool:
    """Return whether a server says that it can serve."""
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


Send = Callable[[aiohttp.ClientSession, int, LiveRequest], Awaitable[RequestRecord]]
"""Sends the request with this index and returns what was seen of it."""


async def send_all(
    url: str,
    requests: Sequence[LiveRequest],
    *,
    requests_per_s: float,
    send: Send | None = None,
    first_index: int = 0,
) -> list[RequestRecord]:
    """Send each request at its time, by `send` if it is given; return what was seen of it."""
    started_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)  # or the 101st would wait here, not at the server
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def send_one(index: int, request: LiveRequest) -> RequestRecord:
            await asyncio.sleep(request.at_s / requests_per_s + started_s - time.monotonic())
            return await (send or _send)(session, index, request)

        return await asyncio.gather(*(send_one(i, r) for i, r in enumerate(requests, first_index)))


async def warm_up(url: str, requests: Sequence[LiveRequest], *, send: Send | None = None) -> None:
    """Send the first few with other prompts, of which no cache can help those that are measured."""
    await send_all(url, requests[:4], requests_per_s=AT_ONCE, send=send, first_index=WARM_UP_INDEX)


def completion_body(index: int, request: LiveRequest) -> dict[str, Any]:
    """Return what any server is asked for, in OpenAI's terms."""
    draw = random.Random(index)
    return {
        "model": "smollm2-135m",
        # Token ids above the control tokens; which ones does not change what a step costs.
        "prompt": [draw.randrange(100, 40_000) for _ in range(request.num_prompt_tokens)],
        "max_tokens": request.num_output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def record_of(
    index: int, request: LiveRequest, arrival_s: float, token_times_s: Sequence[float]
) -> RequestRecord:
    """Return what was seen of a request, to be scored."""
    is_finished = len(token_times_s) == request.num_output_tokens
    return RequestRecord(
        request_id=str(index),
        arrival_s=arrival_s,
        slo=request.priority.slo,
        weight=request.priority.weight,
        priority_class=request.priority.name,
        client="",
        num_expected_tokens=request.num_output_tokens,
        token_times_s=tuple(token_times_s),
        outcome=Outcome.FINISHED if is_finished else Outcome.FAILED,
    )


async def _send(session: aiohttp.ClientSession, index: int, request: LiveRequest) -> RequestRecord:
    arrival_s = time.monotonic()
    body = completion_body(index, request)
    body["stream_options"]["continuous_usage_stats"] = True
    body["priority"] = request.priority.name
    token_times_s: list[float] = []
    async with session.post("/v1/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {") and answer.status == httpx.codes.OK:
                num_tokens = _completion_tokens(line)
                now_s = time.monotonic()
                token_times_s += [now_s] * (num_tokens - len(token_times_s))
    return record_of(index, request, arrival_s, token_times_s)


def _completion_tokens(line: bytes) -> int:
    _, _, rest = line.partition(b'"completion_tokens":')
    digits = rest.split(b",", 1)[0].split(b"}", 1)[0]
    return int(digits) if digits else 0


def scores(table: GainTable) -> dict[str, float]:
    """Return the figures of one run."""
    whole, by_class = table.report(), table.by_class()
    return {
        "tdg_ratio": round(whole.tdg_ratio, 4),
        "slo_attainment": round(whole.slo_attainment, 4),
        **{f"attainment_{n}": round(r.slo_attainment, 4) for n, r in by_class.items()},
        "num_failed": whole.num_failed,
        "tokens_per_s": round(whole.tokens_per_s or 0.0, 1),
    }
