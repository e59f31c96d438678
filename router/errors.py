"""How every failure looks to a client: OpenAI's error body and an HTTP status. The one place.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.core.errors import NodeUnavailable, ProServeError, RequestRejected

MAX_SHOWN = 80
"""Characters of a client's value that a message repeats."""


class Refused(RequestRejected):
    """A request rejected with a status or a code of its own."""

    kind = "invalid_request_error"
    """What OpenAI calls the error's type."""

    def __init__(
        self, message: str, *, field: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message, field=field)
        self.status = status
        self.code = code

    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        return {}


class Unauthenticated(Refused):
    """A request without a key that is valid here."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=401, code="invalid_api_key")

    def headers(self) -> dict[str, str]:
        """Return which kind of credentials is asked for."""
        return {"www-authenticate": "Bearer"}


class TooManyRequests(Refused):
    """A request that would be taken later."""

    def __init__(self, message: str, *, kind: str, code: str, retry_after_s: float) -> None:
        """`kind` is what there is too much of."""
        super().__init__(message, status=429, code=code)
        self.kind = kind
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Return when to try again; OpenAI's client reads milliseconds, others whole seconds."""
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_s))),
            "retry-after-ms": str(math.ceil(self.retry_after_s * 1000)),
        }


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Body of every error answer, and of the event that ends a broken stream."""

    error: ErrorDetail


def error_answer(error: ProServeError) -> tuple[int, ErrorAnswer]:
    """Return the HTTP status and body that tell a client about `error`."""
    kind, param = "server_error", None
    match error:
        case Refused():
            status, code = error.status, error.code
            kind, param = error.kind, error.field
        case RequestRejected():
            status, code = 400, None
            kind, param = "invalid_request_error", error.field
        case NodeUnavailable():
            status, code = 503, "node_unavailable"
        case _:
            status, code = 500, "engine_error"
    return status, ErrorAnswer(ErrorDetail(str(error), kind, param, code))


def error_headers(error: ProServeError) -> dict[str, str]:
    """Return the headers that go with `error_answer`."""
    match error:
        case Refused():
            return error.headers()
        case NodeUnavailable():
            return {"retry-after": "1"}
        case _:
            return {}


def http_error_answer(status: int, message: str, *, code: str | None = None) -> ErrorAnswer:
    """Return the body for a failure that has no exception of ours."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ErrorAnswer(ErrorDetail(message, kind, None, code))


# --- pydantic's findings in our words ------------------------------------------------------

_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "int_parsing_size": "a number of at most 64 bits",
}

_WORDINGS = {
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "string_pattern_mismatch": "of the form {pattern}",
    "literal_error": "one of {expected}",
}

_LIMITS = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "above {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "below {}"),
}


def refusal_of(error: ValidationError, *, known_fields: Sequence[str]) -> Refused:
    """Return what to tell a client whose body failed validation: its first mistake.

    `known_fields` are the parameters of the route, for a hint at a misspelt one.
    """
    detail = error.errors(include_url=False, include_context=True)[0]
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    param = _path(detail["loc"]) or None
    if kind == "json_invalid":
        return Refused(
            f"the body is not valid JSON: {context['error']}", field=None, code="invalid_json"
        )
    if param is None:
        message = f"the body is {_shown(value)}, it must be a JSON object"
        return Refused(message, code="invalid_type")
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(detail["loc"][-1]), known_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close and len(detail["loc"]) == 1 else ""
        return Refused(f"unknown parameter: {param!r}{hint}", field=param, code="unknown_parameter")
    if kind == "missing":
        return Refused(
            f"{param} is missing, it is required", field=param, code="missing_required_parameter"
        )
    if kind == "unsupported_parameter":
        return Refused(f"{param} {detail['msg']}", field=param, code="unsupported_parameter")
    requirement, code = _requirement(detail, context)
    return Refused(f"{param} is {_shown(value)}, it must be {requirement}", field=param, code=code)


def refuse_repeated_keys(content: bytes) -> None:
    """Refuse a body in which an object has a key twice; parsers silently take the last one.

    `content` has been parsed before, so it is JSON. Python's parser takes 11 us for a chat of
    1 kB (AMD EPYC), as long as pydantic's; that one cannot see repeated keys.

    Raises:
        Refused: names the key.
    """
    json.loads(content.decode(), object_pairs_hook=_refuse_repeated_key)


def _refuse_repeated_key(pairs: Sequence[tuple[str, object]]) -> None:
    if len({key for key, _ in pairs}) == len(pairs):
        return
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            message = f"{cut(repr(key))} is in the body twice; send it once"
            raise Refused(message, field=key[:128], code="contradiction")
        seen.add(key)


def _requirement(detail: ErrorDetails, context: Mapping[str, Any]) -> tuple[str, str]:
    kind = detail["type"]
    if kind in _EXPECTED:
        return _EXPECTED[kind], "invalid_type"
    if kind in _LIMITS:
        name, wording = _LIMITS[kind]
        return wording.format(context[name]), "invalid_value"
    if kind in _WORDINGS:
        return _WORDINGS[kind].format(**context), "invalid_value"
    return detail["msg"], "invalid_type" if kind == "wrong_kind" else "invalid_value"


def _path(location: tuple[int | str, ...]) -> str:
    """Return a location as messages[0].content.

    Names of union branches, which `schema` writes in <>, are left out. A client's own word can
    only be the last part; branches never are where a client may invent a name.
    """
    path = ""
    for position, part in enumerate(location, start=1):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
        elif position == len(location) == 1:
            path = part
    return path[:128]


def cut(text: str, limit: int = MAX_SHOWN) -> str:
    """Return a client's words as far as a message repeats them."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def _shown(value: object) -> str:
    """Return a short form of a client's value, as JSON where it is small."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return cut(f"{value}")
        case str():
            return (
                cut(repr(value)) if len(value) <= 64 else f"a string of {len(value):,} characters"
            )
        case list() | tuple():
            return f"an array of {len(value):,}"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"
