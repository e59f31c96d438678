"""Reads and checks the bodies that clients send."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from router.body_types import Body
from router.errors import Refused, refusal_of, refuse_repeated_keys

BodyT = TypeVar("BodyT", bound=Body)


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return a request's body, which its client calls JSON.

    Raises:
        RequestRejected: it is called something else, is too large, or is not there in time.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refused(
            f"content-type is {content_type[:64]!r}, it must be 'application/json'",
            status=415,
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_up_to(max_bytes, request)
    except TimeoutError:
        raise Refused(
            f"the body was not complete after {timeout_s:g} s", status=408, code="body_timeout"
        ) from None


def parsed_body(content: bytes, body_type: type[BodyT]) -> BodyT:
    """Return what a body says.

    Raises:
        RequestRejected: it is not JSON, or does not fit the schema.
    """
    try:
        body = body_type.model_validate_json(content)
    except ValidationError as error:
        raise refusal_of(error, known_fields=list(body_type.model_fields)) from error
    refuse_repeated_keys(content)
    return body


async def _read_up_to(limit: int, request: Request) -> bytes:
    refusal = Refused(
        f"the body has more than {limit:,} bytes, the limit; send less",
        status=413,
        code="body_too_large",
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)
