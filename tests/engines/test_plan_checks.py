"""What plan checks remember; tests/engines/test_engine_contract.py has what they refuse."""

from __future__ import annotations

import pytest

from engines.plan_checks import PlanChecks
from orchestrator.core.ports import ScheduledRequest, ScheduleReasons, SchedulerOutput
from tests.factories import make_capabilities, make_request

MESSAGE = r"request r is scheduled with a block outside of the pool's 8"


def make_plan(blocks: list[int]) -> SchedulerOutput:
    part = ScheduledRequest(make_request(num_prompt_tokens=1), 0, 1, blocks)
    return SchedulerOutput(
        step_id=0,
        scheduled=(part,),
        preempted_ids=(),
        finished_ids=(),
        transfers=(),
        predicted_step_s=0.0,
        reasons=ScheduleReasons(),
    )


def test_a_block_that_comes_later_is_looked_at() -> None:
    checks = PlanChecks(make_capabilities(num_device_blocks=8))
    blocks = [1]
    checks.check(make_plan(blocks))

    blocks.append(8)

    with pytest.raises(ValueError, match=MESSAGE):
        checks.check(make_plan(blocks))


def test_other_blocks_of_a_known_request_are_looked_at() -> None:
    checks = PlanChecks(make_capabilities(num_device_blocks=8))
    checks.check(make_plan([1]))

    with pytest.raises(ValueError, match=MESSAGE):
        checks.check(make_plan([-1]))
