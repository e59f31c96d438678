"""Running one HTTP service in this process, and ending with the process that started us."""

from __future__ import annotations

import ctypes
import signal
import sys

import uvicorn
from fastapi import FastAPI

DRAIN_GRACE_S = 10
"""Open streams may take this long to end after SIGTERM before they are cut."""

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def serve_http(app: FastAPI, *, host: str, port: int) -> int:
    """Serve `app` until SIGTERM or Ctrl-C, let open streams end, and return an exit status."""
    # uvicorn raises the signal again when it has shut down; by then it has been obeyed.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            http="httptools",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=DRAIN_GRACE_S,
        )
    )
    server.run()
    return 0 if server.started else 1
