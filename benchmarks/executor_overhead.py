"""What a step costs beside the model: planning, accounting, choosing tokens, telling the node.

    python -m benchmarks.executor_overhead

An executor process serves the real model to this one, as it does to a node's HTTP process: over the
same socket, in the same messages. 32 requests decode side by side, greedily, then with temperature
and top-p. Of each step at full batch the executor reports how long the model computed, how long the
engine took, and how long planning and accounting took; what is left of the time from one step to
the next one goes into messages. Medians over all such steps.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
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

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._before: StepReport | None = None

    def take(self, found: StepReport) -> None:
        """Take in a step's report."""
        before, self._before = self._before, found
        is_full = found.num_decode_tokens == BATCH_SIZE and found.num_prefill_tokens == 0
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


async def run(sampling: SamplingParams, num_tokens: int, scheduler: str) -> list[Step]:
    """Return the steps at full batch of 32 requests."""
    steps = Steps()
    config = NodeConfig.model_validate(
        {
            "endpoint_id": "node",
            "port": 1,
            "engine": {"directory": str(ENGINE_DIR), "device_kv_bytes": "512MiB"},
            "scheduler": scheduler,
            "max_num_seqs": BATCH_SIZE,
        }
    )
    command = [sys.executable, "-m", "orchestrator.command_line.executor", config.model_dump_json()]
    async with ExecutorClient(command, on_step=steps.take, stall_timeout_s=60.0) as client:
        await client.wait_until_loaded()

        async def consume(index: int) -> None:
            spec = request(index, num_tokens, sampling)
            async for event in client.generate(spec, arrival_s=time.monotonic()):
                if event.finish_reason is not None:
                    assert event.error is None, event.error

        await asyncio.gather(*(consume(index) for index in range(BATCH_SIZE)))
    return steps.steps


def figures(steps: list[Step]) -> dict[str, float]:
    """Return the medians of a run's parts, and the share of what is not the model."""

    def median_ms(values: list[float]) -> float:
        return round(1e3 * statistics.median(values), 3)

    reports = [step.report for step in steps]
    model_s = [found.model_s or 0.0 for found in reports]
    rest_s = [1 - model / step.interval_s for step, model in zip(steps, model_s, strict=True)]
    schedule_s = [found.schedule_s or 0.0 for found in reports]
    return {
        "num_steps": len(steps),
        "step_ms": median_ms([step.interval_s for step in steps]),
        "model_ms": median_ms(model_s),
        "sampling_and_checks_ms": median_ms(
            [found.step_s - model for found, model in zip(reports, model_s, strict=True)]
        ),
        "schedule_ms": median_ms(schedule_s),
        "messages_ms": median_ms(
            [
                step.interval_s - step.report.step_s - schedule
                for step, schedule in zip(steps, schedule_s, strict=True)
            ]
        ),
        "overhead_share_of_step": round(statistics.median(rest_s), 4),
        "overhead_us_per_token": round(
            1e6
            * statistics.median(
                (step.interval_s - model) / BATCH_SIZE
                for step, model in zip(steps, model_s, strict=True)
            ),
            1,
        ),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scheduler", default="slide-batching")
    options = parser.parse_args()
    num_tokens = 100 if options.quick else 400
    results: dict[str, Any] = {}
    for name, sampling in SAMPLING.items():
        steps = asyncio.run(run(sampling, num_tokens, options.scheduler))
        results[name] = figures(steps)
        print(name, results[name], file=sys.stderr)
    report(
        {"batch_size": BATCH_SIZE, "scheduler": options.scheduler, **results},
        file_name=options.json,
    )


if __name__ == "__main__":
    main()
