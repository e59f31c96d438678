"""Spec test 6: the copy budget against an exhaustive search, and the edges of its cases."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.copy_budget import CopyModel, ReloadCandidate, copy_budget
from tests.factories import make_copy_profile

RECOMPUTE_S = 0.004
"""One block of 16 tokens, computed again."""


def candidate(num_host_blocks: int, *, recompute_s: float = RECOMPUTE_S) -> ReloadCandidate:
    return ReloadCandidate(
        num_host_blocks, lambda num_blocks: 0.001 + recompute_s * (num_host_blocks - num_blocks)
    )


def budget(
    candidates: list[ReloadCandidate],
    *,
    other_work_s: float = 0.0,
    budget_s: float = 10.0,
    block_s: float = 0.001,
    start_s: float = 0.0,
) -> int:
    full_work_s = other_work_s + sum(c.work_s(c.num_host_blocks) for c in candidates)
    copies = CopyModel(make_copy_profile(block_s=block_s, start_s=start_s), num_layer_groups=4)
    return copy_budget(candidates, full_work_s=full_work_s, budget_s=budget_s, copies=copies)


def test_a_full_step_hides_what_can_be_copied_in_it() -> None:
    """Case 1: the queue fills 0.1 s, in which (0.1 - 0.01) / 0.002 = 45 blocks are copied."""
    assert budget([candidate(100)], other_work_s=5.0, budget_s=0.1, block_s=0.002,
                  start_s=0.01) == 45  # fmt: skip


def test_everything_is_reloaded_if_the_copy_hides() -> None:
    """Case 3: 100 blocks take 0.1 s, everything else takes 0.2 s."""
    assert budget([candidate(60), candidate(40)], other_work_s=0.2) == 100


def test_reloads_are_given_up_from_the_tail() -> None:
    """Case 2: two requests of 50 blocks, 1 ms a block to copy and 4 ms to compute again, 21 ms of
    other work. All copies: 100 ms against 23. Without m of the tail's, 100 - m against 23 + 4 m:
    they meet at m = 15.4."""
    assert budget([candidate(50), candidate(50)], other_work_s=0.021) in (84, 85)


def test_a_step_with_nothing_else_computes_a_part_again() -> None:
    """One request, 10 blocks, nothing else: 10 - m against 1 + 4 m ms, which meet at m = 1.8."""
    assert budget([candidate(10)]) == 8


def test_without_candidates_nothing_is_reloaded() -> None:
    assert budget([], other_work_s=1.0) == 0
    assert budget([], other_work_s=100.0) == 0


def test_the_cases_meet_without_a_gap() -> None:
    """At the queue length where case 3 ends, and at the budget where case 1 begins."""
    assert budget([candidate(100)], other_work_s=0.099) == 100
    assert budget([candidate(100)], other_work_s=0.0989) in (99, 100)
    assert budget([candidate(100)], other_work_s=0.099, budget_s=0.1) == 100


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    other_work_s=st.floats(0, 0.1),
    block_s=st.floats(0.0005, 0.01),
    recompute_s=st.floats(0.0001, 0.01),
)
def test_the_step_is_as_short_as_any_budget_makes_it(
    sizes: list[int], other_work_s: float, block_s: float, recompute_s: float
) -> None:
    """Case 2: within one block of the best of all budgets, spent from the head."""
    candidates = [candidate(size, recompute_s=recompute_s) for size in sizes]

    def step_s(cap: int) -> float:
        left, compute_s = cap, other_work_s
        for each in candidates:
            num_blocks = min(left, each.num_host_blocks)
            left -= num_blocks
            compute_s += each.work_s(num_blocks)
        return max(block_s * cap, compute_s)

    found = budget(candidates, other_work_s=other_work_s, budget_s=math.inf, block_s=block_s)

    best_s = min(step_s(cap) for cap in range(sum(sizes) + 1))
    assert 0 <= found <= sum(sizes)
    assert step_s(found) <= best_s + max(block_s, recompute_s) + 1e-9


@pytest.mark.parametrize("num_blocks", [0, 1, 7, 400])
def test_what_fits_into_a_time_takes_no_longer(num_blocks: int) -> None:
    """The inverse of equation (15)."""
    copies = CopyModel(make_copy_profile(block_s=0.003, start_s=0.002), num_layer_groups=4)

    assert copies.max_onboard_blocks(copies.onboard_s(num_blocks) + 1e-9) == num_blocks
    assert copies.onboard_s(copies.max_onboard_blocks(0.5)) <= 0.5


def test_only_the_first_layer_group_waits() -> None:
    copies = CopyModel(make_copy_profile(block_s=0.001), num_layer_groups=4)

    assert copies.stall_s(8) == pytest.approx(0.002)
    assert copies.stall_s(0) == 0
