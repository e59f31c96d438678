"""The router's API as an OpenAPI 3.2 document, made of the very types that bodies are checked with
and answers are written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from router.body_types import Body
from router.errors import ErrorAnswer
from router.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatFormat,
    CompletionChoice,
    CompletionFormat,
    Model,
    ModelList,
    Usage,
)
from router.schema import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from router.tokenization import DetokenizeAnswer, TokenizeAnswer

_COMPONENTS = "#/components/schemas/"

_BODIES: Sequence[type[Body]] = (
    ChatCompletionBody,
    CompletionBody,
    TokenizeBody,
    DetokenizeBody,
)
_STRUCTS: Sequence[type[msgspec.Struct]] = (
    ChatChoice,
    ChatChunkChoice,
    CompletionChoice,
    DetokenizeAnswer,
    ErrorAnswer,
    Model,
    ModelList,
    TokenizeAnswer,
    Usage,
)

Schema = dict[str, Any]


@cache
def openapi_document() -> Schema:
    """Return the document, to be sent as it is."""
    return {
        "openapi": "3.2.0",
        "info": {"title": "ProServe router", "version": version("proserve")},
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A router without a clients file looks at no key.
        "security": [{"key": []}, {}],
    }


def _paths() -> Schema:
    return {
        "/v1/chat/completions": {
            "post": _operation(
                "An answer to a conversation, whole or streamed.",
                body=ChatCompletionBody.__name__,
                answers={
                    "application/json": _ref("ChatCompletion"),
                },
                events="ChatCompletionChunk",
            )
        },
        "/v1/completions": {
            "post": _operation(
                "A continuation of one or several prompts, whole or streamed.",
                body=CompletionBody.__name__,
                answers={
                    "application/json": _ref("Completion"),
                },
                events="Completion",
            )
        },
        "/v1/embeddings": {
            "post": {
                "summary": "Always refused: this server generates text only.",
                "responses": {"404": _content("The refusal.", _json(_ref("ErrorAnswer")))},
            }
        },
        "/v1/models": {"get": _operation("The served model, as a list.", _json(_ref("ModelList")))},
        "/v1/models/{model_id}": {
            "get": _operation("The served model.", _json(_ref("Model"))),
            "parameters": [
                {
                    "name": "model_id",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string"},
                }
            ],
        },
        "/tokenize": {
            "post": _operation(
                "The tokens of a prompt or a conversation.",
                _json(_ref("TokenizeAnswer")),
                body=TokenizeBody.__name__,
            )
        },
        "/detokenize": {
            "post": _operation(
                "The text of tokens.",
                _json(_ref("DetokenizeAnswer")),
                body=DetokenizeBody.__name__,
            )
        },
        "/health": {
            "get": {
                "summary": "Whether a node can take requests, and why not for each that cannot.",
                "responses": {
                    "200": _content("At least one can.", _json(_ref("Health"))),
                    "503": _content("None can.", _json(_ref("Health"))),
                },
                "security": [],
            }
        },
        "/metrics": {
            "get": {
                "summary": "Metrics for Prometheus.",
                "responses": {"200": _content("The metrics.", {"text/plain": {"type": "string"}})},
                "security": [],
            }
        },
        "/openapi.json": {
            "get": {
                "summary": "This document.",
                "responses": {"200": _content("It.", _json({"type": "object"}))},
                "security": [],
            }
        },
    }


def _schemas() -> Schema:
    reference = f"{_COMPONENTS}{{model}}"
    _, bodies = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template=reference
    )
    _, structs = msgspec.json.schema_components(_STRUCTS, ref_template=f"{_COMPONENTS}{{name}}")
    return {
        **bodies["$defs"],
        **structs,
        "ChatCompletion": _answer(ChatFormat.answer_object, ChatChoice),
        "ChatCompletionChunk": _answer(ChatFormat.chunk_object, ChatChunkChoice),
        "Completion": _answer(CompletionFormat.answer_object, CompletionChoice),
        "Health": {
            "type": "object",
            "properties": {
                "status": {"type": "string"},
                "nodes": {"type": "object", "additionalProperties": {"type": "string"}},
            },
            "required": ["status", "nodes"],
        },
    }


def _answer(object_name: str, choice: type[msgspec.Struct]) -> Schema:
    """Return the schema of `responses.Answer` with choices of one kind."""
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"const": object_name},
            "created": {"type": "integer", "description": "Seconds since 1970."},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": _ref(choice.__name__)},
            "usage": {"anyOf": [_ref(Usage.__name__), {"type": "null"}]},
        },
        "required": ["id", "object", "created", "model", "choices"],
    }


def _operation(
    summary: str,
    answers: Mapping[str, Schema],
    *,
    body: str | None = None,
    events: str | None = None,
) -> Schema:
    """Return one route's description; a stream of `events` is another form of its answer."""
    answer = _content("The answer.", answers)
    if events is not None:
        answer["content"]["text/event-stream"] = {"itemSchema": _event(events)}
    operation: Schema = {
        "summary": summary,
        "responses": {
            "200": answer,
            "default": _content("What went wrong.", _json(_ref("ErrorAnswer"))),
        },
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        }
    return operation


def _content(description: str, schemas: Mapping[str, Schema]) -> Schema:
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"description": description, "content": content}


def _json(schema: Schema) -> Mapping[str, Schema]:
    return {"application/json": schema}


def _event(name: str) -> Schema:
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(name), _ref(ErrorAnswer.__name__)]},
    }
    return {
        "type": "object",
        "description": f"Each event has a {name}, and the last one [DONE]; after a failure the "
        "last one has an ErrorAnswer.",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"{_COMPONENTS}{name}"}
