"""Real calls of the `openai` package to a real router, node and model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.integration.deployments import Deployment

MODEL = "smollm2-135m"
QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
]


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0, timeout=60
    ) as value:
        yield value


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_answers_the_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=24
    )

    content = answer.choices[0].message.content
    assert content is not None
    assert "Paris" in content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_equals_the_plain_one(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=24
    )
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == plain.usage
    assert len(chunks) > 5


def test_a_completion_continues_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="one two three four five six seven", temperature=0, max_tokens=4
    )

    assert "eight" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_two_choices_differ_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Tell me a story."}],
            n=2,
            seed=7,
            temperature=1.0,
            max_tokens=20,
        )
        return [choice.message.content for choice in answer.choices]

    first, second = ask(), ask()

    assert first == second
    assert first[0] != first[1]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="one, two, three, four,", temperature=0, max_tokens=30, stop=["seven"]
    )

    assert "six" in answer.choices[0].text
    assert "seven" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_belong_to_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0


def test_priority_and_objectives_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=2,
        extra_body={"priority": "high", "slo": {"ttft_ms": 500, "tpot_ms": 50}},
    )

    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "error", "param", "words"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "gpt-4"),
        ({"messages": []}, openai.BadRequestError, "messages", "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "-1"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens", "1,000,000"),
        ({"extra_body": {"priority": "vip"}}, openai.BadRequestError, "priority", "vip"),
        ({"extra_body": {"sped": 1}}, openai.BadRequestError, "sped", "sped"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            openai.BadRequestError,
            "messages",
            "8,192",
        ),
    ],
)
def test_bad_input_is_refused_with_field_and_value(
    client: openai.OpenAI,
    arguments: dict[str, object],
    error: type[openai.APIStatusError],
    param: str,
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(
            **({"model": MODEL, "messages": QUESTION, "max_tokens": 4} | arguments)  # type: ignore[call-overload]
        )

    assert caught.value.param == param
    assert words in caught.value.message
