"""Requests with an `Idempotency-Key`: one generation, however often they are sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.wire import TokenEvent
from router.keys import NewKey, make_key
from router.tokenizer import Tokenizer
from tests.router import sse
from tests.router.client_files import bearer, client, write_clients
from tests.router.clocks import ManualClock
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import Drop, FakeNode, Refuse, Stall, saying
from tests.router.servers import http_post

COMPLETION = {"model": "tiny", "prompt": "Hi"}
KEPT_BYTES = "proserve_router_kept_answer_bytes"


@pytest.fixture
def hello(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("Hello there", add_special_tokens=False)


def send(
    router: RunningRouter, key: str = "a", *, headers: dict[str, str] | None = None, **changes: Any
) -> httpx.Response:
    return router.http.post(
        "/v1/completions",
        json={**COMPLETION, **changes},
        headers={"Idempotency-Key": key, **(headers or {})},
    )


def keyed_post(key: str, body: dict[str, Any]) -> bytes:
    """Return a request with a key as it goes over a connection."""
    return http_post("/v1/completions", body).replace(
        b"\r\n", b"\r\nidempotency-key: %b\r\n" % key.encode(), 1
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_gets_the_same_answer_without_another_generation(
    router: RunningRouter, node: FakeNode, hello: list[int], *, stream: bool
) -> None:
    node.script = saying(hello)

    answers = [send(router, stream=stream) for _ in range(3)]

    assert len(node.requests) == 1
    assert [answer.status_code for answer in answers] == [200] * 3
    assert {answer.content for answer in answers} == {answers[0].content}
    assert {answer.headers["content-type"] for answer in answers} == {
        answers[0].headers["content-type"]
    }
    assert [a.headers.get("idempotent-replayed") for a in answers] == [None, "true", "true"]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    assert router.metric("proserve_router_idempotent_replays_total") == 2
    disconnects = 'proserve_router_client_disconnects_total{priority_class="normal"}'
    assert router.metric(disconnects) == 0


def test_a_router_that_was_started_anew_draws_the_same_answers_again(
    node: FakeNode, start_router: RouterFactory
) -> None:
    """Four answers, each with a seed of its own, which depends on key and request alone; a seed
    that the client names counts more."""

    def seeds(key: str = "a", **changes: Any) -> dict[str, int]:
        node.requests.clear()
        with start_router([(node.endpoint_id, node.url)]) as router:
            asked = {"prompt": ["a", "a"], "n": 2, "logprobs": 1, **changes}
            assert send(router, key, **asked).status_code == 200
        return {r.request_id.rsplit("-", 1)[1]: r.sampling.seed for r in node.requests}

    first, second = seeds(), seeds()

    assert second == first
    assert len(set(first.values())) == 4
    assert not set(first.values()) & set(seeds("b").values())
    assert not set(first.values()) & set(seeds(max_tokens=3).values())
    assert seeds(seed=7) == seeds("b", seed=7)


def test_without_a_key_nothing_is_kept(router: RunningRouter, node: FakeNode) -> None:
    router.complete()
    router.complete()

    assert len(node.requests) == 2
    assert router.metric(KEPT_BYTES) == 0


def test_chat_has_it_too_and_a_key_belongs_to_one_route(
    router: RunningRouter, node: FakeNode
) -> None:
    headers = {"Idempotency-Key": "a"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    first, second = (
        router.http.post("/v1/chat/completions", json=body, headers=headers) for _ in range(2)
    )

    assert first.content == second.content
    assert len(node.requests) == 1
    assert send(router).status_code == 422


def test_layout_and_order_of_a_body_do_not_matter(router: RunningRouter, node: FakeNode) -> None:
    contents = ('{"model": "tiny", "prompt": "Hi"}', '{\n "prompt":"Hi","model":"tiny"}')
    for content in contents:
        answer = router.http.post(
            "/v1/completions",
            content=content,
            headers={"Idempotency-Key": "a", "Content-Type": "application/json"},
        )
        assert answer.status_code == 200

    assert len(node.requests) == 1


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_tokens": 2}, id="other body"),
        pytest.param({"headers": {"X-ProServe-Priority": "high"}}, id="other class"),
        pytest.param({"stream": True}, id="streamed"),
    ],
)
def test_a_key_with_another_request_is_refused(
    router: RunningRouter, node: FakeNode, changes: dict[str, Any]
) -> None:
    send(router, "a-key")

    refused = send(router, "a-key", **changes)

    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert "'a-key' was sent with another request" in refused.json()["error"]["message"]
    assert len(node.requests) == 1


def test_other_keys_and_other_clients_have_their_own_answers(
    router: RunningRouter, node: FakeNode
) -> None:
    send(router, "a", headers={"Authorization": "Bearer one"})
    send(router, "a", headers={"Authorization": "Bearer two"})
    send(router, "b", headers={"Authorization": "Bearer one"})

    assert len(node.requests) == 3
    other = send(router, "a", headers={"Authorization": "Bearer two"}, max_tokens=2)
    assert other.status_code == 422, "its own key with another body"


@pytest.mark.parametrize("key", ["", "with blank", "x" * 256])
def test_a_malformed_key_is_refused(router: RunningRouter, node: FakeNode, key: str) -> None:
    refused = send(router, key)

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert node.requests == []


def test_a_refused_request_does_not_use_up_its_key(router: RunningRouter) -> None:
    assert send(router, max_tokens=0).status_code == 400

    assert send(router).status_code == 200


def test_a_repetition_follows_an_answer_that_is_still_being_made(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    """It gets what was there before it came, and then everything as it comes."""
    node.script = lambda _: [TokenEvent((hello[0],)), Stall(), *saying(hello[1:])(_)]
    headers = {"Idempotency-Key": "a"}
    body = {**COMPLETION, "stream": True}
    with router.http.stream("POST", "/v1/completions", json=body, headers=headers) as first:
        first_events = sse.arriving(first)
        begun = next(first_events)
        with router.http.stream("POST", "/v1/completions", json=body, headers=headers) as second:
            second_events = sse.arriving(second)

            assert next(second_events) == begun
            node.release()
            assert list(second_events) == list(first_events)
    assert len(node.requests) == 1


def test_an_answer_goes_on_without_its_client_and_can_be_fetched(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = lambda _: [TokenEvent((hello[0],)), Stall(), *saying(hello[1:])(_)]
    with router.connect() as connection:
        connection.sendall(keyed_post("a", {**COMPLETION, "stream": True}))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    router.wait_for_metric('proserve_router_client_disconnects_total{priority_class="normal"}', 1)

    node.release()
    answer = send(router, stream=True)

    *chunks, done = sse.parsed(answer.text)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello there"
    assert done == "[DONE]"
    assert (len(node.requests), node.aborted_ids) == (1, [])


def test_an_answer_that_nobody_reads_any_more_is_given_up(
    node: FakeNode, start_router: RouterFactory
) -> None:
    node.script = lambda _: [Stall()]
    with (
        start_router(
            [(node.endpoint_id, node.url)], idempotency={"abandon_after_s": 0.01}
        ) as router,
        router.connect() as connection,
    ):
        connection.sendall(keyed_post("a", COMPLETION))
        node.wait_until(lambda n: len(n.requests) == 1, "the node has the request")
        connection.close()

        node.wait_until(lambda n: len(n.aborted_ids) == 1, "the request is aborted")

        node.script = saying([65])
        assert send(router).status_code == 200, "its key is free again"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_failed_answer_is_not_kept(
    router: RunningRouter, node: FakeNode, hello: list[int], num_tokens: int, *, stream: bool
) -> None:
    """Before and after the first token; the repetition tries again."""
    node.script = lambda _: [
        *(TokenEvent((token,)) for token in hello[:num_tokens]),
        *([Drop()] if num_tokens else [Refuse(503)]),
    ]
    failed = send(router, stream=stream, max_wait_ms=0)
    assert "node_unavailable" in failed.text
    assert router.metric(KEPT_BYTES) == 0
    node.script = saying(hello)
    router.wait_for_metric('proserve_router_endpoint_usable{endpoint_id="node-0"}', 1)

    answer = send(router, stream=stream, max_wait_ms=0)

    assert answer.status_code == 200
    assert "idempotent-replayed" not in answer.headers
    assert len(node.requests) == 2


def test_answers_that_ended_first_make_room(node: FakeNode, start_router: RouterFactory) -> None:
    """There is room for two answers; the third displaces the first."""
    with start_router([(node.endpoint_id, node.url)], idempotency={"max_answers": 2}) as router:
        for key in ("a", "b", "c"):
            send(router, key)

        assert [send(router, key).headers.get("idempotent-replayed") for key in "cb"] == [
            "true"
        ] * 2
        send(router, "a")

    assert len(node.requests) == 4


def test_bytes_are_bounded(node: FakeNode, start_router: RouterFactory, hello: list[int]) -> None:
    """An answer is some 300 bytes; 1,000 hold three."""
    node.script = saying(hello)
    with start_router([(node.endpoint_id, node.url)], idempotency={"max_bytes": 1000}) as router:
        for index in range(10):
            send(router, f"key-{index}")

            assert router.metric(KEPT_BYTES) <= 1000
        send(router, "key-9")
        send(router, "key-0")

    assert len(node.requests) == 11


def test_answers_under_way_are_never_displaced(node: FakeNode, start_router: RouterFactory) -> None:
    node.script = lambda request: [Stall(), *saying([65])(request)]
    with (
        start_router([(node.endpoint_id, node.url)], idempotency={"max_answers": 1}) as router,
        router.connect() as connection,
    ):
        connection.sendall(keyed_post("a", COMPLETION))
        node.wait_until(lambda n: len(n.requests) == 1, "the first one is under way")

        refused = send(router, "b")

        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_keys"
        assert refused.headers["retry-after"] == "1"
        node.release()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert send(router, "b").status_code == 200, "the first one has ended and makes room"


def test_answers_are_forgotten_after_a_while(node: FakeNode, start_router: RouterFactory) -> None:
    clock = ManualClock()
    settings = {"idempotency": {"keep_s": 60}, "max_snapshot_age_s": 10_000}
    with start_router([(node.endpoint_id, node.url)], clock=clock, **settings) as router:
        send(router)
        clock.time_s += 60
        send(router)
        assert len(node.requests) == 1

        clock.time_s += 1
        send(router)

    assert len(node.requests) == 2


@pytest.fixture
def keys() -> tuple[NewKey, NewKey, NewKey]:
    return make_key(), make_key(), make_key()


@pytest.fixture
def closed(
    start_router: RouterFactory, node: FakeNode, tmp_path: Path, keys: tuple[NewKey, ...]
) -> Iterator[RunningRouter]:
    """A router for acme, which has two keys and may have one answer at a time, and for umbra."""
    acme = client("acme", keys[0], limits={"max_concurrent_sequences": 1})
    acme["keys"] += client(key=keys[1])["keys"]
    path = write_clients(tmp_path / "clients.yaml", acme, client("umbra", keys[2]))
    with start_router([(node.endpoint_id, node.url)], clients_file=path) as router:
        yield router


def test_an_answer_belongs_to_a_client_whichever_of_its_keys_it_sends(
    closed: RunningRouter, node: FakeNode, keys: tuple[NewKey, ...]
) -> None:
    answers = [send(closed, "a", headers=bearer(key)) for key in keys]

    assert [a.headers.get("idempotent-replayed") for a in answers] == [None, "true", None]
    assert [a.headers["x-proserve-served-as"] for a in answers] == ["high"] * 3
    assert len(node.requests) == 2


def test_an_answer_that_goes_on_without_its_client_still_counts_against_its_limits(
    closed: RunningRouter, node: FakeNode, hello: list[int], keys: tuple[NewKey, ...]
) -> None:
    """Leaving does not make room for more than one answer at a time."""
    node.script = lambda _: [TokenEvent((hello[0],)), Stall(), *saying(hello[1:])(_)]
    request = keyed_post("a", COMPLETION).replace(
        b"\r\n", b"\r\nauthorization: %b\r\n" % bearer(keys[0])["authorization"].encode(), 1
    )
    with closed.connect() as connection:
        connection.sendall(request)
        node.wait_until(lambda n: len(n.requests) == 1, "the first one is under way")
    closed.wait_for_metric('proserve_router_client_disconnects_total{priority_class="high"}', 1)

    assert send(closed, "b", headers=bearer(keys[0])).json()["error"]["type"] == "sequences"
    node.release()
    assert send(closed, "a", headers=bearer(keys[1])).status_code == 200
    closed.wait_for_metric('proserve_router_requests_in_progress{priority_class="high"}', 0)
    assert send(closed, "b", headers=bearer(keys[0])).status_code == 200


def test_a_shutdown_ends_answers_under_way(
    router: RunningRouter, node: FakeNode, hello: list[int]
) -> None:
    node.script = lambda _: [TokenEvent((hello[0],)), Stall()]
    body = {**COMPLETION, "stream": True}
    with router.http.stream(
        "POST", "/v1/completions", json=body, headers={"Idempotency-Key": "a"}
    ) as response:
        events = sse.arriving(response)
        next(events)

        router.end_open_requests()

        assert "shutting down" in list(events)[-1]["error"]["message"]
