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
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import httpx
import msgspec
import numpy as np

from benchmarks.shared.live_load import (
    AT_ONCE,
    CLASSES,
    ENGINE_DIR,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NODE_PORT,
    LiveRequest,
    make_requests,
    scores,
    send_all,
    serving,
    warm_up,
)
from benchmarks.shared.reporting import argument_parser, report
from engines.manifest import read_manifest
from engines.simulated import SimulatedEngine
from orchestrator.core.gain import GainTable
from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.scheduler_factory import SchedulerName, make_scheduler
from orchestrator.simulation.cluster import Node, Replay, replay
from orchestrator.simulation.trace import Trace
from orchestrator.simulation.workload import Workload
from orchestrator.wire import NodeDescription
from router.baselines import LeastLoadPolicy

SCHEDULERS: tuple[SchedulerName, ...] = (
    "slide-batching",
    "sarathi-fcfs",
    "sarathi-priority",
    "vllm-fcfs",
)
REFERENCE: SchedulerName = "sarathi-fcfs"
"""Measures what is sustained."""

Figures = Mapping[SchedulerName, Mapping[str, float]]
"""Of each scheduler."""


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


def measure_sustained(probe: Sequence[LiveRequest], directory: Path) -> tuple[float, int]:
    """Return the requests a second that the machine gets through now while it always has work,
    and how many KV blocks the node has."""
    with serving(REFERENCE, directory) as url:
        asyncio.run(warm_up(url, probe))
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
        asyncio.run(warm_up(url, requests))
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
