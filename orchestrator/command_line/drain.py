"""`proserve drain`: has a node finish what it has and take nothing new, before it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from orchestrator.core.errors import NodeUnavailable

POLL_S = 0.5
"""Pause between two looks at how much is left."""

CALL_TIMEOUT_S = 5.0


def drain(
    http: httpx.Client,
    *,
    max_wait_s: float,
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Tell the node that is the client's base URL to drain; return how many requests are left when
    there are none any more, or after `max_wait_s`.

    Raises:
        NodeUnavailable: it does not answer, or not as a node does.
    """
    deadline_s = now_s() + max_wait_s
    while True:
        num_open = _num_open(http)
        if num_open == 0 or now_s() >= deadline_s:
            return num_open
        sleep(POLL_S)


def _num_open(http: httpx.Client) -> int:
    try:
        answer = http.post("/v1/drain")  # as often as one likes
        if answer.status_code != httpx.codes.OK:
            raise ValueError(f"it answers {answer.status_code}")
        return int(answer.json()["open_requests"])
    except (httpx.TransportError, ValueError, KeyError) as error:
        raise NodeUnavailable(
            f"{http.base_url} cannot be told to drain: {error}; is that a running node?"
        ) from error
