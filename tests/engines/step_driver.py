"""Runs an engine by hand-made plans, so that a test decides what goes into each step."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import (
    Engine,
    ScheduledRequest,
    ScheduleReasons,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import Request
from tests.factories import make_request

REASONS = ScheduleReasons(latency_budget_s=math.inf, load_s=0.0, num_urgent=0, num_normal=0)


def make_plan(
    *scheduled: ScheduledRequest,
    step_id: int = 1,
    finished_ids: tuple[str, ...] = (),
    transfers: Sequence[KVTransfer] = (),
    waits_for_transfers: bool = False,
) -> SchedulerOutput:
    return SchedulerOutput(
        step_id=step_id,
        scheduled=scheduled,
        preempted_ids=(),
        finished_ids=finished_ids,
        transfers=tuple(transfers),
        waits_for_transfers=waits_for_transfers,
        predicted_step_s=0.0,
        reasons=REASONS,
    )


def random_requests(*prompt_lengths: int, max_tokens: int = 12, **arguments: Any) -> list[Request]:
    """Return requests named by their prompt's length, with random prompts of 97 token ids."""
    generator = random.Random(0)
    return [
        make_request(
            str(length),
            prompt_token_ids=[generator.randrange(97) for _ in range(length)],
            max_tokens=max_tokens,
            **arguments,
        )
        for length in prompt_lengths
    ]


def tokens_alone(engine: Engine, *prompt_lengths: int) -> dict[str, list[int]]:
    """Return the tokens of `random_requests` when each runs alone, its prompt in one piece."""
    outputs: dict[str, list[int]] = {}
    for request in random_requests(*prompt_lengths):
        outputs |= StepDriver(engine, request).run(chunk_tokens=256)
    return outputs


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
        self._host_blocks: dict[str, list[int]] = {name: [] for name in self.requests}
        self._free_host = list(range(engine.capabilities.num_host_blocks))
        self._step_id = 0
        self._num_transfers = 0

    def step(
        self,
        num_new_tokens: Mapping[str, int],
        *,
        transfers: Sequence[KVTransfer] = (),
        waits_for_transfers: bool = False,
    ) -> StepOutput:
        """Start these copies and compute so many new tokens of each of these requests, at most
        what they have left."""
        scheduled = [
            self._schedule(self.requests[name], count) for name, count in num_new_tokens.items()
        ]
        self._step_id += 1
        plan = make_plan(
            *scheduled,
            step_id=self._step_id,
            transfers=transfers,
            waits_for_transfers=waits_for_transfers,
        )
        output = self.engine.step(plan)
        for part in scheduled:
            part.request.num_computed_tokens += part.num_new_tokens
        for name, token_ids in output.new_token_ids.items():
            for token_id in token_ids:
                self.requests[name].append_output_token(token_id, now_s=0.0)
        return output

    def run_until_ended(self, transfer: KVTransfer) -> None:
        """Step without computing until the copy is reported."""
        output = self.step({}, transfers=[transfer])
        while transfer.transfer_id not in output.completed_transfers:
            output = self.step({})

    def offload(self, name: str) -> KVTransfer:
        """Return a copy of the request's full blocks to the host, for a step to start."""
        request = self.requests[name]
        count = request.num_computed_tokens // self.engine.capabilities.block_size_tokens
        self._host_blocks[name] = [
            self._free_host.pop(self._random.randrange(len(self._free_host))) for _ in range(count)
        ]
        return self._transfer(name, TransferDirection.OFFLOAD, count)

    def onboard(self, name: str, num_blocks: int | None = None) -> KVTransfer:
        """Return a copy of a preempted request's first blocks, or of all that the host has, for
        the very step that goes on behind them."""
        count = len(self._host_blocks[name]) if num_blocks is None else num_blocks
        self._blocks[name] = [self._take_block() for _ in range(count)]
        block_size_tokens = self.engine.capabilities.block_size_tokens
        self.requests[name].num_computed_tokens = count * block_size_tokens
        return self._transfer(name, TransferDirection.ONBOARD, count)

    def preempt(self, name: str) -> None:
        """Take the request's device blocks; its next steps compute everything again, but for
        what `onboard` brings back."""
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
            blocks.append(self._take_block())
        return ScheduledRequest(request, request.num_computed_tokens, num_new_tokens, blocks)

    def _take_block(self) -> int:
        return self._free.pop(self._random.randrange(len(self._free)))

    def _transfer(self, name: str, direction: TransferDirection, num_blocks: int) -> KVTransfer:
        self._num_transfers += 1
        return KVTransfer(
            self._num_transfers,
            name,
            direction,
            tuple(self._blocks[name][:num_blocks]),
            tuple(self._host_blocks[name][:num_blocks]),
        )


def reload_together(
    engine: Engine, *, waits_for_transfers: bool
) -> tuple[StepOutput, dict[str, list[int]]]:
    """Let three requests come back in one step, to a pool of 70 blocks that another request has
    written all over in between; return that step's output, and all tokens after the last.

    Three, because a token now and then comes out right by chance. The prompts are those of
    `random_requests(17, 24, 35, 150)`.
    """
    moved = ("17", "24", "35")
    driver = StepDriver(engine, *random_requests(17, 24, 35, 150))
    for _ in range(4):
        driver.step(dict.fromkeys(moved, 35))
    for name in moved:
        driver.run_until_ended(driver.offload(name))
        driver.preempt(name)
    driver.step({"150": 150})
    driver.preempt("150")
    output = driver.step(
        dict.fromkeys(moved, 4),
        transfers=[driver.onboard(name) for name in moved],
        waits_for_transfers=waits_for_transfers,
    )
    return output, driver.run(chunk_tokens=256)
