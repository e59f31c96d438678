"""A sequence whose node fails in the middle goes on elsewhere, unseen by its client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import GenerateRequest, TokenEvent
from router.tokenizer import Tokenizer
from tests.router import sse
from tests.router.conftest import RouterFactory
from tests.router.fake_node import Drop, FakeNode, Hang, Raw, Script, Stall, Step, saying
from tests.router.servers import bound_socket, http_post

TEXT = "Hello, naïve hall 😀!"
LOST = TokenEvent(finish_reason=FinishReason.LOST, error="the engine process died")
BROKEN = TokenEvent(finish_reason=FinishReason.ERROR, error="as the test says")
SLOW_POLLS = {"snapshot_poll_interval_s": 1000, "max_snapshot_age_s": 2000}
"""Only the poll at the start: a node that failed stays out."""

FORGIVING = {"health": {"breaker_failures": 10_000, "slow_start_s": 0}}
"""For nodes that fail in each request of a test."""

RETRIES_AFTER_TOKENS = 'proserve_router_retries_total{after_tokens="true"}'


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> list[int]:
    found = tokenizer.encode(TEXT, add_special_tokens=False)
    assert "�" in (tokenizer.decode([token]) for token in found), "no character is cut"
    return found


def num_delivered(request: GenerateRequest) -> int:
    return len(request.resume_from.output_token_ids) if request.resume_from else 0


def failing(tokens: Sequence[int], ending: Step, *, num_failures: int = 1) -> Script:
    """Return a script that fails behind as many tokens as the request's seed is, so many times."""

    def script(request: GenerateRequest) -> Sequence[Step]:
        said, cut = saying(tokens)(request), request.sampling.seed
        has_failed_enough = num_delivered(request) >= cut * num_failures
        return said if has_failed_enough else [*said[:cut], ending]

    return script


@contextmanager
def nodes_running(*nodes: FakeNode) -> Iterator[list[tuple[str, str]]]:
    """Return the nodes' ids and addresses."""
    with ExitStack() as stack:
        for node in nodes:
            node.url = stack.enter_context(node.serve()).url
        yield [(node.endpoint_id, node.url) for node in nodes]


def trio(script: Script) -> list[FakeNode]:
    nodes = [FakeNode(f"node-{index}") for index in range(3)]
    for node in nodes:
        node.script = script
    return nodes


def text_of(response: httpx.Response) -> str:
    """Return the text of a whole or a streamed answer that has come to its proper end."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        text: str = response.json()["choices"][0]["text"]
        return text
    *chunks, done = sse.parsed(response.text)
    assert done == "[DONE]"
    assert all("error" not in chunk for chunk in chunks)
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(Drop(), id="connection lost"),
        pytest.param(LOST, id="gives the request up"),
        pytest.param(Raw(b""), id="ends too early"),
        pytest.param(Raw(b'{"new_token_ids":[7'), id="ends in mid-line"),
        pytest.param(Raw(b"what?\n"), id="says something foreign"),
        pytest.param(Hang(), id="falls silent"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wherever_a_node_fails_another_one_goes_on(
    start_router: RouterFactory, tokens: list[int], ending: Step, *, stream: bool
) -> None:
    """Cut behind each token, in the middle of characters too."""
    nodes = trio(failing(tokens, ending))
    with (
        nodes_running(*nodes) as addresses,
        start_router(
            addresses, stall_timeout_s=0.5 if isinstance(ending, Hang) else 5.0, **FORGIVING
        ) as router,
    ):
        for cut in range(1, len(tokens)):
            assert text_of(router.complete(stream=stream, seed=cut, max_tokens=99)) == TEXT

        assert router.metric(RETRIES_AFTER_TOKENS) == len(tokens) - 1
    requests = [request for node in nodes for request in node.requests]
    resumed = [request for request in requests if request.resume_from is not None]
    assert len(requests) == 2 * len(resumed) == 2 * (len(tokens) - 1)
    for request in resumed:
        (original,) = [
            r for r in requests if r.request_id == request.request_id and r.resume_from is None
        ]
        assert request.resume_from is not None
        assert request.resume_from.output_token_ids == tuple(tokens[: request.sampling.seed])
        assert original.elapsed_s < request.resume_from.ttft_s <= request.elapsed_s
        assert (request.sampling, request.prompt_token_ids) == (
            original.sampling,
            original.prompt_token_ids,
        )


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_sequence_may_lose_several_nodes(
    start_router: RouterFactory, tokens: list[int], cut: int
) -> None:
    nodes = trio(failing(tokens, Drop(), num_failures=2))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, **SLOW_POLLS) as router,
    ):
        assert text_of(router.complete(stream=True, seed=cut, max_tokens=99)) == TEXT

    assert [num_delivered(r) for node in nodes for r in node.requests] == [0, cut, 2 * cut]


def test_counts_and_log_probabilities_are_those_of_one_run(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    """Each token's log-probability is minus its position; the cut is inside of a character."""

    def with_logprobs(request: GenerateRequest) -> list[Step]:
        first = num_delivered(request)
        return [
            TokenEvent(
                new_token_ids=(token,),
                logprobs=(TokenLogprobs(-1.0 * position, ((token, -1.0 * position),)),),
                finish_reason=FinishReason.STOP if position + 1 == len(tokens) else None,
            )
            for position, token in enumerate(tokens)
            if position >= first
        ]

    def cut_once(request: GenerateRequest) -> list[Step]:
        said = with_logprobs(request)
        return said if request.resume_from else [*said[: len(tokens) - 3], Drop()]

    answers = []
    for script in (with_logprobs, cut_once):
        with (
            nodes_running(*trio(script)) as addresses,
            start_router(addresses, **SLOW_POLLS) as router,
        ):
            answers.append(router.complete(logprobs=1, max_tokens=99).json())

    calm, disturbed = answers
    assert disturbed["choices"] == calm["choices"]
    assert disturbed["usage"] == calm["usage"]
    assert calm["usage"]["completion_tokens"] == len(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_spans_the_cut_ends_the_answer(
    start_router: RouterFactory, tokens: list[int], *, stream: bool
) -> None:
    nodes = trio(failing(tokens, Drop()))
    stop = "ve ha"
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, **FORGIVING) as router,
    ):
        for cut in range(1, len(tokens)):
            text = text_of(router.complete(stream=stream, seed=cut, stop=stop, max_tokens=99))

            assert text == TEXT[: TEXT.index(stop)]


def test_every_answer_of_a_request_goes_on(start_router: RouterFactory, tokens: list[int]) -> None:
    def script(request: GenerateRequest) -> Sequence[Step]:
        said = saying(tokens)(request)
        return said if request.resume_from else [*said[:3], Drop()]

    with (
        nodes_running(*trio(script)) as addresses,
        start_router(addresses, **FORGIVING) as router,
    ):
        answer = router.complete(n=3, max_tokens=99, serving_summary=True).json()

    assert [choice["text"] for choice in answer["choices"]] == [TEXT] * 3
    summaries = answer["usage"]["serving_summary"]
    assert [(s["index"], s["retries"], s["tokens"]) for s in summaries] == [
        (index, 1, len(tokens)) for index in range(3)
    ]


def test_how_a_connection_ends_behind_the_last_token_does_not_matter(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    nodes = trio(lambda request: [*saying(tokens)(request), Drop()])
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, **SLOW_POLLS) as router,
    ):
        assert text_of(router.complete(max_tokens=99)) == TEXT
        assert router.metric(RETRIES_AFTER_TOKENS) == 0

    assert [len(node.requests) for node in nodes] == [1, 0, 0]


def test_a_busy_node_that_gives_signs_of_life_is_not_given_up(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    """It says nothing else for two stall timeouts: five signs each."""
    node = FakeNode()
    node.script = lambda request: [Stall(), *saying(tokens)(request)]
    with (
        nodes_running(node) as addresses,
        start_router(addresses, stall_timeout_s=0.5) as router,
        router.connect() as connection,
    ):
        connection.sendall(http_post("/v1/completions", {"model": "tiny", "prompt": "Hi"}))
        node.wait_until(lambda n: n.num_beats >= 10, "ten signs of life")

        node.release()

        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert len(node.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_without_any_node_left_one_error_ends_the_answer(
    start_router: RouterFactory, tokenizer: Tokenizer, tokens: list[int], *, stream: bool
) -> None:
    """All three fail behind a token, and the client would not wait for another one."""
    nodes = trio(failing(tokens, LOST, num_failures=99))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, **SLOW_POLLS) as router,
    ):
        response = router.complete(stream=stream, seed=1, max_tokens=99, max_wait_ms=0)

        assert router.metric("proserve_router_sequences_given_up_total") == 1
    if stream:
        *chunks, last = sse.parsed(response.text)
        assert [c["choices"][0]["text"] for c in chunks] == [
            tokenizer.decode([token]) for token in tokens[:3]
        ]
        error = last["error"]
    else:
        assert response.status_code == 503
        error = response.json()["error"]
    assert error["code"] == "node_unavailable"
    assert "the engine process died; the request is given up: no node could" in error["message"]
    assert [len(node.requests) for node in nodes] == [1, 1, 1]


def test_attempts_are_bounded(start_router: RouterFactory, tokens: list[int]) -> None:
    nodes = trio(failing(tokens, Drop(), num_failures=99))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, max_attempts=2, **SLOW_POLLS) as router,
    ):
        response = router.complete(seed=1, max_tokens=99)

    assert response.status_code == 503
    assert "it was sent to 2 nodes, the limit (max_attempts)" in response.json()["error"]["message"]
    assert [len(node.requests) for node in nodes] == [1, 1, 0]


def test_a_sequence_never_returns_to_the_process_that_failed_on_it(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    """The node answers polls again at once and would say the rest; other requests go there."""
    node = FakeNode()
    node.script = failing(tokens, Drop())
    with (
        nodes_running(node) as addresses,
        start_router(addresses, **FORGIVING) as router,
    ):
        response = router.complete(seed=3, max_tokens=99, max_wait_ms=200)
        node.script = saying(tokens)

        assert text_of(router.complete(max_tokens=99)) == TEXT

    assert response.status_code == 503
    assert "no node could take it within 0.2 s" in response.json()["error"]["message"]
    assert [num_delivered(request) for request in node.requests] == [0, 0]


def test_a_sequence_waits_for_the_process_that_takes_the_place_of_the_one_that_died(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    dying, next_one = FakeNode(), FakeNode()
    dying.script = lambda request: [*saying(tokens)(request)[:3], Stall()]
    next_one.script = saying(tokens)
    body = {"model": "tiny", "prompt": "Hi", "stream": True, "max_tokens": 99}
    with (
        dying.serve() as server,
        start_router([("node-0", server.url)]) as router,
        router.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        events = sse.arriving(response)
        text = "".join(next(events)["choices"][0]["text"] for _ in range(3))
        server.kill()

        with next_one.serve(port=server.port):
            *chunks, done = events

    assert done == "[DONE]"
    assert text + "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert [num_delivered(request) for request in next_one.requests] == [3]


def test_a_request_may_wait_for_the_first_node(start_router: RouterFactory) -> None:
    with bound_socket() as probe:
        port = probe.getsockname()[1]
    node = FakeNode()
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1, "max_wait_ms": 20_000}
    with start_router([("node-0", f"http://127.0.0.1:{port}")]) as router:
        with node.serve(port=port):
            router.wait_for_metric('proserve_router_endpoint_usable{endpoint_id="node-0"}', 1)
        router.wait_for_metric('proserve_router_endpoint_usable{endpoint_id="node-0"}', 0)
        with router.connect() as connection:
            connection.sendall(http_post("/v1/completions", body))
            router.wait_for_metric(
                'proserve_router_requests_in_progress{priority_class="normal"}', 1
            )

            with node.serve(port=port):
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


HOPELESS = {"slo": {"ttft_ms": 1, "tpot_ms": 1}}
"""All of some 20 tokens are due within 20 ms; a silence is noticed after 250."""


def test_a_sequence_that_can_earn_nothing_any_more_goes_to_no_other_node(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    nodes = trio(failing(tokens, Hang()))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, stall_timeout_s=0.25, **SLOW_POLLS) as router,
    ):
        response = router.complete(seed=1, max_tokens=20, **HOPELESS)

    assert response.status_code == 503
    assert "no token of it can be in time any more" in response.json()["error"]["message"]
    assert [len(node.requests) for node in nodes] == [1, 0, 0]


@pytest.mark.parametrize(
    ("body", "headers", "settings"),
    [
        pytest.param({"max_wait_ms": 20_000}, {}, {}, id="by the body"),
        pytest.param({}, {"X-ProServe-Max-Wait-MS": "20000"}, {}, id="by a header"),
        pytest.param({}, {}, {"default_max_wait_s": 20}, id="by the operator"),
    ],
)
def test_a_request_that_asks_to_wait_goes_on_however_late(
    start_router: RouterFactory,
    tokens: list[int],
    body: dict[str, int],
    headers: dict[str, str],
    settings: dict[str, int],
) -> None:
    nodes = trio(failing(tokens, Hang()))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, stall_timeout_s=0.25, **SLOW_POLLS, **settings) as router,
    ):
        response = router.http.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "Hi", "seed": 1, "max_tokens": 20, **HOPELESS, **body},
            headers=headers,
        )

        assert text_of(response) == TEXT


def test_a_failing_engine_is_replaced(start_router: RouterFactory, tokens: list[int]) -> None:
    """The request may not have been the one at fault; and the node is not taken for dead."""
    nodes = trio(failing(tokens, BROKEN))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, **SLOW_POLLS) as router,
    ):
        assert text_of(router.complete(seed=2, max_tokens=99)) == TEXT

        assert router.http.get("/health").json()["nodes"]["node-0"] == "ready"
    assert [len(node.requests) for node in nodes] == [1, 1, 0]


def test_a_request_on_which_two_engines_fail_is_tried_no_more(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    nodes = trio(failing(tokens, BROKEN, num_failures=99))
    with (
        nodes_running(*nodes) as addresses,
        start_router(addresses, **SLOW_POLLS) as router,
    ):
        response = router.complete(seed=2, max_tokens=99)

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert "as the test says; 2 engines have failed on it" in response.json()["error"]["message"]
    assert [len(node.requests) for node in nodes] == [1, 1, 0]


def test_a_node_that_fails_each_time_gets_a_request_only_now_and_then(
    start_router: RouterFactory, tokens: list[int]
) -> None:
    """It answers every poll; after two failures it is left out, here for longer than the test."""
    bad, good = FakeNode("node-0"), FakeNode("node-1")
    bad.script = lambda request: [*saying(tokens)(request)[:2], Drop()]
    good.script = saying(tokens)
    health = {"breaker_failures": 2, "breaker_open_s": 1000, "breaker_max_open_s": 1000}
    with (
        nodes_running(bad, good) as addresses,
        start_router(addresses, health=health) as router,
    ):
        while len(bad.requests) < 2:
            assert text_of(router.complete(max_tokens=99)) == TEXT
        obstacle = router.http.get("/health").json()["nodes"]["node-0"]
        num_polls = bad.num_polls
        bad.wait_until(lambda node: node.num_polls >= num_polls + 2, "two more polls")
        for _ in range(5):
            router.complete(max_tokens=99)

        assert (
            "failed 2 times in a row, is tried again in"
            in (router.http.get("/health").json()["nodes"]["node-0"])
        ), obstacle
    assert len(bad.requests) == 2
