"""The invariants of every scheduler, under random life: arrivals, steps, aborts, failures."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.deadline_scheduler import DeadlineOptions
from orchestrator.core.errors import RequestRejected
from orchestrator.core.kv_options import KVCacheOptions, KVOffload
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities, SchedulerOutput, StepOutput
from orchestrator.core.request import FinishReason
from orchestrator.core.scheduler_factory import (
    SCHEDULER_NAMES,
    SchedulerName,
    SchedulerOptions,
    make_scheduler,
)
from orchestrator.core.slide_batching import SlideBatchingOptions
from tests.factories import (
    make_capabilities,
    make_copy_profile,
    make_profile,
    make_request,
    run_step,
)

MODEL = BatchLatencyModel(make_profile())


def make(name: SchedulerName, capabilities: EngineCapabilities) -> BatchScheduler:
    """With a minimum chunk that fits into the small steps of these tests."""
    options: SchedulerOptions | None = None
    if name == "slide-batching":
        options = SlideBatchingOptions(min_chunk_tokens=3)
    elif name in DEADLINE_SCHEDULERS:
        options = DeadlineOptions(min_chunk_tokens=3)
    return make_scheduler(name, options, capabilities, MODEL)


STOP_TOKEN_ID = 99
DEADLINE_SCHEDULERS = {
    "fair-batching", "edf", "sjf", "density", "decode-first-edf", "decode-first-density",
    "urgency-priority",
}  # fmt: skip


class SchedulerMachine(RuleBasedStateMachine):
    """Drives one scheduler; the KV pool is so small that preemption is common."""

    @initialize(
        name=st.sampled_from(SCHEDULER_NAMES),
        num_blocks=st.integers(4, 20),
        max_tokens=st.integers(8, 64),
        max_seqs=st.integers(1, 6),
        num_host_blocks=st.sampled_from([0, 3, 40]),
        kv_options=st.builds(
            KVCacheOptions,
            prefix_caching=st.booleans(),
            offload=st.sampled_from(KVOffload),
            copy_budget=st.booleans(),
            max_offload_backlog_s=st.sampled_from([0.0, 0.05, 10.0]),
            parked_rank_fraction=st.sampled_from([0.0, 0.5, 1.0]),
        ),
    )
    def start(
        self,
        name: SchedulerName,
        num_blocks: int,
        max_tokens: int,
        max_seqs: int,
        num_host_blocks: int,
        kv_options: KVCacheOptions,
    ) -> None:
        self.capabilities = make_capabilities(
            num_device_blocks=num_blocks,
            block_size_tokens=4,
            max_num_batched_tokens=max_tokens,
            max_num_seqs=max_seqs,
            max_model_len=64,
            num_host_blocks=num_host_blocks,
        )
        self.scheduler = make(name, self.capabilities)
        self.scheduler.use_kv_options(kv_options, make_copy_profile())
        self.offloads: list[int] = []  # on their way
        self.now_s = 0.0
        self.num_added = 0
        self.live: dict[str, int] = {}  # request_id -> tokens delivered

    @rule(
        num_prompt_tokens=st.integers(0, 70),
        max_tokens=st.integers(1, 12),
        weight=st.sampled_from([0.0, 1.0, 5.0]),
        ttft_s=st.sampled_from([0.01, 0.1, 1.0, float("inf")]),
    )
    def add(self, num_prompt_tokens: int, max_tokens: int, weight: float, ttft_s: float) -> None:
        request = make_request(
            f"r{self.num_added}",
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            weight=weight,
            ttft_s=ttft_s,
            arrival_s=self.now_s,
            client_id="ab"[self.num_added % 2],
            cache_salt="ab"[self.num_added % 2],
            stop_token_ids=(STOP_TOKEN_ID,),
        )
        self.num_added += 1
        try:
            self.scheduler.add_request(request)
        except RequestRejected:
            return
        self.live[request.request_id] = 0

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([*self.live, "unknown"]))

        event = self.scheduler.abort_request(request_id)

        assert (event is not None) == (request_id in self.live)
        self.live.pop(request_id, None)

    @rule(data=st.data(), passed_s=st.floats(0, 2))
    def step(self, data: st.DataObject, passed_s: float) -> None:
        self.now_s += passed_s
        plan = self.scheduler.schedule(self.now_s)

        # Invariant 5: within budget, or exactly one request; caps always.
        assert plan.predicted_step_s <= plan.reasons.latency_budget_s or len(plan.scheduled) == 1
        waits_for_copies = bool(plan.transfers or self.offloads)
        assert bool(plan.scheduled) == bool(self.live) or (self.live and waits_for_copies)
        self.check_parts(plan)
        self.end_step(data, plan)

    def check_parts(self, plan: SchedulerOutput) -> None:
        """What must be so of a plan that an engine is given."""
        caps = self.capabilities
        assert plan.num_new_tokens <= caps.max_num_batched_tokens
        assert len(plan.scheduled) <= caps.max_num_seqs
        part_ids = [p.request_id for p in plan.scheduled]
        assert len(set(part_ids)) == len(part_ids)
        assert set(part_ids) <= self.live.keys()
        assert set(plan.preempted_ids).isdisjoint(part_ids)
        # A block that is written to has one owner, and nobody copies it meanwhile.
        written = [
            p.block_ids[index]
            for p in plan.scheduled
            for index in range(
                p.num_computed_tokens // caps.block_size_tokens,
                -(-(p.num_computed_tokens + p.num_new_tokens) // caps.block_size_tokens),
            )
        ]
        copied = [b for t in plan.transfers for b in t.device_block_ids]
        assert len(set(written)) == len(written)
        assert set(written).isdisjoint(copied)
        for part in plan.scheduled:
            num_covered = len(part.block_ids) * caps.block_size_tokens
            assert part.num_computed_tokens + part.num_new_tokens <= num_covered
            assert part.num_new_tokens >= 1

    def end_step(self, data: st.DataObject, plan: SchedulerOutput) -> None:
        """Let a step end in any way, and account for it."""
        part_ids = [p.request_id for p in plan.scheduled]
        failed_id = data.draw(st.sampled_from([None, *part_ids]), label="failed")
        token_ids = {
            p.request_id: (data.draw(st.sampled_from([1, STOP_TOKEN_ID]), label="token"),)
            for p in plan.scheduled
            if p.is_sampled and p.request_id != failed_id
        }
        completed, failed = self._end_copies(data, plan)
        lost_ids = {t.request_id for t in plan.transfers if t.transfer_id in failed
                    and t.direction is TransferDirection.ONBOARD}  # fmt: skip
        output = StepOutput(
            step_id=plan.step_id,
            new_token_ids={i: tokens for i, tokens in token_ids.items() if i not in lost_ids},
            step_s=0.01,
            completed_transfers=completed,
            failed_transfers=dict.fromkeys(failed, "injected"),
            failed={} if failed_id is None or failed_id in lost_ids else {failed_id: "injected"},
        )
        self.now_s += 0.01

        for event in self.scheduler.update_from_output(plan, output, self.now_s):
            assert (event.error is not None) == (event.finish_reason is FinishReason.ERROR)
            self.live[event.request_id] += len(event.new_token_ids)
            if event.finish_reason is not None:  # invariant 6: no event after the last one
                del self.live[event.request_id]

    def _end_copies(
        self, data: st.DataObject, plan: SchedulerOutput
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return which copies ended well and which did not: all onboards, some offloads."""
        onboards = [t.transfer_id for t in plan.transfers if _is_onboard(t)]
        self.offloads += [t.transfer_id for t in plan.transfers if not _is_onboard(t)]
        least = 1 if self.offloads and not plan.scheduled and not onboards else 0
        num_ended = data.draw(st.integers(least, len(self.offloads)), label="ended offloads")
        ended, self.offloads = self.offloads[:num_ended], self.offloads[num_ended:]
        outcomes = [*onboards, *ended]
        failed = data.draw(st.sampled_from([None, *outcomes]), label="failed copy")
        return tuple(i for i in outcomes if i != failed), () if failed is None else (failed,)

    @invariant()
    def accounting_holds(self) -> None:
        """Invariants 1 and 2."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert self.scheduler.has_requests == bool(self.live)
        load = self.scheduler.load()
        assert load.num_waiting + load.num_running == len(self.live)

    def teardown(self) -> None:
        """Whatever happened, every request ends if the engine goes on, and all blocks return."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.scheduler.has_requests and not self.offloads:
                break
            _, self.now_s = run_step(self.scheduler, self.now_s, ended_copies=self.offloads)
            self.offloads = []
        load = self.scheduler.load()
        assert not self.scheduler.has_requests
        assert load.num_free_device_blocks == load.num_device_blocks


def _is_onboard(transfer: KVTransfer) -> bool:
    return transfer.direction is TransferDirection.ONBOARD


SchedulerMachine.TestCase.settings = settings(
    max_examples=400, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_request_id_in_use_is_refused(name: SchedulerName) -> None:
    scheduler = make(name, make_capabilities())
    scheduler.add_request(make_request("same"))

    with pytest.raises(RequestRejected, match="'same' is already in use"):
        scheduler.add_request(make_request("same"))
