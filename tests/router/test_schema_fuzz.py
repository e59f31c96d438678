"""What the OpenAPI document lets clients send and what not, as schemathesis makes it up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import given
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from router.openapi import openapi_document
from tests.fuzzing import bounded
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, saying
from tests.router.servers import DEADLINE_S

Operation = APIOperation[Any, Any, Any, Any]
AnyCase = Case[Any]

SCHEMA = schemathesis.openapi.from_dict(openapi_document())
OPERATIONS: list[Operation] = [
    result.ok() for result in SCHEMA.get_all_operations() if isinstance(result, Ok)
]
WITH_BODY = [operation for operation in OPERATIONS if len(operation.body) > 0]
WITHOUT_BODY = [operation for operation in OPERATIONS if len(operation.body) == 0]

MESSAGE = {"role": "user", "content": "Hi"}

# Not checked, and why:
# - positive_data_acceptance: the document cannot say which model, classes, token ids and lengths
#   there are, nor which fields go together; and JSON Schema calls 14.0 an integer, we do not.
# - ignored_auth: a router without clients looks at no key; tests/router/test_access_control.py.
# - missing_required_header, use_after_free, ensure_resource_availability: there is no such header,
#   and nothing that a client could make and delete.
CHECKS: list[Callable[..., bool | None]] = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def serving(start_router: RouterFactory) -> Iterator[RunningRouter]:
    node = FakeNode()
    node.script = saying([70, 71, 72])
    with node.serve() as server, start_router([(node.endpoint_id, server.url)]) as router:
        yield router


def for_this_model(case: AnyCase, mode: GenerationMode) -> AnyCase:
    """Return a case that comes further: about the served model, and if it is to be a good one, with
    tokens that this has and fewer than it takes."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"
        if mode is GenerationMode.POSITIVE:
            case.body |= {"prompt": "Hi"} if "prompt" in case.body else {}
            case.body |= {name: 5 for name in case.body if name.startswith("max_")}
    return case


def try_out(
    operation: Operation, mode: GenerationMode, num: int, router: RunningRouter
) -> list[int]:
    """Return the statuses of the answers to `num` requests, each as the document says it is."""
    statuses = []

    @bounded(num)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: AnyCase) -> None:
        case = for_this_model(case, mode)
        response = case.call(base_url=router.url, timeout=DEADLINE_S)
        case.validate_response(response, checks=CHECKS)
        statuses.append(response.status_code)

    check()
    return statuses


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.label)
def test_bodies_of_the_document_are_answered_as_it_says(
    serving: RunningRouter, operation: Operation
) -> None:
    statuses = try_out(operation, GenerationMode.POSITIVE, 8, serving)

    assert 200 in statuses, statuses


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.label)
def test_other_bodies_are_refused_as_it_says(serving: RunningRouter, operation: Operation) -> None:
    statuses = try_out(operation, GenerationMode.NEGATIVE, 8, serving)

    assert set(statuses) <= {400, 415}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_event_of_a_stream_is_as_it_says(serving: RunningRouter, path: str) -> None:
    content = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [MESSAGE]}
    options = {"include_usage": True}
    body: dict[str, Any] = {"model": "tiny", "stream": True, "stream_options": options}
    body |= {"serving_summary": True, **content}
    case = SCHEMA[path]["POST"].Case(body=body, media_type="application/json")

    response = case.call(base_url=serving.url, timeout=DEADLINE_S)

    case.validate_response(response, checks=CHECKS)
    assert response.text.count("data: ") > 3


@pytest.mark.parametrize("operation", WITHOUT_BODY, ids=lambda operation: operation.label)
def test_routes_without_a_body_answer_as_it_says(
    serving: RunningRouter, operation: Operation
) -> None:
    assert try_out(operation, GenerationMode.POSITIVE, 3, serving)
