"""Planning a step while the one before runs: the invariants of every scheduler hold all the same,
and whatever happens in the meantime, an engine is given only what it can run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from engines.plan_checks import PlanChecks, check_transfers
from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.errors import RequestRejected
from orchestrator.core.kv_options import KVCacheOptions
from orchestrator.core.kv_transfer import KVTransfer
from orchestrator.core.latency import BatchShape
from orchestrator.core.ports import RequestEvent, SchedulerOutput, StepOutput
from orchestrator.core.request import FinishReason, Request
from tests.factories import (
    make_capabilities,
    make_copy_profile,
    make_request,
    make_scheduler,
    run_step,
)
from tests.orchestrator.core.test_scheduler_invariants import STOP_TOKEN_ID, SchedulerMachine


class AheadMachine(SchedulerMachine):
    """Requests come and go at any time: while a step runs, before the next is planned and after."""

    running: SchedulerOutput | None = None
    ahead: SchedulerOutput | None = None

    @precondition(lambda self: self.running is None)
    @rule(passed_s=st.floats(0, 2))
    def step(self, passed_s: float) -> None:
        """Start one with nothing planned ahead."""
        self.now_s += passed_s
        self.begin(self.scheduler.schedule(self.now_s))

    @precondition(lambda self: self.running is not None and self.ahead is None)
    @rule()
    def plan_ahead(self) -> None:
        self.ahead = self.scheduler.schedule(self.now_s)
        PlanChecks(self.capabilities).check(self.ahead, is_ahead=True)

    @precondition(lambda self: self.running is not None)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        running, ahead = self.running, self.ahead
        self.running = self.ahead = None
        assert running is not None

        self.end_step(data, running)

        if ahead is not None and (plan := self.scheduler.revise(ahead)) is not None:
            self.begin(plan)

    def begin(self, plan: SchedulerOutput) -> None:
        """Give a plan to an engine that checks it, if it could not run."""
        self.check_parts(plan)
        PlanChecks(self.capabilities).check(plan)
        self.transfers = getattr(self, "transfers", {})
        in_flight: list[KVTransfer] = [self.transfers[number] for number in self.offloads]
        check_transfers(plan, self.capabilities, in_flight)
        self.transfers |= {t.transfer_id: t for t in plan.transfers}
        self.running = plan
        self.scheduler.begin(plan, self.now_s)

    def teardown(self) -> None:
        if self.running is not None:
            end(self.scheduler, self.running, ended_copies=self.offloads)
            self.offloads = []
        if self.ahead is not None and (plan := self.scheduler.revise(self.ahead)) is not None:
            end(self.scheduler, plan)
        super().teardown()


AheadMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestAheadMachine = AheadMachine.TestCase


def end(
    scheduler: BatchScheduler,
    plan: SchedulerOutput,
    *,
    token_id: int = 7,
    failed: Sequence[str] = (),
    ended_copies: Sequence[int] = (),
) -> list[RequestEvent]:
    """End a step at 0 s as an engine would that works, but for these requests."""
    output = StepOutput(
        step_id=plan.step_id,
        new_token_ids={
            p.request_id: (token_id,)
            for p in plan.scheduled
            if p.is_sampled and p.request_id not in failed
        },
        step_s=0.0,  # tells the latency model nothing
        completed_transfers=(*ended_copies, *(t.transfer_id for t in plan.transfers)),
        failed=dict.fromkeys(failed, "injected"),
    )
    return scheduler.update_from_output(plan, output, 0.0)


def start(*requests: Request) -> tuple[BatchScheduler, SchedulerOutput]:
    """Return a scheduler whose first step, with all of these requests, runs."""
    scheduler = make_scheduler(*requests)
    plan = scheduler.schedule(0.0)
    assert len(plan.scheduled) == len(requests)
    scheduler.begin(plan, 0.0)
    return scheduler, plan


def test_the_next_step_goes_on_from_a_token_that_is_not_known_yet() -> None:
    request = make_request("r", num_prompt_tokens=5, max_tokens=3)
    scheduler, running = start(request)

    (part,) = scheduler.schedule(0.0).scheduled

    assert (part.num_computed_tokens, part.num_new_tokens) == (5, 1)
    assert request.num_output_tokens == 1
    assert request.output_token_ids == []
    end(scheduler, running)
    assert part.is_sampled
    assert list(part.token_ids) == [7]


def test_a_first_token_is_expected_when_its_step_ends_and_made_when_it_has() -> None:
    request = make_request("r")
    scheduler = make_scheduler(request)
    plan = scheduler.schedule(0.0)

    scheduler.begin(plan, 0.5)
    assert request.first_token_s == 0.5

    scheduler.update_from_output(plan, StepOutput(plan.step_id, {"r": (7,)}, 0.0), 0.75)
    assert request.first_token_s == 0.75


def test_nothing_is_planned_for_a_request_that_gets_its_last_token() -> None:
    request = make_request("r", max_tokens=1)
    scheduler, running = start(request)

    ahead = scheduler.schedule(0.0)

    assert not ahead.scheduled
    assert scheduler.has_requests
    assert scheduler.load().num_running == 1
    with pytest.raises(RequestRejected, match="already in use"):
        scheduler.add_request(make_request("r"))
    (event,) = end(scheduler, running)
    assert event.finish_reason is FinishReason.LENGTH
    assert scheduler.revise(ahead) is None
    assert not scheduler.has_requests


def test_a_request_can_be_aborted_while_it_gets_its_last_token() -> None:
    scheduler, running = start(make_request("r", max_tokens=1))

    assert scheduler.abort_request("r") is not None

    assert not scheduler.has_requests
    assert end(scheduler, running) == []
    load = scheduler.load()
    assert load.num_free_device_blocks == load.num_device_blocks


def test_what_a_stop_token_ends_is_taken_out_of_the_next_step() -> None:
    stops = make_request("stops", stop_token_ids=(STOP_TOKEN_ID,), num_prompt_tokens=9)
    goes_on = make_request("goes on", num_prompt_tokens=6)
    scheduler, running = start(stops, goes_on)
    ahead = scheduler.schedule(0.0)
    assert {part.request_id for part in ahead.scheduled} == {"stops", "goes on"}

    end(scheduler, running, token_id=STOP_TOKEN_ID)
    plan = scheduler.revise(ahead)

    assert plan is not None
    assert [part.request_id for part in plan.scheduled] == ["goes on"]
    assert plan.shape == BatchShape.of_decode(6)
    assert plan.predicted_step_s < ahead.predicted_step_s


def test_what_fails_is_taken_out_of_the_next_step() -> None:
    scheduler, running = start(make_request("a"), make_request("b"))
    ahead = scheduler.schedule(0.0)

    events = end(scheduler, running, failed=["a"])
    plan = scheduler.revise(ahead)

    assert [event.finish_reason for event in events if event.request_id == "a"] == [
        FinishReason.ERROR
    ]
    assert plan is not None
    assert [part.request_id for part in plan.scheduled] == ["b"]


def test_the_engine_learns_who_ended_though_the_step_that_was_to_tell_it_is_dropped() -> None:
    scheduler, running = start(make_request("r"), make_request("gone"))
    scheduler.abort_request("gone")
    ahead = scheduler.schedule(0.0)
    assert ahead.finished_ids == ("gone",)

    scheduler.abort_request("r")
    end(scheduler, running)

    assert scheduler.revise(ahead) is None
    scheduler.add_request(make_request("next"))
    assert scheduler.schedule(0.0).finished_ids == ("gone", "r")


def test_blocks_that_the_running_step_fills_are_offloaded_later_not_never() -> None:
    capabilities = make_capabilities(
        num_device_blocks=20, num_host_blocks=40, block_size_tokens=4, max_num_batched_tokens=64
    )
    request = make_request("r", num_prompt_tokens=41, max_tokens=20)
    scheduler = make_scheduler(capabilities=capabilities)
    scheduler.use_kv_options(KVCacheOptions(offload_threshold_blocks=1), make_copy_profile())
    scheduler.add_request(request)
    plan = scheduler.schedule(0.0)
    offloaded: list[int] = []
    for _ in range(3):
        scheduler.begin(plan, 0.0)
        ahead = scheduler.schedule(0.0)
        end(scheduler, plan)
        offloaded += [b for t in plan.transfers for b in t.device_block_ids]
        revised = scheduler.revise(ahead)
        assert revised is not None
        plan = revised

    assert len(offloaded) >= 10, "the 10 full blocks of the prompt"


def test_a_request_whose_kv_did_not_come_back_is_computed_again() -> None:
    """`low` has lost its blocks to `high` and gets them back from the host; the next step has it
    decode, but the copy fails."""
    scheduler = make_scheduler(
        capabilities=make_capabilities(num_device_blocks=10, num_host_blocks=20)
    )
    scheduler.use_kv_options(KVCacheOptions(copy_budget=False), make_copy_profile())
    low = make_request("low", num_prompt_tokens=150, max_tokens=10, tpot_s=2.0)
    scheduler.add_request(low)
    _, now_s = run_step(scheduler, 0.0)
    high = make_request("high", num_prompt_tokens=150, max_tokens=1, weight=4.0, cache_salt="b")
    scheduler.add_request(high)
    while not high.num_output_tokens:
        _, now_s = run_step(scheduler, now_s)
    running = scheduler.schedule(now_s)
    (onboard,) = running.transfers
    assert [part.request_id for part in running.scheduled] == ["low"]
    scheduler.begin(running, now_s)
    ahead = scheduler.schedule(now_s)
    assert [part.num_computed_tokens for part in ahead.scheduled] == [151]

    failed = {onboard.transfer_id: "injected"}
    output = StepOutput(running.step_id, {}, 0.0, failed_transfers=failed)
    events = scheduler.update_from_output(running, output, now_s)

    assert events == []
    assert scheduler.revise(ahead) is None
    scheduler.check_integrity()
    assert (low.num_computed_tokens, low.num_tokens, low.num_output_tokens) == (0, 151, 1)
    (part,) = scheduler.schedule(now_s).scheduled
    assert (part.num_computed_tokens, part.num_new_tokens, part.is_sampled) == (0, 151, True)


def planned(*, is_ahead: bool) -> list[tuple[str, int, int]]:
    """Return what ten steps consist of: requests, with computed and new tokens."""
    scheduler = make_scheduler(
        *(make_request(f"r{i}", num_prompt_tokens=10 + i, max_tokens=50) for i in range(5)),
        capabilities=make_capabilities(max_num_batched_tokens=24),
    )
    plans: list[SchedulerOutput] = []
    if not is_ahead:
        plans += [run_step(scheduler, 0.0, step_s=0.0)[0] for _ in range(10)]
    else:
        plan: SchedulerOutput | None = scheduler.schedule(0.0)
        for _ in range(10):
            assert plan is not None
            plans.append(plan)
            scheduler.begin(plan, 0.0)
            ahead = scheduler.schedule(0.0)
            end(scheduler, plan)
            plan = scheduler.revise(ahead)
    return [
        (part.request_id, part.num_computed_tokens, part.num_new_tokens)
        for plan in plans
        for part in plan.scheduled
    ]


def test_a_step_planned_ahead_equals_one_planned_afterwards() -> None:
    """Where nothing ends, knowing the tokens makes no difference to a plan."""
    assert planned(is_ahead=True) == planned(is_ahead=False)
