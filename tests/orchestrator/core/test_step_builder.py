from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.step_builder import StepBuilder, StepRules
from tests.factories import make_capabilities, make_profile, make_request


@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8), token_us=st.integers(1, 2_000))
@example(lengths=[29, 23], token_us=334)
@example(lengths=[12, 11], token_us=819)
@example(lengths=[7, 17], token_us=773)
def test_prefills_that_fit_never_exceed_the_budget(lengths: list[int], token_us: int) -> None:
    """Not by a rounding error either, where the budget is just what they take."""
    model = BatchLatencyModel(
        make_profile(prefill_token_s=token_us * 1e-6, step_constant_s=10_000e-6)
    )
    budget_s = (10_000 + token_us * sum(lengths)) * 1e-6
    step = StepBuilder(model, make_capabilities(), StepRules(budget_s=budget_s))

    for index, length in enumerate([*lengths, 60]):
        if num_tokens := step.num_fitting_tokens(length, 0):
            request = make_request(str(index), prompt_token_ids=range(length))
            step.add_prefill(request, num_tokens, ())

    assert step.predicted_s <= budget_s
