from __future__ import annotations

import numpy as np
import pytest

from orchestrator.core.slo import PriorityClass, Slo
from orchestrator.simulation.workload import (
    ClassShare,
    PrioritiesPer,
    Workload,
    make_workload,
)
from tests.orchestrator.simulation.workloads import make_trace

SHARES = [
    ClassShare(PriorityClass("high", 2.0, Slo(1.0, 0.05)), share=1.0),
    ClassShare(PriorityClass("low", 1.0, Slo(2.0, 0.10)), share=3.0),
]


def draw(num_requests: int, *, per: PrioritiesPer, seed: int = 0) -> Workload:
    return make_workload(
        make_trace(
            np.arange(float(num_requests)).tolist(),
            num_input_tokens=90,
            clients=[f"client-{i % 10}" for i in range(num_requests)],
        ),
        SHARES,
        per=per,
        max_model_len=100,
        max_output_tokens=64,
        random=np.random.default_rng(seed),
    )


def test_classes_are_drawn_in_proportion_to_their_shares() -> None:
    """One in four of 4,000 is high: 1,000, give or take 3.6 standard deviations of 27."""
    workload = draw(4000, per=PrioritiesPer.REQUEST)

    assert (workload.class_index == 0).sum() == pytest.approx(1000, abs=100)


def test_a_client_keeps_its_class() -> None:
    workload = draw(400, per=PrioritiesPer.CLIENT)

    classes_of = {
        client: {
            workload.class_of(i).name for i in range(400) if workload.trace.clients[i] == client
        }
        for client in workload.trace.clients
    }
    assert all(len(names) == 1 for names in classes_of.values())
    assert set.union(*classes_of.values()) == {"high", "low"}


def test_the_same_seed_draws_the_same_classes() -> None:
    first, again, other = (
        draw(100, per=PrioritiesPer.REQUEST, seed=seed).class_index.tolist() for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other


def test_a_request_shows_its_limit_but_not_its_length() -> None:
    """The prompt of 90 leaves 10 of 100 tokens; the 3 that will come are nowhere in it."""
    request = draw(10, per=PrioritiesPer.REQUEST).request(7)

    assert request.request_id == "0000007"
    assert request.arrival_s == 7.0
    assert request.num_prompt_tokens == 90
    assert request.spec.sampling.max_tokens == 10
