from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile

PROFILE = LatencyProfile(
    prefill_quadratic_s=1e-6,
    prefill_context_s=2e-6,
    prefill_token_s=1e-3,
    prefill_cached_s=1e-5,
    decode_context_s=1e-5,
    decode_token_s=2e-3,
    mixed_step_s=0.050,
    decode_step_s=0.020,
)

coefficient = st.floats(0, 1e-2, allow_subnormal=False)
profiles = st.builds(
    LatencyProfile,
    prefill_quadratic_s=st.one_of(st.just(0.0), st.floats(1e-12, 1e-4)),
    prefill_context_s=coefficient,
    prefill_token_s=st.floats(1e-7, 1e-2),
    prefill_cached_s=coefficient,
    decode_context_s=coefficient,
    decode_token_s=coefficient,
    mixed_step_s=coefficient,
    decode_step_s=coefficient,
)


def test_a_mixed_step_adds_marginal_costs_to_one_constant() -> None:
    """Prefill 100 on 50: 1e-6*100^2 + 2e-6*100*50 + 1e-3*100 + 1e-5*50 = 0.1205 s;
    decode on 200: 1e-5*200 + 2e-3 = 0.004 s; constant of a mixed step: 0.05 s.
    """
    shape = BatchShape.of_prefill(100, 50) + BatchShape.of_decode(200)

    assert BatchLatencyModel(PROFILE).predict_s(shape) == pytest.approx(0.1745)


def test_a_decode_only_step_has_its_own_constant() -> None:
    shape = BatchShape.of_decode(200) + BatchShape.of_decode(300)

    assert BatchLatencyModel(PROFILE).predict_s(shape) == pytest.approx(0.020 + 0.004 + 0.005)


def test_an_empty_step_takes_no_time() -> None:
    assert BatchLatencyModel(PROFILE).predict_s(BatchShape()) == 0.0


@given(profile=profiles, num_cached=st.integers(0, 5000), budget_s=st.floats(0, 5))
def test_most_tokens_that_fit_equal_a_binary_search(
    profile: LatencyProfile, num_cached: int, budget_s: float
) -> None:
    """Specification section 10, test 5, with a_p = 0 among the profiles."""
    model = BatchLatencyModel(profile)
    low, high = 0, 100_000_000
    while low < high:
        middle = (low + high + 1) // 2
        if model.prefill_s(middle, num_cached) <= budget_s:
            low = middle
        else:
            high = middle - 1

    assert model.max_new_tokens(num_cached, budget_s) == low


@given(profile=profiles, num_new=st.integers(1, 4000), num_cached=st.integers(0, 4000))
def test_predictions_of_parts_add_up(
    profile: LatencyProfile, num_new: int, num_cached: int
) -> None:
    model = BatchLatencyModel(profile)
    shape = BatchShape.of_prefill(num_new, num_cached) + BatchShape.of_decode(num_cached)

    parts_s = model.prefill_s(num_new, num_cached) + model.decode_s(num_cached)
    assert model.predict_s(shape) == pytest.approx(
        model.step_constant_s(has_prefill=True) + parts_s
    )


@pytest.mark.parametrize(("name", "value"), [("decode_token_s", -1e-9), ("mixed_step_s", math.nan)])
def test_an_unphysical_coefficient_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LatencyProfile.from_dict(PROFILE.to_dict() | {name: value})


def test_a_profile_in_which_prompts_cost_nothing_is_refused() -> None:
    free = {"prefill_token_s": 0.0, "prefill_quadratic_s": 0.0}

    with pytest.raises(ValueError, match="cost nothing"):
        LatencyProfile.from_dict(PROFILE.to_dict() | free)


def test_a_stored_profile_with_other_names_is_refused() -> None:
    values = PROFILE.to_dict()
    values["a_p"] = values.pop("prefill_quadratic_s")

    with pytest.raises(ValueError, match="a_p, prefill_quadratic_s"):
        LatencyProfile.from_dict(values)


def test_a_profile_survives_storing() -> None:
    assert LatencyProfile.from_dict(PROFILE.to_dict()) == PROFILE
