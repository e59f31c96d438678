"""A real scheduler over an engine, short of memory, with late and broken copies: whatever is
preempted, offloaded, reloaded, shared, computed again or aborted, no token may change."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engines.block_copies import BlockPieces, copy_blocks
from orchestrator.core.kv_options import KVCacheOptions, KVOffload
from orchestrator.core.kv_transfer import KVTransfer
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import Engine, SchedulerOutput, StepOutput
from orchestrator.core.request import FinishReason
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from orchestrator.executor import ExecutorLoop, StepFigures
from orchestrator.overlapped_loop import OverlappedLoop
from tests.factories import make_copy_profile, make_profile, make_request

MAX_TOKENS = 10
BEGINNINGS = [[(7 * i + j) % 97 for j in range(13)] for i in range(3)]
"""Prompts begin with one of these, so that some share blocks."""


class VirtualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def now_s(self) -> float:
        self.now += 0.001
        return self.now


class UnreliableCopies:
    """Copies late, and sometimes not at all."""

    def __init__(self, draw: random.Random, *, failure_rate: float) -> None:
        self._draw, self._failure_rate = draw, failure_rate

    def __call__(self, transfer: KVTransfer, pieces: BlockPieces) -> None:
        time.sleep(self._draw.choice([0.0, 0.0, 0.002]))
        if self._draw.random() < self._failure_rate:
            raise RuntimeError("the link is down")
        copy_blocks(transfer, pieces)


class FallibleEngine:
    """The real engine; some of its steps fail."""

    def __init__(self, engine: Engine, draw: random.Random, *, failure_rate: float) -> None:
        self._engine, self._draw, self._failure_rate = engine, draw, failure_rate
        self._has_failed = False
        self.capabilities = engine.capabilities
        self.close = engine.close

    def step(self, plan: SchedulerOutput) -> StepOutput:
        # The loop gives up on an engine that fails three times in a row.
        is_failing = not self._has_failed and self._draw.random() < self._failure_rate
        self._has_failed = is_failing
        if plan.scheduled and is_failing:
            broken = plan.scheduled[0]
            broken.block_ids = [10**6] * len(broken.block_ids)  # the engine refuses the plan
        return self._engine.step(plan)


class Node:
    """One engine under one scheduler, driven at random."""

    def __init__(
        self, seed: int, make_engine: Callable[..., Engine], *, failure_rate: float
    ) -> None:
        """`make_engine` takes options of the engine and `copy_blocks`, by name."""
        draw = self.draw = random.Random(seed)
        engine = make_engine(
            num_device_blocks=draw.randint(14, 26),
            num_host_blocks=draw.choice([0, 6, 60]),
            max_num_batched_tokens=32,
            max_num_seqs=draw.choice([2, 8]),
            max_model_len=50,
            copy_blocks=UnreliableCopies(random.Random(seed), failure_rate=failure_rate),
        )
        self.engine = FallibleEngine(engine, draw, failure_rate=failure_rate / 3)
        self.scheduler = SlideBatchingScheduler(
            engine.capabilities,
            BatchLatencyModel(make_profile()),
            SlideBatchingOptions(min_chunk_tokens=draw.choice([0, 5])),
        )
        self.scheduler.use_kv_options(
            KVCacheOptions(
                prefix_caching=draw.random() < 0.5,
                offload=draw.choice(list(KVOffload)),
                copy_budget=draw.random() < 0.7,
                offload_threshold_blocks=draw.choice([1, 3]),
                parked_rank_fraction=draw.choice([0.0, 1.0]),
            ),
            make_copy_profile(block_s=0.0005),
        )
        self.outputs: dict[str, list[int]] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.seen: Counter[str] = Counter()
        loop_class = draw.choice([ExecutorLoop, OverlappedLoop])
        self.seen[loop_class.__name__] += 1
        self.loop = loop_class(
            self.scheduler,
            self.engine,
            clock=VirtualClock(),
            emit=self._note,
            report=self._report,
        )

    def _note(self, events: object) -> None:
        for event in events:  # type: ignore[attr-defined]
            self.outputs[event.request_id] += event.new_token_ids
            if event.finish_reason is not None:
                assert event.request_id not in self.reasons
                self.reasons[event.request_id] = event.finish_reason

    def _report(self, figures: StepFigures) -> None:
        plan, output = figures.plan, figures.output
        self.seen["preempted"] += len(plan.preempted_ids)
        for transfer in plan.transfers:
            self.seen[transfer.direction.value] += 1
        self.seen["failed copy"] += len(output.failed_transfers)
        self.seen["failed request"] += len(output.failed)
        self.seen["shared"] += plan.reasons.num_prefix_tokens
        self.seen["kept"] += plan.reasons.num_kept_tokens
        self.seen["recomputed"] += plan.reasons.num_recomputed_tokens

    def add(self) -> None:
        draw, name = self.draw, f"r{len(self.prompts)}"
        prompt = (
            *draw.choice(BEGINNINGS),
            *(draw.randrange(97) for _ in range(draw.randint(0, 15))),
        )
        self.prompts[name], self.outputs[name] = prompt, []
        request = make_request(
            name,
            prompt_token_ids=prompt,
            max_tokens=MAX_TOKENS,
            weight=draw.choice([1.0, 4.0]),
            ttft_s=draw.choice([0.02, 0.5, 5.0]),
            cache_salt=draw.choice("ab"),
        )
        self.loop.add(request.spec, self.scheduler_now())

    def scheduler_now(self) -> float:
        return self.draw.random() * 0.1

    def run(self, num_operations: int) -> None:
        for _ in range(num_operations):
            dice = self.draw.random()
            if dice < 0.25 and len(self.prompts) - len(self.reasons) < 8:
                self.add()
            elif dice < 0.28 and self.prompts:
                self.loop.abort(self.draw.choice(list(self.prompts)))
            elif self.loop.has_requests:
                self.loop.run_step()
            self.scheduler.check_integrity()

    def settle(self) -> None:
        for _ in range(3000):
            if not self.loop.has_requests:
                break
            self.loop.run_step()
        self.scheduler.check_integrity()
        self.loop.close()
        self.engine.close()
        assert not self.loop.has_requests
        assert self.reasons.keys() == self.prompts.keys()


def check_live(
    make_engine: Callable[..., Engine],
    undisturbed: Callable[[tuple[int, ...]], Sequence[int]],
    *,
    failure_rate: float,
    num_examples: int,
) -> None:
    """Run nodes over engines with blocks of 4 tokens and a vocabulary of 97; fail if a token is
    not the one of `undisturbed`, the outputs of a prompt that runs alone."""
    seen: Counter[str] = Counter()

    @settings(max_examples=num_examples, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def live(seed: int) -> None:
        node = Node(seed, make_engine, failure_rate=failure_rate)
        node.run(150)
        node.settle()
        for name, tokens in node.outputs.items():
            expected = undisturbed(node.prompts[name])
            assert tokens == list(expected[: len(tokens)]), name
            if node.reasons[name] is FinishReason.LENGTH:
                assert len(tokens) == MAX_TOKENS
        seen.update(node.seen)

    live()

    # All of it must have happened for the test to mean anything.
    assert all(seen[what] for what in ("ExecutorLoop", "OverlappedLoop", "preempted", "offload",
                                       "onboard", "shared", "kept", "recomputed"))  # fmt: skip
    assert bool(seen["failed copy"]) == bool(failure_rate)
    assert bool(seen["failed request"]) == bool(failure_rate)
