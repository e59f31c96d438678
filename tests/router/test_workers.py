"""Two workers of one router. Here each has a port of its own, so that a test can choose."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.wire import TokenEvent
from router.keys import NewKey, make_key
from router.shared_usage import SharedUsage
from router.workers import WorkerSeat
from tests.router import sse
from tests.router.client_files import bearer, client, write_clients
from tests.router.clocks import ManualClock
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Stall, saying
from tests.router.servers import http_post

COMPLETION = {"model": "tiny", "prompt": "Hi"}
REQUESTS = 'proserve_router_requests_total{priority_class="normal",route="/v1/completions"'


class Pair:
    """A router with two workers, either of which may be down."""

    def __init__(self, start_router: RouterFactory, node: FakeNode, **settings: Any) -> None:
        self._start_router = start_router
        self._node = (node.endpoint_id, node.url)
        self._settings = {"num_workers": 2, "snapshot_poll_interval_s": 0.2, **settings}
        self._stack = contextlib.ExitStack()
        # A Unix socket's path may have 107 characters, fewer than pytest's directories have.
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.usage = SharedUsage.create(self.directory / "usage", num_workers=2)
        self.stops = [contextlib.ExitStack() for _ in range(2)]
        self.workers = [self.start(index) for index in range(2)]

    def start(self, index: int) -> RunningRouter:
        seat = WorkerSeat(index, 2, self.directory)
        router = self._start_router([self._node], seat=seat, **self._settings)
        return self.stops[index].enter_context(router)

    def kill(self, index: int) -> None:
        self.workers[index].server.kill()
        self.usage.give_up(index)

    def close(self) -> None:
        for stop in self.stops:
            stop.close()
        self._stack.close()

    def key_kept_by(self, index: int) -> str:
        seat = WorkerSeat(0, 2, self.directory)
        return next(key for key in map(str, range(100)) if seat.keeper_of(key) == index)


@pytest.fixture
def key() -> NewKey:
    return make_key()


@pytest.fixture
def clients_file(tmp_path: Path, key: NewKey) -> Path:
    limits = {"requests_per_s": 0.01, "request_burst": 5, "max_concurrent_sequences": 2}
    acme = client("acme", key, priority_class="normal", limits=limits)
    return write_clients(tmp_path / "clients.yaml", acme)


@pytest.fixture
def pair(start_router: RouterFactory, node: FakeNode) -> Iterator[Pair]:
    """Two workers that serve everybody."""
    with contextlib.closing(Pair(start_router, node)) as found:
        yield found


@pytest.fixture
def closed(start_router: RouterFactory, node: FakeNode, clients_file: Path) -> Iterator[Pair]:
    """Two workers that serve acme, which may send 5 requests, 2 at a time."""
    settings = {"clients_file": clients_file, "clients_poll_interval_s": 0.02}
    with contextlib.closing(Pair(start_router, node, clock=ManualClock(), **settings)) as found:
        yield found


def send(router: RunningRouter, key: str, **headers: str) -> httpx.Response:
    return router.http.post(
        "/v1/completions", json=COMPLETION, headers={"idempotency-key": key, **headers}
    )


def test_a_client_has_its_requests_once_not_once_for_each_worker(closed: Pair, key: NewKey) -> None:
    found = [
        closed.workers[index].http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
        for index in (0, 1, 0, 1, 0, 1, 0)
    ]

    assert [answer.status_code for answer in found] == [200] * 5 + [429] * 2
    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in found]
    assert remaining == ["4", "3", "2", "1", "0", "0", "0"]


def test_answers_at_the_same_time_are_counted_over_workers(
    closed: Pair, node: FakeNode, key: NewKey
) -> None:
    """acme may have 2 made at a time: one stalls in each worker."""
    node.script = lambda _: [TokenEvent((65,)), Stall(), *saying([66])(_)]
    body = {**COMPLETION, "stream": True}
    with contextlib.ExitStack() as stack:
        streams = []
        for worker in closed.workers:
            stream = worker.http.stream("POST", "/v1/completions", json=body, headers=bearer(key))
            streams.append(sse.arriving(stack.enter_context(stream)))
            assert next(streams[-1])["choices"]
        ask = closed.workers[1].http.post
        refused = ask("/v1/completions", json=COMPLETION, headers=bearer(key))
        node.release()
        assert [list(stream)[-1] for stream in streams] == ["[DONE]"] * 2
        accepted = ask("/v1/completions", json=COMPLETION, headers=bearer(key))

    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "sequences"
    assert accepted.status_code == 200


@pytest.mark.parametrize("keeper", [0, 1])
def test_a_repeated_request_gets_the_first_answer_from_any_worker(
    pair: Pair, node: FakeNode, keeper: int
) -> None:
    key = pair.key_kept_by(keeper)

    answers = [send(worker, key) for worker in [*pair.workers, *pair.workers]]

    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.text for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [
        None,
        *["true"] * 3,
    ]
    assert len(node.requests) == 1


def test_a_request_that_is_handed_on_looks_as_if_it_were_not(
    closed: Pair, node: FakeNode, key: NewKey
) -> None:
    name = closed.key_kept_by(1)

    answer = send(closed.workers[0], name, **bearer(key), **{"x-request-id": "mine"})
    stranger = send(closed.workers[0], name, **bearer(make_key()))
    other = closed.workers[0].http.post(
        "/v1/completions",
        json={**COMPLETION, "prompt": "Ho"},
        headers={"idempotency-key": name, **bearer(key)},
    )
    chunked = closed.workers[0].http.post(
        "/v1/completions",
        content=iter([b'{"model": "tiny", ', b'"prompt": "Hi"}']),
        headers={"idempotency-key": name, "content-type": "application/json", **bearer(key)},
    )

    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-ratelimit-remaining-requests"] == "4"
    names = [found for found, _ in answer.headers.multi_items()]
    assert len(names) == len(set(names))
    assert stranger.status_code == 401
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert chunked.text == answer.text
    assert len(node.requests) == 1


def test_no_odd_request_that_is_handed_on_fails_as_if_by_our_fault(pair: Pair) -> None:
    """A server's parser and a client's library disagree about what may be in a header."""
    key = pair.key_kept_by(1)
    values = ["b  ", "caf\xe9", "a\tb", "a\x01b", "\x7f", ""]
    for query, value in itertools.product(["", "?a=%FF&b", "?caf\xe9"], values):
        headers = {"idempotency-key": key, "x-odd": value}
        request = http_post(f"/v1/completions{query}", COMPLETION, headers=headers)
        with pair.workers[0].connect() as connection:
            connection.sendall(request)

            status = connection.recv(65536).split(b" ")[1]

        assert status in {b"200", b"400"}, (query, value)


def test_a_stream_that_is_handed_on_comes_token_by_token(pair: Pair, node: FakeNode) -> None:
    """The node stalls behind its first token, which has to be there before it goes on."""
    node.script = lambda _: [TokenEvent((65,)), Stall(), *saying([66])(_)]
    headers = {"idempotency-key": pair.key_kept_by(1)}
    body = {**COMPLETION, "stream": True}
    http = pair.workers[0].http
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        events = sse.arriving(answer)
        assert next(events)["choices"]
        node.release()

        assert list(events)[-1] == "[DONE]"


def test_a_client_that_leaves_a_stream_that_is_handed_on_leaves_it(
    pair: Pair, node: FakeNode
) -> None:
    """The keeper then sees nobody read; the answer is made for whoever repeats the request."""
    node.script = lambda _: [TokenEvent((65,)), Stall(), *saying([66])(_)]
    key = pair.key_kept_by(1)
    body = {**COMPLETION, "stream": True}
    http = pair.workers[0].http
    headers = {"idempotency-key": key}
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        assert next(sse.arriving(answer))["choices"]
    disconnects = 'proserve_router_client_disconnects_total{priority_class="normal"}'
    pair.workers[1].wait_for_metric(disconnects, 1.0)
    node.release()

    again = http.post("/v1/completions", json=body, headers=headers)

    assert sse.parsed(again.text)[-1] == "[DONE]"
    assert len(node.requests) == 1


def test_while_the_keeper_of_a_key_is_down_its_requests_wait_and_no_others(
    pair: Pair, node: FakeNode
) -> None:
    pair.kill(1)

    refused = send(pair.workers[0], pair.key_kept_by(1))
    served = send(pair.workers[0], pair.key_kept_by(0))

    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "node_unavailable"
    assert served.status_code == 200
    assert len(node.requests) == 1


def metrics_of(workers: Sequence[RunningRouter], line_start: str) -> list[float]:
    return [worker.metric(line_start) for worker in workers]


def test_every_worker_tells_the_metrics_of_all(pair: Pair) -> None:
    first, second = pair.workers
    for worker in (first, first, second):
        assert worker.complete().status_code == 200

    assert metrics_of(pair.workers, f'{REQUESTS},status="200"') == [3.0, 3.0]
    bucket = 'proserve_router_request_seconds_bucket{le="+Inf",priority_class="normal"'
    assert metrics_of(pair.workers, bucket) == [3.0, 3.0]
    usable = 'proserve_router_endpoint_usable{endpoint_id="node-0"}'
    assert metrics_of(pair.workers, usable) == [1.0, 1.0]


def test_what_a_dead_worker_had_counted_still_counts(pair: Pair) -> None:
    """A sum that falls is taken for a router that has begun again, and all of it for new."""
    first, second = pair.workers
    for worker in (first, second, second):
        assert worker.complete().status_code == 200
    line = f'{REQUESTS},status="200"'
    assert first.metric(line) == 3.0
    pair.kill(1)
    while_down = first.metric(line)
    pair.stops[1].close()

    successor = pair.start(1)

    assert successor.complete().status_code == 200
    assert while_down == 3.0
    assert metrics_of([first, successor], line) == [4.0, 4.0]


def test_all_workers_follow_the_clients_file(closed: Pair, clients_file: Path, key: NewKey) -> None:
    """What was used stays used: of 5 requests 1 is, and the new burst is 7."""
    new = make_key()
    closed.workers[0].http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
    limits = {"requests_per_s": 0.02, "request_burst": 7}

    write_clients(clients_file, client("acme", new, priority_class="normal", limits=limits))
    for worker in closed.workers:
        while worker.http.get("/v1/models", headers=bearer(new)).status_code != 200:
            pass  # the test's own timeout bounds it
    found = [
        worker.http.post("/v1/completions", json=COMPLETION, headers=bearer(new))
        for worker in closed.workers
    ]

    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in found]
    assert remaining == ["5", "4"]
    applied = 'proserve_router_clients_file_reloads_total{outcome="applied"}'
    assert metrics_of(closed.workers, applied) == [1.0, 1.0]
