"""An engine without a model, for tests of what surrounds engines; obeys words in the prompt.

Token i of a request is `prompt[0] + i`, so a test knows every token. A prompt that ends with one
of the ids below makes the step that computes it misbehave. Runs as an executor process too:

    python -m tests.scripted_engine [plan-ahead] ADDRESS
"""

from __future__ import annotations

import os
import signal
import sys
import time

from orchestrator.core.errors import EngineLost
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities, SchedulerOutput, StepOutput
from orchestrator.core.slide_batching import SlideBatchingScheduler
from orchestrator.executor_process import LoadedEngine, run_executor
from tests.factories import make_capabilities, make_profile

RAISE = 900_001
"""The step raises."""

EXIT = 900_002
"""The process kills itself."""

REFUSE = 900_003
"""Only this request fails; the rest of the step goes on."""

LOSE = 900_004
"""The engine is lost."""

STEP_S = 0.002


class ScriptedEngine:
    """Implements `core.ports.Engine`; `steps` records every plan it was given."""

    def __init__(self, capabilities: EngineCapabilities, step_s: float = 0.0) -> None:
        self._capabilities = capabilities
        self._step_s = step_s
        self.steps: list[SchedulerOutput] = []
        self.is_closed = False

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._capabilities

    def step(self, plan: SchedulerOutput) -> StepOutput:
        self.steps.append(plan)
        time.sleep(self._step_s)
        new_token_ids: dict[str, tuple[int, ...]] = {}
        failed: dict[str, str] = {}
        for part in plan.scheduled:
            prompt = part.request.spec.prompt_token_ids
            if prompt[-1] == RAISE:
                raise ZeroDivisionError("as the prompt asked")
            if prompt[-1] == LOSE:
                raise EngineLost("as the prompt asked")
            if prompt[-1] == EXIT:
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt[-1] == REFUSE:
                failed[part.request_id] = "as the prompt asked"
            elif part.is_sampled:
                new_token_ids[part.request_id] = (prompt[0] + len(part.request.output_token_ids),)
        return StepOutput(plan.step_id, new_token_ids, step_s=self._step_s, failed=failed)

    def close(self) -> None:
        self.is_closed = True


def load() -> LoadedEngine:
    engine = ScriptedEngine(make_capabilities(num_device_blocks=100), step_s=STEP_S)
    profile = make_profile()
    return LoadedEngine(
        engine=engine,
        scheduler=SlideBatchingScheduler(engine.capabilities, BatchLatencyModel(profile)),
        model="scripted",
        latency_profile=profile,
        manifest_sha256="0" * 64,
        plans_ahead="plan-ahead" in sys.argv,
    )


if __name__ == "__main__":
    sys.exit(run_executor(sys.argv[-1], load))
