from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.slo import (
    DeadlineAnchor,
    GainWeights,
    PriorityClass,
    Slo,
    token_deadline_aware_gain,
    token_deadline_s,
)

SLO = Slo(ttft_s=1.0, tpot_s=0.050)


def test_deadlines_form_a_fixed_envelope() -> None:
    """arrival 10 + TTFT 1 + 3 * TPOT 0.05 = 11.15, whenever the first token came."""
    due_s = token_deadline_s(SLO, 3, arrival_s=10.0, first_token_s=10.2)

    assert due_s == pytest.approx(11.15)


@pytest.mark.parametrize(
    ("anchor", "first_token_s", "due_s"),
    [
        (DeadlineAnchor.FIXED, 10.2, 11.10),
        (DeadlineAnchor.FIXED, 11.7, 11.10),
        (DeadlineAnchor.ACTUAL, 10.2, 10.30),
        (DeadlineAnchor.ACTUAL, 11.7, 11.80),
        (DeadlineAnchor.MIN, 10.2, 10.30),
        (DeadlineAnchor.MIN, 11.7, 11.10),
        (DeadlineAnchor.MIN, None, 11.10),
    ],
)
def test_anchor_decides_what_later_deadlines_are_counted_from(
    anchor: DeadlineAnchor, first_token_s: float | None, due_s: float
) -> None:
    """Token 2 is due two TPOT (0.1 s) after the anchor."""
    result = token_deadline_s(SLO, 2, arrival_s=10.0, first_token_s=first_token_s, anchor=anchor)

    assert result == pytest.approx(due_s)


def test_deadline_of_a_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        token_deadline_s(SLO, -1, arrival_s=0.0)


def test_a_token_exactly_at_its_deadline_earns_nothing() -> None:
    """Equation (6) compares strictly: of tokens at 0.99, 1.05 and 1.09 only the second is late."""
    gain = token_deadline_aware_gain(SLO, [0.99, 1.05, 1.09], arrival_s=0.0, weight=2.0)

    assert gain == 2.0 * 2


def test_postponing_a_token_never_gains() -> None:
    """The example of specification 1.2, with TTFT past: tokens computable at 80 and 135 ms.

    Under time-between-tokens, holding the first until 90 turns the second into a success
    (135 - 90 = 45 < 50). Under TDG both releases earn the same.
    """
    slo = Slo(ttft_s=0.030, tpot_s=0.050)
    honest = token_deadline_aware_gain(slo, [0.020, 0.080, 0.135], arrival_s=0.0, weight=1.0)
    held_back = token_deadline_aware_gain(slo, [0.020, 0.090, 0.135], arrival_s=0.0, weight=1.0)

    assert honest == held_back == 1.0


def test_first_and_later_tokens_are_weighted_apart() -> None:
    weights = GainWeights(first_token=10.0, later_token=0.5)

    gain = token_deadline_aware_gain(
        SLO, [0.5, 0.6, 0.7], arrival_s=0.0, weight=2.0, gain_weights=weights
    )

    assert gain == 2.0 * (10.0 + 0.5 + 0.5)


@given(
    times_s=st.lists(st.floats(0, 3), max_size=20).map(sorted),
    delays_s=st.lists(st.floats(0, 1), min_size=20, max_size=20),
    ttft_s=st.floats(0.01, 2),
    tpot_s=st.floats(0.001, 0.2),
)
def test_delivering_later_never_earns_more(
    times_s: list[float], delays_s: list[float], ttft_s: float, tpot_s: float
) -> None:
    slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s)
    later_s = [t + d for t, d in zip(times_s, delays_s, strict=False)]

    on_time = token_deadline_aware_gain(slo, times_s, arrival_s=0.0, weight=1.0)
    delayed = token_deadline_aware_gain(slo, later_s, arrival_s=0.0, weight=1.0)

    assert delayed <= on_time


def test_no_objective_means_always_in_time() -> None:
    assert token_deadline_aware_gain(Slo(), [1e6, 1e9], arrival_s=0.0, weight=3.0) == 6.0


@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(0.0, 0.1), (1.0, -0.1), (math.nan, 0.1)])
def test_an_objective_that_is_not_positive_is_refused(ttft_s: float, tpot_s: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Slo(ttft_s=ttft_s, tpot_s=tpot_s)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_class_with_an_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of class 'gold'"):
        PriorityClass("gold", weight=weight, slo=SLO)
