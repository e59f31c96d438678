"""Real HTTP servers for tests: any ASGI application on a free port, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from starlette.types import ASGIApp

from orchestrator.command_line.processes import listen_privately
from router.http_protocol import GuardedHttpProtocol

DEADLINE_S = 20.0
"""No wait in these tests lasts longer; reaching it is a failure."""


def bound_socket(port: int = 0) -> socket.socket:
    """Return a socket on `port` of this machine, by default a free one; it does not listen yet."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def http_post(path: str, body: object, *, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a request as it goes over a connection."""
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: test",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, private_path: Path | None) -> None:
        super().__init__(config)
        self._private_path = private_path
        self.has_begun = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._must_end = asyncio.Event()
        await super().startup(sockets)
        if self._private_path is not None:
            await listen_privately(self, self._private_path)
        self.has_begun.set()

    async def main_loop(self) -> None:
        await self._must_end.wait()  # uvicorn's own looks ten times a second.

    def call_soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def end(self) -> None:
        self.call_soon(self._must_end.set)


class RunningServer:
    """Serves `app` while in its context."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        port: int = 0,
        protocol: type[asyncio.Protocol] | None = None,
        private_path: Path | None = None,
    ) -> None:
        self._socket = bound_socket(port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=protocol or "httptools",
                ws="none",
                lifespan="auto",
                timeout_graceful_shutdown=1,
                log_config=None,
                access_log=False,
            ),
            private_path,
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._server.has_begun.wait(DEADLINE_S), "the server did not start"
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have `function` called on the event loop of the server."""
        self._server.call_soon(function)

    def census(self) -> tuple[int, int, int]:
        """Return how many connections, requests under way and tasks there are."""
        counted: Future[tuple[int, int, int]] = Future()

        def count() -> None:
            state = self._server.server_state
            counted.set_result((len(state.connections), len(state.tasks), len(asyncio.all_tasks())))

        self.call_soon(count)
        return counted.result(DEADLINE_S)

    def leave(self) -> None:
        """Have every connection leave, as a router that drains does."""

        def leave() -> None:
            for connection in self._server.server_state.connections:
                assert isinstance(connection, GuardedHttpProtocol)
                connection.leave()

        self.call_soon(leave)

    def kill(self) -> None:
        """Stop at once and cut all connections, as a dying process does."""
        self._server.force_exit = True
        self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._server.end()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the server did not stop"
        self._socket.close()
