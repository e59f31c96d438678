"""What a served workload was worth: service gain, SLO attainment, latency percentiles, throughput.

One module for the simulator, the live node and the benchmarks, so that a number means the same
wherever it is printed. The denominators are honest: every request that arrived counts with all
tokens it would have produced, also if it was rejected, failed or never finished.

Source: ProServe (arXiv 2512.12928), equations numbered as in this project's specification:
(5) token weights, (6) TDG, (7) TDG_Ratio, (8) SLO attainment, (9) normalised miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.slo import GainWeights, Slo


class Outcome(StrEnum):
    """How a request stood when the account was closed."""

    FINISHED = "finished"
    """All its tokens were delivered."""

    UNFINISHED = "unfinished"
    """Still waiting or running."""

    REJECTED = "rejected"
    """Turned away on arrival."""

    FAILED = "failed"
    """Ended by the server before its last token."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, from arrival to its end or to the end of the account."""

    request_id: str
    arrival_s: float
    slo: Slo
    weight: float
    priority_class: str
    client: str
    num_expected_tokens: int
    """Output tokens it would have produced with unlimited resources; at least 1."""

    token_times_s: Sequence[float]
    """When each output token was delivered, ascending, on the clock of `arrival_s`."""

    outcome: Outcome

    def __post_init__(self) -> None:
        num_tokens = len(self.token_times_s)
        if self.num_expected_tokens < max(1, num_tokens):
            raise ValueError(
                f"request {self.request_id}: num_expected_tokens is {self.num_expected_tokens}, "
                f"it must be at least 1 and at least the {num_tokens} tokens delivered"
            )
        if (self.outcome is Outcome.FINISHED) and num_tokens != self.num_expected_tokens:
            raise ValueError(
                f"request {self.request_id} is finished with {num_tokens} of "
                f"{self.num_expected_tokens} tokens"
            )


@dataclass(frozen=True, slots=True)
class MeasurementWindow:
    """The arrivals that count. Cut the same for every system that is compared."""

    start_s: float
    end_s: float
    """Itself inside the window."""

    def __post_init__(self) -> None:
        if not self.start_s <= self.end_s:
            raise ValueError(f"window from {self.start_s} to {self.end_s} ends before it starts")

    @classmethod
    def of_arrivals(
        cls,
        arrival_s: NDArray[np.float64],
        *,
        warmup_fraction: float = 0.0,
        drain_fraction: float = 0.0,
    ) -> Self:
        """Return the span from first to last arrival without its beginning and its end."""
        first_s, last_s = float(arrival_s.min()), float(arrival_s.max())
        span_s = last_s - first_s
        return cls(first_s + warmup_fraction * span_s, last_s - drain_fraction * span_s)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution in five numbers, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class GainReport:
    """What a group of requests got."""

    num_requests: int
    num_finished: int
    num_unfinished: int
    num_rejected: int
    num_failed: int
    gain: float
    """Sum of TDG (6)."""

    obtainable_gain: float
    """Gain if every token of every request had been on time; the denominator of (7)."""

    tdg_ratio: float
    """(7); 1 if there was nothing to gain."""

    slo_attainment: float
    """(8): share of all requests that finished with TTFT and TPOT strictly within their SLO; 1 if
    there were no requests."""

    num_without_token: int
    """Requests that got no token, and so have no TTFT."""

    ttft_s: Percentiles | None
    """Arrival to first token, over requests that got one; None if none did."""

    tpot_s: Percentiles | None
    """Mean time per token after the first, over requests with at least two tokens."""

    tbt_s: Percentiles | None
    """Time between consecutive tokens, over all such pairs of all requests."""

    tokens_per_s: float | None
    """Tokens delivered inside the window, per second of it, also to requests that arrived before
    it; None if the window has no length."""


def normalised_miss(tdg_ratio: float, reference_tdg_ratio: float) -> float:
    """Return equation (9): the gain missed, in units of what the reference missed.

    Infinite if only the reference missed nothing, 1 if neither missed anything.
    """
    missed, reference_missed = 1 - tdg_ratio, 1 - reference_tdg_ratio
    if reference_missed == 0:
        return 1.0 if missed == 0 else math.inf
    return missed / reference_missed


class GainTable:
    """Records in columns. Figures per request are computed once; reports then cost little.

    All arrays are (num_requests,) unless they say otherwise.
    """

    def __init__(
        self, records: Sequence[RequestRecord], gain_weights: GainWeights = GainWeights()
    ) -> None:
        self._classes = np.array([r.priority_class for r in records], dtype=object)
        self._clients = np.array([r.client for r in records], dtype=object)
        self._outcomes = np.array([r.outcome for r in records], dtype=object)
        self.arrival_s = np.array([r.arrival_s for r in records], dtype=np.float64)
        self.num_tokens = np.array([len(r.token_times_s) for r in records], dtype=np.int64)
        self._ttft_slo_s = np.array([r.slo.ttft_s for r in records], dtype=np.float64)
        self._tpot_slo_s = np.array([r.slo.tpot_s for r in records], dtype=np.float64)
        weight = np.array([r.weight for r in records], dtype=np.float64)
        num_expected = np.array([r.num_expected_tokens for r in records], dtype=np.int64)
        # Tokens of all requests, one request after the other; both (num_tokens,).
        self._token_s = _concatenated(records)
        self._owner = np.repeat(np.arange(len(records)), self.num_tokens)

        later = weight * gain_weights.later_token
        self.obtainable_gain = weight * gain_weights.first_token + later * (num_expected - 1)
        self.gain = self._gains(weight * gain_weights.first_token, later)
        self.ttft_s, self.tpot_s = self._latencies()
        # Comparisons with nan, of requests without a token or a second one, are false.
        is_first_in_time = self.ttft_s < self._ttft_slo_s
        is_rest_in_time = (self.num_tokens == 1) | (self.tpot_s < self._tpot_slo_s)
        self.is_attained = (self._outcomes == Outcome.FINISHED) & is_first_in_time & is_rest_in_time

    def report(self, window: MeasurementWindow | None = None) -> GainReport:
        """Return the figures over all classes and clients; without a window, over all time."""
        return self._report(np.ones(len(self.arrival_s), dtype=np.bool_), window)

    def by_class(self, window: MeasurementWindow | None = None) -> dict[str, GainReport]:
        """Return one report per priority class, in the order of their names."""
        return self._by(self._classes, window)

    def by_client(self, window: MeasurementWindow | None = None) -> dict[str, GainReport]:
        """Return one report per client, in the order of their names."""
        return self._by(self._clients, window)

    def _by(
        self, names: NDArray[np.object_], window: MeasurementWindow | None
    ) -> dict[str, GainReport]:
        return {name: self._report(names == name, window) for name in sorted(set(names.tolist()))}

    def _gains(self, first: NDArray[np.float64], later: NDArray[np.float64]) -> NDArray[np.float64]:
        index = self._token_index()
        due_s = (self.arrival_s + self._ttft_slo_s)[self._owner]
        with np.errstate(invalid="ignore"):  # 0 * inf; the first token is due at `due_s`
            later_due_s = due_s + index * self._tpot_slo_s[self._owner]
        is_first = index == 0
        is_on_time = self._token_s < np.where(is_first, due_s, later_due_s)
        value = np.where(is_first, first[self._owner], later[self._owner])
        gain = np.bincount(self._owner, weights=value * is_on_time, minlength=len(first))
        return gain.astype(np.float64)  # bincount of nothing is integer

    def _token_index(self) -> NDArray[np.int64]:
        """Return each token's index within its request, shape (num_tokens,)."""
        starts = np.cumsum(self.num_tokens) - self.num_tokens
        return np.arange(len(self._owner)) - starts[self._owner]

    def _latencies(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return TTFT and TPOT per request; nan where there is none."""
        ttft_s = np.full(len(self.num_tokens), np.nan)
        tpot_s = np.full(len(self.num_tokens), np.nan)
        ends = np.cumsum(self.num_tokens)
        has_token, has_two = self.num_tokens >= 1, self.num_tokens >= 2
        first_s = self._token_s[(ends - self.num_tokens)[has_token]]
        ttft_s[has_token] = first_s - self.arrival_s[has_token]
        first_s = self._token_s[(ends - self.num_tokens)[has_two]]
        last_s = self._token_s[ends[has_two] - 1]
        tpot_s[has_two] = (last_s - first_s) / (self.num_tokens[has_two] - 1)
        return ttft_s, tpot_s

    def _report(
        self, is_in_group: NDArray[np.bool_], window: MeasurementWindow | None
    ) -> GainReport:
        token_s = self._token_s[is_in_group[self._owner]]
        if window is None:
            is_counted = is_in_group
            span = _whole_span(self.arrival_s[is_in_group], token_s)
        else:
            is_arrival_inside = (window.start_s <= self.arrival_s) & (
                self.arrival_s <= window.end_s
            )
            is_counted = is_in_group & is_arrival_inside
            span = window
        outcomes = self._outcomes[is_counted]
        gain = float(self.gain[is_counted].sum())
        obtainable_gain = float(self.obtainable_gain[is_counted].sum())
        num_requests = int(is_counted.sum())
        is_gap = (self._owner[1:] == self._owner[:-1]) & is_counted[self._owner[1:]]
        return GainReport(
            num_requests=num_requests,
            num_finished=int((outcomes == Outcome.FINISHED).sum()),
            num_unfinished=int((outcomes == Outcome.UNFINISHED).sum()),
            num_rejected=int((outcomes == Outcome.REJECTED).sum()),
            num_failed=int((outcomes == Outcome.FAILED).sum()),
            gain=gain,
            obtainable_gain=obtainable_gain,
            tdg_ratio=gain / obtainable_gain if obtainable_gain > 0 else 1.0,
            slo_attainment=(
                float(self.is_attained[is_counted].mean()) if num_requests > 0 else 1.0
            ),
            num_without_token=int((self.num_tokens[is_counted] == 0).sum()),
            ttft_s=_percentiles(self.ttft_s[is_counted]),
            tpot_s=_percentiles(self.tpot_s[is_counted]),
            tbt_s=_percentiles(np.diff(self._token_s)[is_gap]),
            tokens_per_s=_rate_per_s(token_s, span),
        )


def _concatenated(records: Sequence[RequestRecord]) -> NDArray[np.float64]:
    parts = [np.asarray(r.token_times_s, dtype=np.float64) for r in records]
    return np.concatenate(parts) if parts else np.empty(0)


def _whole_span(
    arrival_s: NDArray[np.float64], token_s: NDArray[np.float64]
) -> MeasurementWindow | None:
    if len(arrival_s) == 0:
        return None
    start_s = float(arrival_s.min())
    return MeasurementWindow(start_s, max(start_s, float(token_s.max(initial=start_s))))


def _rate_per_s(token_s: NDArray[np.float64], span: MeasurementWindow | None) -> float | None:
    if span is None or span.start_s == span.end_s:
        return None
    num_tokens = int(((span.start_s <= token_s) & (token_s <= span.end_s)).sum())
    return num_tokens / (span.end_s - span.start_s)


def _percentiles(values: NDArray[np.float64]) -> Percentiles | None:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return None
    p50, p90, p99 = np.percentile(known, (50, 90, 99)).tolist()
    return Percentiles(mean=float(known.mean()), p50=p50, p90=p90, p99=p99, max=float(known.max()))
