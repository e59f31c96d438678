"""A router that shuts down tells every client how its request ended."""

from __future__ import annotations

import json
import socket

import pytest

from orchestrator.wire import TokenEvent
from tests.router import sse
from tests.router.conftest import RunningRouter
from tests.router.fake_node import FakeNode, Stall, Step
from tests.router.servers import http_post

COMPLETION = {"model": "tiny", "prompt": "Hi"}
MESSAGE = "the router is shutting down; try again"


def read_whole_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return head and body of an answer that is complete by its own account."""
    head, _, body = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        while not body.endswith(b"0\r\n\r\n"):
            body += receive(connection)
    else:
        (length,) = [
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ]
        while len(body) < length:
            body += receive(connection)
    return head, body


def read_until(connection: socket.socket, ending: bytes) -> bytes:
    received = b""
    while ending not in received:
        received += receive(connection)
    return received


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the connection was cut"
    return data


@pytest.mark.parametrize("n", [1, 3])
def test_an_open_stream_ends_with_an_error_event_at_shutdown(
    router: RunningRouter, node: FakeNode, n: int
) -> None:
    """httpx raises for a chunked body without its end."""
    node.script = lambda _: [TokenEvent((70,)), Stall()]
    body = {**COMPLETION, "stream": True, "n": n}

    with router.http.stream("POST", "/v1/completions", json=body) as response:
        events = sse.arriving(response)
        for _ in range(n):
            next(events)

        router.end_open_requests()

        (last,) = events
    assert last["error"] == {
        "message": MESSAGE,
        "type": "server_error",
        "param": None,
        "code": "node_unavailable",
    }
    node.wait_until(lambda found: len(found.aborted_ids) == n, "all sequences are aborted")
    assert router.metric('proserve_router_requests_in_progress{priority_class="normal"}') == 0


@pytest.mark.parametrize(
    ("stream", "steps"),
    [
        pytest.param(True, [Stall()], id="stream"),
        pytest.param(False, [Stall()], id="whole"),
        pytest.param(False, [TokenEvent((70,)), Stall()], id="whole, after a token"),
    ],
)
def test_an_answer_that_has_not_begun_is_503_at_shutdown(
    router: RunningRouter, node: FakeNode, steps: list[Step], *, stream: bool
) -> None:
    node.script = lambda _: steps
    with router.connect() as connection:
        connection.sendall(http_post("/v1/completions", {**COMPLETION, "stream": stream}))
        node.wait_until(lambda n: len(n.requests) == 1, "the node has the request")

        router.end_open_requests()

        head, body = read_whole_answer(connection)
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1" in head
    assert json.loads(body)["error"]["message"] == MESSAGE
    node.wait_until(lambda n: len(n.aborted_ids) == 1, "the request is aborted")


def test_a_body_that_is_still_coming_is_not_waited_for_at_shutdown(router: RunningRouter) -> None:
    request = http_post("/v1/completions", COMPLETION)
    expecting = request.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n", 1)
    head_only = expecting.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    with router.connect() as connection:
        connection.sendall(head_only)
        read_until(connection, b"100 Continue\r\n\r\n")  # So the router waits for the body.

        router.end_open_requests()

        head, body = read_whole_answer(connection)
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["message"] == MESSAGE


def test_after_the_end_no_generation_begins(router: RunningRouter, node: FakeNode) -> None:
    router.end_open_requests()

    for response in (router.complete(), router.chat(stream=True)):
        assert response.status_code == 503
        assert response.json()["error"]["message"] == MESSAGE
    assert node.requests == []
    assert router.http.get("/v1/models").status_code == 200
