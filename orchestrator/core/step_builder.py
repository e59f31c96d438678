"""Fills one step, part by part, within time, token and sequence limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.core.latency import BatchLatencyModel, BatchShape, Floats
from orchestrator.core.ports import EngineCapabilities, ScheduledRequest
from orchestrator.core.request import Request


@dataclass(frozen=True, slots=True)
class StepRules:
    """What a scheduler allows one step to hold, beside the engine's own limits."""

    budget_s: float
    """Predicted duration at most; infinite for none."""

    max_mixed_s: float = math.inf
    """Predicted duration at most of a step with prefills, where that is less than the budget."""

    max_decode_only_s: float = math.inf
    """The same of a decode-only step."""

    max_tokens: int | None = None
    """New tokens at most; None leaves the engine's limit."""

    min_chunk_tokens: int = 0
    """A prefill chunk that does not finish its prompt has more tokens than this: its share of
    the step's constant and of re-reading the context would be too large (n_min of equation 25)."""

    whole_prompts: bool = False
    """Prompts are computed in one piece or not at all, as long as one step could hold them."""

    separate_phases: bool = False
    """A step holds prefills or decodes, whichever comes first, not both."""

    admission_kv_fraction: float = 1.0
    """Requests that own no KV blocks wait while a larger share of them is in use."""


def is_decode_step(request: Request) -> bool:
    """Return whether the request's next piece of work is one token after its last output.

    A preempted decode that must be computed again is priced as the prefill it has become,
    though its deadline and weight stay those of a decode (OC-11).
    """
    return request.is_decoding and request.num_uncomputed_tokens == 1


class StepBuilder:
    """One step while it is being filled."""

    def __init__(
        self, model: BatchLatencyModel, capabilities: EngineCapabilities, rules: StepRules
    ) -> None:
        self._model = model
        self._rules = rules
        self._max_tokens = capabilities.max_num_batched_tokens
        if rules.max_tokens is not None:
            self._max_tokens = min(self._max_tokens, rules.max_tokens)
        self._num_tokens_left = self._max_tokens
        self._num_seqs_left = capabilities.max_num_seqs
        # Of the class that the step has so far; the first prefill makes it a mixed one.
        self._constant_s = model.step_constant_s(has_prefill=False)
        self._limit_s = min(rules.budget_s, rules.max_decode_only_s)
        self._decode_factor = 1.0
        self._marginal_s = 0.0
        self._num_prefills = 0
        self._prefill_tokens = 0
        self._prefill_tokens_squared = 0
        self._prefill_tokens_times_context = 0
        self._prefill_context = 0
        self._decode_context = 0
        self.scheduled: list[ScheduledRequest] = []

    @property
    def is_full(self) -> bool:
        """True if no further request fits, whatever it needs."""
        return (
            self._num_seqs_left == 0
            or self._num_tokens_left == 0
            or (self._constant_s + self._marginal_s >= self._limit_s and bool(self.scheduled))
        )

    @property
    def longest_s(self) -> float:
        """What a step of one prompt with as many tokens as a step may have would take."""
        constant_s = self._model.step_constant_s(has_prefill=True)
        return constant_s + self._model.prefill_s(self._max_tokens, 0)

    @property
    def predicted_s(self) -> float:
        """Predicted duration of the step as filled so far; 0 if it is empty."""
        if not self.scheduled:
            return 0.0
        return self._constant_s + self._marginal_s

    @property
    def shape(self) -> BatchShape:
        """Sums over the step as filled so far."""
        return BatchShape(
            num_prefills=self._num_prefills,
            prefill_tokens=self._prefill_tokens,
            prefill_tokens_squared=self._prefill_tokens_squared,
            prefill_tokens_times_context=self._prefill_tokens_times_context,
            prefill_context=self._prefill_context,
            num_decodes=len(self.scheduled) - self._num_prefills,
            decode_context=self._decode_context,
        )

    def decode_cost_if_fits_s(self, num_cached_tokens: int) -> float | None:
        """Return the marginal cost of one decode token, or None if it does not fit."""
        if self._rules.separate_phases and self._num_prefills:
            return None
        cost_s = self._model.decode_s(num_cached_tokens) * self._decode_factor
        if self._constant_s + (self._marginal_s + cost_s) > self._limit_s:
            return None
        return cost_s

    def num_fitting_tokens(self, num_wanted: int, num_cached: int, stall_s: float = 0.0) -> int:
        """Return how many of so many tokens of a prefill fit after its cached ones, if the step
        has to wait `stall_s` for those; 0 if none, or too few to be worth it."""
        rules = self._rules
        if rules.separate_phases and self.scheduled and not self._num_prefills:
            return 0
        left_s = self._left_s() - stall_s
        num_tokens = min(num_wanted, self._num_tokens_left)
        if self._model.prefill_s(num_tokens, num_cached) > left_s:
            num_tokens = self._model.max_new_tokens(num_cached, left_s)
        if num_tokens > 0 and self._exceeds_limit(num_tokens, num_cached, stall_s):
            num_tokens -= 1
        if num_tokens == num_wanted:
            return num_tokens
        if rules.whole_prompts and num_wanted <= self._max_tokens:
            return 0
        return num_tokens if num_tokens > rules.min_chunk_tokens else 0

    def num_forced_tokens(self, request: Request) -> int:
        """Return a number of new tokens for a step that nothing fits into; at least 1."""
        num_tokens = min(request.num_uncomputed_tokens, self._num_tokens_left)
        left_s = max(0.0, self._left_s())
        if self._model.prefill_s(num_tokens, request.num_computed_tokens) <= left_s:
            return num_tokens
        num_in_time = self._model.max_new_tokens(request.num_computed_tokens, left_s)
        return min(num_tokens, max(num_in_time, self._rules.min_chunk_tokens, 1))

    def num_fitting_decodes(self, num_cached_tokens: Floats) -> int:
        """Return how many decodes fit, one after the other, of those with so many cached tokens."""
        if self._rules.separate_phases and self._num_prefills:
            return 0
        at_most = min(self._num_tokens_left, self._num_seqs_left, len(num_cached_tokens))
        step_s = self._constant_s + self._marginal_after_s(num_cached_tokens[:at_most])
        return int(np.searchsorted(step_s, self._limit_s, side="right"))

    def add_decodes(
        self,
        requests: Sequence[Request],
        num_cached_tokens: Floats,
        block_ids: Sequence[Sequence[int]],
    ) -> None:
        """Add one decode token of each of these requests; at least one."""
        self._marginal_s = float(self._marginal_after_s(num_cached_tokens)[-1])
        self._decode_context += int(num_cached_tokens.sum())
        self._num_tokens_left -= len(requests)
        self._num_seqs_left -= len(requests)
        self.scheduled += [
            ScheduledRequest(request, request.num_computed_tokens, 1, blocks)
            for request, blocks in zip(requests, block_ids, strict=True)
        ]

    def add_decode(self, request: Request, cost_s: float, block_ids: Sequence[int]) -> None:
        """Add one decode token of known cost."""
        num_cached = request.num_computed_tokens
        self._marginal_s += cost_s
        self._decode_context += num_cached
        self._num_tokens_left -= 1
        self._num_seqs_left -= 1
        self.scheduled.append(ScheduledRequest(request, num_cached, 1, block_ids))

    def add_prefill(
        self,
        request: Request,
        num_new_tokens: int,
        block_ids: Sequence[int],
        stall_s: float = 0.0,
    ) -> float:
        """Add a prefill piece, for whose cached tokens the step waits `stall_s`, and return its
        predicted marginal cost in seconds."""
        num_cached = request.num_computed_tokens
        cost_s = self._model.prefill_s(num_new_tokens, num_cached)
        if not self._num_prefills:
            self._become_mixed()
        self._constant_s += stall_s
        self._marginal_s += cost_s
        self._num_prefills += 1
        self._prefill_tokens += num_new_tokens
        self._prefill_tokens_squared += num_new_tokens * num_new_tokens
        self._prefill_tokens_times_context += num_new_tokens * num_cached
        self._prefill_context += num_cached
        self._num_tokens_left -= num_new_tokens
        self._num_seqs_left -= 1
        self.scheduled.append(ScheduledRequest(request, num_cached, num_new_tokens, block_ids))
        return cost_s

    def _marginal_after_s(self, num_cached_tokens: Floats) -> Floats:
        """Return the marginal cost of the step after each of these decodes."""
        cost_s = self._model.decodes_s(num_cached_tokens) * self._decode_factor
        return np.cumsum(np.concatenate(((self._marginal_s,), cost_s)))[1:]

    def _become_mixed(self) -> None:
        """Price what is in the step as parts of a mixed one."""
        self._limit_s, self._constant_s, self._marginal_s = self._as_mixed()
        self._decode_factor = self._model.mixed_decode_factor

    def _exceeds_limit(self, num_tokens: int, num_cached: int, stall_s: float) -> bool:
        """Return whether the step with this prefill is predicted to take too long. What fits into
        the time that is left may do so in its last digit: sums round otherwise than differences."""
        limit_s, constant_s, marginal_s = self._as_mixed()
        cost_s = self._model.prefill_s(num_tokens, num_cached)
        return constant_s + stall_s + (marginal_s + cost_s) > limit_s

    def _left_s(self) -> float:
        """Return the time left for a prefill."""
        limit_s, constant_s, marginal_s = self._as_mixed()
        return limit_s - constant_s - marginal_s

    def _as_mixed(self) -> tuple[float, float, float]:
        """Return limit, constant and marginal cost, all in seconds, of the step with a prefill."""
        if self._num_prefills:
            return self._limit_s, self._constant_s, self._marginal_s
        return (
            min(self._rules.budget_s, self._rules.max_mixed_s),
            self._model.step_constant_s(has_prefill=True),
            self._marginal_s * self._model.mixed_decode_factor,
        )
