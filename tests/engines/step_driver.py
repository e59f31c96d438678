"""Runs an engine by hand-made plans, so that a test decides what goes into each step."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from orchestrator.core.ports import (
    Engine,
    ScheduledRequest,
    ScheduleReasons,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import Request

REASONS = ScheduleReasons(latency_budget_s=math.inf, load_s=0.0, num_urgent=0, num_normal=0)


def make_plan(
    *scheduled: ScheduledRequest, step_id: int = 1, finished_ids: tuple[str, ...] = ()
) -> SchedulerOutput:
    return SchedulerOutput(
        step_id=step_id,
        scheduled=scheduled,
        preempted_ids=(),
        finished_ids=finished_ids,
        transfers=(),
        predicted_step_s=0.0,
        reasons=REASONS,
    )


class StepDriver:
    """Owns requests and blocks. Blocks are handed out in random order, so that none of a
    request's lie side by side, and are reused at once, with what their last owner left in them.
    """

    def __init__(self, engine: Engine, *requests: Request) -> None:
        self.engine = engine
        self.requests = {request.request_id: request for request in requests}
        self._blocks: dict[str, list[int]] = {name: [] for name in self.requests}
        self._random = random.Random(0)
        self._free = list(range(engine.capabilities.num_device_blocks))
        self._step_id = 0

    def step(self, num_new_tokens: Mapping[str, int]) -> StepOutput:
        """Compute so many new tokens of each of these requests, at most what they have left."""
        scheduled = [
            self._schedule(self.requests[name], count) for name, count in num_new_tokens.items()
        ]
        self._step_id += 1
        output = self.engine.step(make_plan(*scheduled, step_id=self._step_id))
        for part in scheduled:
            part.request.num_computed_tokens += part.num_new_tokens
        for name, token_ids in output.new_token_ids.items():
            for token_id in token_ids:
                self.requests[name].append_output_token(token_id, now_s=0.0)
        return output

    def preempt(self, name: str) -> None:
        """Take the request's blocks; its next steps compute everything again."""
        self._free += self._blocks[name]
        self._blocks[name] = []
        self.requests[name].num_computed_tokens = 0

    def unfinished(self) -> list[str]:
        return [
            name
            for name, request in self.requests.items()
            if request.num_output_tokens < request.spec.sampling.max_tokens
        ]

    def run(self, *, chunk_tokens: int) -> dict[str, list[int]]:
        """Run all to their end, every request in every step, prompts in chunks; return outputs."""
        while names := self.unfinished():
            self.step(dict.fromkeys(names, chunk_tokens))
        return self.outputs()

    def outputs(self) -> dict[str, list[int]]:
        return {name: request.output_token_ids for name, request in self.requests.items()}

    def _schedule(self, request: Request, num_new_tokens: int) -> ScheduledRequest:
        num_new_tokens = min(num_new_tokens, request.num_uncomputed_tokens)
        num_tokens = request.num_computed_tokens + num_new_tokens
        blocks = self._blocks[request.request_id]
        while len(blocks) * self.engine.capabilities.block_size_tokens < num_tokens:
            blocks.append(self._free.pop(self._random.randrange(len(self._free))))
        return ScheduledRequest(request, request.num_computed_tokens, num_new_tokens, blocks)
