"""What becomes of a request when a node fails before its first token; see `test_resume` too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.tokenizer import Tokenizer
from tests.router import sse
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import Drop, FakeNode, Hang, Raw, Refuse, Stall, Step, saying
from tests.router.servers import bound_socket, http_post

SLOW_POLLS = {"snapshot_poll_interval_s": 1000, "max_snapshot_age_s": 2000}
"""Only the poll at the start: nodes look as they did then."""

LOST = TokenEvent(finish_reason=FinishReason.LOST, error="the engine process died")


@pytest.fixture
def hello(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("Hello there", add_special_tokens=False)


@pytest.fixture
def pair(hello: list[int]) -> Iterator[tuple[FakeNode, FakeNode]]:
    """Two nodes that say hello; least-load turns to the first one first."""
    first, second = FakeNode("node-a"), FakeNode("node-b")
    with first.serve() as first_server, second.serve() as second_server:
        first.url, second.url = first_server.url, second_server.url
        first.script = second.script = saying(hello)
        yield first, second


def addresses(*nodes: FakeNode) -> list[tuple[str, str]]:
    return [(node.endpoint_id, node.url) for node in nodes]


def test_the_less_loaded_node_gets_the_request(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    first, second = pair
    first.num_queued_prompt_tokens = 100_000  # not done with on the slowest machine

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        router.complete()

    assert (len(first.requests), len(second.requests)) == (0, 1)


def test_requests_under_way_count_before_any_snapshot_shows_them(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    """Four sequences at once: each one's prompt turns the next one to the other node."""
    first, second = pair
    first.script = second.script = lambda _: [Stall()]

    with start_router(addresses(*pair), **SLOW_POLLS) as router, router.connect() as connection:
        connection.sendall(http_post("/v1/completions", {"model": "tiny", "prompt": "Hi", "n": 4}))

        for node in pair:
            node.wait_until(lambda n: len(n.requests) == 2, "two sequences on each")


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param([Refuse(503)], id="unavailable"),
        pytest.param([Refuse(500)], id="broken"),
        pytest.param([Refuse(429)], id="too busy"),
        pytest.param([Drop()], id="connection lost"),
        pytest.param([Raw(b"")], id="ends at once"),
        pytest.param([Raw(b"what?\n")], id="says something foreign"),
        pytest.param([LOST], id="loses the request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_node_that_fails_before_the_first_token_is_replaced(
    pair: tuple[FakeNode, FakeNode],
    start_router: RouterFactory,
    failure: list[Step],
    *,
    stream: bool,
) -> None:
    first, second = pair
    first.script = lambda _: failure

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        response = router.complete(stream=stream)

    assert response.status_code == 200
    if stream:
        *chunks, done = sse.parsed(response.text)
        assert done == "[DONE]"
        text = "".join(c["choices"][0]["text"] for c in chunks)
    else:
        text = response.json()["choices"][0]["text"]
    assert text == "Hello there"
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_node_that_has_died_is_replaced(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    """It accepts no connections any more, and no poll has noticed."""
    _, second = pair
    dying = FakeNode("node-0")
    with (
        dying.serve() as server,
        start_router([("node-0", server.url), *addresses(second)], **SLOW_POLLS) as router,
    ):
        server.kill()

        assert router.complete().status_code == 200

        assert router.metric('proserve_router_upstream_errors_total{endpoint_id="node-0"}') == 1
        health = router.http.get("/health").json()["nodes"]
        assert health["node-b"] == "ready"
        assert "does not answer" in health["node-0"]


def test_a_failed_node_is_not_tried_again(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    first, second = pair
    first.script = second.script = lambda _: [Refuse(503, "as the test says")]

    with start_router(addresses(*pair)) as router:
        response = router.complete()

    assert response.status_code == 503
    error = response.json()["error"]
    assert error["type"] == "server_error"
    assert error["code"] == "node_unavailable"
    assert response.headers["retry-after"] == "1"
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_attempts_are_bounded(pair: tuple[FakeNode, FakeNode], start_router: RouterFactory) -> None:
    first, second = pair
    first.script = lambda _: [Refuse(503, "as the test says")]

    with start_router(addresses(*pair), max_attempts=1, **SLOW_POLLS) as router:
        response = router.complete()

    assert response.status_code == 503
    assert "as the test says" in response.json()["error"]["message"]
    assert second.requests == []


def test_a_node_that_loses_a_request_counts_as_failed(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    first, second = pair
    first.script = lambda _: [LOST]

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        router.complete()
        router.complete()

        assert router.metric('proserve_router_upstream_errors_total{endpoint_id="node-a"}') == 1
        health = router.http.get("/health").json()["nodes"]
        assert "the engine process died" in health["node-a"]
    assert (len(first.requests), len(second.requests)) == (1, 2)


def test_a_nodes_refusal_of_the_request_is_the_clients(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    first, second = pair
    first.script = lambda _: [Refuse(400, "needs 9 KV blocks, there are 5", field="max_tokens")]

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        response = router.complete()

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "needs 9 KV blocks, there are 5",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": None,
    }
    assert second.requests == []


def test_one_failing_sequence_ends_the_whole_request(node: FakeNode, router: RunningRouter) -> None:
    node.script = lambda request: (
        [Stall(is_silent=True), Refuse(400)] if request.request_id.endswith("-1") else [Hang()]
    )
    with router.connect() as connection:
        connection.sendall(http_post("/v1/completions", {"model": "tiny", "prompt": "Hi", "n": 2}))
        node.wait_until(lambda n: len(n.requests) == 2, "both sequences are on the node")

        node.release()

        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    node.wait_until(lambda n: len(n.aborted_ids) == 1, "the other sequence is aborted")


def test_a_request_goes_only_to_nodes_that_are_large_enough(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    first, second = pair
    first.max_model_len = 20

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        router.complete(max_tokens=100)

    assert (len(first.requests), len(second.requests)) == (0, 1)


def test_a_guided_request_goes_only_to_nodes_that_follow_grammars(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    """Also when the only such node fails, and however loaded it is."""
    first, second = pair
    first.grammar_obstacle = "its engine draws by itself"
    second.num_queued_prompt_tokens = 100

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        router.complete(guided_regex="a+")
        second.script = lambda _: [Refuse(503)]
        without_another = router.complete(guided_regex="a+")

    assert (len(first.requests), len(second.requests)) == (0, 2)
    assert without_another.status_code == 503


def test_a_guided_request_that_no_node_will_ever_take_is_refused_at_once(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    for node in pair:
        node.grammar_obstacle = "its engine draws by itself"

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        refused = router.complete(guided_regex="a+").json()["error"]
        refused_form = router.complete(response_format={"type": "json_object"}).json()["error"]
        assert router.complete().status_code == 200

    assert (refused["param"], refused["code"]) == ("guided_regex", "unsupported_parameter")
    assert "node-b: its engine draws by itself" in refused["message"]
    assert refused_form["param"] == "response_format"


def test_a_guided_request_waits_for_a_node_that_may_yet_come(
    node: FakeNode, start_router: RouterFactory
) -> None:
    """Of a node that was never heard of nobody knows whether it follows grammars."""
    node.grammar_obstacle = "its engine draws by itself"
    with (
        bound_socket() as closed,
        start_router(
            [*addresses(node), ("node-z", f"http://127.0.0.1:{closed.getsockname()[1]}")],
            **SLOW_POLLS,
        ) as router,
    ):
        answer = router.complete(guided_regex="a+")

    assert answer.status_code == 503
    assert "node-0: tried without success, too small" in answer.json()["error"]["message"]


def test_a_silent_node_is_given_up(node: FakeNode, start_router: RouterFactory) -> None:
    node.script = lambda _: [Hang()]

    with start_router(addresses(node), stall_timeout_s=0.05) as router:
        response = router.complete()

    assert response.status_code == 503
    assert "does not answer" in response.json()["error"]["message"]
    node.wait_until(lambda n: len(n.aborted_ids) == 1, "the request is aborted")


def test_without_a_usable_node_the_answer_says_why(start_router: RouterFactory) -> None:
    with (
        bound_socket() as closed,
        start_router([("node-a", f"http://127.0.0.1:{closed.getsockname()[1]}")]) as router,
    ):
        for response in (router.complete(), router.chat(stream=True)):
            assert response.status_code == 503
            assert "node-a: node http://127.0.0.1" in response.json()["error"]["message"]
        assert router.http.get("/health").status_code == 503


def test_a_node_that_drains_gets_no_requests(
    pair: tuple[FakeNode, FakeNode], start_router: RouterFactory
) -> None:
    first, second = pair
    first.is_draining = True

    with start_router(addresses(*pair), **SLOW_POLLS) as router:
        router.complete()

    assert (len(first.requests), len(second.requests)) == (0, 1)


def test_a_node_that_comes_back_is_used_again(start_router: RouterFactory) -> None:
    with bound_socket() as probe:
        port = probe.getsockname()[1]
    with start_router([("node-0", f"http://127.0.0.1:{port}")]) as router:
        assert router.complete().status_code == 503
        node = FakeNode()

        with node.serve(port=port):
            node.wait_until(lambda n: n.num_polls >= 2, "two polls")

            assert router.complete().status_code == 200
