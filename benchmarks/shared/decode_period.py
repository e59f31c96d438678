"""What passes from one step of decodes to the next, in either executor loop, within this process.

Over an engine that computes asynchronously, the period is the model's time and what the host lets
show of checks, packing, planning and accounting.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import Engine, LaunchesAhead, RequestEvent, SchedulerOutput, StepOutput
from orchestrator.core.request import RequestSpec, SamplingParams
from orchestrator.core.slide_batching import SlideBatchingScheduler
from orchestrator.core.slo import Slo
from orchestrator.executor import ExecutorLoop, MonotonicClock, StepFigures

_VOCAB_PART = 997
"""Prompts are made of the first so many tokens."""


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Requests that decode together."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class DecodePeriod:
    """Over the steps in which all requests decode."""

    period_s: float
    """Median."""

    exposed_s: float
    """Median time in which the engine had no step, by the loop's own account."""

    launched_share: float
    """Steps that were launched ahead."""


class CountingEngine:
    """An engine, and how many steps it has launched ahead."""

    def __init__(self, engine: Engine) -> None:
        self.capabilities = engine.capabilities
        self.num_launched = 0
        self.num_refused = 0
        self._engine = engine

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """See `core.ports.Engine`."""
        return self._engine.step(plan)

    def launch_ahead(self, plan: SchedulerOutput) -> bool:
        """See `core.ports.LaunchesAhead`."""
        engine = self._engine
        is_launched = isinstance(engine, LaunchesAhead) and engine.launch_ahead(plan)
        self.num_launched += is_launched
        self.num_refused += not is_launched
        return is_launched

    def close(self) -> None:
        """See `core.ports.Engine`."""
        self._engine.close()


def decode_period(
    loop_class: type[ExecutorLoop], engine: Engine, batch: DecodeBatch, profile: LatencyProfile
) -> DecodePeriod:
    """Run the batch under SlideBatching; return how its decodes went.

    Raises:
        RuntimeError: a request did not get all of its tokens.
    """
    counting, figures = CountingEngine(engine), list[StepFigures]()
    events: list[RequestEvent] = []
    clock = MonotonicClock()
    loop = loop_class(
        SlideBatchingScheduler(engine.capabilities, BatchLatencyModel(profile)),
        counting,
        clock=clock,
        emit=events.extend,
        report=figures.append,
    )
    for spec in _specs(batch):
        loop.add(spec, clock.now_s())
    while loop.has_requests:
        loop.run_step()
    loop.close()
    num_tokens = sum(len(event.new_token_ids) for event in events)
    if num_tokens != batch.num_requests * batch.num_output_tokens:
        raise RuntimeError(f"{num_tokens} tokens came of {batch}; {events[-1]}")
    steps = [step for step in figures if _is_full_decode(step, batch.num_requests)]
    periods = [later.began_s - step.began_s for step, later in itertools.pairwise(steps)]
    return DecodePeriod(
        period_s=statistics.median(periods),
        exposed_s=statistics.median(step.exposed_s for step in steps),
        launched_share=counting.num_launched / len(figures),
    )


def _specs(batch: DecodeBatch) -> Sequence[RequestSpec]:
    return [
        RequestSpec(
            request_id=f"r{index}",
            prompt_token_ids=tuple(
                (index * 31 + place * 7) % _VOCAB_PART for place in range(batch.num_prompt_tokens)
            ),
            sampling=SamplingParams(
                max_tokens=batch.num_output_tokens, seed=index, temperature=0.0
            ),
            priority_class="benchmark",
            weight=1.0,
            slo=Slo(),
        )
        for index in range(batch.num_requests)
    ]


def _is_full_decode(step: StepFigures, num_requests: int) -> bool:
    parts = step.plan.scheduled
    return len(parts) == num_requests == step.plan.num_new_tokens
