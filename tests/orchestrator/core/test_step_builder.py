from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.step_builder import StepBuilder, StepRules
from tests.factories import make_capabilities, make_profile, make_request


def make_step(token_us: int, num_tokens: int) -> tuple[StepBuilder, float]:
    """A step with a budget for just so many tokens, and the budget."""
    token_s = token_us * 1e-6
    model = BatchLatencyModel(
        make_profile(prefill_token_s=token_s, decode_token_s=token_s, step_constant_s=10_000e-6)
    )
    budget_s = (10_000 + token_us * num_tokens) * 1e-6
    return StepBuilder(model, make_capabilities(), StepRules(budget_s=budget_s)), budget_s


@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8), token_us=st.integers(1, 2_000))
@example(lengths=[29, 23], token_us=334)
@example(lengths=[12, 11], token_us=819)
@example(lengths=[7, 17], token_us=773)
def test_prefills_that_fit_never_exceed_the_budget(lengths: list[int], token_us: int) -> None:
    """Not by a rounding error either."""
    step, budget_s = make_step(token_us, sum(lengths))

    for index, length in enumerate([*lengths, 60]):
        if num_tokens := step.num_fitting_tokens(length, 0):
            request = make_request(str(index), prompt_token_ids=range(length))
            step.add_prefill(request, num_tokens, ())

    assert step.predicted_s <= budget_s


@given(num_decodes=st.integers(1, 60), token_us=st.integers(1, 2_000))
@example(num_decodes=6, token_us=1_210)
@example(num_decodes=2, token_us=1_786)
def test_decodes_that_fit_one_by_one_never_exceed_the_budget(
    num_decodes: int, token_us: int
) -> None:
    step, budget_s = make_step(token_us, num_decodes)

    while (cost_s := step.decode_cost_if_fits_s(10)) is not None:
        step.add_decode(make_request(str(len(step.scheduled))), cost_s, ())

    assert step.predicted_s <= budget_s
