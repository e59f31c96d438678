"""What a step costs beside the model: planning, accounting, choosing tokens, telling the node.

    python -m benchmarks.executor_overhead

An executor process serves the real model to this one, as it does to a node's HTTP process: over the
same socket, in the same messages. 32 requests decode side by side, greedily, then with temperature
and top-p, in the plain loop and in the one that plans ahead. Of each step at full batch the
executor reports how long the model computed, how long the engine took, how long planning and
accounting took, and for how long the engine was left without work by them.

Then 64 requests, with an engine that only waits 10 ms per step (`shared.waiting_engine`): what is
exposed there is what a GPU would wait for, but for the engine's own preparations. Medians over all
steps at full batch.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.shared.reporting import BENCHMARKS, argument_parser, report
from orchestrator.config import NodeConfig
from orchestrator.core.request import RequestSpec, SamplingParams
from orchestrator.core.slo import Slo
from orchestrator.executor_client import ExecutorClient
from orchestrator.wire import StepReport

ENGINE_DIR = BENCHMARKS.parent / "built_engines/smollm2-135m"
BATCH_SIZE = 32
WAITING_BATCH_SIZE = 64
LOOPS = {"plain": False, "ahead": True}
SAMPLING = {
    "greedy": SamplingParams(max_tokens=1, seed=0, temperature=0.0),
    "temperature": SamplingParams(max_tokens=1, seed=0, temperature=0.8),
    "temperature_and_top_p": SamplingParams(max_tokens=1, seed=0, temperature=0.8, top_p=0.95),
}


@dataclass(frozen=True, slots=True)
class Step:
    """A step at full batch."""

    report: StepReport
    interval_s: float
    """Since the step before was taken for done, on the executor's clock."""


class Steps:
    """Collects the steps at full batch of one run."""

    def __init__(self, batch_size: int) -> None:
        self.steps: list[Step] = []
        self._batch_size = batch_size
        self._before: StepReport | None = None

    def take(self, found: StepReport) -> None:
        """Take in a step's report."""
        before, self._before = self._before, found
        is_full = found.num_decode_tokens == self._batch_size and found.num_prefill_tokens == 0
        if before is not None and is_full:
            interval_s = found.load.taken_at_s - before.load.taken_at_s
            self.steps.append(Step(found, interval_s))


def request(index: int, num_tokens: int, sampling: SamplingParams) -> RequestSpec:
    """Return a request that decodes with all others."""
    return RequestSpec(
        request_id=f"request-{index}",
        prompt_token_ids=tuple((index * 37 + place * 11) % 40_000 + 100 for place in range(64)),
        sampling=replace(sampling, max_tokens=num_tokens, seed=index),
        priority_class="normal",
        weight=1.0,
        slo=Slo(ttft_s=60.0, tpot_s=60.0),
    )


def model_command(scheduler: str, *, plans_ahead: bool) -> list[str]:
    """Return the command of an executor process that serves the real model."""
    config = NodeConfig.model_validate(
        {
            "endpoint_id": "node",
            "port": 1,
            "engine": {"directory": str(ENGINE_DIR), "device_kv_bytes": "512MiB"},
            "scheduler": scheduler,
            "max_num_seqs": BATCH_SIZE,
            "plan_ahead": plans_ahead,
        }
    )
    return [sys.executable, "-m", "orchestrator.command_line.executor", config.model_dump_json()]


def waiting_command(*, plans_ahead: bool) -> list[str]:
    """Return the command of an executor process whose engine only waits."""
    loop = "plan-ahead" if plans_ahead else "plain"
    module = "benchmarks.shared.waiting_engine"
    return [sys.executable, "-m", module, str(WAITING_BATCH_SIZE), loop]


async def run(
    command: list[str], batch_size: int, sampling: SamplingParams, num_tokens: int
) -> list[Step]:
    """Return the steps at full batch of so many requests."""
    steps = Steps(batch_size)
    async with ExecutorClient(command, on_step=steps.take, stall_timeout_s=60.0) as client:
        await client.wait_until_loaded()

        async def consume(index: int) -> None:
            spec = request(index, num_tokens, sampling)
            async for event in client.generate(spec, arrival_s=time.monotonic()):
                if event.finish_reason is not None:
                    assert event.error is None, event.error

        await asyncio.gather(*(consume(index) for index in range(batch_size)))
    return steps.steps


def figures(steps: list[Step]) -> dict[str, float]:
    """Return the medians of a run's parts, and the share of what is not the model."""

    def median_ms(values: Iterable[float | None]) -> float:
        return round(1e3 * statistics.median(value or 0.0 for value in values), 3)

    reports = [step.report for step in steps]
    rest_s = [step.interval_s - (step.report.model_s or 0.0) for step in steps]
    return {
        "num_steps": len(steps),
        "step_ms": median_ms(step.interval_s for step in steps),
        "model_ms": median_ms(found.model_s for found in reports),
        "sampling_and_checks_ms": median_ms(
            found.step_s - (found.model_s or 0.0) for found in reports
        ),
        "planning_and_accounting_ms": median_ms(found.schedule_s for found in reports),
        "exposed_ms": median_ms(found.exposed_s for found in reports),
        "overhead_share_of_step": round(
            statistics.median(
                rest / step.interval_s for rest, step in zip(rest_s, steps, strict=True)
            ),
            4,
        ),
        "overhead_us_per_token": round(
            1e6 * statistics.median(rest_s) / reports[0].num_decode_tokens, 1
        ),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scheduler", default="slide-batching")
    options = parser.parse_args()
    num_tokens = 100 if options.quick else 400
    results: dict[str, Any] = {}

    def measure(name: str, command: list[str], size: int, sampling: SamplingParams) -> None:
        results[name] = figures(asyncio.run(run(command, size, sampling, num_tokens)))
        print(name, results[name], file=sys.stderr)

    for loop, plans_ahead in LOOPS.items():
        for name, sampling in SAMPLING.items():
            command = model_command(options.scheduler, plans_ahead=plans_ahead)
            measure(f"{loop}_{name}", command, BATCH_SIZE, sampling)
        command = waiting_command(plans_ahead=plans_ahead)
        measure(f"{loop}_waiting_engine", command, WAITING_BATCH_SIZE, SAMPLING["greedy"])
    report(
        {
            "batch_size": BATCH_SIZE,
            "waiting_engine_batch_size": WAITING_BATCH_SIZE,
            "scheduler": options.scheduler,
            **results,
        },
        file_name=options.json,
    )


if __name__ == "__main__":
    main()
