"""What is let in while nodes have too much to do: a real router before a node that waits."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.wire import TokenEvent
from router.keys import make_key
from tests.router.client_files import bearer, client, write_clients
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Refuse, Stall, saying
from tests.router.servers import http_post

WAITING = "proserve_router_waiting_sequences"


class Crowd:
    """Requests that are sent and not waited for."""

    def __init__(self, router: RunningRouter, node: FakeNode, stack: contextlib.ExitStack) -> None:
        self._router = router
        self._node = node
        self._stack = stack

    def send(
        self, count: int = 1, *, headers: dict[str, str] | None = None, **fields: Any
    ) -> list[socket.socket]:
        """Send requests, and return their connections when the node has them."""
        body = {"model": "tiny", "prompt": "Hi", **fields}
        num_before = len(self._node.requests)
        connections = []
        for _ in range(count):
            connection = self._stack.enter_context(self._router.connect())
            connection.sendall(http_post("/v1/completions", body, headers=headers))
            connections.append(connection)
        num_after = num_before + count * fields.get("n", 1)
        self._node.wait_until(lambda n: len(n.requests) == num_after, "the node has them")
        return connections


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as found:
        yield found


@pytest.fixture
def small(
    start_router: RouterFactory, node: FakeNode, stack: contextlib.ExitStack
) -> tuple[RunningRouter, Crowd]:
    """4 places: low may have floor(4 * 0.75^2) = 2, normal 3, high 4."""
    node.script = lambda request: [Stall(), *saying([65])(request)]
    router = stack.enter_context(
        start_router([(node.endpoint_id, node.url)], admission={"max_waiting_sequences": 4})
    )
    return router, Crowd(router, node, stack)


def test_places_are_kept_for_the_more_valuable_and_the_mark_clears(
    small: tuple[RunningRouter, Crowd], node: FakeNode
) -> None:
    router, crowd = small
    crowd.send(2, priority="low")

    low = router.complete(priority="low")
    crowd.send(priority="normal")
    normal = router.complete(priority="normal")
    crowd.send(priority="high")
    high = router.complete(priority="high")

    for response, num_waiting, name, num_open in (
        (low, 2, "low", 2),
        (normal, 3, "normal", 3),
        (high, 4, "high", 4),
    ):
        assert response.status_code == 429
        assert response.json()["error"] == {
            "message": f"{num_waiting} sequences wait for their first token, and class '{name}' "
            f"may wait while there are no more than {num_open}; try again in 1s",
            "type": "overload",
            "param": None,
            "code": "queue_full",
        }
        assert response.headers["retry-after"] == "1"
    refused = 'proserve_router_refusals_total{client="",code="queue_full",type="overload"}'
    assert router.metric(refused) == 3
    node.release()
    router.wait_for_metric(WAITING, 0)
    assert router.complete(priority="low").status_code == 200


def test_what_is_turned_away_counts_as_missed(small: tuple[RunningRouter, Crowd]) -> None:
    """Each of the three first tokens would have earned 1."""
    router, crowd = small
    crowd.send(2, priority="low")

    router.complete(priority="low", n=3)

    assert router.metric('proserve_router_service_gain_possible_total{priority_class="low"}') == 3


def test_a_request_that_is_refused_takes_no_place(small: tuple[RunningRouter, Crowd]) -> None:
    router, crowd = small
    crowd.send(3, priority="normal")

    for _ in range(5):
        assert router.complete(priority="normal").status_code == 429

    assert router.metric(WAITING) == 3
    crowd.send(priority="high")


def test_a_sequence_waits_until_its_first_token(
    small: tuple[RunningRouter, Crowd], node: FakeNode
) -> None:
    router, crowd = small
    node.script = lambda _: [TokenEvent((70,)), Stall()]

    for _ in range(6):
        crowd.send(priority="low", stream=True)
        router.wait_for_metric(WAITING, 0)

    in_progress = 'proserve_router_requests_in_progress{priority_class="low"}'
    assert router.metric(in_progress) == 6


def test_every_sequence_of_a_request_has_a_place(small: tuple[RunningRouter, Crowd]) -> None:
    router, crowd = small
    crowd.send(n=3)

    assert router.metric(WAITING) == 3
    assert router.complete(priority="high", n=2).status_code == 429


def test_a_client_that_leaves_frees_its_place(small: tuple[RunningRouter, Crowd]) -> None:
    router, crowd = small
    connections = crowd.send(2, priority="low")

    connections[0].close()

    router.wait_for_metric(WAITING, 1)
    crowd.send(priority="low")


def test_a_request_that_fails_frees_its_place(
    small: tuple[RunningRouter, Crowd], node: FakeNode
) -> None:
    router, _ = small
    node.script = lambda _: [Refuse(400)]

    for _ in range(10):
        assert router.complete(priority="low", n=2).status_code == 400

    router.wait_for_metric(WAITING, 0)


def test_a_client_leaves_places_to_the_others_of_its_class(
    start_router: RouterFactory, node: FakeNode, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    """Of 9 places one client alone has 6 at most: 6 >= 2 * (9 - 6)."""
    greedy, modest = make_key(), make_key()
    path = write_clients(
        tmp_path / "clients.yaml", client("greedy", greedy), client("modest", modest)
    )
    node.script = lambda _: [Stall()]
    router = stack.enter_context(
        start_router(
            [(node.endpoint_id, node.url)],
            clients_file=path,
            admission={"max_waiting_sequences": 9},
        )
    )
    crowd = Crowd(router, node, stack)
    crowd.send(6, headers=bearer(greedy))

    router.http.headers.update(bearer(greedy))
    refusal = router.complete()

    assert refusal.status_code == 429
    assert refusal.json()["error"]["code"] == "client_share_full"
    assert "client 'greedy' has 6 of the 6 sequences" in refusal.json()["error"]["message"]
    crowd.send(headers=bearer(modest))


# --- requests that can earn nothing ------------------------------------------------------------

QUEUED_TOKENS = 100_000
DRAIN_S = 100_000 * 0.001 + 0.010
"""At 1 ms a token, and 10 ms of a step besides."""


@contextlib.contextmanager
def busy_router(
    start_router: RouterFactory, node: FakeNode, hopeless: str, **settings: Any
) -> Iterator[RunningRouter]:
    """A router whose node will not be idle before DRAIN_S."""
    node.num_queued_prompt_tokens = QUEUED_TOKENS
    admission = {"hopeless": hopeless}
    with start_router([(node.endpoint_id, node.url)], admission=admission, **settings) as router:
        yield router


def test_hopeless_requests_are_let_in_by_default(
    start_router: RouterFactory, node: FakeNode
) -> None:
    with busy_router(start_router, node, "queue") as router:
        response = router.complete(priority="high")

    assert response.status_code == 200
    assert response.headers["x-proserve-served-as"] == "high"
    assert node.requests[0].priority_class == "high"


def test_hopeless_requests_are_refused_until_the_queue_has_drained(
    start_router: RouterFactory, node: FakeNode
) -> None:
    with busy_router(start_router, node, "refuse") as router:
        refusal = router.complete(priority="high")
        patient = router.complete(priority="high", slo={"ttft_ms": 200_000})

    assert refusal.status_code == 429
    assert refusal.json()["error"]["code"] == "no_gain_possible"
    assert "within the objective of 1000 ms" in refusal.json()["error"]["message"]
    assert float(refusal.headers["retry-after-ms"]) == pytest.approx(DRAIN_S * 1000, rel=0.01)
    assert patient.status_code == 200
    assert len(node.requests) == 1


def test_hopeless_requests_are_demoted_and_counted_as_what_they_were(
    start_router: RouterFactory, node: FakeNode
) -> None:
    """The node is told low: weight 1, due in 5 s. What could be earned is high's 4."""
    with busy_router(start_router, node, "demote") as router:
        response = router.complete(priority="high", slo={"tpot_ms": 900})

        possible = "proserve_router_service_gain_possible_total"
        assert router.metric(f'{possible}{{priority_class="high"}}') == 4
        assert router.metric('proserve_router_demotions_total{priority_class="high"}') == 1

    assert response.headers["x-proserve-served-as"] == "low"
    told = node.requests[0]
    assert (told.priority_class, told.weight) == ("low", 1.0)
    assert (told.ttft_s, told.tpot_s) == (5.0, 0.9)


def test_the_least_class_cannot_be_demoted(start_router: RouterFactory, node: FakeNode) -> None:
    with busy_router(start_router, node, "demote") as router:
        assert router.complete(priority="low").headers["x-proserve-served-as"] == "low"
        assert "proserve_router_demotions_total{" not in router.http.get("/metrics").text


def test_a_client_is_demoted_to_a_class_that_it_may_use(
    start_router: RouterFactory, node: FakeNode, tmp_path: Path
) -> None:
    key = make_key()
    entry = client("acme", key, allowed_classes=["high", "normal"])
    path = write_clients(tmp_path / "clients.yaml", entry)
    with busy_router(start_router, node, "demote", clients_file=path) as router:
        router.http.headers.update(bearer(key))
        router.complete()

    assert node.requests[0].priority_class == "normal"


def test_without_a_node_it_is_the_node_that_is_missing(
    start_router: RouterFactory, node: FakeNode
) -> None:
    with busy_router(start_router, node, "refuse") as router:
        node.is_draining = True
        router.wait_for_metric('proserve_router_endpoint_usable{endpoint_id="node-0"}', 0)
        response = router.complete()

    assert response.status_code == 503
    assert "draining" in response.json()["error"]["message"]
