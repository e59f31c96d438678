"""Service level objectives, token deadlines and the token-level deadline-aware gain (TDG).

Source: ProServe (arXiv 2512.12928), equations numbered as in this project's specification:
(4) token deadlines, (5) token weights, (6) TDG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency promised to one request. `math.inf` means that no promise was made."""

    ttft_s: float = math.inf
    """From arrival to the first output token."""

    tpot_s: float = math.inf
    """Between consecutive output tokens."""

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if not value > 0:
                raise ValueError(f"{name} is {value}, it must be above 0 seconds")


@dataclass(frozen=True, slots=True)
class PriorityClass:
    """A service class that clients belong to; a larger weight is a more valuable client."""

    name: str
    weight: float
    """Gain of one output token delivered before its deadline, relative to other classes."""

    slo: Slo
    """Used when a request brings none of its own."""

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"weight of class {self.name!r} is {self.weight}, it must be finite and at least 0"
            )


@dataclass(frozen=True, slots=True)
class GainWeights:
    """How much the first and the later tokens of a request count, before its own weight."""

    first_token: float = 1.0
    """`w_p` of equation (5)."""

    later_token: float = 1.0
    """`w_d` of equation (5)."""

    def of_token(self, index: int) -> float:
        """Return the weight of output token `index`, counted from 0."""
        return self.first_token if index == 0 else self.later_token


class DeadlineAnchor(StrEnum):
    """What the deadlines of the second and later tokens are counted from (open choice OC-1)."""

    FIXED = "fixed"
    """Arrival + TTFT objective: the paper's envelope, equation (4)."""

    ACTUAL = "actual"
    """The moment the first token was made."""

    MIN = "min"
    """The earlier of the two: meets both the envelope and the TPOT measured by clients."""


def token_deadline_s(
    slo: Slo,
    index: int,
    *,
    arrival_s: float,
    first_token_s: float | None = None,
    anchor: DeadlineAnchor = DeadlineAnchor.FIXED,
) -> float:
    """Return when output token `index` (from 0) is due, on the clock of `arrival_s`.

    The first token is due `slo.ttft_s` after arrival, each later one `slo.tpot_s` after the
    one before it, whenever that one was made. `first_token_s` is when the first token was
    made; None (not made yet) counts as on time.

    Raises:
        ValueError: `index` is negative.

    Source: ProServe, equation (4); anchors are open choice OC-1.
    """
    if index < 0:
        raise ValueError(f"token index is {index}, it must be at least 0")
    if index == 0:
        return arrival_s + slo.ttft_s
    return index * slo.tpot_s + deadline_origin_s(
        slo, arrival_s=arrival_s, first_token_s=first_token_s, anchor=anchor
    )


def deadline_origin_s(
    slo: Slo, *, arrival_s: float, first_token_s: float | None, anchor: DeadlineAnchor
) -> float:
    """Return what the deadlines of the second and later tokens are counted from."""
    due_s = arrival_s + slo.ttft_s
    if first_token_s is None or anchor is DeadlineAnchor.FIXED:
        return due_s
    return first_token_s if anchor is DeadlineAnchor.ACTUAL else min(due_s, first_token_s)


def token_deadline_aware_gain(
    slo: Slo,
    token_times_s: Sequence[float],
    *,
    arrival_s: float,
    weight: float,
    gain_weights: GainWeights = GainWeights(),
) -> float:
    """Return the TDG of one request whose token i was delivered at `token_times_s[i]`.

    Each token earns its weight iff it comes strictly before its deadline on the paper's
    fixed envelope; whatever anchor a scheduler plans with, gain is always measured so.

    Source: ProServe, equations (4) to (6).
    """
    return sum(
        weight * gain_weights.of_token(index)
        for index, time_s in enumerate(token_times_s)
        if time_s < token_deadline_s(slo, index, arrival_s=arrival_s)
    )
