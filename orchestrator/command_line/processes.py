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
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

DRAIN_GRACE_S = 10.0
"""Open requests may take this long to end by themselves after SIGTERM."""

CUT_GRACE_S = 3
"""After that they are ended with an error, and have this long to send it."""

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux to send a signal to this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def become(command: Sequence[str]) -> NoReturn:
    """Replace this process by a command that ends with the process that started us, and that
    Ctrl-C in the terminal does not reach."""
    die_with_parent()  # which outlives the replacement
    os.setsid()
    os.execvp(command[0], list(command))


class _GracefulServer(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        begin_shutdown: Callable[[], Awaitable[None]] | None,
        end_open_requests: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._begin_shutdown = begin_shutdown
        self._end_open_requests = end_open_requests

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(DRAIN_GRACE_S, self._end_open_requests)
        try:
            if self._begin_shutdown is not None:
                await self._begin_shutdown()
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve_http(
    app: FastAPI, *, host: str, port: int, protocol: type[asyncio.Protocol] | None = None
) -> int:
    """Serve `app` until SIGTERM or Ctrl-C, let open requests end, and return an exit status.

    `protocol` is for HTTP/1.1; None takes uvicorn's own, for those whose clients are trusted.

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
        ),
        getattr(app.state, "begin_shutdown", None),
        app.state.end_open_requests,
    )
    # What is loaded by now stays. Looking through it for garbage takes a router 55 ms each time
    # (AMD EPYC, busy), in which no stream goes on.
    gc.collect()
    gc.freeze()
    server.run()
    return 0 if server.started else 1
