"""`proserve drain`: tells a node to drain and waits until it has."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from orchestrator.command_line.drain import POLL_S, drain
from orchestrator.core.errors import NodeUnavailable


class Node:
    """Answers as a node that has so many requests left, look for look; its clock is the sleeps."""

    def __init__(self, *num_open: int) -> None:
        self._num_open: Iterator[int] = iter(num_open)
        self.now_s = 0.0
        self.http = httpx.Client(
            base_url="http://node", transport=httpx.MockTransport(self._answer)
        )

    def _answer(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/v1/drain")
        return httpx.Response(200, json={"open_requests": next(self._num_open)})

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(
    ("num_open", "expected", "num_looks"),
    [((0,), 0, 1), ((3, 1, 0), 0, 3), ((3, 2, 2, 2, 0), 2, 4)],
)
def test_it_returns_when_nothing_is_left_or_the_time_is_over(
    num_open: tuple[int, ...], expected: int, num_looks: int
) -> None:
    """1.5 s is three pauses of 0.5 s, so four looks."""
    node = Node(*num_open)

    left = drain(node.http, max_wait_s=1.5, now_s=lambda: node.now_s, sleep=node.sleep)

    assert left == expected
    assert node.now_s == (num_looks - 1) * POLL_S


@pytest.mark.parametrize(
    "answer",
    [httpx.Response(404), httpx.Response(200, text="hello"), httpx.Response(200, json={"a": 1})],
)
def test_what_is_no_node_is_named(answer: httpx.Response) -> None:
    http = httpx.Client(base_url="http://x", transport=httpx.MockTransport(lambda _: answer))

    with pytest.raises(NodeUnavailable, match=r"http://x cannot be told to drain: .*node\?"):
        drain(http, max_wait_s=1.0)
