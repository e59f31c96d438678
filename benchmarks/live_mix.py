"""The real model under mixed priorities: the same requests through several schedulers, live.

    python -m benchmarks.live_mix

Starts `proserve serve` once per scheduler, sends the same list of streaming requests at the same
times, and scores what the client saw with the module that scores simulations. Half of the
requests are high class and count twice. The load is given as a multiple of what the machine
sustains, which is measured first, in the same run, by sending a part of the list at once.

Then the same list goes through the simulator, whose engine is the built engine's latency profile
times one factor, such that it sustains the measured rate. Both rankings are printed.
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
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import yaml

from benchmarks.shared.reporting import argument_parser, report
from engines.manifest import read_manifest
from engines.simulated import SimulatedEngine
from orchestrator.core.gain import GainTable, Outcome, RequestRecord
from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.scheduler_factory import SchedulerName, make_scheduler
from orchestrator.core.slo import PriorityClass, Slo
from orchestrator.simulation.cluster import Node, Replay, replay
from orchestrator.simulation.trace import Trace
from orchestrator.simulation.workload import Workload
from router.baselines import LeastLoadPolicy

ROOT = Path(__file__).parents[1]
ENGINE_DIR = ROOT / "built_engines/smollm2-135m"
SCHEDULERS: tuple[SchedulerName, ...] = (
    "slide-batching",
    "sarathi-fcfs",
    "sarathi-priority",
    "vllm-fcfs",
)
REFERENCE: SchedulerName = "sarathi-fcfs"
"""Measures what is sustained."""

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, KV_BYTES = 32, 2048, 1 << 30
KV_BLOCK_BYTES = 16 * 30 * 2 * 3 * 64 * 4
"""16 tokens, 30 layers, keys and values, 3 heads of 64, fp32."""

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
                    "dtype": "float32",  # as KV_BLOCK_BYTES says
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
) -> list[RequestRecord]:
    """Send each request at its time, by `send` if it is given; return what was seen of it."""
    started_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)  # or the 101st would wait here, not at the server
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def send_one(index: int, request: LiveRequest) -> RequestRecord:
            await asyncio.sleep(request.at_s / requests_per_s + started_s - time.monotonic())
            return await (send or _send)(session, index, request)

        return await asyncio.gather(*(send_one(i, r) for i, r in enumerate(requests)))


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


def simulate(
    requests: Sequence[LiveRequest],
    scheduler: SchedulerName,
    profile: LatencyProfile,
    *,
    requests_per_s: float,
) -> Replay:
    """Send the same list through the simulator."""
    workload = Workload(
        Trace(
            np.array([r.at_s / requests_per_s for r in requests]),
            np.array([r.num_prompt_tokens for r in requests]),
            np.array([r.num_output_tokens for r in requests]),
            clients=("",) * len(requests),
        ),
        max_tokens=np.array([r.num_output_tokens for r in requests]),
        classes=CLASSES,
        class_index=np.array([CLASSES.index(r.priority) for r in requests]),
    )
    capabilities = EngineCapabilities(
        block_size_tokens=16,
        num_device_blocks=KV_BYTES // KV_BLOCK_BYTES,
        num_host_blocks=0,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=8192,
    )
    node = Node(
        "node-0",
        make_scheduler(scheduler, None, capabilities, BatchLatencyModel(profile)),
        SimulatedEngine(
            capabilities, BatchLatencyModel(profile), output_lengths=workload.output_lengths()
        ),
    )
    return replay(workload, lambda _: node, num_nodes=1, policy=LeastLoadPolicy())


def scaled(profile: LatencyProfile, factor: float) -> LatencyProfile:
    """Return the profile of an engine that takes `factor` times as long."""
    return LatencyProfile(**{name: factor * value for name, value in profile.to_dict().items()})


def simulated_figures(requests: Sequence[LiveRequest], *, load: float, sustained: float,
                      num_probe: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return each scheduler's figures in the simulator."""
    profile = read_manifest(ENGINE_DIR).latency_profile
    probe = simulate(requests[:num_probe], REFERENCE, profile, requests_per_s=1e6)
    profile = scaled(profile, num_probe / probe.end_s / sustained)
    return {
        scheduler: scores(
            GainTable(
                simulate(requests, scheduler, profile, requests_per_s=load * sustained).records
            )
        )
        for scheduler in SCHEDULERS
    }


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


def ranking(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the schedulers by TDG_Ratio, best first."""
    return sorted(figures, key=lambda name: figures[name]["tdg_ratio"], reverse=True)


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=180)
    parser.add_argument("--load", type=float, default=1.5, help="times the sustained rate")
    arguments = parser.parse_args()
    count = 4 if arguments.quick else arguments.num_requests
    schedulers = SCHEDULERS[:1] if arguments.quick else SCHEDULERS
    requests = make_requests(count, seed=0)
    num_probe = max(4, count // 3)
    live: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        with serving(REFERENCE, Path(directory)) as url:
            started_s = time.monotonic()
            asyncio.run(send_all(url, requests[:num_probe], requests_per_s=1e6))
            sustained = num_probe / (time.monotonic() - started_s)
        rate = arguments.load * sustained
        for scheduler in schedulers:
            with serving(scheduler, Path(directory)) as url:
                records = asyncio.run(send_all(url, requests, requests_per_s=rate))
            live[scheduler] = scores(GainTable(records))
            print("live     ", scheduler, live[scheduler])
    simulated = simulated_figures(
        requests, load=arguments.load, sustained=sustained, num_probe=num_probe
    )
    for name, figures in simulated.items():
        print("simulated", name, figures)
    report(
        {
            "num_requests": count,
            "load": arguments.load,
            "sustained_requests_per_s": round(sustained, 3),
            "live": live,
            "simulated": simulated,
            "live_ranking": ranking(live),
            "simulated_ranking": ranking(simulated),
        },
        file_name=arguments.json,
    )


if __name__ == "__main__":
    main()
