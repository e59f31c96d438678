"""Answers of the real model in a given form, asked for by OpenAI's client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.shared_params import ResponseFormatJSONSchema

from tests.integration.deployments import Deployment

MODEL = "smollm2-135m"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Describe a book that everybody should read, as JSON."}
]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 20},
        "year": {"type": "integer", "minimum": 1450, "maximum": 2026},
        "genres": {
            "type": "array",
            "items": {"enum": ["novel", "poetry", "science", "history"]},
            "minItems": 1,
            "maxItems": 2,
        },
        "author": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9} [A-Z][a-z]{1,9}$"}
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["title", "year", "genres", "author"],
    "additionalProperties": False,
}
FORM: ResponseFormatJSONSchema = {
    "type": "json_schema",
    "json_schema": {"name": "book", "strict": True, "schema": SCHEMA},
}


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0, timeout=60
    ) as value:
        yield value


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_the_schema(client: openai.OpenAI, temperature: Literal[0, 1]) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_format=FORM,
        temperature=temperature,
        seed=1,
        n=2,
        max_tokens=100,
    )

    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) == (2 if temperature else 1)


def test_a_call_that_must_come_is_made(client: openai.OpenAI) -> None:
    """Streamed, of one of two functions, and with its result sent back."""
    year = SCHEMA["properties"]["year"]
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"year": year},
        "required": ["year"],
        "additionalProperties": False,
    }
    tools: list[ChatCompletionToolParam] = [
        {"type": "function", "function": {"name": "describe", "parameters": schema}},
        {"type": "function", "function": {"name": "give_up"}},
    ]
    with client.chat.completions.stream(
        model=MODEL,
        messages=MESSAGES,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "describe"}},
        seed=1,
        max_tokens=60,
    ) as stream:
        choice = stream.get_final_completion().choices[0]

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.name == "describe"
    jsonschema.validate(json.loads(call.function.arguments), schema)

    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": "describe", "arguments": call.function.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ],
        tools=tools,
        tool_choice="none",
        max_tokens=4,
    )
    assert answer.choices[0].message.content


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_completion_matches_its_regular_expression(
    client: openai.OpenAI, temperature: Literal[0, 1]
) -> None:
    regex = r"(?:January|February|March) [1-9][0-9]?, [12][0-9]{3}"
    answer = client.completions.create(
        model=MODEL,
        prompt="He was born on",
        temperature=temperature,
        seed=5,
        max_tokens=30,
        extra_body={"guided_regex": regex},
    )

    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(regex, answer.choices[0].text)
