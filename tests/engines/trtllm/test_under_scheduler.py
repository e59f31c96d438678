"""A TensorRT-LLM engine under a real scheduler that has too little memory.

The model is the stand-ins' fake one: a token that was not computed from the request's whole
context, in its order, is another token.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engines.trtllm.engine import TrtLlmEngine
from orchestrator.core.kv_options import KVCacheOptions
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.latency_correction import CorrectionOptions
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from orchestrator.executor import ExecutorLoop, StepFigures
from tests.engines.copies import CountedCopies
from tests.engines.scheduled_node import MAX_TOKENS, VirtualClock, check_live
from tests.engines.trtllm.fake_engines import make_options, write_engine
from tests.factories import make_copy_profile, make_profile, make_request
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.reference_engine import fake_spec

pytestmark = pytest.mark.usefixtures("stand_ins")

SPEC = fake_spec(vocab_size=97)


@cache
def undisturbed(prompt: tuple[int, ...]) -> list[int]:
    """Return the tokens of a request that runs alone."""
    return FakeModel(SPEC).tokens(prompt, MAX_TOKENS)


@pytest.mark.parametrize("failure_rate", [0.0, 0.15])
def test_no_token_changes(tmp_path: Path, failure_rate: float) -> None:
    engine_dir = write_engine(tmp_path, SPEC)

    def make_engine(*, copy_blocks: Any, **options: int) -> TrtLlmEngine:
        return TrtLlmEngine(engine_dir, make_options(**options), copy_blocks=copy_blocks)

    check_live(make_engine, undisturbed, failure_rate=failure_rate, num_examples=10)


class CrowdedNode:
    """A pool of 10 blocks, which is what one of the requests needs: 15 + 24 tokens.

    What happens does not depend on the machine's speed: offloads end with their step, and neither
    the durations of steps nor those of copies are learned from.
    """

    def __init__(self, directory: Path) -> None:
        self.copies = CountedCopies()
        self.engine = TrtLlmEngine(
            write_engine(directory, SPEC),
            make_options(num_device_blocks=10, num_host_blocks=100, max_model_len=40),
            copy_blocks=self.copies,
        )
        scheduler = SlideBatchingScheduler(
            self.engine.capabilities,
            BatchLatencyModel(make_profile(), CorrectionOptions(min_factor=1, max_factor=1)),
            SlideBatchingOptions(min_chunk_tokens=0),
        )
        scheduler.use_kv_options(
            KVCacheOptions(offload_threshold_blocks=1, copy_budget=False),
            make_copy_profile(block_s=0.0005),
        )
        self.outputs: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.preempted: Counter[str] = Counter()
        self.offloaded: Counter[str] = Counter()
        self.onboarded: Counter[str] = Counter()
        self.clock = VirtualClock()
        self.loop = ExecutorLoop(
            scheduler, self.engine, clock=self.clock, emit=self._note, report=self._report
        )

    def add(self, name: str, *, num_prompt_tokens: int, max_tokens: int, weight: float) -> None:
        index = len(self.prompts)
        prompt = [(7 * index + 3 * place) % 97 for place in range(num_prompt_tokens)]
        self.prompts[name], self.outputs[name] = prompt, []
        request = make_request(
            name, prompt_token_ids=prompt, max_tokens=max_tokens, weight=weight, cache_salt=name,
            ttft_s=0.05, tpot_s=0.01,
        )  # fmt: skip
        self.loop.add(request.spec, self.clock.now)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.loop.has_requests:
                self.loop.run_step()
                self.copies.wait_for_offloads(self.offloaded.total())

    def _note(self, events: Any) -> None:
        for event in events:
            self.outputs[event.request_id] += event.new_token_ids

    def _report(self, figures: StepFigures) -> None:
        self.preempted.update(figures.plan.preempted_ids)
        for transfer in figures.plan.transfers:
            counts = {"offload": self.offloaded, "onboard": self.onboarded}
            counts[transfer.direction.value][transfer.request_id] += 1


def test_requests_that_are_all_thrown_out_and_brought_back_keep_their_tokens(
    tmp_path: Path,
) -> None:
    """Six requests of equal weight; after each has begun, a visitor of far greater weight needs
    nearly the whole pool for its prompt, and leaves after one token."""
    node = CrowdedNode(tmp_path)
    names = [f"r{index}" for index in range(6)]
    for name in names:
        node.add(name, num_prompt_tokens=15, max_tokens=24, weight=1.0)
        node.run(8)
        node.add(f"visitor of {name}", num_prompt_tokens=38, max_tokens=1, weight=100.0)
        node.run(4)
    node.run(2000)
    node.engine.close()

    assert not node.loop.has_requests
    for name, prompt in node.prompts.items():
        num_tokens = 24 if name in names else 1
        assert node.outputs[name] == FakeModel(SPEC).tokens(prompt, num_tokens), name
    for counts in (node.preempted, node.offloaded, node.onboarded):
        assert counts.keys() >= set(names)
