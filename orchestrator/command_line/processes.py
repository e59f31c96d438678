"""What a process runs as: one HTTP service, or another command; and ending with the process that
started us."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, cast

import uvicorn
from fastapi import FastAPI

DRAIN_GRACE_S = 10.0
"""Open requests may take this long to end by themselves after SIGTERM."""

CUT_GRACE_S = 3
"""After that they are ended with an error, and have this long to send it."""

LEAVE_S = 2.0
"""A server that drains leaves idle connections to their clients for so long: each answer until then
asks its client to come back over another connection."""

_LEAVE_POLL_S = 0.05

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux to send a signal to this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def stop_signal() -> asyncio.Future[None]:
    """Return a future that is done once this process was asked to stop, by Ctrl-C or SIGTERM."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if not stopping.done():
            stopping.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return stopping


def become(command: Sequence[str]) -> NoReturn:
    """Replace this process by a command that ends with the process that started us, and that
    Ctrl-C in the terminal does not reach."""
    die_with_parent()  # which outlives the replacement
    os.setsid()
    os.execvp(command[0], list(command))


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where a service listens."""

    public: socket.socket
    """With its own options. One of several processes that serve a port together has bound it with
    SO_REUSEPORT, so that the kernel gives each process a part of the connections; or all of them
    have inherited it, so that each takes connections as it can."""

    private_path: Path | None = None
    """Of a Unix socket, for the other processes."""


class CertificateFiles(Protocol):
    """What a server shows clients that come over https."""

    @property
    def cert_file(self) -> Path:
        """Return where its certificate is."""

    @property
    def key_file(self) -> Path:
        """Return where the private key is."""


class Leaving(Protocol):
    """A connection that can be asked to end."""

    def leave(self) -> None:
        """Answer what comes, and ask the client with each answer not to use it again."""


def bound_socket(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """Return a socket that is bound to a port and does not listen yet.

    One that `is_shared` has the port together with other processes, if they are of the same user
    and share it too.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


async def listen_privately(server: uvicorn.Server, path: Path) -> None:
    """Have a server that has started listen on a Unix socket as well, in the place of a process
    that was killed."""
    protocol: Callable[..., asyncio.Protocol] = server.config.http_protocol_class
    make_protocol = partial(
        protocol,
        config=server.config,
        server_state=server.server_state,
        app_state=server.lifespan.state,
    )
    loop = asyncio.get_running_loop()
    server.servers.append(await loop.create_unix_server(make_protocol, str(path)))


class _GracefulServer(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        begin_shutdown: Callable[[], Awaitable[None]] | None,
        end_open_requests: Callable[[], None],
        private_path: Path | None,
        max_drain_s: float | None,
    ) -> None:
        super().__init__(config)
        self._begin_shutdown = begin_shutdown
        self._end_open_requests = end_open_requests
        self._private_path = private_path
        self._max_drain_s = max_drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._private_path is not None:
            await listen_privately(self, self._private_path)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        grace_s = DRAIN_GRACE_S
        if self._max_drain_s is not None:
            await self._drain(loop.time() + self._max_drain_s)
            grace_s = 0.0
        timer = loop.call_later(grace_s, self._end_open_requests)
        try:
            if self._begin_shutdown is not None:
                await self._begin_shutdown()
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    async def _drain(self, until_s: float) -> None:
        """Accept no connection, and return when all are gone, or idle for good, or at `until_s`."""
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        busy_at_s = loop.time()
        while self.server_state.connections and loop.time() < until_s:
            for connection in self.server_state.connections:
                cast(Leaving, connection).leave()
            if self.server_state.tasks:
                busy_at_s = loop.time()
            elif loop.time() - busy_at_s > LEAVE_S:
                return
            await asyncio.sleep(_LEAVE_POLL_S)


def serve_http(
    app: FastAPI,
    *,
    host: str,
    port: int,
    protocol: type[asyncio.Protocol] | None = None,
    sockets: Sockets | None = None,
    max_drain_s: float | None = None,
    tls: CertificateFiles | None = None,
) -> int:
    """Serve `app` until SIGTERM or Ctrl-C, let open requests end, and return an exit status.

    `protocol` is for HTTP/1.1; None takes uvicorn's own, for those whose clients are trusted.
    `sockets` take the place of host and port. With `max_drain_s`, for
    a `protocol` that is `Leaving` while others go on, open requests have this long instead of
    `DRAIN_GRACE_S`, and connections are left to their clients first. With `tls` it is https.

    First `app.state.begin_shutdown` is called, if there is one, while new requests are still
    answered. Those that have not ended by themselves when the grace is over are ended through
    `app.state.end_open_requests`, so that every client hears how its request ended.
    """
    # uvicorn raises the signal again when it has shut down; by then it has been obeyed.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server = _GracefulServer(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            http=protocol or "httptools",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(DRAIN_GRACE_S) + CUT_GRACE_S,
            ssl_certfile=None if tls is None else tls.cert_file,
            ssl_keyfile=None if tls is None else tls.key_file,
        ),
        getattr(app.state, "begin_shutdown", None),
        app.state.end_open_requests,
        None if sockets is None else sockets.private_path,
        max_drain_s,
    )
    # What is loaded by now stays. Looking through it for garbage takes a router 55 ms each time
    # (AMD EPYC, busy), in which no stream goes on.
    gc.collect()
    gc.freeze()
    server.run(None if sockets is None else [sockets.public])
    return 0 if server.started else 1
