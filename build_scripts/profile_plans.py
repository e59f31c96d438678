"""The steps that a profile measures, as plans for `Engine.step`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from build_scripts.recipe import StepGrid
from orchestrator.core.latency import BatchShape
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    ScheduleReasons,
    SchedulerOutput,
)
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slo import Slo

_REASONS = ScheduleReasons(latency_budget_s=math.inf, load_s=0.0, num_urgent=0, num_normal=0)


@dataclass(frozen=True, slots=True)
class Piece:
    """One request's part of a measured step."""

    num_new_tokens: int
    num_cached_tokens: int
    is_decode: bool

    @property
    def shape(self) -> BatchShape:
        """The piece as the latency model sees it."""
        if self.is_decode:
            return BatchShape.of_decode(self.num_cached_tokens)
        return BatchShape.of_prefill(self.num_new_tokens, self.num_cached_tokens)


def prefill_grid(grid: StepGrid) -> list[tuple[Piece, ...]]:
    """Return steps of one prefill piece each."""
    return [
        (Piece(new, cached, is_decode=False),)
        for new in grid.prefill_new_tokens
        for cached in grid.prefill_cached_tokens
    ]


def decode_grid(grid: StepGrid) -> list[tuple[Piece, ...]]:
    """Return decode-only steps of equal contexts."""
    return [
        (Piece(1, cached, is_decode=True),) * batch_size
        for batch_size in grid.decode_batch_sizes
        for cached in grid.decode_cached_tokens
    ]


def mixed_steps(grid: StepGrid) -> Iterator[tuple[Piece, ...]]:
    """Yield random steps of one prefill piece and some decodes of different contexts; the
    same ones each time, without end."""
    generator = np.random.default_rng(0)
    while True:
        num_decodes = int(generator.integers(1, max(grid.decode_batch_sizes) // 2 + 2))
        contexts = generator.integers(1, max(grid.decode_cached_tokens), num_decodes)
        new = int(generator.integers(2, max(grid.prefill_new_tokens) // 2 + 3))
        cached = int(generator.choice(grid.prefill_cached_tokens))
        yield (
            Piece(new, cached, is_decode=False),
            *(Piece(1, int(context), is_decode=True) for context in contexts),
        )


def fits(pieces: Sequence[Piece], limits: EngineCapabilities) -> bool:
    """Return whether an engine with these limits can run the step."""
    tokens = [piece.num_new_tokens + piece.num_cached_tokens for piece in pieces]
    blocks = sum(-(-count // limits.block_size_tokens) for count in tokens)
    return (
        max(tokens) <= limits.max_model_len
        and blocks <= limits.num_device_blocks
        and len(pieces) <= limits.max_num_seqs
        and sum(piece.num_new_tokens for piece in pieces) <= limits.max_num_batched_tokens
    )


class PlanMaker:
    """Turns pieces into plans whose requests are really in the state that the piece says.

    Every request has blocks of its own, scattered over the pool as after hours of serving, so
    that reading them costs what it costs then. What the blocks hold does not matter: attention
    takes the same time over any numbers.
    """

    def __init__(self, limits: EngineCapabilities, *, vocab_size: int) -> None:
        self._limits = limits
        self._vocab_size = vocab_size
        self._generator = np.random.default_rng(0)
        self._block_ids = self._generator.permutation(limits.num_device_blocks).tolist()
        self._num_plans = 0

    def plan(self, pieces: Sequence[Piece]) -> SchedulerOutput:
        """Return one step; the requests of the plan before are reported as finished."""
        self._num_plans += 1
        free = list(self._block_ids)
        return SchedulerOutput(
            step_id=self._num_plans,
            scheduled=tuple(
                self._scheduled(piece, f"profile-{index}", free)
                for index, piece in enumerate(pieces)
            ),
            preempted_ids=(),
            finished_ids=tuple(f"profile-{i}" for i in range(self._limits.max_num_seqs)),
            transfers=(),
            predicted_step_s=0.0,
            reasons=_REASONS,
        )

    def _scheduled(self, piece: Piece, request_id: str, free: list[int]) -> ScheduledRequest:
        num_tokens = piece.num_cached_tokens + piece.num_new_tokens
        tokens = self._generator.integers(0, self._vocab_size, num_tokens).tolist()
        num_prompt_tokens = num_tokens - 1 if piece.is_decode else num_tokens
        spec = RequestSpec(
            request_id=request_id,
            prompt_token_ids=tuple(tokens[:num_prompt_tokens]),
            sampling=SamplingParams(max_tokens=self._limits.max_model_len, seed=0),
            priority_class="profile",
            weight=1.0,
            slo=Slo(),
        )
        num_blocks = -(-num_tokens // self._limits.block_size_tokens)
        return ScheduledRequest(
            request=Request(spec, arrival_s=0.0, output_token_ids=tokens[num_prompt_tokens:]),
            num_computed_tokens=piece.num_cached_tokens,
            num_new_tokens=piece.num_new_tokens,
            block_ids=[free.pop() for _ in range(num_blocks)],
        )
