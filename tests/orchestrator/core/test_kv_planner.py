from __future__ import annotations

import pytest

from orchestrator.core.kv_options import KVCacheOptions
from orchestrator.core.kv_transfer import TransferDirection
from orchestrator.core.ports import SchedulerOutput
from tests.factories import (
    make_capabilities,
    make_copy_profile,
    make_request,
    make_scheduler,
    run_step,
)


def resumption(options: KVCacheOptions) -> SchedulerOutput:
    """Return the step in which a preempted request goes on.

    `low` has computed its 150 prompt tokens when `high` takes all ten blocks, for one step. Nine
    full blocks of `low` are on the host by then; 7 of its 151 tokens are not. A block takes 50 ms
    to come back, a token 1 ms to compute and a step 10 ms beside that.
    """
    scheduler = make_scheduler(
        capabilities=make_capabilities(num_device_blocks=10, num_host_blocks=20)
    )
    scheduler.use_kv_options(options, make_copy_profile(block_s=0.050))
    scheduler.add_request(make_request("low", num_prompt_tokens=150, max_tokens=10, tpot_s=2.0))
    _, now_s = run_step(scheduler, 0.0)
    high = make_request(
        "high", num_prompt_tokens=150, max_tokens=1, weight=4.0, ttft_s=1.0, arrival_s=now_s,
        cache_salt="another",
    )  # fmt: skip
    scheduler.add_request(high)
    while not high.num_output_tokens:
        _, now_s = run_step(scheduler, now_s)
    return scheduler.schedule(now_s)


def num_reloaded_blocks(plan: SchedulerOutput) -> int:
    return sum(
        len(transfer.device_block_ids)
        for transfer in plan.transfers
        if transfer.direction is TransferDirection.ONBOARD
    )


def test_only_what_hides_under_the_computation_is_reloaded() -> None:
    """Two blocks take 100 ms, and the 119 tokens that are left 129 ms; three would take 150 ms,
    and what is left 113 ms. The step waits for a quarter of the copy, its first layer group."""
    plan = resumption(KVCacheOptions())

    assert num_reloaded_blocks(plan) == 2
    assert plan.num_new_tokens == 119
    assert plan.predicted_step_s == pytest.approx(0.010 + 0.119 + 0.100 / 4)


def test_without_a_copy_budget_everything_is_reloaded_as_if_at_once() -> None:
    plan = resumption(KVCacheOptions(copy_budget=False))

    assert num_reloaded_blocks(plan) == 9
    assert plan.num_new_tokens == 7
    assert plan.predicted_step_s == pytest.approx(0.010 + 0.007)
