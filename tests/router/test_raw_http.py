"""Whatever bytes come over a connection: no 5xx, no hang, and nothing left behind.

Each example opens several connections at once, so that waiting for time-outs costs little.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire import GenerateRequest, TokenEvent
from router.http_protocol import GuardedHttpProtocol
from tests.fuzzing import bounded
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Stall, Step, saying
from tests.router.servers import http_post

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
HELD = re.compile(
    r"^proserve_router_(?:endpoint_sequences|waiting_sequences|requests_in_progress).* (.*)$", re.M
)
"""Values of the gauges that count what has not ended."""

MAX_BODY_BYTES = 20_000
NUM_IDLE_TASKS = 3
ENDLESS = "endless"
"""Whose answers never end."""

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "seed": 1}


class Impatient(GuardedHttpProtocol):
    head_timeout_s = 0.2
    max_head_bytes = 4096


@dataclass(frozen=True)
class Attack:
    """What one client does."""

    pieces: tuple[bytes, ...]
    """Sent one after the other."""

    ending: str
    """What comes then: `wait` for the end, `close`, `reset`, `half-close`, or `leave` in the
    middle of the answer."""


@pytest.fixture(scope="module")
def attacked(start_router: RouterFactory) -> Iterator[RunningRouter]:
    node = FakeNode()

    def script(request: GenerateRequest) -> Sequence[Step]:
        if request.client_id == ENDLESS:
            return [TokenEvent((70,)), Stall()]
        return saying([70, 71, 72])(request)

    node.script = script
    with (
        node.serve() as server,
        start_router(
            [(node.endpoint_id, server.url)],
            protocol=Impatient,
            body_timeout_s=0.2,
            max_body_bytes=MAX_BODY_BYTES,
            idempotency={"abandon_after_s": 0.05},
        ) as router,
    ):
        yield router


def wait_until_quiet(router: RunningRouter) -> None:
    """Return when nothing is left of any request; the test's own timeout bounds it."""
    while not is_quiet(router):
        pass


def is_quiet(router: RunningRouter) -> bool:
    """One connection is that of `router.http`; tasks are those of the server, of its lifespan, and
    the one that follows the node."""
    held = HELD.findall(router.http.get("/metrics").text)
    num_connections, num_requests, num_tasks = router.server.census()
    return (
        {float(value) for value in held} == {0.0}
        and num_connections <= 1
        and num_requests == 0
        and num_tasks <= NUM_IDLE_TASKS
    )


def carry_out(attacks: Sequence[Attack], router: RunningRouter) -> list[bytes]:
    """Return what each client received."""
    connections = [router.connect() for _ in attacks]
    for connection, attack in zip(connections, attacks, strict=True):
        try:
            for piece in attack.pieces:
                connection.sendall(piece)
            if attack.ending == "half-close":
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # Refused in the middle.
    received = [receive(c, a.ending) for c, a in zip(connections, attacks, strict=True)]
    for connection, attack in zip(connections, attacks, strict=True):
        if attack.ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    return received


def receive(connection: socket.socket, ending: str) -> bytes:
    received = b""
    if ending in {"close", "reset"}:
        return received
    try:
        while data := connection.recv(65536):
            received += data
            if ending == "leave":
                break
    except ConnectionResetError:
        pass  # It had refused a body that went on.
    return received


def refuse_5xx(received: Sequence[bytes]) -> None:
    for data in received:
        assert not [status for status in STATUS.findall(data) if status >= b"500"], data


# --- What clients send ---------------------------------------------------------------------


def nested(opening: bytes, middle: bytes, ending: bytes, depth: int) -> bytes:
    return opening * depth + middle + ending * depth


NUMBERS = [b"1" * 5000, b"-1", b"1e999", b"1e-999", b"-0", b"0.0", b"9223372036854775808", b"NaN"]
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from([b"null", b"true", b'"\\ud800"', b'"\\u0000"', b'"\xff"', b'"\x00"', b"[]"]),
    st.sampled_from([b"{}", nested(b"[", b"", b"]", 150), nested(b'{"a":', b"1", b"}", 3000)]),
    st.text(max_size=8).map(lambda text: json.dumps(text).encode()),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ).map(lambda value: json.dumps(value).encode()),
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "max_tokens", "stream", "stream_options", "n", "stop"),
        *("logit_bias", "response_format", "guided_regex", "priority", "slo", "seed", "logprobs"),
        *("max_wait_ms", "user", "metadata", "tools", "tokens", "echo", "\x00", ""),
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    base: dict[str, Any] = draw(st.sampled_from([CHAT, COMPLETION, {"tokens": [70]}, {}]))
    parts = {name: json.dumps(value).encode() for name, value in base.items()}
    parts |= draw(st.sampled_from([{}, {"stream": b"true"}]))
    parts |= draw(st.dictionaries(FIELDS, VALUES, max_size=2))
    body = b"{%b}" % b",".join(b"%b:%b" % (json.dumps(n).encode(), v) for n, v in parts.items())
    match draw(st.sampled_from(["as it is"] * 4 + ["cut", "garbled", "large", "foreign"])):
        case "cut":
            return body[: draw(st.integers(0, len(body)))]
        case "garbled":
            position = draw(st.integers(0, len(body)))
            return body[:position] + draw(st.binary(max_size=5)) + body[position:]
        case "large":
            return body + b" " * (MAX_BODY_BYTES + 1)
        case "foreign":
            return draw(st.binary(max_size=50))
    return body


LINES = [
    b"POST /v1/chat/completions HTTP/1.1",
    b"POST /v1/completions HTTP/1.1",
    b"POST /tokenize HTTP/1.1",
    b"POST /detokenize HTTP/1.1",
]
ODD_LINES = [
    b"POST /v1/chat/completions HTTP/1.0",
    b"POST /v1/completions HTTP/2.0",
    b"POST /v1/embeddings?a=%zz HTTP/1.1",
    b"HEAD /v1/models/%00%ff HTTP/1.1",
    b"GET /v1/models/../../etc/passwd HTTP/1.1",
    b"GET /v1/models/\xff\xfe HTTP/1.1",
    b"GET http://elsewhere/health HTTP/1.1",
    b"GET // HTTP/1.1",
    b"GET /%s HTTP/1.1" % (b"a" * 3000),
    b"GET /%s HTTP/1.1" % (b"a" * 9000),
    b"OPTIONS * HTTP/1.1",
    b"CONNECT node:443 HTTP/1.1",
    b"TRACE /openapi.json HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"get /health HTTP/1.1",
    b"GET /health",
    b"G\x00T /health HTTP/1.1",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"",
]
HEADERS = [
    b"content-type: text/plain",
    b"content-length: -1",
    b"content-length: 99999999999999999999",
    b"content-length: 9999999",
    b"content-length: 0x10",
    b"content-length: 1, 2",
    b"transfer-encoding: chunked",
    b"transfer-encoding: gzip, chunked",
    b"transfer-encoding: identity",
    b"expect: 100-continue",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x",
    b"connection: upgrade, http2-settings\r\nupgrade: h2c",
    b"connection: close",
    b"idempotency-key: again",
    b"idempotency-key: \xff",
    b"x-proserve-priority: \xff\xfe",
    b"x-proserve-priority: high",
    b"x-proserve-ttft-ms: nan",
    b"x-proserve-tpot-ms: 1e400",
    b"x-proserve-max-wait-ms: -0",
    b"x-request-id: \x00\x01",
    b"authorization: Bearer \xe9",
    b"no colon",
    b" folded",
    b": no name",
    b"x: " + b"a" * 9000,
    b"x: \x00",
]


@st.composite
def attacks(draw: st.DrawFn) -> Attack:
    line = draw(st.sampled_from([*LINES * 6, *ODD_LINES]))
    headers = draw(st.lists(st.sampled_from(HEADERS), max_size=2))
    headers.append(b"content-type: application/json")
    body = draw(bodies())
    match draw(st.sampled_from(["length", "length", "length", "chunks", "wrong length"])):
        case "length":
            headers.append(b"content-length: %d" % len(body))
        case "wrong length":
            headers.append(b"content-length: %d" % draw(st.integers(0, 2 * len(body))))
        case "chunks":
            headers.append(b"transfer-encoding: chunked")
            size = draw(st.sampled_from([b"%x"] * 4 + [b"-%x", b"f%x", b"0x%x", b"%x;a=b"]))
            ending = draw(st.sampled_from([b"0\r\n\r\n", b"", b"0\r\ntrailer: a\r\n\r\n"]))
            body = b"%b\r\n%b\r\n%b" % (size % len(body), body, ending)
    data = b"\r\n".join([line, b"host: test", *headers, b"", b""]) + body
    data *= draw(st.sampled_from([1] * 6 + [2]))
    if draw(st.sampled_from([False] * 4 + [True])):
        data = data[: draw(st.integers(0, len(data)))]
    cut = draw(st.integers(0, len(data)))
    last = draw(st.sampled_from(["wait", "wait", "wait", "close", "reset", "half-close"]))
    return Attack((data[:cut], data[cut:]), last)


def test_whatever_comes_there_is_an_answer_or_an_end_and_nothing_stays(
    attacked: RunningRouter,
) -> None:
    """`make fuzz` does the same for longer."""

    @bounded(10)
    @given(batch=st.lists(attacks(), min_size=12, max_size=24))
    def attack(batch: Sequence[Attack]) -> None:
        refuse_5xx(carry_out(batch, attacked))
        wait_until_quiet(attacked)

    attack()
    assert attacked.chat().status_code == 200


# --- What it found, and what it would seldom hit ---------------------------------------------


def one(router: RunningRouter, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """Return status and body of the one answer to a request, behind which the connection ends."""
    (received,) = carry_out([Attack(pieces, "wait")], router)
    head, _, body = received.partition(b"\r\n\r\n")
    (status,) = STATUS.findall(head)
    return int(status), json.loads(body)["error"]


@pytest.mark.parametrize(
    ("pieces", "status", "words"),
    [
        pytest.param([b"\x16\x03\x01\r\n\r\n"], 400, "Invalid HTTP", id="tls"),
        pytest.param([b"GET /health HT"], 408, "after 0.2 s", id="half a line"),
        pytest.param([b"GET /health HTTP/1.1\r\nhost: a\r\n"], 408, "head", id="half a head"),
        pytest.param([b"GET /", b"a" * 2100, b"a" * 2100], 431, "4,096 B", id="long line"),
        pytest.param([b"GET / HTTP/1.1\r\nx: ", b"a" * 4100], 431, "4,096 B", id="long header"),
    ],
)
def test_what_does_not_become_a_request_is_refused_in_the_shape_of_all_errors(
    attacked: RunningRouter, pieces: Sequence[bytes], status: int, words: str
) -> None:
    found, error = one(attacked, *pieces)

    assert found == status
    assert words in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")


def test_broken_framing_in_the_middle_of_a_body_is_refused(attacked: RunningRouter) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"

    status, error = one(attacked, head + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nxyz\r\n")

    assert (status, error["code"]) == (400, "invalid_http")


def test_nothing_is_written_into_another_answer(attacked: RunningRouter) -> None:
    """A stream is under way when something that is no HTTP follows on its connection."""
    stream = {**COMPLETION, "stream": True, "user": ENDLESS}
    with attacked.connect() as connection:
        connection.sendall(http_post("/v1/completions", stream))
        received = connection.recv(65536)
        connection.sendall(b"\x00\x01\r\n\r\n")
        while data := connection.recv(65536):
            received += data

    assert STATUS.findall(received) == [b"200"]
    wait_until_quiet(attacked)


def test_a_connection_ends_behind_a_request_that_asks_to_change_the_protocol(
    attacked: RunningRouter,
) -> None:
    """The parser reads nothing behind it, so a second request would never be answered."""
    request = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"

    (received,) = carry_out([Attack((request, request), "wait")], attacked)

    assert STATUS.findall(received) == [b"200"]
    assert b"connection: close" in received.lower()


def test_a_body_that_goes_on_behind_its_refusal_is_not_listened_to_for_long(
    attacked: RunningRouter,
) -> None:
    """Each piece would start uvicorn's own wait anew."""
    head = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-length: 999999\r\n\r\n"
    with attacked.connect() as connection:
        connection.sendall(head)
        assert STATUS.findall(connection.recv(65536)) == [b"415"]
        with suppress(OSError):  # The end of the connection, or else of the test's time.
            while True:
                connection.sendall(b"a")

    wait_until_quiet(attacked)


@pytest.mark.parametrize("depth", [300, 5000])
@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "deep"}])
def test_what_is_nested_too_deeply_is_no_bug(
    attacked: RunningRouter, depth: int, headers: dict[str, str]
) -> None:
    content = b'{"model": "tiny", "metadata": %b}' % nested(b"[", b"", b"]", depth)

    response = attacked.http.post(
        "/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
    )

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("ending", ["leave", "close", "reset", "half-close"])
@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "endless"}])
def test_a_client_that_leaves_an_endless_stream_leaves_nothing_behind(
    attacked: RunningRouter, ending: str, headers: dict[str, str]
) -> None:
    """Answers with a key go on for `abandon_after_s`; all clients but the first repeat it."""
    stream = {**COMPLETION, "stream": True, "user": ENDLESS, "n": 2}
    request = http_post("/v1/completions", stream, headers=headers)

    refuse_5xx(carry_out([Attack((request,), ending)] * 5, attacked))

    wait_until_quiet(attacked)
