from __future__ import annotations

import asyncio
import json

import pytest

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.http_protocol import GuardedHttpProtocol
from router.tokenizer import Tokenizer
from tests.router import sse
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import Drop, FakeNode, Raw, Stall, saying
from tests.router.servers import http_post

CHAT = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "tiny", "stream": True, "prompt": "Hi"}


@pytest.fixture
def hello(tokenizer: Tokenizer) -> list[int]:
    """Tokens of "Hello there" and the end token."""
    return [
        *tokenizer.encode("Hello there", add_special_tokens=False),
        *tokenizer.eos_token_ids,
    ]


def token_of(tokenizer: Tokenizer, raw: bytes) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == raw)


def test_a_chat_streams_role_then_text_then_finish_reason(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = saying(hello)

    response = router.chat(stream=True)

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = sse.parsed(response.text)
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hello"}, None),
        ({"content": " there"}, None),
        ({}, "stop"),
    ]
    assert all("usage" not in c for c in chunks)


def test_a_completion_streams_its_text(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = saying(hello)

    *chunks, done = sse.parsed(router.complete(stream=True, echo=True).text)

    assert done == "[DONE]"
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ("HiHello", None),
        (" there", None),
        ("", "stop"),
    ]


def test_usage_ends_the_stream_if_asked_for(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = saying(hello)

    *chunks, last, _ = sse.parsed(
        router.complete(stream=True, stream_options={"include_usage": True}).text
    )

    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": len(node.requests[0].prompt_token_ids),
        "completion_tokens": len(hello),
        "total_tokens": len(node.requests[0].prompt_token_ids) + len(hello),
    }


def test_every_chunk_carries_counts_if_asked_for(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = saying(hello)
    options = {"include_usage": True, "continuous_usage_stats": True}

    *chunks, _ = sse.parsed(router.complete(stream=True, stream_options=options).text)

    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]


def test_n_streams_come_together(router: RunningRouter, node: FakeNode, hello: list[int]) -> None:
    node.script = saying(hello)

    *chunks, done = sse.parsed(router.chat(stream=True, n=2).text)

    assert done == "[DONE]"
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello there"
        assert mine[-1]["finish_reason"] == "stop"


def test_half_a_character_sends_nothing(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    node.script = saying(
        [token_of(tokenizer, bytes([byte])) for byte in "é".encode()], finish=FinishReason.LENGTH
    )

    *chunks, _ = sse.parsed(router.complete(stream=True).text)

    assert [c["choices"][0]["text"] for c in chunks] == ["é"]


def test_logprobs_wait_for_the_text_they_belong_to(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    first, second = (token_of(tokenizer, bytes([byte])) for byte in "é".encode())
    node.script = lambda _: [
        TokenEvent((first,), (TokenLogprobs(-1.0, ()),)),
        TokenEvent((second,), (TokenLogprobs(-2.0, ()),)),
        TokenEvent((token_of(tokenizer, b"!"),), (TokenLogprobs(-3.0, ()),), FinishReason.LENGTH),
    ]

    *chunks, _ = sse.parsed(router.chat(stream=True, logprobs=True).text)

    found = [
        (c["choices"][0]["delta"]["content"], c["choices"][0]["logprobs"]) for c in chunks[1:-1]
    ]
    assert [text for text, _ in found] == ["é", "!"]
    assert [[t["logprob"] for t in logprobs["content"]] for _, logprobs in found] == [
        [-1.0, -2.0],
        [-3.0],
    ]


def test_every_token_is_sent_before_the_next_one_is_made(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = lambda _: [TokenEvent((hello[0],)), Stall(), *saying(hello[1:])(_)]

    with router.http.stream("POST", "/v1/completions", json=COMPLETION) as response:
        events = sse.arriving(response)
        first = next(events)
        assert first["choices"][0]["text"] == "Hello"
        assert node.aborted_ids == []

        node.release()

        assert [e if e == "[DONE]" else e["choices"][0]["text"] for e in events] == [
            " there",
            "",
            "[DONE]",
        ]


def test_a_stop_string_ends_the_stream_and_the_nodes_work(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    """The node would stall behind the stop string; the answer ends all the same."""
    letters = [token_of(tokenizer, bytes([byte])) for byte in b"abSTOP"]
    node.script = lambda _: [*(TokenEvent((letter,)) for letter in letters), Stall()]

    *chunks, done = sse.parsed(router.complete(stream=True, stop=["STOP", "never"]).text)

    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == "ab"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    node.wait_until(lambda n: len(n.aborted_ids) == 1, "the stopped request is aborted")


def test_a_stop_string_ends_a_whole_answer(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    letters = [token_of(tokenizer, bytes([byte])) for byte in b"ab.cd"]
    node.script = lambda _: [*(TokenEvent((letter,)) for letter in letters), Stall()]

    body = router.complete(stop=".").json()

    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3
    node.wait_until(lambda n: len(n.aborted_ids) == 1, "the stopped request is aborted")


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_in_mid_stream_aborts_on_the_node(
    router: RunningRouter, node: FakeNode, hello: list[int], n: int
) -> None:
    node.script = lambda _: [TokenEvent((hello[0],)), Stall()]

    with router.http.stream("POST", "/v1/completions", json={**COMPLETION, "n": n}) as response:
        next(sse.arriving(response))
        node.wait_until(lambda found: len(found.requests) == n, "all sequences are there")

    node.wait_until(lambda found: len(found.aborted_ids) == n, "all sequences are aborted")
    router.wait_for_metric('proserve_router_client_disconnects_total{priority_class="normal"}', 1)
    assert router.metric('proserve_router_requests_in_progress{priority_class="normal"}') == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_aborts_on_the_node(
    router: RunningRouter, node: FakeNode, *, stream: bool
) -> None:
    node.script = lambda _: [Stall()]
    with router.connect() as connection:
        connection.sendall(http_post("/v1/completions", {**COMPLETION, "stream": stream}))
        node.wait_until(lambda n: len(n.requests) == 1, "the node has the request")

    node.wait_until(lambda n: len(n.aborted_ids) == 1, "the request is aborted")
    router.wait_for_metric(
        'proserve_router_requests_total{priority_class="normal",'
        'route="/v1/completions",status="499"}',
        1,
    )


def test_a_connection_to_the_node_is_kept_after_a_finished_answer(
    node: FakeNode, start_router: RouterFactory, hello: list[int]
) -> None:
    """Neither a poll nor the stream of snapshots may come in between: they would take the idle
    connection."""
    node.script = saying(hello)
    node.snapshot_lines = asyncio.Queue()
    settings = {"snapshot_poll_interval_s": 1000, "max_snapshot_age_s": 2000}

    with start_router([(node.endpoint_id, node.url)], **settings) as router:
        node.wait_until(lambda n: n.num_streams == 1, "the router listens")
        for _ in range(5):
            router.complete(stream=True)

    assert len(node.generate_connections) == 1


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        pytest.param(Drop(), "node_unavailable", "does not answer", id="connection lost"),
        pytest.param(
            TokenEvent(finish_reason=FinishReason.ERROR, error="out of memory"),
            "engine_error",
            "out of memory",
            id="engine failed",
        ),
        pytest.param(
            TokenEvent(finish_reason=FinishReason.ABORT),
            "node_unavailable",
            "gave the request up",
            id="aborted by the node",
        ),
        pytest.param(
            TokenEvent(finish_reason=FinishReason.LOST, error="the engine process died"),
            "node_unavailable",
            "the engine process died",
            id="lost by the node",
        ),
        pytest.param(Raw(b""), "node_unavailable", "before the request's end", id="ends early"),
        pytest.param(Raw(b"{]\n"), "node_unavailable", "foreign answer", id="not JSON"),
        pytest.param(Raw(b'{"new_'), "node_unavailable", "middle of a line", id="half a line"),
    ],
)
def test_a_failure_in_mid_stream_is_told_as_an_event(
    router: RunningRouter,
    node: FakeNode,
    hello: list[int],
    ending: TokenEvent | Drop | Raw,
    code: str,
    words: str,
) -> None:
    node.script = lambda _: [TokenEvent((hello[0],)), ending]

    response = router.complete(stream=True)

    first, last = sse.parsed(response.text)
    assert response.status_code == 200
    assert first["choices"][0]["text"] == "Hello"
    assert last["error"]["type"] == "server_error"
    assert last["error"]["code"] == code
    assert words in last["error"]["message"]


def test_a_slow_reader_gets_everything(router: RunningRouter, node: FakeNode) -> None:
    """More text than sockets buffer is made while the client reads nothing."""
    line = TokenEvent((70,) * 50)
    node.script = lambda _: [*[line] * 4_000, TokenEvent((70,), finish_reason=FinishReason.LENGTH)]

    with router.http.stream("POST", "/v1/completions", json=COMPLETION) as response:
        node.wait_until(lambda n: len(n.requests) == 1, "the node has the request")
        *chunks, done = sse.arriving(response)

    assert done == "[DONE]"
    assert sum(len(c["choices"][0]["text"]) for c in chunks) == 4_000 * 50 + 1


class Impatient(GuardedHttpProtocol):
    unread_timeout_s = 0.2


def test_a_client_that_reads_nothing_does_not_hold_its_place_for_ever(
    node: FakeNode, start_router: RouterFactory
) -> None:
    """More text is made for it than sockets buffer; only the router can call the node off."""
    node.script = lambda _: [*[TokenEvent((70,) * 50)] * 40_000, Stall()]
    body = json.dumps(COMPLETION).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: router\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )

    with (
        start_router([(node.endpoint_id, node.url)], protocol=Impatient) as router,
        router.connect() as connection,
    ):
        connection.sendall(head % len(body) + body)
        node.wait_until(lambda n: len(n.requests) == 1, "the node has the request")

        node.wait_until(lambda n: len(n.aborted_ids) == 1, "the node was told that nobody reads")


def test_a_connection_that_is_to_end_answers_first_and_says_so(
    router: RunningRouter, node: FakeNode
) -> None:
    """A stream that has begun goes on; the next answer on its connection says that it is the last,
    before the connection ends."""
    node.script = lambda _: [TokenEvent((70,)), Stall(), *saying([71])(_)]

    with router.http.stream("POST", "/v1/completions", json=COMPLETION) as response:
        chunks = sse.arriving(response)
        next(chunks)
        router.server.leave()
        node.release()
        *_, done = chunks
    next_response = router.complete()
    another_response = router.complete()

    assert done == "[DONE]"
    assert "connection" not in response.headers
    assert (next_response.status_code, next_response.headers["connection"]) == (200, "close")
    assert "connection" not in another_response.headers
