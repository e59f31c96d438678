"""A request that one engine began and another one finishes: the same tokens as on one alone."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.core.ports import RequestEvent, TokenLogprobs
from orchestrator.core.request import FinishReason, ResumePoint, SamplingParams
from orchestrator.executor import ExecutorLoop
from tests.engines.tiny_llama import tiny_engine
from tests.factories import make_request, make_scheduler

MAX_TOKENS = 12
PROMPT = (3, 14, 15, 92, 65, 35, 89, 79)


class StandingClock:
    def now_s(self) -> float:
        return 0.0


def run(
    sampling: SamplingParams, resume_from: ResumePoint | None = None
) -> tuple[list[int], list[TokenLogprobs], FinishReason | None]:
    """Return the tokens that a fresh node produces, their log-probabilities and the reason."""
    engine = tiny_engine()
    events: list[RequestEvent] = []
    loop = ExecutorLoop(
        make_scheduler(capabilities=engine.capabilities),
        engine,
        clock=StandingClock(),
        emit=events.extend,
        report=lambda _: None,
    )
    spec = make_request(prompt_token_ids=PROMPT, sampling=sampling).spec
    loop.add(spec, 0.0, resume_from)
    while loop.has_requests:
        loop.run_step()
    engine.close()
    token_ids = [token_id for event in events for token_id in event.new_token_ids]
    logprobs = [found for event in events for found in event.logprobs]
    return token_ids, logprobs, events[-1].finish_reason


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param({"temperature": 1.3}, id="sampled"),
        pytest.param(
            {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01}, id="truncated"
        ),
        pytest.param(
            {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
            id="penalized",
        ),
        pytest.param({"temperature": 0.0, "presence_penalty": 1.5}, id="greedy and penalized"),
    ],
)
def test_a_resumed_request_gets_the_tokens_that_it_would_have_got(
    params: dict[str, Any],
) -> None:
    """Cut behind every token, among them those at the end of a KV block of 4 tokens."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=7, num_logprobs=2, **params)
    tokens, logprobs, reason = run(sampling)
    assert len(tokens) == MAX_TOKENS

    for cut in range(1, MAX_TOKENS):
        resumed = run(sampling, ResumePoint(tuple(tokens[:cut]), ttft_s=0.1))

        assert resumed[0] == tokens[cut:]
        assert resumed[2] is reason is FinishReason.LENGTH
        for found, expected in zip(resumed[1], logprobs[cut:], strict=True):
            assert found.token_logprob == pytest.approx(expected.token_logprob, abs=1e-4)
            assert [i for i, _ in found.top] == [i for i, _ in expected.top]


def test_a_resumed_request_ends_at_its_stop_token() -> None:
    """The sixth token is made the stop token; the cut is just before it, and long before it."""
    tokens, _, _ = run(SamplingParams(max_tokens=MAX_TOKENS, seed=7))
    last = next(i for i in range(5, MAX_TOKENS) if tokens[i] not in tokens[:i])
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=7, stop_token_ids=(tokens[last],))

    for cut in (1, last):
        found, _, reason = run(sampling, ResumePoint(tuple(tokens[:cut]), ttft_s=0.1))

        assert found == tokens[cut : last + 1]
        assert reason is FinishReason.STOP
