"""An engine whose steps leave the processor alone, as those of a GPU do: each takes 10 ms of
waiting. To measure what a step costs beside such an engine. An executor process:

    python -m benchmarks.shared.waiting_engine MAX_NUM_SEQS plain|plan-ahead ADDRESS
"""

from __future__ import annotations

import sys
import time
from functools import partial

from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import EngineCapabilities, SchedulerOutput, StepOutput
from orchestrator.core.slide_batching import SlideBatchingScheduler
from orchestrator.executor_process import LoadedEngine, run_executor

STEP_S = 0.010


class WaitingEngine:
    """Implements `core.ports.Engine`."""

    def __init__(self, max_num_seqs: int) -> None:
        self.capabilities = EngineCapabilities(
            block_size_tokens=64,
            num_device_blocks=64 * max_num_seqs,
            num_host_blocks=0,
            max_num_batched_tokens=64 * max_num_seqs,
            max_num_seqs=max_num_seqs,
            max_model_len=4096,
        )

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """Wait, then return the same token for each request."""
        tokens = {part.request_id: (7,) for part in plan.scheduled if part.is_sampled}
        time.sleep(STEP_S)
        return StepOutput(plan.step_id, tokens, step_s=STEP_S, model_s=STEP_S)

    def close(self) -> None:
        """Nothing to release."""


def load(max_num_seqs: int, *, plans_ahead: bool) -> LoadedEngine:
    """Return the engine under SlideBatching, which knows how long its steps take."""
    engine = WaitingEngine(max_num_seqs)
    profile = LatencyProfile(
        prefill_quadratic_s=0.0,
        prefill_context_s=0.0,
        prefill_token_s=1e-9,
        prefill_cached_s=0.0,
        decode_context_s=0.0,
        decode_token_s=0.0,
        mixed_step_s=STEP_S,
        decode_step_s=STEP_S,
    )
    return LoadedEngine(
        engine=engine,
        scheduler=SlideBatchingScheduler(engine.capabilities, BatchLatencyModel(profile)),
        model="waiting",
        latency_profile=profile,
        manifest_sha256="0" * 64,
        plans_ahead=plans_ahead,
    )


if __name__ == "__main__":
    _, max_num_seqs, loop, address = sys.argv
    sys.exit(
        run_executor(address, partial(load, int(max_num_seqs), plans_ahead=loop == "plan-ahead"))
    )
