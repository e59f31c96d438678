"""What the router's application answers where something went wrong."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from orchestrator.core.errors import ProServeError
from router.access import CLIENT_LEFT_STATUS, REQUEST_ID_HEADER
from router.errors import ErrorAnswer, error_answer, error_headers, http_error_answer

_encoder = msgspec.json.Encoder()


def json_response(status: int, value: object, headers: dict[str, str] | None = None) -> Response:
    """Return an answer with `value` as its body."""
    return Response(_encoder.encode(value), status, headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Have errors of all kinds, bugs included, answered in the API's shape and counted."""

    @app.exception_handler(ProServeError)
    async def on_error(request: Request, error: ProServeError) -> Response:
        status, answer = error_answer(error)
        return _refuse(request, status, answer, error_headers(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path[:128]}"
        message, code = {
            404: (f"unknown route: {path}", "unknown_route"),
            405: (f"{path} is not allowed; see the Allow header", "method_not_allowed"),
        }.get(error.status_code, (str(error.detail), None))
        answer = http_error_answer(error.status_code, message, code=code)
        return _refuse(request, error.status_code, answer, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, _: ClientDisconnect) -> Response:
        request.state.record.has_client_left = True
        return Response(status_code=CLIENT_LEFT_STATUS)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, _: Exception) -> Response:
        request_id = request.state.record.request_id
        message = f"internal error; the router's log tells more under request id {request_id}"
        answer = http_error_answer(500, message, code="internal_error")
        # Its server closes the connection behind an exception, so the client should know.
        headers = {REQUEST_ID_HEADER: request_id, "connection": "close"}
        return json_response(500, answer, headers)


def _refuse(
    request: Request, status: int, answer: ErrorAnswer, headers: dict[str, str]
) -> Response:
    request.state.record.fail(answer)
    return json_response(status, answer, headers)
