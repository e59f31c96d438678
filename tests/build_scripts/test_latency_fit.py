from __future__ import annotations

import itertools
import math

import pytest

from build_scripts.latency_fit import (
    StepSample,
    fit_latency_profile,
    mean_absolute_percentage_error,
)
from orchestrator.core.errors import EngineError
from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile

TRUTH = LatencyProfile(
    prefill_quadratic_s=2e-7,
    prefill_context_s=5e-7,
    prefill_token_s=2e-3,
    prefill_cached_s=1e-5,
    decode_context_s=1e-5,
    decode_token_s=4e-3,
    mixed_step_s=0.080,
    decode_step_s=0.060,
)


def make_samples(profile: LatencyProfile = TRUTH, *, noise: float = 0.0) -> list[StepSample]:
    """Prefills alone, decodes alone, and some of both; times off by +noise, -noise in turn."""
    prefills = [BatchShape.of_prefill(q, k) for q in (16, 64, 256) for k in (0, 512, 2048)]
    decodes = [
        sum([BatchShape.of_decode(k)] * n, BatchShape()) for n in (1, 8, 32) for k in (16, 1024)
    ]
    mixed = [prefill + decode for prefill, decode in zip(prefills, decodes, strict=False)]
    model = BatchLatencyModel(profile)
    signs = itertools.cycle([1, -1])
    return [
        StepSample(shape, model.predict_s(shape) * (1 + noise * sign))
        for shape, sign in zip(prefills + decodes + mixed, signs, strict=False)
    ]


def test_exact_times_give_back_every_coefficient() -> None:
    fitted = fit_latency_profile(make_samples())

    for name, value in TRUTH.to_dict().items():
        assert getattr(fitted, name) == pytest.approx(value, rel=1e-6), name


def test_the_error_of_the_fit_is_that_of_the_measurement() -> None:
    """Times off by 10 % up and down: no line can be much closer than 10 % to them."""
    samples = make_samples(noise=0.1)

    error = mean_absolute_percentage_error(fit_latency_profile(samples), samples)

    assert 0.05 < error < 0.11


def test_coefficients_are_never_negative() -> None:
    """The quadratic part is truly 0; noise would put it below."""
    samples = make_samples(noise=0.2)

    assert min(fit_latency_profile(samples).to_dict().values()) >= 0


def test_a_percentage_error_is_relative_to_the_measured_time() -> None:
    """Predicted 80 + 32 + 0.05 ms; measured twice that: half of it is missing."""
    shape = BatchShape.of_prefill(16, 0)
    measured_s = 2 * BatchLatencyModel(TRUTH).predict_s(shape)

    error = mean_absolute_percentage_error(TRUTH, [StepSample(shape, measured_s)])

    assert math.isclose(error, 0.5)


def test_decodes_without_a_cost_are_refused() -> None:
    """Ever larger batches in ever less time."""
    decodes = [
        StepSample(sum([BatchShape.of_decode(16)] * n, BatchShape()), 1.0 / n) for n in (1, 8, 64)
    ]
    prefills = [StepSample(BatchShape.of_prefill(q, 0), 0.01 * q) for q in (16, 64)]

    with pytest.raises(EngineError, match="gives decodes no cost"):
        fit_latency_profile(decodes + prefills)


def test_prompt_tokens_without_a_cost_are_refused() -> None:
    prefills = [StepSample(BatchShape.of_prefill(q, 0), 0.1) for q in (16, 64, 256)]
    decodes = [
        StepSample(sum([BatchShape.of_decode(16)] * n, BatchShape()), 0.1 + 0.01 * n)
        for n in (1, 8)
    ]

    with pytest.raises(EngineError, match="prompts would cost nothing"):
        fit_latency_profile(prefills + decodes)
