"""The real model under mixed priorities: the same requests through several schedulers, live.

    python -m benchmarks.live_mix

Starts `proserve serve` once per scheduler, sends the same list of streaming requests at the same
times, and scores what the client saw with the module that scores simulations. Half of the
requests are high class and count twice. The load is given as a multiple of what the machine
sustains, which is measured first, in the same run, by sending a part of the list at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import yaml

from benchmarks.shared.reporting import argument_parser, report
from orchestrator.core.gain import GainTable, Outcome, RequestRecord
from orchestrator.core.slo import PriorityClass, Slo

ROOT = Path(__file__).parents[1]
ENGINE_DIR = ROOT / "built_engines/smollm2-135m"
SCHEDULERS = ("slide-batching", "sarathi-fcfs", "sarathi-priority", "vllm-fcfs")
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


def make_requests(count: int, seed: int) -> list[LiveRequest]:
    """Return Poisson arrivals with log-normal lengths, fit for the small model."""
    draw = random.Random(seed)
    requests, at_s = [], 0.0
    for _ in range(count):
        at_s += draw.expovariate(1.0)
        requests.append(
            LiveRequest(
                at_s,
                num_prompt_tokens=min(max(int(draw.lognormvariate(4.8, 0.8)), 8), 800),
                num_output_tokens=min(max(int(draw.lognormvariate(3.0, 0.6)), 4), 80),
                priority=draw.choice(CLASSES),
            )
        )
    return requests


@contextlib.contextmanager
def serving(scheduler: str, directory: Path) -> Iterator[str]:
    """Serve the model under a scheduler; yield the address."""
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
                for c in CLASSES
            ],
            "default_class": "low",
        },
        "nodes": [
            {
                "endpoint_id": "node-0",
                "port": NODE_PORT,
                "scheduler": scheduler,
                "max_num_seqs": 32,
                "engine": {"directory": str(ENGINE_DIR), "device_kv_bytes": "1GiB"},
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
        while not _is_healthy(url):
            if process.poll() is not None:
                sys.exit((directory / f"{scheduler}.log").read_text())
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def send_all(
    url: str, requests: Sequence[LiveRequest], *, requests_per_s: float
) -> list[RequestRecord]:
    """Send each request at its time and return what was seen of it."""
    started_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:

        async def send(index: int, request: LiveRequest) -> RequestRecord:
            await asyncio.sleep(request.at_s / requests_per_s + started_s - time.monotonic())
            return await _send(session, index, request)

        return await asyncio.gather(*(send(i, r) for i, r in enumerate(requests)))


async def _send(session: aiohttp.ClientSession, index: int, request: LiveRequest) -> RequestRecord:
    arrival_s = time.monotonic()
    draw = random.Random(index)
    body = {
        "model": "smollm2-135m",
        # Token ids above the control tokens; which ones does not change what a step costs.
        "prompt": [draw.randrange(100, 40_000) for _ in range(request.num_prompt_tokens)],
        "max_tokens": request.num_output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "priority": request.priority.name,
    }
    token_times_s: list[float] = []
    async with session.post("/v1/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {") and answer.status == httpx.codes.OK:
                num_tokens = _completion_tokens(line)
                now_s = time.monotonic()
                token_times_s += [now_s] * (num_tokens - len(token_times_s))
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


def _completion_tokens(line: bytes) -> int:
    _, _, rest = line.partition(b'"completion_tokens":')
    digits = rest.split(b",", 1)[0].split(b"}", 1)[0]
    return int(digits) if digits else 0


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=120)
    parser.add_argument("--load", type=float, default=1.3, help="times the sustained rate")
    arguments = parser.parse_args()
    count = 4 if arguments.quick else arguments.num_requests
    schedulers = SCHEDULERS[:1] if arguments.quick else SCHEDULERS
    requests = make_requests(count, seed=0)
    figures: dict[str, object] = {"num_requests": count, "load": arguments.load}
    with tempfile.TemporaryDirectory() as directory:
        with serving("sarathi-fcfs", Path(directory)) as url:
            probe = requests[: max(4, count // 4)]
            started_s = time.monotonic()
            asyncio.run(send_all(url, probe, requests_per_s=1e6))
            sustained = len(probe) / (time.monotonic() - started_s)
        figures["sustained_requests_per_s"] = round(sustained, 3)
        for scheduler in schedulers:
            with serving(scheduler, Path(directory)) as url:
                records = asyncio.run(
                    send_all(url, requests, requests_per_s=arguments.load * sustained)
                )
            table = GainTable(records)
            whole, by_class = table.report(), table.by_class()
            figures[scheduler] = {
                "tdg_ratio": round(whole.tdg_ratio, 4),
                "slo_attainment": round(whole.slo_attainment, 4),
                **{f"attainment_{n}": round(r.slo_attainment, 4) for n, r in by_class.items()},
                "num_failed": whole.num_failed,
                "tokens_per_s": round(whole.tokens_per_s or 0.0, 1),
            }
            print(scheduler, figures[scheduler])
    report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
