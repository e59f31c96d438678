"""The real model under mixed priorities: the same requests through several schedulers, live.

    python -m benchmarks.live_mix

Starts `proserve serve` once per scheduler and round, sends the round's list of streaming requests
at its times, and scores what the client saw with the module that scores simulations. Half of the
requests are high class and count twice. The load is given as a multiple of what the machine
sustains, which is measured before each round and after the last, by sending a part of the list at
once. A round has a list of its own, and takes the schedulers in the opposite order of the one
before, so that a machine whose speed drifts favours none of them.

Then the same lists go through the simulator, whose engine is the built engine's latency profile
times one factor, such that it sustains the rate that was measured before the round. Both rankings,
by the mean over the rounds, are printed.
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
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import aiohttp
import httpx
import msgspec
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
from orchestrator.wire import NodeDescription
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

AT_ONCE = 1e6
"""Requests a second."""

Figures = Mapping[SchedulerName, Mapping[str, float]]
"""Of each scheduler."""

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
    num_device_blocks: int,
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
        num_device_blocks=num_device_blocks,
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


def simulated_figures(
    requests: Sequence[LiveRequest],
    probe: Sequence[LiveRequest],
    *,
    load: float,
    sustained: float,
    num_device_blocks: int,
) -> Figures:
    """Return each scheduler's figures in the simulator, where the probe is sustained as live."""
    profile = read_manifest(ENGINE_DIR).latency_profile
    send = partial(simulate, num_device_blocks=num_device_blocks)
    sent = send(probe, REFERENCE, profile, requests_per_s=AT_ONCE)
    profile = scaled(profile, len(probe) / sent.end_s / sustained)
    return {
        scheduler: scores(
            GainTable(send(requests, scheduler, profile, requests_per_s=load * sustained).records)
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


def measure_sustained(probe: Sequence[LiveRequest], directory: Path) -> tuple[float, int]:
    """Return the requests a second that the machine gets through now while it always has work,
    and how many KV blocks the node has."""
    with serving(REFERENCE, directory) as url:
        asyncio.run(send_all(url, probe[:4], requests_per_s=AT_ONCE))  # to warm up
        started_s = time.monotonic()
        asyncio.run(send_all(url, probe, requests_per_s=AT_ONCE))
        rate = len(probe) / (time.monotonic() - started_s)
        answer = httpx.get(f"http://127.0.0.1:{NODE_PORT}/v1/node").content
    return rate, msgspec.json.decode(answer, type=NodeDescription).capabilities.num_device_blocks


def serve_live(
    requests: Sequence[LiveRequest], scheduler: SchedulerName, rate: float, directory: Path
) -> dict[str, float]:
    """Return one scheduler's figures with the real model."""
    with serving(scheduler, directory) as url:
        asyncio.run(send_all(url, requests[:4], requests_per_s=AT_ONCE))  # to warm up
        return scores(GainTable(asyncio.run(send_all(url, requests, requests_per_s=rate))))


def mean_figures(rounds: Sequence[Figures]) -> Figures:
    """Return the means over the rounds, and the least and the greatest TDG_Ratio."""
    means = {}
    for scheduler in rounds[0]:
        of_rounds = [figures[scheduler] for figures in rounds]
        ratios = [figures["tdg_ratio"] for figures in of_rounds]
        means[scheduler] = {
            name: round(fmean(figures[name] for figures in of_rounds), 4) for name in of_rounds[0]
        } | {"least_tdg_ratio": min(ratios), "greatest_tdg_ratio": max(ratios)}
    return means


def ranking(figures: Figures) -> list[SchedulerName]:
    """Return the schedulers by TDG_Ratio, best first."""
    return sorted(figures, key=lambda name: figures[name]["tdg_ratio"], reverse=True)


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=150, help="in each round")
    parser.add_argument("--load", type=float, default=1.5, help="times the sustained rate")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    load = arguments.load
    count, num_rounds = (4, 1) if arguments.quick else (arguments.num_requests, arguments.rounds)
    order = SCHEDULERS[:1] if arguments.quick else SCHEDULERS
    live, simulated = [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        probe = make_requests(max(4, count // 3), seed=0)
        sustained, num_device_blocks = measure_sustained(probe, directory)
        rates = [sustained]
        for seed in range(1, num_rounds + 1):
            requests = make_requests(count, seed=seed)
            figures = {s: serve_live(requests, s, load * sustained, directory) for s in order}
            print_figures(f"live, round {seed}", figures)
            live.append(figures)
            simulated.append(
                simulated_figures(
                    requests,
                    probe,
                    load=load,
                    sustained=sustained,
                    num_device_blocks=num_device_blocks,
                )
            )
            order = order[::-1]
            sustained, _ = measure_sustained(probe, directory)
            rates.append(sustained)
    live_means, simulated_means = mean_figures(live), mean_figures(simulated)
    print_figures("live", live_means)
    print_figures("simulated", simulated_means)
    report(
        {
            "num_requests": count,
            "load": load,
            "sustained_requests_per_s": [round(rate, 3) for rate in rates],
            "live": live_means,
            "simulated": simulated_means,
            "live_ranking": ranking(live_means),
            "simulated_ranking": ranking(simulated_means),
            "live_rounds": live,
        },
        file_name=arguments.json,
    )


def print_figures(what: str, figures: Figures) -> None:
    """Print a line for each scheduler."""
    for scheduler in SCHEDULERS:
        if scheduler in figures:
            print(what, scheduler, figures[scheduler], sep=" | ", flush=True)


if __name__ == "__main__":
    main()
