"""An engine whose steps take exactly as long as a profile says."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile
from orchestrator.core.ports import EngineCapabilities, SchedulerOutput, StepOutput
from tests.factories import make_capabilities

PROFILE = LatencyProfile(
    prefill_quadratic_s=1e-6,
    prefill_context_s=1e-6,
    prefill_token_s=1e-3,
    prefill_cached_s=1e-5,
    decode_context_s=1e-5,
    decode_token_s=2e-3,
    mixed_step_s=0.03,
    decode_step_s=0.02,
)


@dataclass
class ClockworkEngine:
    """Takes exactly as long as its profile says, and keeps what it was given."""

    capabilities: EngineCapabilities = field(default_factory=make_capabilities)
    profile: LatencyProfile = PROFILE
    plans: list[SchedulerOutput] = field(default_factory=list)

    def step(self, plan: SchedulerOutput) -> StepOutput:
        self.plans.append(plan)
        shape = BatchShape()
        for part in plan.scheduled:
            if part.request.is_decoding:
                shape += BatchShape.of_decode(part.num_computed_tokens)
            else:
                shape += BatchShape.of_prefill(part.num_new_tokens, part.num_computed_tokens)
        step_s = BatchLatencyModel(self.profile).predict_s(shape)
        return StepOutput(step_id=plan.step_id, new_token_ids={}, step_s=step_s)

    def close(self) -> None: ...
