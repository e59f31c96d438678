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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.deadline_scheduler import DeadlineOptions, DeadlineScheduler, Signals
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.ranking import Ranking, RankOrder
from orchestrator.core.request import Request

# Groups in the order in which they are served (OC-5, OC-6).
_URGENT_DECODE, _STARVED, _URGENT_PREFILL, _NORMAL, _HOPELESS = range(5)


@dataclass(frozen=True, slots=True)
class SlideBatchingOptions(DeadlineOptions):
    """The paper's parameters and this project's open choices; defaults are the recommended ones."""

    alpha: float = 1.0
    """Aggressiveness: how much of the load counts when deciding who is urgent (21, OC-10)."""

    starvation_threshold: float = 1.0
    """A prefill overdue by more than this many TTFT objectives is starved (24)."""

    starvation_quota: float = 0.05
    """Share of the latency budget that starved prefills may take, over time; 0 turns their
    help off (OC-9). In a minute of twice the load 0.05 costs 3 points of gain, 0.1 costs 5.5."""

    demote_hopeless: bool = True
    """Prefills that can no longer make their deadline go after everything else (OC-6)."""

    def __post_init__(self) -> None:
        DeadlineOptions.__post_init__(self)
        self._require(
            alpha=(self.alpha > 0, "above 0"),
            starvation_threshold=(self.starvation_threshold >= 0, "at least 0"),
            starvation_quota=(0 <= self.starvation_quota <= 1, "between 0 and 1"),
        )


class SlideBatchingScheduler(DeadlineScheduler):
    """See the module's text."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        options: SlideBatchingOptions = SlideBatchingOptions(),
    ) -> None:
        super().__init__(capabilities, model, options)
        self._options = options
        self._starvation_credit_s = 0.0
        self._starved_ids: frozenset[str] = frozenset()

    def _rank(self, now_s: float) -> Ranking:
        options, signals = self._options, self._signals(now_s)
        load_s = queue_load_s(signals)
        is_urgent = signals.remaining_s < options.alpha * load_s
        is_starved = self._pick_starved(signals)
        urgent_group = np.where(signals.is_prefill, _URGENT_PREFILL, _URGENT_DECODE)
        group = np.where(is_urgent, urgent_group, _NORMAL)
        if options.demote_hopeless:
            group[signals.is_prefill & ~signals.is_feasible] = _HOPELESS
        group[is_starved] = _STARVED
        by_deadline = (group == _NORMAL) | (group == _STARVED)
        return Ranking(
            group=group,
            key=np.where(by_deadline, signals.remaining_s, -signals.density),
            rules=self._rules(signals),
            load_s=load_s,
            num_urgent=int(np.count_nonzero(is_urgent)),
            starved_ids=self._starved_ids,
        )

    def _pick_starved(self, signals: Signals) -> NDArray[np.bool_]:
        """Return which starved prefills are helped in this step, oldest deadline first.

        The quota is a balance: each step pays in its share of usable time and a starved chunk
        takes out what it costs. A chunk dearer than one step's share can so still be made,
        while over time no more than the share is spent, and overload does not turn the
        schedule into first come, first served (OC-9).
        """
        options, table = self._options, self._table
        share_s = options.starvation_quota * (signals.budget_s - signals.constant_s)
        # Saved up for at most ten steps, so that a calm hour does not pay for a blind minute.
        credit_s = min(self._starvation_credit_s + share_s, 10 * share_s)
        self._starvation_credit_s = credit_s
        is_helped = np.zeros(len(table), dtype=np.bool_)
        is_overdue = signals.remaining_s < -options.starvation_threshold * table.ttft_s
        is_starved = signals.is_prefill & is_overdue
        if credit_s > 0 and is_starved.any():
            order = RankOrder(table, np.where(is_starved, 0, 1), signals.remaining_s)
            for row in order:
                if credit_s <= 0 or not is_starved[row]:
                    break
                is_helped[row] = True
                credit_s -= float(signals.work_s[row])
        self._starved_ids = frozenset(
            table.requests[row].request_id for row in np.flatnonzero(is_helped)
        )
        return is_helped

    def _standing(self, request: Request) -> tuple[float, ...]:
        """Compare requests as if none had been started (OC-14): the greater gain per second of
        the whole prompt has the stronger claim."""
        return (-self._fresh_density(request),)

    def _may_claim(self, request: Request, now_s: float) -> bool:
        """A prefill that can no longer be in time takes nobody's blocks."""
        if request.is_decoding:
            return True
        remaining_s = request.next_token_deadline_s(self._options.anchor) - now_s
        work_s = self._model.prefill_s(request.num_uncomputed_tokens, request.num_computed_tokens)
        return remaining_s >= work_s + self._model.step_constant_s(has_prefill=True)

    def _on_prefill(self, request: Request, num_new_tokens: int, cost_s: float) -> None:
        if request.request_id in self._starved_ids:
            self._starvation_credit_s -= cost_s


def queue_load_s(signals: Signals) -> float:
    """Return Phi of equation (20): the queue's work in batches of the latency budget."""
    # The budget is at least min_budget_constants > 1 constants, so the divisor is positive
    # unless both are 0, when batches cost nothing extra.
    # Sorted, or its last digit would depend on the order in which requests came.
    work_s = float(np.sort(signals.work_s).sum())
    usable_s = signals.budget_s - signals.constant_s
    return work_s * signals.budget_s / usable_s if usable_s > 0 else work_s
