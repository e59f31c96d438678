from __future__ import annotations

import math

import pytest

from engines.simulated import STOP_TOKEN_ID, SimulatedEngine, StepTimeError
from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.request import FinishReason
from tests.factories import make_capabilities, make_profile, make_request, make_scheduler

PROFILE = LatencyProfile(
    prefill_quadratic_s=1e-6,
    prefill_context_s=2e-6,
    prefill_token_s=1e-3,
    prefill_cached_s=1e-5,
    decode_context_s=1e-5,
    decode_token_s=1e-3,
    mixed_step_s=0.02,
    decode_step_s=0.01,
)


def make_engine(
    profile: LatencyProfile = PROFILE,
    *,
    output_lengths: dict[str, int] | None = None,
    error: StepTimeError | None = None,
) -> SimulatedEngine:
    return SimulatedEngine(
        make_capabilities(),
        BatchLatencyModel(profile),
        output_lengths=output_lengths or {},
        error=error or StepTimeError(),
    )


def test_a_request_stops_at_its_own_length() -> None:
    """Three tokens are known to the engine alone; the request would take eight."""
    request = make_request(max_tokens=8, stop_token_ids=(STOP_TOKEN_ID,))
    scheduler = make_scheduler(request)
    engine = make_engine(output_lengths={"r": 3})
    events = []
    while scheduler.has_requests:
        plan = scheduler.schedule(0.0)
        events += scheduler.update_from_output(plan, engine.step(plan), 0.0)

    assert [len(event.new_token_ids) for event in events] == [1, 1, 1]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.STOP]


def test_a_chunk_before_the_last_gives_no_token() -> None:
    request = make_request(num_prompt_tokens=3000)
    scheduler = make_scheduler(request, profile=make_profile(prefill_token_s=1e-5))
    plan = scheduler.schedule(0.0)
    assert plan.num_new_tokens < 3000

    assert make_engine().step(plan).new_token_ids == {}


def test_a_step_takes_what_its_scheduler_predicted_if_both_have_one_profile() -> None:
    scheduler = make_scheduler(
        make_request("a", num_prompt_tokens=700, max_tokens=5),
        make_request("b", num_prompt_tokens=90, max_tokens=9),
        profile=PROFILE,
    )
    engine = make_engine()
    now_s = 0.0
    while scheduler.has_requests:
        plan = scheduler.schedule(now_s)
        output = engine.step(plan)
        now_s += output.step_s
        scheduler.update_from_output(plan, output, now_s)

        assert output.step_s == pytest.approx(plan.predicted_step_s)
    assert engine.busy_s == pytest.approx(now_s)


def test_bias_makes_every_step_longer() -> None:
    """1.5 times 20 ms and 100 prompt tokens of 1 ms and their squares: 1.5 * 0.13."""
    plan = make_scheduler(make_request(num_prompt_tokens=100)).schedule(0.0)

    assert make_engine(error=StepTimeError(bias=1.5)).step(plan).step_s == pytest.approx(0.195)


def test_noise_depends_on_the_seed_alone_and_keeps_the_mean() -> None:
    """Log-normal with sigma 0.2 and mean 1: over 10,000 steps within 1 % of 0.13 s."""
    plan = make_scheduler(make_request(num_prompt_tokens=100)).schedule(0.0)
    engines = [make_engine(error=StepTimeError(noise=0.2, seed=seed)) for seed in (1, 1, 2)]

    first, again, other = ([e.step(plan).step_s for _ in range(10_000)] for e in engines)

    assert first == again
    assert first != other
    assert math.fsum(first) / len(first) == pytest.approx(0.13, rel=0.01)
    assert min(first) < 0.12
    assert max(first) > 0.14


@pytest.mark.parametrize(("bias", "noise"), [(0.0, 0.0), (math.inf, 0.0), (1.0, -0.1)])
def test_an_impossible_error_is_refused(bias: float, noise: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        StepTimeError(bias=bias, noise=noise)
