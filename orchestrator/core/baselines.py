"""Schedulers to compare SlideBatching with, behind the same protocol (specification 6.1).

All run over the same KV accounting and step builder; they differ in ranking, in the rules of a
step and in whom they may preempt. Those that look at deadlines count them from the same anchor
as SlideBatching, unless told otherwise, so that no result hides in the definition of a deadline.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.deadline_scheduler import DeadlineScheduler, Signals
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.ranking import Ranking
from orchestrator.core.request import Request
from orchestrator.core.request_table import Floats
from orchestrator.core.slide_batching import queue_load_s
from orchestrator.core.step_builder import StepRules

Groups = NDArray[np.int8]

_LEAST_TOKEN_BUDGET, _GREATEST_TOKEN_BUDGET = 64, 4096
"""Range in which Sarathi's token budget is profiled; the upper end is xLLM's, below the lower
one a step would hardly be more than its constant."""

_ADMISSION_KV_FRACTION = 0.95
"""vLLM and Sarathi admit no new prompt above this share of KV blocks in use (xLLM)."""


class FcfsScheduler(BatchScheduler):
    """First come, first served, with chunked prefill up to the token cap of a step.

    Blind to deadlines and weights. When KV blocks run out the latest arrivals give theirs up.
    """

    def _rank(self, now_s: float) -> Ranking:
        return Ranking(
            group=np.zeros(len(self._table), dtype=np.int8),
            key=np.zeros(len(self._table)),
            rules=StepRules(budget_s=math.inf),
        )

    def _standing(self, request: Request) -> tuple[float, ...]:
        return ()


class VllmFcfsScheduler(BatchScheduler):
    """vLLM before chunked prefill: a step of whole prompts if any waits and fits, else one of
    all decodes. Victims are the latest arrivals, and only for requests already running."""

    def _rank(self, now_s: float) -> Ranking:
        return Ranking(
            group=np.where(self._table.is_decode_step, 1, 0),
            key=self._table.arrival_s,
            rules=StepRules(
                budget_s=math.inf,
                whole_prompts=True,
                separate_phases=True,
                admission_kv_fraction=_ADMISSION_KV_FRACTION,
            ),
        )

    def _standing(self, request: Request) -> tuple[float, ...]:
        return ()

    def _may_claim(self, request: Request, now_s: float) -> bool:
        return request.num_computed_tokens > 0


@dataclass(frozen=True, slots=True)
class SarathiOptions:
    """How many tokens a step of Sarathi takes."""

    token_budget: int | None = None
    """New tokens per step. None takes the most whose lone prefill keeps the tightest TPOT
    objective of the queue, as xLLM profiles it."""

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget is {self.token_budget}, it must be at least 1")


class SarathiScheduler(BatchScheduler):
    """Sarathi-Serve: all decodes, then half-done prompts, then new ones, into a fixed number of
    tokens. Inside each of the three: first come, first served."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        options: SarathiOptions = SarathiOptions(),
    ) -> None:
        super().__init__(capabilities, model)
        self._token_budget = options.token_budget

    def _rank(self, now_s: float) -> Ranking:
        table = self._table
        is_new = (table.num_computed_tokens == 0).astype(np.int8)
        return Ranking(
            group=np.where(table.is_decode_step, 0, 1 + is_new),
            key=self._key(),
            rules=StepRules(
                budget_s=math.inf,
                max_tokens=self._token_budget or self._profiled_budget(),
                admission_kv_fraction=_ADMISSION_KV_FRACTION,
            ),
        )

    def _key(self) -> Floats:
        return self._table.arrival_s

    def _standing(self, request: Request) -> tuple[float, ...]:
        return ()

    def _may_claim(self, request: Request, now_s: float) -> bool:
        return request.num_computed_tokens > 0

    def _profiled_budget(self) -> int:
        tightest_tpot_s = float(self._table.tpot_s.min())
        if math.isinf(tightest_tpot_s):
            return _GREATEST_TOKEN_BUDGET
        left_s = tightest_tpot_s - self._model.step_constant_s(has_prefill=True)
        num_tokens = self._model.max_new_tokens(0, left_s)
        return min(max(num_tokens, _LEAST_TOKEN_BUDGET), _GREATEST_TOKEN_BUDGET)


class SarathiPriorityScheduler(SarathiScheduler):
    """Sarathi with (weight, arrival) in place of arrival; victims have the least weight."""

    def _key(self) -> Floats:
        return -self._table.weight

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (-request.spec.weight,)


class StrictPriorityScheduler(SarathiScheduler):
    """Heavier requests before all others, prefills and decodes alike, into Sarathi's budget."""

    def _rank(self, now_s: float) -> Ranking:
        rules = super()._rank(now_s).rules
        return Ranking(
            group=np.zeros(len(self._table), dtype=np.int8), key=-self._table.weight, rules=rules
        )

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (-request.spec.weight,)

    def _may_claim(self, request: Request, now_s: float) -> bool:
        return True


class WeightedVtcScheduler(SarathiScheduler):
    """Virtual token counter (Sheng et al., OSDI 2024) with weights: new prompts of the client
    that was served least per weight go first, into Sarathi's budget.

    A prompt token counts 1, an output token 2; a client that becomes active is lifted to the
    least counter of the active ones, so that nobody saves up.
    """

    _OUTPUT_TOKEN_COST = 2.0

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        options: SarathiOptions = SarathiOptions(),
    ) -> None:
        super().__init__(capabilities, model, options)
        self._served: dict[str, float] = {}

    def _key(self) -> Floats:
        return np.array([self._served[r.spec.client_id] for r in self._table.requests])

    def _on_arrival(self, request: Request) -> None:
        client_id = request.spec.client_id
        active_ids = {r.spec.client_id for r in self._table.requests}
        if client_id not in active_ids:
            least = min((self._served[c] for c in active_ids), default=0.0)
            self._served[client_id] = max(self._served.get(client_id, 0.0), least)

    def _on_prefill(self, request: Request, num_new_tokens: int, cost_s: float) -> None:
        if request.num_computed_tokens == 0 and request.num_preemptions == 0:
            self._charge(request, request.num_prompt_tokens)

    def _on_output(self, request: Request, num_new_tokens: int) -> None:
        self._charge(request, self._OUTPUT_TOKEN_COST * num_new_tokens)

    def _charge(self, request: Request, cost: float) -> None:
        # A client of weight 0 would be charged without end; it is served last instead.
        weight = request.spec.weight
        self._served[request.spec.client_id] += cost / weight if weight > 0 else math.inf


class _KeyedScheduler(DeadlineScheduler):
    """A time budget and one fixed order; weaker requests of its tail are the victims."""

    def _rank(self, now_s: float) -> Ranking:
        signals = self._signals(now_s)
        group, key = self._order(signals)
        return Ranking(group=group, key=key, rules=self._rules(signals))

    @abstractmethod
    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        """Return group and key of each row; lower goes first."""

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (request.arrival_s + request.spec.slo.ttft_s,)


class EdfScheduler(_KeyedScheduler):
    """Earliest deadline first, all stages together. Also the paper's ablation "only deadline"."""

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        return _one_group(signals), signals.remaining_s


class SjfScheduler(_KeyedScheduler):
    """Shortest job first: least predicted work before the next token."""

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        return _one_group(signals), signals.work_s

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (request.num_prompt_tokens,)


class DensityScheduler(_KeyedScheduler):
    """Most gain per second first. Also the paper's ablation "only density"."""

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        return _one_group(signals), -signals.density

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (-self._fresh_density(request),)


class DecodeFirstEdfScheduler(_KeyedScheduler):
    """Decodes before prefills, earliest deadline first among each."""

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        return signals.is_prefill.astype(np.int8), signals.remaining_s


class DecodeFirstDensityScheduler(_KeyedScheduler):
    """Decodes before prefills, most gain per second first among each."""

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        return signals.is_prefill.astype(np.int8), -signals.density

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (-self._fresh_density(request),)


class UrgencyPriorityScheduler(_KeyedScheduler):
    """SlideBatching's boundary, with the heavier weight first among the urgent, whatever their
    density (a variant in xLLM)."""

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        is_urgent = signals.remaining_s < queue_load_s(signals)
        key = np.where(is_urgent, -self._table.weight, signals.remaining_s)
        return np.where(is_urgent, 0, 1).astype(np.int8), key

    def _standing(self, request: Request) -> tuple[float, ...]:
        return (-request.spec.weight,)


class FairBatchingScheduler(_KeyedScheduler):
    """Decodes close to their deadline by slack, then prefills by deadline, then other decodes.

    Close means due before the end of this step plus one TPOT objective (our reading).
    """

    def _order(self, signals: Signals) -> tuple[Groups, Floats]:
        is_close = signals.remaining_s < signals.budget_s + self._table.tpot_s
        group = np.where(signals.is_prefill, 1, np.where(is_close, 0, 2))
        return group.astype(np.int8), signals.remaining_s


def _one_group(signals: Signals) -> Groups:
    return np.zeros(len(signals.work_s), dtype=np.int8)
