"""What schedulers that look at deadlines share: remaining times, work, the latency budget.

Source: ProServe (arXiv 2512.12928); equation and open-choice (OC) numbers are those of this
project's specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.request import Request
from orchestrator.core.request_table import Floats
from orchestrator.core.slo import DeadlineAnchor, GainWeights
from orchestrator.core.step_builder import StepRules

_LEAST_WORK_S = 1e-9
"""Work that a profile prices at nothing still has a finite density."""


@dataclass(frozen=True, slots=True)
class DeadlineOptions:
    """How deadlines are counted and how long a step may be."""

    anchor: DeadlineAnchor = DeadlineAnchor.MIN
    """What the deadlines of later tokens are counted from (OC-1)."""

    min_budget_tpot_fraction: float = 0.65
    """Lower bound of the latency budget, in tightest TPOT objectives of the queue (OC-3)."""

    min_budget_constants: float = 2.0
    """Lower bound of the latency budget, in step constants c0 (OC-3)."""

    max_step_s: float = 0.5
    """Upper bound of the latency budget: a request that arrives while a step runs waits for its
    end, so even relaxed work is computed in steps no longer than this."""

    budget_quantile: float | None = 0.75
    """Share of steps that should end before the tightest deadline of the queue when they are
    filled up to it: predictions are stretched by that quantile of recent measured / predicted,
    per batch class. None fills by the mean prediction."""

    token_budget: int | None = None
    """Fixed number of new tokens per step in place of the latency budget; none by default. The
    paper's ablation without latency awareness."""

    min_chunk_tokens: int = 50
    """A prefill chunk that does not finish its prompt has more tokens than this (n_min)."""

    scan_limit: int = 64
    """Requests that may be skipped in one step because they do not fit, before filling ends
    (OC-7)."""

    first_token_weight: float = 1.0
    """What a request's first token counts, times the request's weight (w_p of equation 5)."""

    later_token_weight: float = 1.0
    """What each later token counts, times the request's weight (w_d of equation 5)."""

    def __post_init__(self) -> None:
        self._require(
            min_budget_tpot_fraction=(self.min_budget_tpot_fraction >= 0, "at least 0"),
            min_budget_constants=(self.min_budget_constants > 1, "above 1"),
            max_step_s=(0 < self.max_step_s < math.inf, "above 0 and finite"),
            budget_quantile=(
                self.budget_quantile is None or 0.5 <= self.budget_quantile <= 0.99,
                "between 0.5 and 0.99",
            ),
            token_budget=(self.token_budget is None or self.token_budget > 0, "above 0"),
            min_chunk_tokens=(self.min_chunk_tokens >= 0, "at least 0"),
            scan_limit=(self.scan_limit >= 1, "at least 1"),
            first_token_weight=(self.first_token_weight >= 0, "at least 0"),
            later_token_weight=(self.later_token_weight >= 0, "at least 0"),
        )

    def _require(self, **rules: tuple[bool, str]) -> None:
        for name, (is_valid, rule) in rules.items():
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {rule}")


@dataclass(frozen=True, slots=True)
class Signals:
    """What a ranking looks at, at one moment; arrays are by table row."""

    is_prefill: NDArray[np.bool_]
    """True until the first token is produced."""

    remaining_s: Floats
    """Until the next token is due; negative if overdue (equation 16)."""

    work_s: Floats
    """Predicted marginal cost of everything before that token (equation 17)."""

    density: Floats
    """Gain per second of that token (equation 22)."""

    is_feasible: NDArray[np.bool_]
    """The token could be in time if the next step were its own (equation 18)."""

    budget_s: float
    """The latency budget B of the next step (equation 19)."""

    constant_s: float
    """c0 of a mixed step."""

    max_mixed_s: float
    """What of B is left if a mixed step should keep the tightest deadline with the wanted
    probability, not on average."""

    max_decode_only_s: float
    """The same for a decode-only step."""


class DeadlineScheduler(BatchScheduler):
    """A scheduler with a time budget; what remains open is the ranking."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        options: DeadlineOptions,
    ) -> None:
        if options.min_chunk_tokens >= capabilities.max_num_batched_tokens:
            raise ValueError(
                f"min_chunk_tokens is {options.min_chunk_tokens}, it must be below "
                f"max_num_batched_tokens ({capabilities.max_num_batched_tokens}), "
                "or no long prompt could ever start"
            )
        super().__init__(capabilities, model, anchor=options.anchor, scan_limit=options.scan_limit)
        self._deadline_options = options
        self._fresh_model = model.fresh()
        self._gain_weights = GainWeights(
            first_token=options.first_token_weight, later_token=options.later_token_weight
        )

    def _signals(self, now_s: float) -> Signals:
        table = self._table
        is_prefill = table.num_output_tokens == 0
        remaining_s = table.deadline_s() - now_s
        work_s = self._work_s()
        mixed_s = self._model.step_constant_s(has_prefill=True)
        decode_only_s = self._model.step_constant_s(has_prefill=False)
        is_feasible = remaining_s >= work_s + np.where(is_prefill, mixed_s, decode_only_s)
        gain = table.weight * np.where(
            is_prefill, self._gain_weights.first_token, self._gain_weights.later_token
        )
        least_s, tightest_s = self._budget_bounds_s(remaining_s[is_feasible], mixed_s)
        return Signals(
            is_prefill=is_prefill,
            remaining_s=remaining_s,
            work_s=work_s,
            density=gain / np.maximum(work_s, _LEAST_WORK_S),
            is_feasible=is_feasible,
            budget_s=self._latency_budget_s(least_s, tightest_s),
            constant_s=mixed_s,
            max_mixed_s=self._latency_budget_s(
                least_s, tightest_s / self._upper_factor(has_prefill=True)
            ),
            max_decode_only_s=self._latency_budget_s(
                least_s, tightest_s / self._upper_factor(has_prefill=False)
            ),
        )

    def _fresh_density(self, request: Request) -> float:
        """Return the gain per second of a request's whole prompt; fixed while it lives."""
        gain = request.spec.weight * self._gain_weights.first_token
        return gain / max(self._fresh_model.prefill_s(request.num_prompt_tokens, 0), _LEAST_WORK_S)

    def _rules(self, signals: Signals) -> StepRules:
        options = self._deadline_options
        if options.token_budget is not None:
            return StepRules(
                budget_s=math.inf,
                max_tokens=options.token_budget,
                min_chunk_tokens=options.min_chunk_tokens,
            )
        return StepRules(
            budget_s=signals.budget_s,
            max_mixed_s=signals.max_mixed_s,
            max_decode_only_s=signals.max_decode_only_s,
            min_chunk_tokens=options.min_chunk_tokens,
        )

    def _upper_factor(self, *, has_prefill: bool) -> float:
        quantile = self._deadline_options.budget_quantile
        if quantile is None:
            return 1.0
        return self._model.upper_factor(quantile, has_prefill=has_prefill)

    def _latency_budget_s(self, least_s: float, tightest_s: float) -> float:
        """Return B of equation (19), bounded on both sides."""
        return max(least_s, min(tightest_s, self._deadline_options.max_step_s))

    def _budget_bounds_s(
        self, feasible_remaining_s: Floats, constant_s: float
    ) -> tuple[float, float]:
        """Return the least budget and the tightest deadline's."""
        options = self._deadline_options
        tightest_tpot_s = float(self._table.tpot_s.min())
        least_s = options.min_budget_constants * constant_s
        if math.isfinite(tightest_tpot_s):
            least_s = max(least_s, options.min_budget_tpot_fraction * tightest_tpot_s)
        # If nobody's deadline can be met (OC-2) the tightest TPOT objective sets the pace.
        tightest_s = float(feasible_remaining_s.min(initial=math.inf))
        if not len(feasible_remaining_s):
            tightest_s = tightest_tpot_s
        return least_s, tightest_s
