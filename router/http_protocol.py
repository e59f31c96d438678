"""The router's side of HTTP/1.1: uvicorn's, which never gives up a request whose head does not end
nor a client that reads nothing.

Once its head is there, a request is the application's, which bounds its body in size and time.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from router.errors import http_error_answer
from router.one_write import OneWriteProtocol

CLOSE_HEADER = (b"connection", b"close")

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class GuardedHttpProtocol(OneWriteProtocol):
    """One connection; what is no HTTP is refused in the shape of all errors."""

    head_timeout_s = 10.0
    """From the connection's beginning, or the end of an answer, to the end of the next head. An
    idle connection is closed earlier, by uvicorn."""

    max_head_bytes = 65_536
    """Of request line and headers that have not ended; browsers and proxies send at most 16 kB."""

    unread_timeout_s = 60.0
    """A client that takes nothing of an answer for this long, while more waits than is buffered,
    loses its connection; else it would hold its place, and its node's, for ever."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._num_head_bytes = 0
        self._is_leaving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        self._stop_watching_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More waits for the client than should be buffered."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has read enough of it."""
        super().resume_writing()
        self._stop_watching_reader()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head gets too long."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > self.max_head_bytes:
            self._refuse(431, f"the head of the request is longer than {self.max_head_bytes:,} B")

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        super().on_headers_complete()
        self._stop_waiting()
        self._is_in_head = False
        self._num_head_bytes = 0
        if self._is_leaving:
            self._ask_to_leave()
        if self.parser.should_upgrade():
            # Nothing behind it is parsed any more, so another request would wait for ever.
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """What comes now is the next head."""
        super().on_message_complete()
        self._is_in_head = True

    def on_response_complete(self) -> None:
        """Wait for the next head, unless it is there already."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._await_head()

    def leave(self) -> None:
        """Answer what comes, and ask the client with each answer to use another connection."""
        if not self._is_leaving:
            self._is_leaving = True
            self._ask_to_leave()

    def _ask_to_leave(self) -> None:
        """Say so in the headers of the last request's answer, if they have not been sent."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None:
            cycle.default_headers = [*cycle.default_headers, CLOSE_HEADER]

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, msg)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(self.unread_timeout_s, self._check_reader, unread)

    def _check_reader(self, num_bytes_before: int) -> None:
        if self.transport.get_write_buffer_size() < num_bytes_before:
            self._watch_reader()
        else:
            self.transport.abort()

    def _stop_watching_reader(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _give_up(self) -> None:
        if self._num_head_bytes == 0:  # Idle, or still sending the body of what was refused.
            self.transport.close()
            return
        self._refuse(408, f"the request's head was not complete after {self.head_timeout_s:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Close the connection; say why, unless that would end up in another answer."""
        if self.transport.is_closing():
            return
        cycle = cast("RequestResponseCycle | None", self.cycle)
        has_begun = cycle is not None and (cycle.response_started or len(self.pipeline) > 0)
        if cycle is None or cycle.response_complete or not has_begun:
            body = msgspec.json.encode(http_error_answer(status, message, code="invalid_http"))
            head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\n" % (
                status,
                _REASONS[status],
            )
            head += b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(head + body)
        self.transport.close()
