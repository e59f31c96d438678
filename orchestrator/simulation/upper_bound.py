"""A clairvoyant upper bound on service gain: no schedule of a workload can earn more.

It knows every arrival and every output length in advance. What it drops from reality, and why
each step can only raise the bound:

1. Work instead of steps. A sequence position j (j positions before it) must go through the model
   at least once. Within a prefill piece that costs at least c_p + a'(2j + 1) with
   a' = min(a_p, b_p / 2), because a piece of q tokens on k costs
   a_p q^2 + b_p q k + c_p q >= a'((q + k)^2 - k^2) + c_p q; as a decode token it costs
   a_d j + b_d. Output positions take the cheaper of the two (a preempted decode is computed again
   as a prefill), prompt positions are prefill. A step of s requests and t tokens also pays its
   constant c0 >= c0 * (s / max_num_seqs + t / max_num_batched_tokens) / 2, as neither quotient
   exceeds 1; so each token bears c0 / (2 max_num_batched_tokens), and each prompt and each decode
   token c0 / (2 max_num_seqs). The rest of the constants is dropped. Token i of a request
   needs E_i, the work of its prompt and of i - 1 output positions, done between arrival and
   deadline.
2. Fluid nodes. N nodes become one resource with N seconds of work per second, shared and
   interrupted at will; the memory limit, migration and copies are dropped.
3. What is out of reach stays out. Each token needs a step of its own, so token i comes no earlier
   than a + i c0 + E_i even on an idle node; where that is not before its deadline, its weight is
   taken as 0, which changes no schedule's gain.
4. Time in bins. Work due inside a bin may use all of the bin, and a request that arrives inside a
   bin all of that bin too.
5. Prices instead of capacity (Lagrangian duality). For any prices p_b >= 0 of a second of work in
   bin b, the gain of a schedule is at most

       sum_b p_b * capacity_b  +  sum_r max over choices of r alone (gain - price of its work)

   because a schedule within capacity pays at most the first sum. The second sum is taken apart by
   request. If token k is the first in time, E_k is paid at no less than the cheapest price up to
   d_k; each later token is in time and pays its own work at the cheapest price up to its deadline,
   or is counted at 0. That is at least what the request can really win.

Every choice of prices gives a valid bound, so the search for good ones needs no proof: the prices
are moved against the excess of demand over capacity, and the least bound seen is kept.

The bound holds for engines that take exactly the time of their latency profile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.slo import GainWeights
from orchestrator.simulation.workload import Workload

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

MAX_BINS = 4096
"""Enough for a second's resolution over an hour; finer bins cost time and win little."""

BINS_PER_TTFT = 4
"""Bins in the shortest TTFT objective, unless that makes too many."""


@dataclass(frozen=True, slots=True)
class UpperBound:
    """The most that any schedule earns."""

    gain: float
    obtainable_gain: float
    """If every token of every counted request were on time."""

    @property
    def tdg_ratio(self) -> float:
        """Return the share of the obtainable gain; 1 if there is none."""
        return self.gain / self.obtainable_gain if self.obtainable_gain > 0 else 1.0


def gain_upper_bound(
    workload: Workload,
    profile: LatencyProfile,
    capabilities: EngineCapabilities,
    *,
    num_nodes: int = 1,
    is_counted: NDArray[np.bool_] | None = None,
    gain_weights: GainWeights = GainWeights(),
) -> UpperBound:
    """Return a bound on the gain of the requests marked by `is_counted`, by default all.

    The others need not be served at all.
    """
    weights = np.array([c.weight for c in workload.classes])[workload.class_index]
    if is_counted is not None:
        weights = weights * is_counted
    tokens = _make_tokens(workload, profile, capabilities, weights, gain_weights)
    obtainable_gain = float(tokens.gain.sum())
    tokens = tokens.within_reach(min(profile.mixed_step_s, profile.decode_step_s))
    if len(tokens.gain) == 0:
        return UpperBound(0.0, obtainable_gain)
    prices = _Prices(tokens, num_nodes)
    return UpperBound(min(_least_bound(prices), float(tokens.gain.sum())), obtainable_gain)


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Every output token of every request, in order; all arrays are (num_tokens,)."""

    request: Indices
    index: Indices
    """Within its request, from 0."""

    arrival_s: Floats
    due_s: Floats
    """Infinite where nothing was promised."""

    ttft_s: Floats
    """The request's objective."""

    gain: Floats
    raw_work_s: Floats
    """Least work from arrival to this token (E_i), without any step constants."""

    work_s: Floats
    """The same with this work's share of step constants."""

    own_work_s: Floats
    """Of this, what the tokens before it do not need."""

    def within_reach(self, constant_s: float) -> _Tokens:
        """Return the tokens that are worth something and can be in time on an idle node."""
        soonest_s = self.arrival_s + self.raw_work_s + (self.index + 1) * constant_s
        is_kept = (soonest_s <= self.due_s) & (self.gain > 0)
        return _Tokens(*(getattr(self, f.name)[is_kept] for f in fields(_Tokens)))


def _make_tokens(
    workload: Workload,
    profile: LatencyProfile,
    capabilities: EngineCapabilities,
    weights: Floats,
    gain_weights: GainWeights,
) -> _Tokens:
    trace = workload.trace
    counts = trace.num_output_tokens
    request = np.repeat(np.arange(len(workload)), counts)
    index = np.arange(len(request)) - (np.cumsum(counts) - counts)[request]
    num_prompt_tokens = trace.num_input_tokens[request]

    constant_s = min(profile.mixed_step_s, profile.decode_step_s)
    per_token_s = constant_s / (2 * capabilities.max_num_batched_tokens)
    per_request_s = constant_s / (2 * capabilities.max_num_seqs)
    square_s = min(profile.prefill_quadratic_s, profile.prefill_context_s / 2)
    prompt_s = (profile.prefill_token_s + square_s * num_prompt_tokens) * num_prompt_tokens
    position = num_prompt_tokens + index - 1
    prefill_s = profile.prefill_token_s + square_s * (2 * position + 1)
    decode_s = profile.decode_context_s * position + profile.decode_token_s
    raw_s = np.where(index == 0, prompt_s, np.minimum(prefill_s, decode_s))
    own_s = np.where(
        index == 0,
        prompt_s + num_prompt_tokens * per_token_s + per_request_s,
        np.minimum(prefill_s, decode_s + per_request_s) + per_token_s,
    )
    slos = [priority_class.slo for priority_class in workload.classes]
    ttft_s = np.array([slo.ttft_s for slo in slos])[workload.class_index][request]
    tpot_s = np.array([slo.tpot_s for slo in slos])[workload.class_index][request]
    with np.errstate(invalid="ignore"):  # 0 * inf
        later_s = np.where(index == 0, 0.0, index * tpot_s)
    first_or_later = np.where(index == 0, gain_weights.first_token, gain_weights.later_token)
    return _Tokens(
        request=request,
        index=index,
        arrival_s=trace.arrival_s[request],
        due_s=trace.arrival_s[request] + ttft_s + later_s,
        ttft_s=ttft_s,
        gain=weights[request] * first_or_later,
        raw_work_s=_sums_within(raw_s, counts),
        work_s=_sums_within(own_s, counts),
        own_work_s=own_s,
    )


def _sums_within(values: Floats, counts: Indices) -> Floats:
    """Return running sums that begin anew after each of `counts` values."""
    totals = np.cumsum(values)
    starts = np.cumsum(counts) - counts
    before: Floats = totals[starts] - values[starts]
    return totals - np.repeat(before, counts)


class _Prices:
    """The Lagrangian: bound and excess demand at given prices per bin.

    Tokens of one request that are due in one bin form a group. They share a price, so it is best
    to begin with the group's first: passing it over loses its gain and saves nothing, as its work
    is part of the next one's. Arrays are (num_groups,) unless they say otherwise.
    """

    def __init__(self, tokens: _Tokens, num_nodes: int) -> None:
        is_dated = np.isfinite(tokens.due_s)
        horizon_s = float(max(tokens.arrival_s.max(), tokens.due_s[is_dated].max(initial=0.0)))
        bin_s = float(tokens.ttft_s.min()) / BINS_PER_TTFT
        bin_s = min(max(bin_s, horizon_s / MAX_BINS), max(horizon_s, 1e-6))
        self.num_bins = int(horizon_s / bin_s) + 1
        self.capacity_s = bin_s * num_nodes
        """Work that fits into one bin."""

        # What is never due falls into one more bin, whose price is always 0.
        due_bin = np.full(len(tokens.due_s), self.num_bins)
        due_bin[is_dated] = (tokens.due_s[is_dated] / bin_s).astype(np.int64)
        request = tokens.request
        is_start = np.ones(len(request), dtype=np.bool_)
        is_start[1:] = (request[1:] != request[:-1]) | (due_bin[1:] != due_bin[:-1])
        starts = np.flatnonzero(is_start)
        ends = np.append(starts[1:], len(request))
        self._sizes = ends - starts
        self._first_gain = tokens.gain[starts]
        self._first_work_s = tokens.work_s[starts]
        self._token_gain = tokens.gain[ends - 1]
        self._token_work_s = np.minimum.reduceat(tokens.own_work_s, starts)
        self._arrival_bin = (tokens.arrival_s[starts] / bin_s).astype(np.int64)
        self._due_bin = due_bin[starts]
        # Groups of a request are neighbours; both (num_requests with a group,).
        group_request = request[starts]
        is_head = np.append(True, group_request[1:] != group_request[:-1])
        self._heads = np.flatnonzero(is_head)
        self._tails = np.append(self._heads[1:], len(starts))
        self._row = np.cumsum(is_head) - 1
        # Cheapest bin of a span, from two overlapping spans of a power of two bins.
        span = self._due_bin - self._arrival_bin + 1
        self._level = np.frexp(span.astype(np.float64))[1] - 1
        self._second_start = self._due_bin + 1 - (1 << self._level)

    def evaluate(self, prices: Floats) -> tuple[float, Floats]:
        """Return the bound at `prices`, shape (num_bins,), and each bin's demand in seconds."""
        cheapest_bin, price = self._cheapest(np.append(prices, 0.0))
        token_worth = np.maximum(0.0, self._token_gain - self._token_work_s * price)
        running = np.cumsum(self._sizes * token_worth)
        after = running[self._tails - 1][self._row] - running
        begin_worth = (
            self._first_gain - self._first_work_s * price + (self._sizes - 1) * token_worth + after
        )
        worth = np.maximum.reduceat(begin_worth, self._heads)
        bound = float(prices.sum()) * self.capacity_s + float(np.maximum(0.0, worth).sum())

        # Where each request begins; none if it is not worth anything.
        group = np.arange(len(begin_worth))
        is_best = begin_worth == worth[self._row]
        begin = np.minimum.reduceat(np.where(is_best, group, len(group)), self._heads)
        begin = np.where(worth > 0, begin, len(group))[self._row]
        num_taken = np.where(token_worth > 0, self._sizes, 0)
        work_s = np.where(group > begin, num_taken * self._token_work_s, 0.0)
        is_begin = group == begin
        rest_s = np.maximum(num_taken - 1, 0) * self._token_work_s
        work_s[is_begin] = (self._first_work_s + rest_s)[is_begin]
        demand_s = np.bincount(cheapest_bin, weights=work_s, minlength=self.num_bins + 1)
        return bound, demand_s[: self.num_bins].astype(np.float64)

    def _cheapest(self, prices: Floats) -> tuple[Indices, Floats]:
        """Return for each group the cheapest bin from arrival to deadline, and its price."""
        table = [np.arange(len(prices))]
        for level in range(int(self._level.max())):
            left, right = table[-1][: -(1 << level)], table[-1][1 << level :]
            table.append(np.where(prices[left] <= prices[right], left, right))
        padded = np.zeros((len(table), len(prices)), dtype=np.int64)
        for level, row in enumerate(table):
            padded[level, : len(row)] = row
        first = padded[self._level, self._arrival_bin]
        second = padded[self._level, self._second_start]
        cheapest_bin = np.where(prices[first] <= prices[second], first, second)
        return cheapest_bin, prices[cheapest_bin]


def _least_bound(prices: _Prices, num_iterations: int = 400) -> float:
    """Return the least bound found by moving prices against excess demand.

    Subgradient steps of Polyak's length towards a target a little below the best bound so far;
    after ten steps without progress the search goes on from the best prices with a nearer target.
    """
    current = best_prices = np.zeros(prices.num_bins)
    best, demand_s = prices.evaluate(current)
    bound, best_demand_s = best, demand_s
    ambition, num_idle = 0.1, 0
    for _ in range(num_iterations):
        slope = prices.capacity_s - demand_s
        slope[(current == 0) & (slope > 0)] = 0.0  # a price does not go below 0
        steepness = float(slope @ slope)
        if steepness == 0:
            break
        step = (bound - (1 - ambition) * best) / steepness
        current = np.maximum(0.0, current - step * slope)
        bound, demand_s = prices.evaluate(current)
        if bound < best:
            best, best_prices, best_demand_s = bound, current, demand_s
            num_idle = 0
        else:
            num_idle += 1
        if num_idle == 10:
            bound, current, demand_s = best, best_prices, best_demand_s
            ambition, num_idle = ambition / 2, 0
    return best
