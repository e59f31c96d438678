"""The `openai` package as its users call it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.tokenizer import Tokenizer
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Refuse, saying


@pytest.fixture
def hello(tokenizer: Tokenizer, node: FakeNode) -> list[int]:
    """Tokens that the node says: "Hello there" and the end token."""
    tokens = tokenizer.encode("Hello there", add_special_tokens=False)
    node.script = saying([*tokens, *tokenizer.eos_token_ids])
    return tokens


@pytest.fixture
def client(router: RunningRouter, hello: list[int]) -> Iterator[openai.OpenAI]:
    assert hello, "the node has something to say"
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}]
    )

    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_an_answer_can_be_sent_back_as_it_is(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Hi"}
    answer = client.chat.completions.create(model="tiny", messages=[question])  # type: ignore[list-item]

    again = client.chat.completions.create(
        model="tiny",
        messages=[question, answer.choices[0].message.model_dump(), question],  # type: ignore[list-item]
    )

    assert again.choices[0].message.content == "Hello there"


def test_streamed_chat_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello there"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_summary_of_how_it_was_served_is_an_extra_of_usage(
    client: openai.OpenAI, *, stream: bool
) -> None:
    """Class `normal` has weight 2, and the answer three tokens."""
    body = {"serving_summary": True, "stream_options": {"include_usage": True} if stream else None}

    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], extra_body=body, stream=stream
    )

    usage = (list(answer)[-1] if isinstance(answer, openai.Stream) else answer).usage
    assert usage is not None
    assert usage.completion_tokens == 3
    assert usage.model_extra is not None
    (summary,) = usage.model_extra["serving_summary"]
    assert summary["tokens"] == summary["tokens_on_time"] == 3
    assert summary["service_gain"] == summary["possible_service_gain"] == 6.0
    assert summary["objectives_met"]
    assert (summary["node"], summary["retries"]) == ("node-0", 0)


def test_the_packages_own_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "Hi"}]
    ) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.content == "Hello there"


def test_completion(client: openai.OpenAI, node: FakeNode) -> None:
    answer = client.completions.create(model="tiny", prompt="Hi", seed=7, temperature=0)

    assert answer.choices[0].text == "Hello there"
    assert node.requests[0].sampling.seed == 7
    assert node.requests[0].sampling.temperature == 0


def test_streamed_completion(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="Hi", stream=True))

    assert "".join(c.choices[0].text for c in chunks) == "Hello there"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_two_answers(client: openai.OpenAI, node: FakeNode) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], n=2, seed=7
    )

    assert [c.index for c in answer.choices] == [0, 1]
    assert [c.message.content for c in answer.choices] == ["Hello there"] * 2
    assert len({r.sampling.seed for r in node.requests}) == 2


def test_stop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], stop=["there"]
    )

    assert answer.choices[0].message.content == "Hello "
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI, node: FakeNode, hello: list[int]) -> None:
    logprobs = TokenLogprobs(-0.25, ((hello[0], -0.25), (hello[1], -1.5)))
    node.script = lambda _: [TokenEvent((hello[0],), (logprobs,), FinishReason.LENGTH)]

    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=2,
    )
    completion = client.completions.create(model="tiny", prompt="Hi", logprobs=2)

    found = chat.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [(t.token, t.logprob) for t in found.content[0].top_logprobs] == [
        ("Hello", -0.25),
        (" there", -1.5),
    ]
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.top_logprobs == [{"Hello": -0.25, " there": -1.5}]


def test_priority_and_objectives(client: openai.OpenAI, node: FakeNode) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        extra_body={"priority": "high", "slo": {"ttft_ms": 250, "tpot_ms": 20}},
    )

    request = node.requests[0]
    assert (request.priority_class, request.ttft_s, request.tpot_s) == ("high", 0.25, 0.02)


def test_errors_have_their_classes(client: openai.OpenAI, node: FakeNode) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9") as not_found:
        client.completions.create(model="gpt-9", prompt="Hi")
    assert not_found.value.code == "model_not_found"

    with pytest.raises(openai.BadRequestError, match="temperature is 9") as bad:
        client.completions.create(model="tiny", prompt="Hi", temperature=9)
    assert bad.value.param == "temperature"

    node.script = lambda _: [Refuse(503, "as the test says")]
    with pytest.raises(openai.InternalServerError, match="as the test says"):
        client.completions.create(model="tiny", prompt="Hi")


def test_a_stream_that_breaks_raises(
    client: openai.OpenAI, node: FakeNode, hello: list[int]
) -> None:
    node.script = lambda _: [
        TokenEvent((hello[0],)),
        TokenEvent(finish_reason=FinishReason.ERROR, error="out of memory"),
    ]

    stream = client.completions.create(model="tiny", prompt="Hi", stream=True)

    assert next(stream).choices[0].text == "Hello"
    with pytest.raises(openai.APIError, match="out of memory"):
        next(stream)


@pytest.mark.usefixtures("hello")
def test_the_client_retries_when_there_is_no_node(
    start_router: RouterFactory, node: FakeNode
) -> None:
    """The package repeats a 503 by itself; the second time the node accepts."""
    answers = iter([[Refuse(503)]])
    good = node.script
    node.script = lambda request: next(answers, good(request))
    with (
        start_router([(node.endpoint_id, node.url)]) as router,
        openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=2) as client,
    ):
        answer = client.completions.create(model="tiny", prompt="Hi")

    assert answer.choices[0].text == "Hello there"
    assert len(node.requests) == 2
