"""How predictions follow measurements."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile
from orchestrator.core.latency_correction import BatchClass, CorrectionOptions
from orchestrator.core.ports import SchedulerOutput, StepOutput
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from orchestrator.core.slo import DeadlineAnchor
from tests.factories import make_capabilities, make_profile, make_request, make_scheduler, run_step
from tests.orchestrator.core.test_latency import PROFILE

DECODES = BatchShape(num_decodes=4, decode_context=400)
PREFILL = BatchShape.of_prefill(100, 50)

shapes = st.builds(
    lambda q, k, n: (
        BatchShape.of_prefill(q, k) + BatchShape(num_decodes=n, decode_context=n * k)
        if q
        else BatchShape(num_decodes=n + 1, decode_context=n * k)
    ),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 200),
)
durations = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)


def make_shapes(seed: int = 0) -> Iterator[BatchShape]:
    """Steps of all sizes, about half of them without a prefill, without end."""
    generator = random.Random(seed)
    while True:
        num_decodes = generator.randint(1, 64)
        shape = BatchShape(
            num_decodes=num_decodes, decode_context=num_decodes * generator.randint(10, 2000)
        )
        if generator.random() < 0.5:
            shape += BatchShape.of_prefill(generator.randint(10, 500), generator.randint(0, 2000))
        yield shape


def observe_steps(
    model: BatchLatencyModel, truth: BatchLatencyModel, *, num_steps: int, noise: float = 0.0
) -> None:
    """Let the model see steps that take as long as `truth` says, times a log-normal factor."""
    generator = random.Random(1)
    for _, shape in zip(range(num_steps), make_shapes(), strict=False):
        noisy = math.exp(generator.gauss(0, noise)) if noise else 1.0
        model.observe(shape, truth.predict_s(shape) * noisy)


def scaled(factor: float, *names: str) -> LatencyProfile:
    """Return PROFILE with the named coefficients, or all, times a factor."""
    values = PROFILE.to_dict()
    return LatencyProfile.from_dict(
        values | {name: factor * values[name] for name in names or values}
    )


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.5, 5.0])
def test_predictions_converge_on_an_engine_slower_or_faster_than_profiled(factor: float) -> None:
    model, truth = BatchLatencyModel(PROFILE), BatchLatencyModel(scaled(factor))

    observe_steps(model, truth, num_steps=150)

    for shape in (PREFILL, DECODES, PREFILL + DECODES):
        assert model.predict_s(shape) == pytest.approx(truth.predict_s(shape), rel=0.02)


def test_one_step_moves_the_factor_by_a_tenth_of_its_error() -> None:
    """0.9 * 1 + 0.1 * 2 = 1.1; the first step only introduces its kind."""
    model = BatchLatencyModel(PROFILE)
    predicted_s = model.predict_s(DECODES)
    model.observe(DECODES, 2 * predicted_s)

    model.observe(DECODES, 2 * predicted_s)

    assert model.predict_s(DECODES) == pytest.approx(1.1 * predicted_s)


def test_the_factor_of_one_batch_class_leaves_the_other_alone() -> None:
    """Twenty decode-only steps at twice their time: 2 - 0.9^20 = 1.878."""
    model, profiled = BatchLatencyModel(PROFILE), BatchLatencyModel(PROFILE)

    for _ in range(21):
        model.observe(DECODES, 2 * profiled.predict_s(DECODES))

    assert model.predict_s(DECODES) == pytest.approx(1.8784 * profiled.predict_s(DECODES), rel=1e-3)
    mixed = PREFILL + DECODES
    assert model.predict_s(mixed) == profiled.predict_s(mixed)
    # Decodes are priced as parts of the class of their step.
    assert model.decode_s(100) * model.mixed_decode_factor == pytest.approx(profiled.decode_s(100))


def test_the_slow_layer_finds_the_coefficients_that_changed() -> None:
    """Prompt tokens cost twice, contexts of decodes half as much as profiled.

    After 2,000 steps with 5 % noise both classes predict within 5 % shapes far larger than any
    that was seen. A factor per class cannot: it is at least 30 % off for one of the two.
    """
    values = scaled(2.0, "prefill_token_s").to_dict()
    values["decode_context_s"] *= 0.5
    truth = BatchLatencyModel(LatencyProfile.from_dict(values))
    model = BatchLatencyModel(PROFILE)

    observe_steps(model, truth, num_steps=2000, noise=0.05)

    for shape in (
        BatchShape.of_prefill(1000, 0),
        BatchShape.of_prefill(500, 0) + BatchShape(num_decodes=200, decode_context=200_000),
        BatchShape(num_decodes=200, decode_context=800_000),
        BatchShape(num_decodes=200, decode_context=2000),
    ):
        assert model.predict_s(shape) == pytest.approx(truth.predict_s(shape), rel=0.05)


def test_learned_coefficients_take_the_correction_over_from_the_factor() -> None:
    """Both layers see the same engine, three times slower; together they are not nine times."""
    model, truth = BatchLatencyModel(PROFILE), BatchLatencyModel(scaled(3.0))

    for num_seen, shape in zip(range(300), make_shapes(), strict=False):
        if num_seen > 100:
            assert model.predict_s(shape) == pytest.approx(truth.predict_s(shape), rel=0.15)
        model.observe(shape, truth.predict_s(shape))


def test_corrections_stay_within_their_bounds() -> None:
    """Bounds [0.5, 2] on both layers; an engine 100 times slower pushes both to the upper one.

    At most the factor and the coefficients are at 2 each.
    """
    model = BatchLatencyModel(PROFILE, CorrectionOptions(min_factor=0.5, max_factor=2.0))
    profiled = BatchLatencyModel(PROFILE)

    observe_steps(model, BatchLatencyModel(scaled(100.0)), num_steps=300)

    for shape in (PREFILL, DECODES):
        assert 1.9 <= model.predict_s(shape) / profiled.predict_s(shape) <= 4.0


def test_bounds_of_one_turn_the_correction_off() -> None:
    model = BatchLatencyModel(PROFILE, CorrectionOptions(min_factor=1.0, max_factor=1.0))
    profiled = BatchLatencyModel(PROFILE)

    observe_steps(model, BatchLatencyModel(scaled(3.0)), num_steps=100)

    for shape in (PREFILL, DECODES):
        assert model.predict_s(shape) == profiled.predict_s(shape)


def test_an_engine_that_keeps_its_profile_is_never_corrected() -> None:
    """Not even by rounding, so that an exact simulation stays exact."""
    model, truth = BatchLatencyModel(PROFILE), BatchLatencyModel(PROFILE)

    for _, shape in zip(range(200), make_shapes(), strict=False):
        model.observe(shape, truth.predict_s(shape) * (1 + 1e-14))

    for shape in (PREFILL, DECODES):
        assert model.predict_s(shape) == truth.predict_s(shape)
    assert model.upper_factor(0.9, has_prefill=True) == 1.0


@settings(max_examples=50)
@given(st.lists(st.tuples(shapes, durations), min_size=1, max_size=150))
def test_predictions_stay_finite_and_above_zero_whatever_is_measured(
    steps: list[tuple[BatchShape, float]],
) -> None:
    """Each layer stays in [0.25, 8], so a prediction within [1/16, 64] of the profile's."""
    model, profiled = BatchLatencyModel(PROFILE), BatchLatencyModel(PROFILE)

    for shape, measured_s in steps:
        model.observe(shape, measured_s)

    for shape, _ in steps:
        ratio = model.predict_s(shape) / profiled.predict_s(shape)
        assert 0.999 / 16 <= ratio <= 64.001
    for has_prefill in (True, False):
        assert 1.0 <= model.upper_factor(0.9, has_prefill=has_prefill) <= 8.0


@settings(max_examples=50)
@given(
    steps=st.lists(st.tuples(shapes, st.floats(1e-3, 10)), min_size=40, max_size=80),
    num_cached=st.integers(0, 5000),
    budget_s=st.floats(0, 20),
)
def test_most_tokens_that_fit_equal_a_binary_search_after_corrections(
    steps: list[tuple[BatchShape, float]], num_cached: int, budget_s: float
) -> None:
    model = BatchLatencyModel(PROFILE)
    for shape, measured_s in steps:
        model.observe(shape, measured_s)
    low, high = 0, 10_000_000
    while low < high:
        middle = (low + high + 1) // 2
        if model.prefill_s(middle, num_cached) <= budget_s:
            low = middle
        else:
            high = middle - 1

    assert model.max_new_tokens(num_cached, budget_s) == low


def test_the_same_observations_give_the_same_predictions() -> None:
    models = [BatchLatencyModel(PROFILE), BatchLatencyModel(PROFILE)]
    truth = BatchLatencyModel(scaled(1.7, "prefill_token_s"))

    for model in models:
        observe_steps(model, truth, num_steps=200, noise=0.2)

    assert models[0].predict_s(PREFILL + DECODES) == models[1].predict_s(PREFILL + DECODES)
    assert models[0].errors() == models[1].errors()


def test_the_first_step_of_a_kind_is_not_believed() -> None:
    """It may have compiled a kernel: 30 s say nothing about the next one."""
    model = BatchLatencyModel(PROFILE)
    predicted_s = model.predict_s(DECODES)

    model.observe(DECODES, 30.0)

    assert model.predict_s(DECODES) == predicted_s
    assert model.errors() == ()


@pytest.mark.parametrize("measured_s", [0.0, -1.0, math.inf, math.nan])
def test_a_duration_that_is_none_is_refused(measured_s: float) -> None:
    with pytest.raises(ValueError, match="measured_s"):
        BatchLatencyModel(PROFILE).observe(DECODES, measured_s)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_the_upper_factor_covers_its_share_of_the_steps_that_follow(quantile: float) -> None:
    """2,000 steps with 20 % noise, judged before they are seen. Coverage is the wanted share
    up to sampling error, 3 * sqrt(0.25 / 2000) = 3.4 % at most, and the correction's own noise.
    """
    model, truth = BatchLatencyModel(PROFILE), BatchLatencyModel(PROFILE)
    generator = random.Random(2)
    num_covered = num_judged = 0

    for index, shape in zip(range(2300), make_shapes(), strict=False):
        measured_s = truth.predict_s(shape) * math.exp(generator.gauss(0, 0.2))
        if index >= 300:
            has_prefill = shape.num_prefills > 0
            factor = model.upper_factor(quantile, has_prefill=has_prefill)
            num_judged += 1
            num_covered += measured_s <= factor * model.predict_s(shape)
        model.observe(shape, measured_s)

    assert quantile - 0.035 <= num_covered / num_judged <= quantile + 0.07


def test_a_short_window_gives_no_upper_factor() -> None:
    """The first of 20 equal steps introduces its kind, 19 are remembered."""
    model = BatchLatencyModel(PROFILE)
    for index in range(20):
        model.observe(DECODES, (0.03, 0.3)[index % 2])

    assert model.upper_factor(0.5, has_prefill=False) == 1.0

    model.observe(DECODES, 0.3)

    assert model.upper_factor(0.5, has_prefill=False) > 1.0


def test_errors_are_quantiles_over_the_last_steps_of_each_class() -> None:
    """Corrections off: of 20 remembered steps 10 took what was predicted, 9 took 1.5 and one 3
    times as much; what was before them is forgotten.
    """
    options = CorrectionOptions(min_factor=1.0, max_factor=1.0, window_steps=20)
    model = BatchLatencyModel(PROFILE, options)
    predicted_s = model.predict_s(DECODES)

    for ratio in [1.0] + [7.0] * 20 + [3.0] + [1.5] * 9 + [1.0] * 10:
        model.observe(DECODES, ratio * predicted_s)

    (errors,) = model.errors()
    assert (errors.batch_class, errors.num_steps) == (BatchClass.DECODE_ONLY, 20)
    assert (errors.p50, errors.p90, errors.p99) == pytest.approx((0.0, 0.5, 2.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("momentum", 1.0), ("min_factor", 0.0), ("max_factor", 0.5), ("forgetting", 1.0),
     ("window_steps", 5)],
)  # fmt: skip
def test_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        CorrectionOptions(**{name: value})  # type: ignore[arg-type]


def test_a_scheduler_learns_from_its_steps() -> None:
    """An engine three times slower than profiled: after 60 steps plans say so."""
    scheduler = make_scheduler(make_request("r", num_prompt_tokens=500, max_tokens=100))
    now_s = 0.0
    for _ in range(60):
        plan = scheduler.schedule(now_s)
        profiled_s = BatchLatencyModel(make_profile()).predict_s(plan.shape)
        now_s = finish(scheduler, plan, now_s, step_s=3 * profiled_s)

    plan = scheduler.schedule(now_s)

    profiled_s = BatchLatencyModel(make_profile()).predict_s(plan.shape)
    assert plan.predicted_step_s == pytest.approx(3 * profiled_s, rel=0.02)


def test_a_scheduler_does_not_teach_the_model_it_was_made_with() -> None:
    """One model may make the schedulers of many nodes."""
    model = BatchLatencyModel(make_profile())
    scheduler = SlideBatchingScheduler(make_capabilities(), model)
    scheduler.add_request(make_request("r", max_tokens=20))
    now_s = 0.0

    for _ in range(10):
        _, now_s = run_step(scheduler, now_s, step_s=0.2)

    assert [errors.num_steps for errors in scheduler.step_errors()] == [8]
    assert model.errors() == ()


@pytest.mark.parametrize("step_s", [0.2, 0.0])
def test_failed_and_unmeasured_steps_teach_nothing(step_s: float) -> None:
    """`bad` fails in each of 10 steps, or the engine measured nothing."""
    scheduler = make_scheduler(make_request("good", max_tokens=20))
    now_s = 0.0

    for index in range(10):
        scheduler.add_request(make_request(f"bad-{index}", arrival_s=now_s))
        plan = scheduler.schedule(now_s)
        failed = {f"bad-{index}": "injected"} if step_s else {}
        now_s = finish(scheduler, plan, now_s, step_s=step_s, failed=failed)

    assert scheduler.step_errors() == ()


def test_a_plan_carries_the_sums_over_its_parts() -> None:
    """Two prompts in chunks, then as decodes: mixed and decode-only steps."""
    scheduler = make_scheduler(
        make_request("a", num_prompt_tokens=100, max_tokens=6),
        make_request("b", num_prompt_tokens=300, max_tokens=3),
        capabilities=make_capabilities(max_num_batched_tokens=64),
    )
    now_s = 0.0

    while scheduler.has_requests:
        plan = scheduler.schedule(now_s)
        expected = BatchShape()
        for part in plan.scheduled:
            if part.num_computed_tokens >= part.request.num_prompt_tokens:
                expected += BatchShape.of_decode(part.num_computed_tokens)
            else:
                expected += BatchShape.of_prefill(part.num_new_tokens, part.num_computed_tokens)
        assert plan.shape == expected
        assert plan.predicted_step_s == pytest.approx(
            BatchLatencyModel(make_profile()).predict_s(expected)
        )
        now_s = finish(scheduler, plan, now_s, step_s=plan.predicted_step_s)


@pytest.mark.parametrize(("quantile", "filled_s"), [(None, 0.280), (0.9, 0.280 / 1.2)])
def test_a_step_is_filled_up_to_the_quantile_that_was_asked_for(
    quantile: float | None, filled_s: float
) -> None:
    """Steps take alternately 0.8 and 1.2 times their mean. A decode is always due in 280 ms.

    By the mean a step is filled to 280 ms and every other one is late; so that 9 of 10 are in
    time it may take 280 / 1.2 = 233 ms on average. What the budget is does not change.
    """
    decode = make_request("decode", max_tokens=100, tpot_s=0.300)
    scheduler = make_scheduler(
        decode,
        *(
            make_request(f"prompt-{i}", num_prompt_tokens=7000, ttft_s=math.inf, tpot_s=math.inf)
            for i in range(2)
        ),
        options=SlideBatchingOptions(min_chunk_tokens=0, budget_quantile=quantile),
    )
    run_step(scheduler, 0.0)

    for index in range(40):
        now_s = decode.next_token_deadline_s(DeadlineAnchor.MIN) - 0.280
        plan = scheduler.schedule(now_s)
        finish(scheduler, plan, now_s, step_s=plan.predicted_step_s * (0.8, 1.2)[index % 2])

    assert plan.reasons.latency_budget_s == pytest.approx(0.280)
    # The factor of the fast layer swings by 2 % with such noise.
    assert plan.predicted_step_s == pytest.approx(filled_s, rel=0.03)


@pytest.mark.parametrize("quantile", [0.4, 1.0, math.nan])
def test_a_budget_quantile_out_of_range_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="budget_quantile"):
        SlideBatchingOptions(budget_quantile=quantile)


def finish(
    scheduler: SlideBatchingScheduler,
    plan: SchedulerOutput,
    now_s: float,
    *,
    step_s: float,
    failed: Mapping[str, str] | None = None,
) -> float:
    """Account for a step of the given duration; return its end."""
    output = StepOutput(
        step_id=plan.step_id,
        new_token_ids={p.request_id: (7,) for p in plan.scheduled if p.is_sampled},
        step_s=step_s,
        failed=failed or {},
    )
    scheduler.update_from_output(plan, output, now_s + step_s)
    return now_s + step_s
