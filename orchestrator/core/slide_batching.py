"""SlideBatching: order by deadline when there is room, by gain density when there is not.

Source: ProServe (arXiv 2512.12928), Algorithm 1; equation and open-choice (OC) numbers are those
of this project's specification. Each step:

    1. every request's remaining time, marginal work and density          (16, 17, 22)
    2. the latency budget B: the tightest deadline that can still be met  (18, 19)
    3. the load Phi: how long the queue needs in batches of B             (20)
    4. a request is urgent if less time remains than alpha * Phi          (21)
    5. urgent before normal; urgent by density, normal by deadline        (23)

With a short queue Phi is small, all are normal and the order is earliest deadline first; with a
long one all are urgent and the order is most gain per second first. The boundary slides between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.batch_scheduler import BatchScheduler, ScheduleOrder
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.request import Request
from orchestrator.core.slo import DeadlineAnchor, GainWeights
from orchestrator.core.step_builder import marginal_work_s


@dataclass(frozen=True, slots=True)
class SlideBatchingOptions:
    """The paper's parameters and this project's open choices; defaults are the recommended ones."""

    alpha: float = 1.0
    """Aggressiveness: how much of the load counts when deciding who is urgent (21)."""

    anchor: DeadlineAnchor = DeadlineAnchor.MIN
    """What the deadlines of later tokens are counted from (OC-1)."""

    min_budget_tpot_fraction: float = 0.65
    """Lower bound of the latency budget, in tightest TPOT objectives of the queue (OC-3)."""

    min_budget_constants: float = 2.0
    """Lower bound of the latency budget, in step constants c0 (OC-3)."""

    max_step_s: float = 0.5
    """Upper bound of the latency budget: a request that arrives while a step runs waits for its
    end, so even relaxed work is computed in steps no longer than this."""

    min_chunk_tokens: int = 50
    """A prefill chunk that does not finish its prompt has more tokens than this (n_min)."""

    scan_limit: int = 64
    """Requests that may be skipped in one step because they do not fit, before filling ends
    (OC-7)."""

    starvation_threshold: float = 1.0
    """A prefill overdue by more than this many TTFT objectives is starved (24)."""

    starvation_quota: float = 0.1
    """Share of the latency budget that starved prefills may take, over time; 0 turns their
    help off (OC-9)."""

    demote_hopeless: bool = True
    """Prefills that can no longer make their deadline go after everything else (OC-6)."""

    first_token_weight: float = 1.0
    """What a request's first token counts, times the request's weight (w_p of equation 5)."""

    later_token_weight: float = 1.0
    """What each later token counts, times the request's weight (w_d of equation 5)."""

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("alpha", self.alpha > 0, "above 0"),
            ("min_budget_tpot_fraction", self.min_budget_tpot_fraction >= 0, "at least 0"),
            ("min_budget_constants", self.min_budget_constants > 1, "above 1"),
            ("max_step_s", 0 < self.max_step_s < math.inf, "above 0 and finite"),
            ("min_chunk_tokens", self.min_chunk_tokens >= 0, "at least 0"),
            ("scan_limit", self.scan_limit >= 1, "at least 1"),
            ("first_token_weight", self.first_token_weight >= 0, "at least 0"),
            ("later_token_weight", self.later_token_weight >= 0, "at least 0"),
            ("starvation_threshold", self.starvation_threshold >= 0, "at least 0"),
            ("starvation_quota", 0 <= self.starvation_quota <= 1, "between 0 and 1"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {rule}")


@dataclass(frozen=True, slots=True)
class _Ranked:
    """A request with what its rank depends on, all at one moment."""

    request: Request
    remaining_s: float
    """Until its next token is due; negative if overdue."""

    work_s: float
    """Predicted marginal cost of everything before that token."""

    density: float
    """Gain per second of that token."""

    is_feasible: bool
    """The token could be in time if the next step were its own."""


class SlideBatchingScheduler(BatchScheduler):
    """See the module's text."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        options: SlideBatchingOptions = SlideBatchingOptions(),
    ) -> None:
        super().__init__(
            capabilities,
            model,
            min_chunk_tokens=options.min_chunk_tokens,
            scan_limit=options.scan_limit,
        )
        self._options = options
        self._gain_weights = GainWeights(
            first_token=options.first_token_weight, later_token=options.later_token_weight
        )
        self._starvation_credit_s = 0.0
        self._starved_ids: frozenset[str] = frozenset()

    def _order(self, now_s: float) -> ScheduleOrder:
        queue = [self._rank(request, now_s) for request in self._requests.values()]
        if not queue:
            return ScheduleOrder((), budget_s=0.0)
        constant_s = self._model.step_constant_s(has_prefill=True)
        budget_s = self._latency_budget_s(queue, constant_s)
        load_s = _load_s(sum(r.work_s for r in queue), budget_s, constant_s)
        boundary_s = self._options.alpha * load_s
        self._starved_ids = self._pick_starved(queue, budget_s - constant_s)
        order = sorted(queue, key=lambda r: self._sort_key(r, boundary_s))
        return ScheduleOrder(
            [r.request for r in order],
            budget_s=budget_s,
            load_s=load_s,
            num_urgent=sum(r.remaining_s < boundary_s for r in queue),
            starved_ids=self._starved_ids,
        )

    def _rank(self, request: Request, now_s: float) -> _Ranked:
        remaining_s = request.next_token_deadline_s(self._options.anchor) - now_s
        work_s = marginal_work_s(self._model, request)
        constant_s = self._model.step_constant_s(has_prefill=not request.is_decoding)
        gain = request.spec.weight * self._gain_weights.of_token(request.num_output_tokens)
        return _Ranked(
            request,
            remaining_s=remaining_s,
            work_s=work_s,
            density=gain / work_s if work_s > 0 else math.inf if gain > 0 else 0.0,
            is_feasible=remaining_s >= work_s + constant_s,
        )

    def _latency_budget_s(self, queue: Sequence[_Ranked], constant_s: float) -> float:
        """Return B of equation (19), bounded on both sides."""
        options = self._options
        tightest_tpot_s = min(r.request.spec.slo.tpot_s for r in queue)
        least_s = options.min_budget_constants * constant_s
        if math.isfinite(tightest_tpot_s):
            least_s = max(least_s, options.min_budget_tpot_fraction * tightest_tpot_s)
        # If nobody's deadline can be met (OC-2) the tightest TPOT objective sets the pace.
        tightest_s = min((r.remaining_s for r in queue if r.is_feasible), default=tightest_tpot_s)
        return max(least_s, min(tightest_s, options.max_step_s))

    def _pick_starved(self, queue: Sequence[_Ranked], usable_s: float) -> frozenset[str]:
        """Return the starved prefills that are helped in this step, oldest deadline first.

        The quota is a balance: each step pays in its share of usable time and a starved chunk
        takes out what it costs. A chunk dearer than one step's share can so still be made,
        while over time no more than the share is spent, and overload does not turn the
        schedule into first come, first served (OC-9).
        """
        options = self._options
        starved = [
            r
            for r in queue
            if not r.request.is_decoding
            and r.remaining_s < -options.starvation_threshold * r.request.spec.slo.ttft_s
        ]
        share_s = options.starvation_quota * usable_s
        # Saved up for at most ten steps, so that a calm hour does not pay for a blind minute.
        self._starvation_credit_s = min(self._starvation_credit_s + share_s, 10 * share_s)
        helped: set[str] = set()
        credit_s = self._starvation_credit_s
        for ranked in sorted(starved, key=lambda r: (r.remaining_s, r.request.request_id)):
            if credit_s <= 0:
                break
            helped.add(ranked.request.request_id)
            credit_s -= ranked.work_s
        return frozenset(helped)

    def _sort_key(self, ranked: _Ranked, boundary_s: float) -> tuple[int, float, float, str]:
        """Return a total order (OC-16): group, key inside it, arrival, id."""
        request = ranked.request
        is_prefill = not request.is_decoding
        if is_prefill and request.request_id in self._starved_ids:
            group, key = 1, ranked.remaining_s
        elif is_prefill and self._options.demote_hopeless and not ranked.is_feasible:
            group, key = 4, -ranked.density
        elif ranked.remaining_s >= boundary_s:
            group, key = 3, ranked.remaining_s
        else:
            group, key = (2 if is_prefill else 0), -ranked.density
        return (group, key, request.arrival_s, request.request_id)

    def _may_preempt(self, candidate: Request, victim: Request, now_s: float) -> bool:
        """Compare both as if neither had been started (OC-14).

        A prefill that can no longer be in time takes nobody's blocks; otherwise the greater
        gain per second of the whole prompt wins. That value does not change while a request
        lives, so two requests never take turns in throwing each other out.
        """
        if not candidate.is_decoding and not self._rank(candidate, now_s).is_feasible:
            return False
        return self._fresh_key(candidate) < self._fresh_key(victim)

    def _fresh_key(self, request: Request) -> tuple[float, float, str]:
        gain = request.spec.weight * self._gain_weights.first_token
        work_s = self._model.prefill_s(request.num_prompt_tokens, 0)
        return (-gain / work_s, request.arrival_s, request.request_id)

    def _spent(self, request: Request, cost_s: float) -> None:
        if request.request_id in self._starved_ids:
            self._starvation_credit_s -= cost_s


def _load_s(work_s: float, budget_s: float, constant_s: float) -> float:
    """Return Phi of equation (20): the queue's work in batches of `budget_s`."""
    # `budget_s` is at least min_budget_constants > 1 constants, so the divisor is positive
    # unless both are 0, when batches cost nothing extra.
    usable_s = budget_s - constant_s
    return work_s * budget_s / usable_s if usable_s > 0 else work_s
