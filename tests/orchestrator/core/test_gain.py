from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.gain import (
    GainReport,
    GainTable,
    MeasurementWindow,
    Outcome,
    RequestRecord,
    normalised_miss,
)
from orchestrator.core.slo import GainWeights, Slo, token_deadline_aware_gain

SLO = Slo(ttft_s=1.0, tpot_s=0.050)


def make_record(
    token_times_s: Sequence[float] = (),
    *,
    request_id: str = "r",
    arrival_s: float = 0.0,
    slo: Slo = SLO,
    weight: float = 1.0,
    priority_class: str = "normal",
    client: str = "",
    num_expected_tokens: int | None = None,
    outcome: Outcome = Outcome.FINISHED,
) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        arrival_s=arrival_s,
        slo=slo,
        weight=weight,
        priority_class=priority_class,
        client=client,
        num_expected_tokens=num_expected_tokens or len(token_times_s),
        token_times_s=token_times_s,
        outcome=outcome,
    )


def report_of(*records: RequestRecord) -> GainReport:
    return GainTable(records).report()


def test_a_token_at_its_deadline_earns_nothing() -> None:
    """Due at 1.0 and 1.05: the first comes exactly then, the second before: 1 of 2."""
    report = report_of(make_record([1.0, 1.04]))

    assert report.gain == 1.0
    assert report.tdg_ratio == 0.5


def test_holding_a_late_token_back_does_not_pay() -> None:
    """The gaming example of the specification's section 1.2, S2 = 50 ms.

    Tokens are computable at 80 and 135 ms. Judged by gaps, releasing them at once earns nothing
    (80 and 55 ms) and holding the first until 90 earns one (45 ms). By fixed deadlines, 50 and
    100 ms after the token before these two, both are late either way.
    """
    slo = Slo(ttft_s=0.001, tpot_s=0.050)
    honest, held = [0.0, 0.080, 0.135], [0.0, 0.090, 0.135]

    def gain_by_gaps(times_s: list[float]) -> int:
        return sum(b - a < slo.tpot_s for a, b in itertools.pairwise(times_s))

    assert (gain_by_gaps(honest), gain_by_gaps(held)) == (0, 1)
    assert report_of(make_record(honest, slo=slo)).gain == 1.0
    assert report_of(make_record(held, slo=slo)).gain == 1.0


def test_requests_without_tokens_stay_in_the_denominators() -> None:
    """One of 2 tokens served in time; one rejected of 3, one unfinished of 5: 2 / 10 and 1 / 3."""
    report = report_of(
        make_record([0.1, 0.2], slo=Slo(1.0, 0.5)),
        make_record(num_expected_tokens=3, outcome=Outcome.REJECTED),
        make_record(num_expected_tokens=5, outcome=Outcome.UNFINISHED),
    )

    assert report.tdg_ratio == 0.2
    assert report.slo_attainment == pytest.approx(1 / 3)
    assert (report.num_rejected, report.num_unfinished, report.num_without_token) == (1, 1, 2)


@pytest.mark.parametrize(
    ("token_times_s", "is_attained"),
    [
        ([0.5], True),  # no second token, no TPOT
        ([1.0], False),  # TTFT is strict
        ([0.5, 0.5 + 1 / 32], True),
        ([0.5, 0.5 + 1 / 16], False),  # TPOT is strict: exactly 1/16
        ([0.0, 0.1, 0.11, 0.12], True),  # only the mean counts: 0.12 / 3
        ([0.2, 0.3, 0.4], False),  # in time for gain, but 0.1 each since the first
    ],
)
def test_attainment_is_strict_and_by_the_mean_time_per_token(
    token_times_s: list[float], *, is_attained: bool
) -> None:
    report = report_of(make_record(token_times_s, slo=Slo(ttft_s=1.0, tpot_s=1 / 16)))

    assert report.slo_attainment == float(is_attained)


def test_an_unfinished_request_has_not_attained_its_objectives() -> None:
    record = make_record([0.1], num_expected_tokens=2, outcome=Outcome.UNFINISHED)

    assert report_of(record).slo_attainment == 0.0


def test_a_request_without_promises_always_gains() -> None:
    report = report_of(make_record([1e6, 2e6], slo=Slo()))

    assert report.tdg_ratio == 1.0
    assert report.slo_attainment == 1.0


def test_time_between_tokens_does_not_span_requests() -> None:
    """Gaps 0.1 and 0.3 in one request, 0.2 in the next; not the 4.6 between the two."""
    report = report_of(make_record([0.0, 0.1, 0.4]), make_record([5.0, 5.2]))

    assert report.tbt_s is not None
    assert report.tbt_s.p50 == pytest.approx(0.2)
    assert report.tbt_s.max == pytest.approx(0.3)


def test_the_window_cuts_by_arrival_and_counts_tokens_by_their_time() -> None:
    """Arrivals at 0, 10 and 20; the window of 5 to 15 counts the one at 10.

    Inside it, 10 s, fall two tokens: one of each of the first two requests.
    """
    table = GainTable(
        [
            make_record([0.5, 6.0], arrival_s=0.0),
            make_record([10.5, 16.0], arrival_s=10.0),
            make_record([21.0], arrival_s=20.0),
        ]
    )

    report = table.report(MeasurementWindow(5.0, 15.0))

    assert report.num_requests == 1
    assert report.gain == 1.0
    assert report.tokens_per_s == pytest.approx(0.2)


def test_warmup_and_drain_are_shares_of_the_arrival_span() -> None:
    """Arrivals from 100 to 200: without the first 10 % and the last 20 %, 110 to 180."""
    window = MeasurementWindow.of_arrivals(
        np.array([100.0, 150.0, 200.0]), warmup_fraction=0.1, drain_fraction=0.2
    )

    assert (window.start_s, window.end_s) == (110.0, 180.0)


def test_classes_and_clients_are_reported_apart() -> None:
    table = GainTable(
        [
            make_record([0.5], priority_class="high", client="a", weight=2.0),
            make_record([1.5], priority_class="low", client="a"),
            make_record([0.5], priority_class="low", client="b"),
        ]
    )

    by_class, by_client = table.by_class(), table.by_client()

    assert {name: r.tdg_ratio for name, r in by_class.items()} == {"high": 1.0, "low": 0.5}
    assert {name: r.tdg_ratio for name, r in by_client.items()} == {"a": 2 / 3, "b": 1.0}


def test_an_empty_account_has_nothing_to_miss() -> None:
    report = report_of()

    assert (report.num_requests, report.tdg_ratio, report.slo_attainment) == (0, 1.0, 1.0)
    assert report.ttft_s is None
    assert report.tokens_per_s is None


def test_normalised_miss_is_in_units_of_the_reference() -> None:
    """Missing 30 % against 10 % is 3; nothing against nothing is 1."""
    assert normalised_miss(0.7, 0.9) == pytest.approx(3.0)
    assert normalised_miss(1.0, 1.0) == 1.0
    assert normalised_miss(0.9, 1.0) == math.inf


@pytest.mark.parametrize(
    ("num_expected_tokens", "outcome"),
    [(1, Outcome.UNFINISHED), (3, Outcome.FINISHED)],
)
def test_a_record_that_contradicts_itself_is_refused(
    num_expected_tokens: int, outcome: Outcome
) -> None:
    with pytest.raises(ValueError, match="tokens"):
        make_record([0.1, 0.2], num_expected_tokens=num_expected_tokens, outcome=outcome)


# Sixteenths of a second, so that deadlines are met exactly now and then.
times = st.integers(0, 64).map(lambda n: n / 16)
durations = st.one_of(st.just(math.inf), st.integers(1, 32).map(lambda n: n / 16))


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    arrival_s = draw(times)
    token_times_s = [arrival_s + s for s in sorted(draw(st.lists(times, max_size=6)))]
    num_missing = draw(st.integers(0 if token_times_s else 1, 3))
    return make_record(
        token_times_s,
        arrival_s=arrival_s,
        slo=Slo(ttft_s=draw(durations), tpot_s=draw(durations)),
        weight=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        priority_class=draw(st.sampled_from(["high", "low"])),
        num_expected_tokens=len(token_times_s) + num_missing,
        outcome=Outcome.UNFINISHED if num_missing else Outcome.FINISHED,
    )


@given(st.lists(records(), max_size=8), st.sampled_from([1.0, 3.0]))
def test_columns_agree_with_scoring_request_by_request(
    group: list[RequestRecord], first_token: float
) -> None:
    weights = GainWeights(first_token=first_token, later_token=1.0)
    gain = obtainable = 0.0
    num_attained = 0
    for r in group:
        times_s = list(r.token_times_s)
        gain += token_deadline_aware_gain(
            r.slo, times_s, arrival_s=r.arrival_s, weight=r.weight, gain_weights=weights
        )
        obtainable += sum(r.weight * weights.of_token(i) for i in range(r.num_expected_tokens))
        if r.outcome is Outcome.FINISHED and times_s[0] - r.arrival_s < r.slo.ttft_s:
            count = len(times_s)
            num_attained += count == 1 or ((times_s[-1] - times_s[0]) / (count - 1) < r.slo.tpot_s)

    report = GainTable(group, weights).report()

    assert report.gain == pytest.approx(gain)
    assert report.obtainable_gain == pytest.approx(obtainable)
    assert report.tdg_ratio == pytest.approx(gain / obtainable if obtainable else 1.0)
    assert report.slo_attainment == pytest.approx(num_attained / len(group) if group else 1.0)
