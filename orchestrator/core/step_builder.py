"""Fills one step, part by part, within time, token and sequence limits."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities, ScheduledRequest
from orchestrator.core.request import Request


def is_decode_step(request: Request) -> bool:
    """Return whether the request's next piece of work is one token after its last output.

    A preempted decode that must be computed again is priced as the prefill it has become,
    though its deadline and weight stay those of a decode (OC-11).
    """
    return request.is_decoding and request.num_uncomputed_tokens == 1


def marginal_work_s(model: BatchLatencyModel, request: Request) -> float:
    """Return the predicted cost of everything before the request's next token (equation 17)."""
    if is_decode_step(request):
        return model.decode_s(request.num_computed_tokens)
    return model.prefill_s(request.num_uncomputed_tokens, request.num_computed_tokens)


class StepBuilder:
    """One step while it is being filled."""

    def __init__(
        self,
        model: BatchLatencyModel,
        capabilities: EngineCapabilities,
        *,
        budget_s: float,
        min_chunk_tokens: int,
    ) -> None:
        self._model = model
        self._budget_s = budget_s
        self._min_chunk_tokens = min_chunk_tokens
        self._num_tokens_left = capabilities.max_num_batched_tokens
        self._num_seqs_left = capabilities.max_num_seqs
        self._marginal_s = 0.0
        self._has_prefill = False
        self.scheduled: list[ScheduledRequest] = []

    @property
    def is_full(self) -> bool:
        """True if no further request fits, whatever it needs."""
        return (
            self._num_seqs_left == 0
            or self._num_tokens_left == 0
            or self.predicted_s >= self._budget_s
        )

    @property
    def predicted_s(self) -> float:
        """Predicted duration of the step as filled so far; 0 if it is empty."""
        if not self.scheduled:
            return 0.0
        return self._model.step_constant_s(has_prefill=self._has_prefill) + self._marginal_s

    def num_fitting_tokens(self, request: Request) -> int:
        """Return how many new tokens of the request fit; 0 if none, or too few to be worth it.

        A non-final prefill chunk of `min_chunk_tokens` or fewer is not made: its share of the
        step's constant and of re-reading the context would be too large (equation 25, n_min).
        """
        num_wanted = request.num_uncomputed_tokens
        num_cached = request.num_computed_tokens
        if is_decode_step(request):
            left_s = self._left_s(has_prefill=self._has_prefill)
            return 1 if self._model.decode_s(num_cached) <= left_s else 0
        left_s = self._left_s(has_prefill=True)
        num_tokens = min(num_wanted, self._num_tokens_left)
        if self._model.prefill_s(num_tokens, num_cached) > left_s:
            num_tokens = self._model.max_new_tokens(num_cached, left_s)
        if num_tokens < num_wanted and num_tokens <= self._min_chunk_tokens:
            return 0
        return num_tokens

    def num_forced_tokens(self, request: Request) -> int:
        """Return a number of new tokens for a step that nothing fits into; at least 1."""
        if is_decode_step(request):
            return 1
        left_s = max(0.0, self._left_s(has_prefill=True))
        num_tokens = min(request.num_uncomputed_tokens, self._num_tokens_left)
        if self._model.prefill_s(num_tokens, request.num_computed_tokens) <= left_s:
            return num_tokens
        num_in_time = self._model.max_new_tokens(request.num_computed_tokens, left_s)
        return min(num_tokens, max(num_in_time, self._min_chunk_tokens, 1))

    def add(self, request: Request, num_new_tokens: int, block_ids: Sequence[int]) -> float:
        """Add a part to the step and return its predicted marginal cost in seconds."""
        num_cached = request.num_computed_tokens
        if is_decode_step(request):
            cost_s = self._model.decode_s(num_cached)
        else:
            cost_s = self._model.prefill_s(num_new_tokens, num_cached)
            self._has_prefill = True
        self._marginal_s += cost_s
        self._num_tokens_left -= num_new_tokens
        self._num_seqs_left -= 1
        self.scheduled.append(ScheduledRequest(request, num_cached, num_new_tokens, block_ids))
        return cost_s

    def _left_s(self, *, has_prefill: bool) -> float:
        constant_s = self._model.step_constant_s(has_prefill=has_prefill)
        return self._budget_s - constant_s - self._marginal_s
