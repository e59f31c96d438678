"""SlideBatching against vLLM's own v1 scheduler, on a virtual clock.

    make peer-vllm
    .venv-vllm/bin/python -m benchmarks.vllm_scheduler_peer

Every scheduler gets the same requests, KV blocks, limits and step durations; vLLM's decides with
its own code over its own KV cache manager. Then what a step costs each of them, with 256 requests
decoding and 0, 1,000 or 10,000 prompts queued, in turns in one process.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.scheduler_cost import (
    CAPABILITIES,
    PROFILE,
    QUEUE_LENGTHS,
    fill,
    run_step,
)
from benchmarks.shared.reporting import argument_parser, report
from engines.simulated import SimulatedEngine
from orchestrator.core.gain import GainReport, GainTable
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.slide_batching import SlideBatchingScheduler
from orchestrator.simulation.calibration import Calibration, calibrate
from orchestrator.simulation.cluster import Node, Replay, replay
from orchestrator.simulation.config import SimulationConfig
from orchestrator.simulation.results import Estimate
from orchestrator.simulation.scenario import (
    counted_window,
    make_seeded_workload,
    replay_workload,
)
from orchestrator.simulation.workers import workers
from orchestrator.simulation.workload import Workload
from orchestrator.yaml_config import load_yaml_model
from router.baselines import LeastLoadPolicy

CONFIG = Path("configs/simulations/h200-7b.yaml")
RATE = 1.3
"""In knees of Sarathi-FCFS; a constant, since below the knee all schedulers earn nearly all."""

MAX_REQUESTS = 300
"""Per replay; vLLM's scheduler takes milliseconds a step."""

OURS = ("slide-batching", "sarathi-fcfs", "sarathi-priority")
"""Sarathi's are in what follows the schedulers most like vLLM's that are our own code."""

THEIRS = {"vLLM's fcfs": "fcfs", "vLLM's priority": "priority"}


@dataclass(frozen=True, slots=True)
class Scene:
    """One workload."""

    config: SimulationConfig
    trace_index: int
    calibration: Calibration
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one scheduler made of it."""

    trace: str
    policy: str
    tdg_ratio: float
    slo_attainment: float
    num_preemptions: int


def replay_vllm(config: SimulationConfig, workload: Workload, policy: str) -> Replay:
    """Run a workload on one node under vLLM's scheduler."""
    from benchmarks.shared.vllm_scheduler import VllmScheduler

    capabilities = config.engine.capabilities()
    engine = SimulatedEngine(
        capabilities,
        BatchLatencyModel(config.engine.profile),
        output_lengths=workload.output_lengths(),
    )
    node = Node("vllm", VllmScheduler(capabilities, policy=policy), engine)
    return replay(workload, lambda _: node, num_nodes=1, policy=LeastLoadPolicy())


def run_scene(scene: Scene) -> list[Outcome]:
    """Run one workload under every scheduler."""
    config, trace = scene.config, scene.config.traces[scene.trace_index]
    knee_rate = scene.calibration.knee_rate
    assert knee_rate is not None
    workload = make_seeded_workload(
        config,
        trace,
        slo=scene.calibration.slo,
        requests_per_s=RATE * knee_rate,
        seed=scene.seed,
    )
    window = counted_window(config, workload)
    outcomes = []
    for policy in (*OURS, *THEIRS):
        if policy in THEIRS:
            result = replay_vllm(config, workload, THEIRS[policy])
        else:
            result = replay_workload(
                config, config.policies[policy], workload, engines=config.engines(), seed=scene.seed
            )
        gain: GainReport = GainTable(result.records, config.metrics.gain_weights).report(window)
        outcomes.append(
            Outcome(trace.name, policy, gain.tdg_ratio, gain.slo_attainment,
                    result.num_preemptions)
        )  # fmt: skip
    return outcomes


def compare(*, quick: bool, num_seeds: int) -> list[dict[str, object]]:
    """Return a row per trace and scheduler: means and 95 % intervals over seeds."""
    config = load_yaml_model(CONFIG, SimulationConfig)
    limit = 100 if quick else MAX_REQUESTS
    traces = [
        t.model_copy(update={"num_requests": min(t.num_requests or limit, limit)})
        for t in config.traces[: 2 if quick else None]
    ]
    config = config.model_copy(update={"traces": tuple(traces), "num_seeds": num_seeds})
    with workers(2, Console(stderr=True)) as pool:
        tasks = [(config, index) for index in range(len(config.traces))]
        calibrations = pool.do("calibrate", calibrate_trace, tasks)
        scenes = [
            Scene(config, index, calibration, seed)
            for index, calibration in enumerate(calibrations)
            for seed in range(num_seeds)
        ]
        results = pool.do("replay", run_scene, scenes)
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in (outcome for outcomes in results for outcome in outcomes):
        groups[outcome.trace, outcome.policy].append(outcome)
    rows: list[dict[str, object]] = []
    for (trace, policy), of_seeds in groups.items():
        tdg = shown([o.tdg_ratio for o in of_seeds])
        attainment = shown([o.slo_attainment for o in of_seeds])
        num_preemptions = statistics.mean(o.num_preemptions for o in of_seeds)
        print(f"{trace:28} {policy:17} TDG {tdg} attained {attainment} "
              f"{num_preemptions:6.0f} preemptions")  # fmt: skip
        rows.append(
            {
                "trace": trace,
                "policy": policy,
                "tdg_ratio": [o.tdg_ratio for o in of_seeds],
                "slo_attainment": [o.slo_attainment for o in of_seeds],
                "num_preemptions": num_preemptions,
            }
        )
    return rows


def shown(values: Sequence[float]) -> str:
    """Return a mean and the half width of its 95 % interval, if there are several values."""
    estimate = Estimate.of(values)
    width = "" if estimate.half_width is None else f"±{estimate.half_width:.3f}"
    return f"{estimate.mean:.3f}{width}"


def calibrate_trace(task: tuple[SimulationConfig, int]) -> Calibration:
    """Return a trace's objectives and knee."""
    config, trace_index = task
    return calibrate(config, config.traces[trace_index])


def cost_figures(num_steps: int) -> dict[str, float]:
    """Return medians per step, ours and vLLM's, step by step in turns."""
    from benchmarks.shared.vllm_scheduler import VllmScheduler

    figures: dict[str, float] = {}
    for num_queued in QUEUE_LENGTHS:
        ours = SlideBatchingScheduler(CAPABILITIES, BatchLatencyModel(PROFILE))
        theirs = VllmScheduler(CAPABILITIES, policy="priority")
        ours_now_s, theirs_now_s = fill(ours, num_queued), fill(theirs, num_queued)
        ours_s, theirs_s = [], []
        for _ in range(num_steps):
            seconds, ours_now_s, _ = run_step(ours, ours_now_s)
            ours_s.append(seconds)
            before_s = theirs.scheduler_s
            _, theirs_now_s, _ = run_step(theirs, theirs_now_s + 0.01)
            theirs_s.append(theirs.scheduler_s - before_s)
        ours_ms, theirs_ms = (1e3 * statistics.median(times) for times in (ours_s, theirs_s))
        print(f"{num_queued:6} queued: ours {ours_ms:.3f} ms, vLLM's {theirs_ms:.3f} ms, "
              f"ratio {ours_ms / theirs_ms:.2f}")  # fmt: skip
        figures[f"ours_ms_{num_queued}_queued"] = round(ours_ms, 3)
        figures[f"vllm_ms_{num_queued}_queued"] = round(theirs_ms, 3)
        figures[f"ratio_{num_queued}_queued"] = round(ours_ms / theirs_ms, 3)
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each replay")
    arguments = parser.parse_args()
    try:
        import vllm
    except ImportError:
        sys.exit("vLLM is not installed here; run `make peer-vllm` and use .venv-vllm/bin/python")
    figures = cost_figures(30 if arguments.quick else 300)
    rows = compare(quick=arguments.quick, num_seeds=1 if arguments.quick else arguments.seeds)
    report(
        {"vllm": vllm.__version__, **figures, "rate_in_knees": RATE, "replays": rows},
        file_name=arguments.json,
    )


if __name__ == "__main__":
    main()
