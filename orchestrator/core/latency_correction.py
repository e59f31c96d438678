"""Corrects predicted step durations by measured ones; knows numbers, not what a step holds.

Two layers, and the spread of what they leave (equations 13 and 14 of this project's specification):

    fast    one factor per batch class follows what was measured last            (13)
    slow    least squares with forgetting over the coefficients, in blocks       (14)
    spread  measured / predicted of the last steps of each class, for quantiles
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK_STEPS = 32
"""Steps between two updates of the coefficients: the slow layer need not pay for a solution in
every step."""

_ROUNDING = 1e-9
"""Measured and predicted that differ by less are equal: sums in another order, not an error."""

_PROFILE_STEPS = 1.0
"""What the profile's proportions weigh in the slow layer, in steps made of one term alone: a term
that the measured steps hardly contain keeps its proportion to the others. Where the time of a
step and the profile's proportions are both off by about as much (a quarter, say), 1 is right."""

_SCALE_SPREAD = 10.0
"""How much further the profile's scale may be off than its proportions: another load on the
machine, or another clock, moves all coefficients together."""

_LEAST_SAMPLES = 20
"""Fewer steps say nothing about a quantile."""


class BatchClass(StrEnum):
    """Steps whose durations err alike."""

    DECODE_ONLY = "decode-only"
    MIXED = "mixed"
    """Any step with a prefill."""


@dataclass(frozen=True, slots=True)
class CorrectionOptions:
    """How predictions follow measurements."""

    momentum: float = 0.9
    """What the fast factor keeps of itself in each step (beta of equation 13)."""

    min_factor: float = 0.25
    """Least correction, of the fast factor and of each coefficient. Both bounds at 1 turn the
    correction off."""

    max_factor: float = 8.0
    """Greatest correction. The source's [0.5, 2] is for a GPU of one's own; an engine on the
    cores of a busy laptop was seen at 5 times its profiled durations, and a bound below the truth
    misses every deadline."""

    forgetting: float = 0.999
    """What a step's weight in the slow layer keeps with each later step."""

    window_steps: int = 256
    """Steps of each batch class that error quantiles look back on."""

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("min_factor", 0 < self.min_factor <= 1, "above 0 and at most 1"),
            ("max_factor", 1 <= self.max_factor < math.inf, "at least 1 and finite"),
            ("forgetting", 0 < self.forgetting < 1, "between 0 and 1"),
            ("window_steps", self.window_steps >= _LEAST_SAMPLES, f"at least {_LEAST_SAMPLES}"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {rule}")

    def bounded_ratio(self, measured_s: float, predicted_s: float) -> float:
        """Return measured / predicted within the bounds, and exactly 1 but for rounding.

        The bound is on what one step says, so that a stall of seconds moves an average no
        further than the greatest correction would.
        """
        ratio = measured_s / predicted_s
        if abs(ratio - 1.0) < _ROUNDING:
            return 1.0
        return min(max(ratio, self.min_factor), self.max_factor)


@dataclass(frozen=True, slots=True)
class StepErrors:
    """Quantiles of (measured - predicted) / predicted over the last steps of one class.

    Positive where steps took longer than predicted, which is the side that misses deadlines.
    """

    batch_class: BatchClass
    num_steps: int
    p50: float
    p90: float
    p99: float


class ClassCorrection:
    """The fast layer of one batch class, and its residuals."""

    def __init__(self, options: CorrectionOptions) -> None:
        self._options = options
        self.factor = 1.0
        """Multiplies what the coefficients predict."""

        self._recent: deque[float] = deque()
        self._ordered: list[float] = []
        """The same ratios, ascending."""

    @property
    def num_steps(self) -> int:
        """Steps in the window."""
        return len(self._ordered)

    def observe(self, measured_s: float, predicted_s: float) -> None:
        """Learn from a step; `predicted_s` is above 0 and holds the factor."""
        options = self._options
        if len(self._recent) == options.window_steps:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]
        ratio = measured_s / predicted_s
        self._recent.append(ratio)
        insort(self._ordered, ratio)
        target = options.bounded_ratio(measured_s, predicted_s / self.factor)
        self.factor += (1 - options.momentum) * (target - self.factor)

    def rescale(self, scale: float) -> None:
        """Take over, or hand to the slow layer, a part of the correction."""
        self.factor = min(max(self.factor * scale, self._options.min_factor),
                          self._options.max_factor)  # fmt: skip

    def upper_factor(self, quantile: float) -> float:
        """Return what to multiply a prediction with to bound that share of steps.

        Conformal: of n exchangeable ratios and the next one, the next is at most the
        ceil((n + 1) * quantile)-th smallest of the n with the wanted probability. Never below
        1, nor above the greatest correction; 1 while the window is too short to tell.
        """
        num_steps = len(self._ordered)
        rank = math.ceil((num_steps + 1) * quantile)
        if num_steps < _LEAST_SAMPLES or rank > num_steps:
            return 1.0
        ratio = self._ordered[rank - 1]
        if ratio < 1.0 + _ROUNDING:
            return 1.0
        return min(ratio, self._options.max_factor)

    def errors(self, batch_class: BatchClass) -> StepErrors:
        """Return the error quantiles of the window, which holds at least one step."""
        ordered = self._ordered
        p50, p90, p99 = (
            ordered[math.ceil(len(ordered) * quantile) - 1] - 1.0 for quantile in (0.5, 0.9, 0.99)
        )
        return StepErrors(batch_class, len(ordered), p50, p90, p99)


class CoefficientFilter:
    """The slow layer: recursive least squares with forgetting, in its information form.

    Looks for a multiplier of each profiled coefficient, since coefficients differ by six orders
    of magnitude and a step's relative error is what counts. With z_j the share of coefficient j
    in what the profile predicts for a step (z_j >= 0, their sum is 1), it minimises

        sum over steps, forgetting:  (measured / profiled - sum_j m_j * z_j)^2
            + the prior:  m_j = 1 + s + d_j with d_j of variance 1 / _PROFILE_STEPS and s, which
              all share, of variance _SCALE_SPREAD^2 / _PROFILE_STEPS

    within the bounds. What is forgotten falls back to the prior, so the normal matrix never gets
    below the prior's, nor above it by more than 1 / (1 - forgetting): terms that no step contains
    neither wind up nor turn it singular. A coefficient that was profiled as 0 stays 0.
    """

    def __init__(self, coefficients: Sequence[float], options: CorrectionOptions) -> None:
        self._profiled = np.array(coefficients, dtype=np.float64)
        self._options = options
        num = len(self._profiled)
        self._prior = _PROFILE_STEPS * np.linalg.inv(
            np.eye(num) + _SCALE_SPREAD**2 * np.ones((num, num))
        )
        self._normal_matrix = self._prior.copy()
        self._moment = np.zeros(len(self._profiled))
        self._weights = options.forgetting ** np.arange(BLOCK_STEPS - 1, -1, -1)
        self._terms: list[Sequence[float]] = []
        self._measured_s: list[float] = []

    def observe(self, terms: Sequence[float], measured_s: float) -> list[float] | None:
        """Take in a step; return the new coefficients after each block of steps, else None.

        `terms` is what each coefficient is multiplied with; the profile predicts more than 0.
        """
        self._terms.append(terms)
        self._measured_s.append(measured_s)
        if len(self._terms) < BLOCK_STEPS:
            return None
        self._absorb_block()
        values: list[float] = (self._profiled * self._multipliers()).tolist()
        return values

    def _absorb_block(self) -> None:
        priced_s = np.array(self._terms, dtype=np.float64) * self._profiled
        profiled_s = priced_s.sum(axis=1)
        shares = priced_s / profiled_s[:, None]  # (BLOCK_STEPS, num_coefficients)
        excess = np.array(
            [
                self._options.bounded_ratio(measured_s, predicted_s) - 1.0
                for measured_s, predicted_s in zip(
                    self._measured_s, profiled_s.tolist(), strict=True
                )
            ]
        )
        weighted = shares.T * self._weights
        kept = self._options.forgetting**BLOCK_STEPS
        self._normal_matrix = (
            kept * self._normal_matrix + (1 - kept) * self._prior + weighted @ shares
        )
        self._moment = kept * self._moment + weighted @ excess
        self._terms.clear()
        self._measured_s.clear()

    def _multipliers(self) -> Floats:
        """Return the minimum within the bounds: whoever leaves them is held there, and the
        others are solved for again. At most one round per coefficient."""
        low, high = self._options.min_factor - 1.0, self._options.max_factor - 1.0
        excess = np.zeros(len(self._profiled))
        is_free = np.ones(len(self._profiled), dtype=np.bool_)
        while is_free.any():
            rest = self._moment - self._normal_matrix @ np.where(is_free, 0.0, excess)
            excess[is_free] = np.linalg.solve(
                self._normal_matrix[np.ix_(is_free, is_free)], rest[is_free]
            )
            is_out = (excess < low) | (excess > high)
            if not is_out.any():
                break
            excess = excess.clip(low, high)
            is_free &= ~is_out
        return 1.0 + excess
