"""What the executor is asked, and what its answers mean, on the strict stubs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.trtllm.executor_requests import cache_salt_of, event_of, make_request, priority_of
from orchestrator.core.errors import RequestRejected
from orchestrator.core.ports import RequestEvent
from orchestrator.core.request import FinishReason, RequestSpec, SamplingParams
from tests.factories import make_request as make_core_request
from tests.trtllm.fake_executor import BINDINGS
from tests.trtllm.stub_modules import Stubs, stub_modules


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    with stub_modules() as value:
        yield value


def spec(*, weight: float = 1.0, cache_salt: str = "", **sampling: Any) -> RequestSpec:
    params = SamplingParams(**({"max_tokens": 8, "seed": 7} | sampling))
    request = make_core_request(
        prompt_token_ids=(5, 6), weight=weight, cache_salt=cache_salt, sampling=params
    )
    return request.spec


def asked(stubs: Stubs, wanted: RequestSpec, *, has_block_reuse: bool = True) -> dict[str, Any]:
    """Return the arguments of the Request that is made."""
    make_request(stubs.find(BINDINGS), wanted, has_block_reuse=has_block_reuse)
    (arguments,) = stubs.calls_of(f"{BINDINGS}.Request")
    return dict(arguments)


def sampling_asked(stubs: Stubs, **sampling: Any) -> dict[str, Any]:
    asked(stubs, spec(**sampling))
    (arguments,) = stubs.calls_of(f"{BINDINGS}.SamplingConfig")
    return dict(arguments)


def test_a_request_is_streamed_without_its_prompt(stubs: Stubs) -> None:
    request = asked(stubs, spec())

    assert request["input_token_ids"] == [5, 6]
    assert request["max_tokens"] == 8
    assert request["streaming"] is True
    assert stubs.calls_of(f"{BINDINGS}.OutputConfig") == [{"exclude_input_from_output": True}]


def test_every_stop_token_is_a_stop_word(stubs: Stubs) -> None:
    assert asked(stubs, spec(stop_token_ids=(2, 9)))["stop_words"] == [[2], [9]]


def test_without_stop_tokens_there_are_no_stop_words(stubs: Stubs) -> None:
    request = asked(stubs, spec())

    assert request["stop_words"] is None
    assert "end_id" not in request


def test_greedy_is_the_likeliest_token(stubs: Stubs) -> None:
    assert sampling_asked(stubs, temperature=0.0, top_p=0.5, min_p=0.1) == {"top_k": 1}


def test_a_drawn_token_keeps_its_parameters(stubs: Stubs) -> None:
    """Parameters that change nothing are left out, but for `top_k` and `top_p`: without both the
    executor is greedy."""
    assert sampling_asked(stubs) == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 7}


def test_parameters_that_change_something_are_passed_on(stubs: Stubs) -> None:
    given = {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}

    assert sampling_asked(stubs, **given) == given | {"seed": 7}


def test_a_penalty_holds_for_greedy_requests_too(stubs: Stubs) -> None:
    assert sampling_asked(stubs, temperature=0.0, repetition_penalty=1.2) == {
        "top_k": 1,
        "repetition_penalty": 1.2,
    }


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"num_logprobs": 0}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"top_k": 1025}, "top_k"),
        ({"logit_bias": ((5, 1.0),)}, "logit_bias"),
    ],
)
def test_what_the_executor_does_otherwise_is_refused(
    stubs: Stubs, sampling: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestRejected) as caught:
        asked(stubs, spec(**sampling))

    assert caught.value.field == field
    assert "TensorRT-LLM's executor" in str(caught.value)


def test_the_executor_takes_every_parameter_that_a_request_can_have() -> None:
    """A new one must be mapped or refused."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}

    assert names == {
        *("max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "stop_token_ids"),
        # Refused by the engine's capabilities.
        "grammar",
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "num_logprobs"),
        "logit_bias",
    }


def test_weight_one_has_the_priority_of_requests_without_one() -> None:
    assert priority_of(1.0) == 0.5


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_priorities_order_as_weights_do_and_stay_in_range(first: float, second: float) -> None:
    low, high = sorted([first, second])

    assert 0 <= priority_of(low) <= priority_of(high) < 1
    # Priorities are single precision inside the executor: a tenth more weight must not vanish.
    if high > 1.1 * low and high > 1e-3 and high < 1e5:
        assert priority_of(high) - priority_of(low) > 1e-7


def test_a_request_has_its_priority_and_its_clients_salt(stubs: Stubs) -> None:
    request = asked(stubs, spec(weight=3.0, cache_salt="ada"))

    assert request["priority"] == 0.75
    assert request["cache_salt_id"] == cache_salt_of("ada")


def test_without_block_reuse_there_is_no_salt(stubs: Stubs) -> None:
    assert asked(stubs, spec(cache_salt="ada"), has_block_reuse=False)["cache_salt_id"] is None


def test_clients_have_salts_of_their_own_that_fit_64_bits() -> None:
    salts = [cache_salt_of(cache_salt) for cache_salt in ("", "ada", "bob", "é" * 100)]

    assert len(set(salts)) == 4
    assert all(0 <= salt < 2**64 for salt in salts)
    assert cache_salt_of("ada") == salts[1]


def response(stubs: Stubs, *token_ids: int, reason: str) -> Any:
    reasons = stubs.find(BINDINGS).FinishReason
    stubs.implement(f"{BINDINGS}.Response.has_error", lambda response: response is None)
    result = stubs.make(
        f"{BINDINGS}.Result",
        is_final=reason != "NOT_FINISHED",
        output_token_ids=[list(token_ids)],
        finish_reasons=[reasons[reason]],
    )
    return stubs.make(f"{BINDINGS}.Response", request_id=1, result=result)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("NOT_FINISHED", None),
        ("END_ID", FinishReason.STOP),
        ("STOP_WORDS", FinishReason.STOP),
        ("LENGTH", FinishReason.LENGTH),
    ],
)
def test_a_response_becomes_an_event(
    stubs: Stubs, reason: str, expected: FinishReason | None
) -> None:
    event = event_of(stubs.find(BINDINGS), response(stubs, 5, 6, reason=reason), "a")

    assert event == RequestEvent("a", (5, 6), finish_reason=expected)


@pytest.mark.parametrize("reason", ["TIMED_OUT", "CANCELLED"])
def test_an_end_that_nobody_asked_for_is_an_error(stubs: Stubs, reason: str) -> None:
    event = event_of(stubs.find(BINDINGS), response(stubs, reason=reason), "a")

    assert event.finish_reason is FinishReason.ERROR
    assert event.error == f"TensorRT-LLM's executor ended the request with {reason}"


def test_every_finish_reason_is_known(stubs: Stubs) -> None:
    """So that a new one is looked at."""
    assert {reason.name for reason in stubs.find(BINDINGS).FinishReason} == {
        *("NOT_FINISHED", "END_ID", "STOP_WORDS", "LENGTH", "TIMED_OUT", "CANCELLED")
    }


def test_an_error_response_ends_the_request_with_its_message(stubs: Stubs) -> None:
    stubs.implement(f"{BINDINGS}.Response.has_error", lambda response: response is not None)
    failed = stubs.make(f"{BINDINGS}.Response", request_id=1, error_msg="out of memory")

    event = event_of(stubs.find(BINDINGS), failed, "a")

    assert event.finish_reason is FinishReason.ERROR
    assert event.error == "the engine failed: out of memory"
