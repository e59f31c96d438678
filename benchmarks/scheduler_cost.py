"""What one step of a scheduler costs: `schedule()` and `update_from_output()`, without an engine.

    python -m benchmarks.scheduler_cost

256 requests decode, and 0, 1,000 or 10,000 prompts wait behind them; then 32 decode alone. The time
per step is the median over many steps; token ids are made up. `cold` is the same while 64 MiB are
read between two calls, as a model's weights are between two plans.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from benchmarks.shared.reporting import argument_parser, report
from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import EngineCapabilities, Scheduler, StepOutput
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slide_batching import SlideBatchingScheduler
from orchestrator.core.slo import Slo

MAX_NUM_RUNNING = 256
QUEUE_LENGTHS = (0, 1_000, 10_000)
CASES = (*((MAX_NUM_RUNNING, num_queued) for num_queued in QUEUE_LENGTHS), (32, 0))
"""Requests that decode, and that wait."""

NUM_BYTES_BETWEEN = 64 << 20

# A 7B model on a large GPU, rounded; only the order of magnitude matters here.
PROFILE = LatencyProfile(
    prefill_quadratic_s=1e-9,
    prefill_context_s=1e-9,
    prefill_token_s=4e-5,
    prefill_cached_s=1e-8,
    decode_context_s=3e-8,
    decode_token_s=1e-5,
    mixed_step_s=6e-3,
    decode_step_s=5e-3,
)
CAPABILITIES = EngineCapabilities(
    block_size_tokens=16,
    num_device_blocks=40_000,
    num_host_blocks=0,
    max_num_batched_tokens=8192,
    max_num_seqs=MAX_NUM_RUNNING,
    max_model_len=32_768,
)


def make_request(request_id: str, *, num_prompt_tokens: int, arrival_s: float) -> Request:
    """Return a request of a mix of weights and objectives that never ends by itself."""
    index = int(request_id[1:])
    return Request(
        RequestSpec(
            request_id=request_id,
            prompt_token_ids=tuple(range(num_prompt_tokens)),
            sampling=SamplingParams(max_tokens=20_000, seed=0),
            priority_class="normal",
            weight=(1.0, 2.0, 4.0)[index % 3],
            slo=Slo(ttft_s=1.0 + index % 7, tpot_s=0.05),
        ),
        arrival_s=arrival_s,
    )


def run_step(scheduler: Scheduler, now_s: float) -> tuple[float, float, int]:
    """Run one step; return the seconds it took the scheduler, its end and its requests."""
    started_s = time.perf_counter()
    plan = scheduler.schedule(now_s)
    scheduled_s = time.perf_counter() - started_s
    output = StepOutput(
        step_id=plan.step_id,
        new_token_ids={p.request_id: (7,) for p in plan.scheduled if p.is_sampled},
        step_s=plan.predicted_step_s,
    )
    now_s += plan.predicted_step_s
    started_s = time.perf_counter()
    scheduler.update_from_output(plan, output, now_s)
    return scheduled_s + time.perf_counter() - started_s, now_s, len(plan.scheduled)


def fill(scheduler: Scheduler, num_queued: int, *, num_running: int = MAX_NUM_RUNNING) -> float:
    """Fill a scheduler with decoding and queued requests; return its time now."""
    now_s = 0.0
    for index in range(num_running):
        scheduler.add_request(
            make_request(f"r{index}", num_prompt_tokens=300, arrival_s=index * 1e-4)
        )
    while scheduler.load().num_decoding < num_running:
        _, now_s, _ = run_step(scheduler, now_s)
    for index in range(num_queued):
        scheduler.add_request(
            make_request(
                f"q{index}", num_prompt_tokens=200 + index % 2000, arrival_s=now_s + index * 1e-4
            )
        )
    return now_s


def costs_s(num_running: int, num_queued: int, num_steps: int, *, is_cold: bool) -> list[float]:
    """Return the cost of each step, in ascending order."""
    between = np.ones(NUM_BYTES_BETWEEN if is_cold else 0, np.uint8)  # zeros would share a page
    scheduler = SlideBatchingScheduler(CAPABILITIES, BatchLatencyModel(PROFILE))
    now_s = fill(scheduler, num_queued, num_running=num_running)
    times_s = []
    for _ in range(num_steps):
        between.max(initial=0)
        seconds, now_s, num_scheduled = run_step(scheduler, now_s)
        assert num_scheduled > 0
        times_s.append(seconds)
    return sorted(times_s)


def main() -> None:
    """Run the benchmark."""
    arguments = argument_parser(__doc__).parse_args()
    num_steps = 50 if arguments.quick else 400
    figures: dict[str, float] = {}
    for num_running, num_queued in CASES:
        case = f"{num_running}_running_{num_queued}_queued"
        for prefix, is_cold in (("", False), ("cold_", True)):
            found_s = costs_s(num_running, num_queued, num_steps, is_cold=is_cold)
            median_s, p99_s = statistics.median(found_s), found_s[int(0.99 * num_steps)]
            figures[f"{prefix}step_ms_median_{case}"] = round(median_s * 1e3, 3)
            figures[f"{prefix}step_ms_p99_{case}"] = round(p99_s * 1e3, 3)
            print(f"{prefix}{case}: {median_s * 1e3:7.3f} ms median, {p99_s * 1e3:7.3f} ms p99")
    report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
