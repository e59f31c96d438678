"""uvicorn's HTTP protocol, but for how the beginning of a response is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class OneWriteProtocol(HttpToolsProtocol):
    """Sends the headers of a response together with the first piece of its body.

    uvicorn writes them one after the other, and uvloop sends what it is given at once: two system
    calls and two segments for each response, and a first token that travels behind its headers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        joining = _JoiningTransport(transport, self._is_new_response)
        self._begun: object | None = None
        super().connection_made(cast(asyncio.Transport, joining))

    def _is_new_response(self) -> bool:
        """Return whether what is written now are the headers of a response with a body.

        Of requests that were sent before the one before was answered this is not known; their
        headers leave alone.
        """
        cycle = cast(RequestResponseCycle | None, self.cycle)  # None before the first request
        if cycle is None or not cycle.response_started or cycle is self._begun:
            return False
        self._begun = cycle
        return cycle.scope["method"] != "HEAD"


class _JoiningTransport:
    """A transport that keeps some writes back until the next one."""

    def __init__(self, transport: asyncio.Transport, is_kept_back: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_kept_back = is_kept_back
        self._kept = b""

    def write(self, data: bytes) -> None:
        if self._is_kept_back():
            self._kept += data
        else:
            self._transport.write(self._kept + data if self._kept else data)
            self._kept = b""

    def close(self) -> None:
        if self._kept:
            self._transport.write(self._kept)
            self._kept = b""
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
