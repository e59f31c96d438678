"""The OpenAPI document is about the routes that there are and takes and gives what they do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.openapi import openapi_document
from router.schema import ChatCompletionBody, CompletionBody
from tests.router import sse
from tests.router.conftest import RunningRouter
from tests.router.fake_node import FakeNode
from tests.router.test_bad_input import CHAT, CHAT_CASES, COMPLETION, COMPLETION_CASES

FOUND_OUT_LATER = re.compile(
    r"unknown model|max_tokens over|newer limit|prompt too long|n too high|too many sequences"
    r"|token outside|empty prompt|an empty one of several|mixed prompt"
    r"|unusable|schema missing|schema of another form"
    r"|an answer without anything|a result of nothing|arguments (?:outside|unlike|of great)"
    r"|a tool twice|choice of an absent|(?:choice|calls) alone|tools and a|a call that never"
    r"|bias of|priority$|two limits|options alone|without usage|without logprobs|echo with"
)
"""Cases whose mistake depends on the model, the configuration or another field."""


def validator(name: str) -> Draft202012Validator:
    """Return what checks values against a schema of the document."""
    document = openapi_document()
    return Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"})


def references(value: Any) -> Iterator[str]:
    """Yield every reference in the document."""
    match value:
        case {"$ref": str(reference)}:
            yield reference
        case dict():
            for item in value.values():
                yield from references(item)
        case list():
            for item in value:
                yield from references(item)


def test_the_router_serves_the_document(quiet_router: RunningRouter) -> None:
    assert quiet_router.http.get("/openapi.json").json() == openapi_document()


def test_it_has_the_routes_of_the_router_and_no_others(quiet_router: RunningRouter) -> None:
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in quiet_router.app.routes
        if isinstance(route, Route) and route.include_in_schema  # a page for people is not
        for method in route.methods or ()
    }

    described = {
        (path, method)
        for path, operations in openapi_document()["paths"].items()
        for method in operations
        if method != "parameters"
    }
    assert described == served


def test_every_reference_leads_to_a_valid_schema() -> None:
    document = openapi_document()
    schemas = document["components"]["schemas"]

    names = {reference.rpartition("/")[2] for reference in references(document)}

    assert names <= schemas.keys()
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("body", "base"), [(ChatCompletionBody, CHAT), (CompletionBody, COMPLETION)]
)
def test_it_takes_good_bodies(body: type[Any], base: dict[str, Any]) -> None:
    check = validator(body.__name__)
    nulls = dict.fromkeys(set(body.model_fields) - set(base))

    for changes in (
        {},
        nulls,
        {"temperature": 0.5, "stop": ["a"], "logit_bias": {"5": -100}, "slo": {"ttft_ms": 5}},
        {"stop": "a", "n": 2, "stream": True, "stream_options": {"include_usage": True}},
    ):
        assert check.is_valid(base | changes), changes


@pytest.mark.parametrize(
    ("body", "base", "cases"),
    [
        pytest.param("ChatCompletionBody", CHAT, CHAT_CASES, id="chat"),
        pytest.param("CompletionBody", COMPLETION, COMPLETION_CASES, id="completion"),
    ],
)
def test_it_refuses_what_the_router_refuses(
    body: str, base: dict[str, Any], cases: list[Any]
) -> None:
    check = validator(body)
    taken = {case.id for case in cases if check.is_valid(base | case.values[0])}

    assert {name for name in taken if not FOUND_OUT_LATER.search(name)} == set()


def with_logprobs(_: object) -> list[TokenEvent]:
    logprobs = (TokenLogprobs(-1.0, ((65, -1.0), (66, -2.0))),)
    return [TokenEvent((65,), logprobs, FinishReason.LENGTH)]


@pytest.mark.parametrize("num_tops", [None, 2])
def test_answers_are_as_it_says(
    router: RunningRouter, node: FakeNode, num_tops: int | None
) -> None:
    node.script = with_logprobs
    chat: dict[str, Any] = {"logprobs": num_tops is not None, "top_logprobs": num_tops}
    completion = {"logprobs": num_tops}
    stream = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "serving_summary": num_tops is not None,
    }

    answers = {
        "ChatCompletion": [router.chat(**chat).json()],
        "ChatCompletionChunk": sse.parsed(router.chat(**chat, **stream).text)[:-1],
        "Completion": [
            router.complete(**completion).json(),
            *sse.parsed(router.complete(**completion, **stream).text)[:-1],
        ],
        "TokenizeAnswer": [
            router.http.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True}).json()
        ],
        "DetokenizeAnswer": [router.http.post("/detokenize", json={"tokens": [70]}).json()],
        "ErrorAnswer": [router.chat(n=0).json(), router.http.get("/v1/nothing").json()],
        "ModelList": [router.http.get("/v1/models").json()],
        "Model": [router.http.get("/v1/models/tiny").json()],
        "Health": [router.http.get("/health").json()],
    }

    for name, values in answers.items():
        assert values
        for value in values:
            validator(name).validate(value)
