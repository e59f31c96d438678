"""The dashboard's routes.

    GET /dashboard                 the page; it asks for the key by itself
    GET /dashboard/page/NAME       its scripts and styles
    GET /dashboard/events          Picture as JSON, a server-sent event a second
    GET /dashboard/requests/ID     TracedRequest: what became of a recent request

The last two want the header `Authorization: Bearer KEY`; without a configured key, they answer
this machine alone.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from orchestrator.journal import Story
from orchestrator.peers import Secret
from router.dashboard.observer import Observer, RecentRequests
from router.error_handlers import json_response
from router.errors import Refused, Unauthenticated, cut

PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
# Nothing is loaded from elsewhere, and nobody else shows the page in a frame.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class ToldStory(msgspec.Struct, frozen=True):
    """What one process knows of a request."""

    told_by: str
    """`router`, or a node's endpoint id."""

    story: Story


class TracedRequest(msgspec.Struct, frozen=True):
    """Everything that is known of a request."""

    completion_id: str
    request_id: str
    stories: Sequence[ToldStory]


def add_dashboard_routes(
    app: FastAPI, observer: Observer, requests: RecentRequests, key: Secret | None
) -> None:
    """Serve the dashboard; without `key`, its figures to this machine alone."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in _TYPES}

    @app.get("/dashboard", include_in_schema=False)
    async def page() -> Response:
        return _file(files["index.html"])

    @app.get("/dashboard/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise Refused(f"the dashboard has no {cut(name)!r}", status=404, code="unknown_route")
        return _file(files[name])

    @app.get("/dashboard/events", include_in_schema=False)
    async def events(request: Request) -> Response:
        _authorise(request, key)
        return StreamingResponse(
            _as_events(observer),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    @app.get("/dashboard/requests/{request_id}", include_in_schema=False)
    async def story(request: Request, request_id: str) -> Response:
        _authorise(request, key)
        record = requests.find(request_id)
        if record is None or record.completion_id is None:
            raise Refused(
                f"nothing is known of request {cut(request_id)!r}: it is not among the latest ones "
                "of this router process, or was refused; take the id of the answer or of its "
                "X-Request-Id header",
                status=404,
                code="unknown_request",
            )
        stories = await observer.stories(record)
        told = [ToldStory(told_by, found) for told_by, found in stories]
        return json_response(200, TracedRequest(record.completion_id, record.request_id, told))


async def _as_events(observer: Observer) -> AsyncGenerator[bytes]:
    async for picture in observer.pictures():
        yield b"data: " + picture + b"\n\n"


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), headers=_HEADERS, media_type=_TYPES[path.suffix])


def _authorise(request: Request, key: Secret | None) -> None:
    """Raise Unauthenticated unless the sender may see everything."""
    if key is None:
        if request.client is not None and not ipaddress.ip_address(request.client.host).is_loopback:
            raise Unauthenticated(
                "the dashboard has no key and answers this machine alone; set dashboard.key in the "
                "router's configuration"
            )
        return
    values = request.headers.getlist("authorization")
    if len(values) != 1 or not key.is_proved_by(values[0]):
        raise Unauthenticated("the dashboard's key is missing or wrong")
