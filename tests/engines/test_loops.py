"""Both executor loops over the embedded engine: the same tokens, however they are chosen, also if
steps are launched before the tokens of those before are known."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from benchmarks.shared.decode_period import CountingEngine
from orchestrator.core.ports import Engine, RequestEvent
from orchestrator.core.request import SamplingParams
from orchestrator.executor import ExecutorLoop, MonotonicClock, StepFigures
from orchestrator.logit_adjustment import changes_logits
from orchestrator.overlapped_loop import OverlappedLoop
from tests.engines.tiny_llama import tiny_config, tiny_engine
from tests.factories import make_request, make_scheduler

NUM_TOKENS = 12


def sampling_params(seed: int) -> list[SamplingParams]:
    """Return every way of choosing that looks at a request's own tokens, or at their number."""
    plain = [
        SamplingParams(max_tokens=NUM_TOKENS, seed=seed, temperature=temperature)
        for temperature in (0.0, 1.5)
    ]
    return [
        changed
        for params in plain
        for changed in (
            params,
            replace(params, repetition_penalty=1.5),
            replace(params, presence_penalty=1.0, frequency_penalty=0.5),
            replace(params, logit_bias=((5, 2.0),)),
            replace(params, stop_token_ids=tuple(range(0, 97, 7))),
        )
    ]


def embedded() -> Engine:
    return tiny_engine(num_device_blocks=60, max_num_seqs=8, max_num_batched_tokens=24)


def told_by(
    loop_class: type[ExecutorLoop],
    make_engine: Callable[[], Engine] = embedded,
    params: Sequence[SamplingParams] = (*sampling_params(1), *sampling_params(2)),
) -> dict[str, list[RequestEvent]]:
    """Return what is told of each of some requests."""
    engine = make_engine()
    events: list[RequestEvent] = []
    figures: list[StepFigures] = []
    loop = loop_class(
        make_scheduler(capabilities=engine.capabilities),
        engine,
        clock=MonotonicClock(),
        emit=events.extend,
        report=figures.append,
    )
    names = []
    for index, sampling in enumerate(params):
        prompt = tuple((index * 31 + place * 7) % 97 for place in range(3 + index))
        names.append(f"r{index}")
        loop.add(make_request(names[-1], prompt_token_ids=prompt, sampling=sampling).spec, 0.0)
    while loop.has_requests:
        loop.run_step()
    loop.close()
    engine.close()
    return {name: [event for event in events if event.request_id == name] for name in names}


def test_both_loops_choose_the_same_tokens() -> None:
    plain, overlapped = told_by(ExecutorLoop), told_by(OverlappedLoop)

    assert plain == overlapped
    lengths = {len(events) for events in plain.values()}
    assert NUM_TOKENS in lengths
    assert min(lengths) < NUM_TOKENS, "some stop early"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_steps_launched_ahead_choose_the_same_tokens() -> None:
    """Triton's decoder, without a GPU by its interpreter. Some requests change their logits: steps
    that have one of them are not launched ahead, those after them are."""
    from tests.engines.triton_engine import TritonEngine

    engines: list[CountingEngine] = []

    def make_engine() -> Engine:
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "num_device_blocks": 60}
        engines.append(CountingEngine(TritonEngine(tiny_config(), **limits)))
        return engines[-1]

    every = [replace(p, max_tokens=6) for p in sampling_params(1)]
    params = [replace(p, max_tokens=2) for p in every if changes_logits(p)][::3]
    params += [p for p in every if not changes_logits(p)]
    plain = told_by(ExecutorLoop, make_engine, params)

    assert told_by(OverlappedLoop, make_engine, params) == plain
    _, overlapped = engines
    assert overlapped.num_launched > 0
    assert overlapped.num_refused > 0
