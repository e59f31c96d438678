"""API keys, classes and limits over HTTP: what does not belong here never reaches a node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.keys import NewKey, make_key
from tests.router import sse
from tests.router.client_files import bearer, client, write_clients
from tests.router.clocks import ManualClock
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Stall, saying
from tests.router.servers import http_post

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


@pytest.fixture
def key() -> NewKey:
    return make_key()


@pytest.fixture
def clients_file(tmp_path: Path, key: NewKey) -> Path:
    """One client, acme, in class normal; high is above it."""
    return write_clients(tmp_path / "clients.yaml", client("acme", key, priority_class="normal"))


@pytest.fixture
def closed(
    start_router: RouterFactory, node: FakeNode, clients_file: Path
) -> Iterator[RunningRouter]:
    """A router that only acme may use; its client sends no key by itself."""
    with start_router(
        [(node.endpoint_id, node.url)], clients_file=clients_file, clients_poll_interval_s=0.01
    ) as router:
        yield router


@pytest.fixture
def openai_client(closed: RunningRouter, key: NewKey) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{closed.url}/v1", api_key=key.token, max_retries=0) as made:
        yield made


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [{}, bearer(make_key()), {"authorization": "Basic YTpi"}])
def test_without_a_valid_key_nothing_reaches_a_node(
    closed: RunningRouter, node: FakeNode, method: str, path: str, headers: dict[str, str]
) -> None:
    body = {"model": "tiny", "prompt": "Hi"} if method == "POST" else None
    response = closed.http.request(method, path, json=body, headers=headers)

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert node.requests == []


def test_without_a_valid_key_the_body_is_not_even_read(closed: RunningRouter) -> None:
    """A client that asks before it sends its body is told at once, not to go on."""
    request = http_post("/v1/completions", {}, headers={"expect": "100-continue"})
    with closed.connect() as connection:
        connection.sendall(request.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")

        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    value=st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=80).map(lambda found: b"Bearer " + found),
        st.from_regex(rb"Bearer psk_[a-z]{8}_[A-Za-z0-9_-]{43}", fullmatch=True),
    ).filter(lambda found: not set(found) & set(b"\r\n"))
)
def test_no_bytes_in_place_of_a_key_reach_a_node(
    closed: RunningRouter, node: FakeNode, value: bytes
) -> None:
    """Either the server's parser refuses them (400), or the router does."""
    request = http_post("/v1/completions", {"model": "tiny", "prompt": "Hi"})
    with closed.connect() as connection:
        connection.sendall(request.replace(b"host:", b"authorization: " + value + b"\r\nhost:", 1))

        status = connection.recv(65536).split(b" ")[1]

    assert status in {b"400", b"401"}
    assert node.requests == []


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_health_and_metrics_need_no_key(closed: RunningRouter, path: str) -> None:
    assert closed.http.get(path).status_code == 200


def test_with_a_key_the_node_is_told_the_client(
    closed: RunningRouter, node: FakeNode, key: NewKey
) -> None:
    closed.http.headers.update(bearer(key))

    response = closed.chat(user="me")
    closed.chat(user="you")
    closed.chat()

    assert response.status_code == 200
    assert response.headers["x-proserve-served-as"] == "normal"
    assert {request.client_id for request in node.requests} == {"acme"}
    assert [request.cache_salt for request in node.requests] == ["acme\nme", "acme\nyou", "acme\n"]
    assert [request.priority_class for request in node.requests] == ["normal"] * 3


def test_the_openai_package_raises_what_fits(
    closed: RunningRouter, openai_client: openai.OpenAI, node: FakeNode
) -> None:
    with pytest.raises(openai.AuthenticationError, match="not valid here") as no_key:
        openai_client.with_options(api_key=make_key().token).completions.create(
            model="tiny", prompt="Hi"
        )
    with pytest.raises(openai.PermissionDeniedError, match=r"may use.*: normal, low;") as no_class:
        openai_client.completions.create(model="tiny", prompt="Hi", extra_body={"priority": "high"})
    with pytest.raises(openai.PermissionDeniedError, match="is promised 2000") as no_time:
        openai_client.completions.create(
            model="tiny", prompt="Hi", extra_headers={"X-ProServe-TTFT-MS": "10"}
        )

    assert no_key.value.code == "invalid_api_key"
    assert (no_class.value.code, no_class.value.param) == ("class_not_allowed", "priority")
    assert no_time.value.code == "objective_not_allowed"
    assert node.requests == []
    refused = 'proserve_router_refusals_total{client="%s",code="%s",type="invalid_request_error"}'
    assert closed.metric(refused % ("", "invalid_api_key")) == 1
    assert closed.metric(refused % ("acme", "class_not_allowed")) == 1
    assert closed.metric(refused % ("acme", "objective_not_allowed")) == 1


def test_a_revoked_key_is_refused_and_its_stream_goes_on(
    closed: RunningRouter, node: FakeNode, key: NewKey, clients_file: Path
) -> None:
    node.script = lambda _: [TokenEvent((70,)), Stall(), *saying([71])(_)]
    body = {"model": "tiny", "prompt": "Hi", "stream": True}
    with closed.http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as response:
        events = sse.arriving(response)
        next(events)

        new = make_key()
        write_clients(clients_file, client("acme", new, priority_class="normal"))
        reloads = 'proserve_router_clients_file_reloads_total{outcome="applied"}'
        closed.wait_for_metric(reloads, 1)
        refused = closed.http.get("/v1/models", headers=bearer(key))
        accepted = closed.http.get("/v1/models", headers=bearer(new))
        node.release()
        rest = list(events)

    assert refused.status_code == 401
    assert accepted.status_code == 200
    assert rest[-1] == "[DONE]"


def test_a_broken_clients_file_keeps_the_one_before(
    closed: RunningRouter, key: NewKey, clients_file: Path
) -> None:
    clients_file.write_text("clients: [")

    closed.wait_for_metric("proserve_router_clients_file_is_stale", 1)

    assert closed.http.get("/v1/models", headers=bearer(key)).status_code == 200


def test_figures_by_client(closed: RunningRouter, node: FakeNode, key: NewKey) -> None:
    """Two answers of 3 tokens to a prompt of 2, each token worth 2 in class normal."""
    node.script = saying([70, 71, 72])
    closed.http.headers.update(bearer(key))

    closed.complete(prompt=[5, 6], n=2)
    closed.complete(n=0)

    name = "proserve_router_client_%s_total"
    requests = (name % "requests") + '{client="acme",priority_class="%s",status="%s"}'
    assert closed.metric(requests % ("normal", 200)) == 1
    assert closed.metric(requests % ("none", 400)) == 1
    assert closed.metric((name % "prompt_tokens") + '{client="acme"}') == 2
    assert closed.metric((name % "completion_tokens") + '{client="acme"}') == 6
    assert closed.metric((name % "service_gain_captured") + '{client="acme"}') == 12
    assert closed.metric((name % "service_gain_possible") + '{client="acme"}') == 12


def test_without_a_clients_file_whatever_key_is_sent_does_not_matter(
    router: RunningRouter, node: FakeNode
) -> None:
    response = router.http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "Hi", "priority": "high"},
        headers={"authorization": "Bearer none"},
    )

    assert response.status_code == 200
    assert node.requests[0].client_id == ""
    assert 'client="' not in router.http.get("/metrics").text


def test_a_router_without_a_clients_file_says_so(
    start_router: RouterFactory, node: FakeNode
) -> None:
    with (
        structlog.testing.capture_logs() as lines,
        start_router([(node.endpoint_id, node.url)]),
    ):
        pass

    (line,) = [line for line in lines if line["event"] == "no_clients_file"]
    assert line["log_level"] == "warning"


# --- limits, in the router's own time ----------------------------------------------------------


class Limited:
    """A router with a client under limits, on a clock that the test moves."""

    def __init__(self, router: RunningRouter, clock: ManualClock) -> None:
        self.router = router
        self.clock = clock

    def complete(self, **changes: Any) -> httpx.Response:
        return self.router.complete(**{"max_tokens": 10, "prompt": [5, 6], **changes})


@pytest.fixture
def limited(
    start_router: RouterFactory,
    node: FakeNode,
    tmp_path: Path,
    key: NewKey,
    request: pytest.FixtureRequest,
) -> Iterator[Limited]:
    """The limits are the parameter of the test."""
    path = write_clients(tmp_path / "clients.yaml", client("acme", key, limits=request.param))
    clock = ManualClock()
    with start_router(
        [(node.endpoint_id, node.url)], clients_file=path, clock=clock, max_snapshot_age_s=1e9
    ) as router:
        router.http.headers.update(bearer(key))
        yield Limited(router, clock)


@pytest.mark.parametrize("limited", [{"requests_per_s": 10, "request_burst": 10}], indirect=True)
def test_requests_a_second_are_exact(limited: Limited, node: FakeNode) -> None:
    """In 20 s, at two tries for each place, 10 + 200 pass."""
    statuses = []
    for tick in range(401):
        limited.clock.time_s = 100.0 + tick * 0.05
        statuses.append(limited.complete().status_code)

    assert statuses.count(200) == pytest.approx(210, rel=0.01)
    assert statuses.count(200) + statuses.count(429) == 401
    assert len(node.requests) == statuses.count(200)


@pytest.mark.parametrize("limited", [{"requests_per_s": 0.4, "request_burst": 2}], indirect=True)
def test_a_refusal_says_when_to_come_again(limited: Limited) -> None:
    first, second, third = limited.complete(), limited.complete(), limited.complete()

    assert [r.status_code for r in (first, second, third)] == [200, 200, 429]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in (first, second, third)] == [
        "1",
        "0",
        "0",
    ]
    assert third.headers["x-ratelimit-limit-requests"] == "2"
    assert third.headers["x-ratelimit-reset-requests"] == "5s"
    assert third.headers["retry-after"] == "3"
    assert third.headers["retry-after-ms"] == "2500"
    assert third.json()["error"] == {
        "message": "client 'acme' may send 0.4 requests a second, 2 at once; try again in 2.5s",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    limited.clock.time_s += 2.5
    assert limited.complete().status_code == 200


@pytest.mark.parametrize("limited", [{"requests_per_s": 0.4, "request_burst": 1}], indirect=True)
def test_the_openai_package_raises_at_a_limit(limited: Limited, key: NewKey) -> None:
    limited.complete()
    with (
        openai.OpenAI(
            base_url=f"{limited.router.url}/v1", api_key=key.token, max_retries=0
        ) as openai_client,
        pytest.raises(openai.RateLimitError, match=r"may send 0\.4 requests a second") as refusal,
    ):
        openai_client.completions.create(model="tiny", prompt="Hi")

    assert refusal.value.code == "rate_limit_exceeded"
    assert refusal.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("limited", [{"requests_per_s": 1, "request_burst": 1}], indirect=True)
def test_requests_that_are_refused_for_other_reasons_count(limited: Limited) -> None:
    """Or a limit would be no protection against requests that are all wrong."""
    assert limited.complete(n=0).status_code == 400
    assert limited.complete().status_code == 429


@pytest.mark.parametrize("limited", [{"tokens_per_min": 60}], indirect=True)
def test_tokens_are_counted_as_they_are_used(limited: Limited, node: FakeNode) -> None:
    """Each request may use 2 + 10 tokens and uses 2 + 3. After ten of them 10 of 60 are left, too
    few for another 12; at one a second they are there 2 s later."""
    node.script = saying([70, 71, 72])
    for _ in range(10):
        assert limited.complete().status_code == 200

    refusal = limited.complete()
    limited.clock.time_s += 2.0

    assert refusal.status_code == 429
    assert refusal.headers["x-ratelimit-remaining-tokens"] == "10"
    assert refusal.headers["retry-after"] == "2"
    assert refusal.json()["error"]["type"] == "tokens"
    assert limited.complete().status_code == 200


@pytest.mark.parametrize("limited", [{"tokens_per_min": 60}], indirect=True)
def test_an_answer_that_fails_costs_no_tokens(limited: Limited, node: FakeNode) -> None:
    node.script = lambda _: [
        TokenEvent((70,)),
        TokenEvent(finish_reason=FinishReason.ERROR, error="out of memory"),
    ]
    for _ in range(10):
        assert limited.complete(max_tokens=50).status_code == 500

    node.script = saying([70])
    assert limited.complete(max_tokens=50).headers["x-ratelimit-remaining-tokens"] == "8"


@pytest.mark.parametrize("limited", [{"tokens_per_min": 60}], indirect=True)
def test_a_request_beyond_the_token_limit_is_told_so(limited: Limited) -> None:
    response = limited.complete(max_tokens=40, n=2)

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "over_client_limit"
    assert "82 tokens, 2 of prompt and 80 of answers" in response.json()["error"]["message"]


@pytest.mark.parametrize("limited", [{"max_concurrent_sequences": 2}], indirect=True)
def test_answers_at_the_same_time_are_bounded_until_they_end(
    limited: Limited, node: FakeNode, key: NewKey
) -> None:
    node.script = lambda _: [Stall()]
    body = {"model": "tiny", "prompt": "Hi", "n": 2}
    with limited.router.connect() as connection:
        connection.sendall(http_post("/v1/completions", body, headers=bearer(key)))
        node.wait_until(lambda n: len(n.requests) == 2, "the node has both")

        refusal = limited.complete()

    assert refusal.status_code == 429
    assert refusal.json()["error"]["type"] == "sequences"
    node.script = saying([70])
    limited.router.wait_for_metric("proserve_router_waiting_sequences", 0)
    assert limited.complete(n=2).status_code == 200


# --- logs --------------------------------------------------------------------------------------


def test_logs_name_the_client_and_the_keys_id(closed: RunningRouter, key: NewKey) -> None:
    with structlog.testing.capture_logs() as lines:
        closed.http.headers.update(bearer(key))
        closed.complete()
        closed.http.get("/v1/models")  # The line before is written by now.

    (line,) = lines
    assert line["client_id"] == "acme"
    assert line["key_id"] == key.key_id


def test_no_log_line_has_a_key(
    closed: RunningRouter,
    key: NewKey,
    clients_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Keys that are right, wrong, cut, sent as something else, and pasted into the file."""
    wrong = make_key()
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as lines:
        for headers in (
            bearer(key),
            bearer(wrong),
            {"authorization": key.token},
            {"authorization": f"Bearer {key.token}x"},
            {**bearer(key), "X-Request-Id": key.token},
            {**bearer(key), "X-ProServe-Priority": key.token},
        ):
            closed.http.post(
                "/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers=headers
            )
        clients_file.write_text(f"clients:\n  - {key.token}\n  - sha256: {wrong.token}\n")
        closed.wait_for_metric("proserve_router_clients_file_is_stale", 1)

    assert len(lines) == 7
    everything = f"{lines}{caplog.text}"
    for secret in (key, wrong):
        assert secret.token.split("_", 2)[2] not in everything
        assert secret.sha256 not in everything
