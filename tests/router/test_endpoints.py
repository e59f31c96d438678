"""The pool against real nodes, on a clock that the tests move."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import structlog

from router.config import EndpointConfig, RouterConfig
from router.endpoints import IN_FLIGHT_S, EndpointPool
from router.fleet import Dispatch
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.policy import RoutingDecision
from tests.factories import make_queue_summary
from tests.router.clocks import ManualClock
from tests.router.fake_node import FakeNode
from tests.router.fleets import make_routing_request
from tests.router.servers import DEADLINE_S, bound_socket

MAX_AGE_S = 3000.0
"""Of the clock that the tests move; nothing waits so long."""


TO_NODE_0 = RoutingDecision("node-0", None, "as the test says", is_satisfiable=True)


@asynccontextmanager
async def started_pool(
    nodes: dict[str, str],
    clock: ManualClock,
    *,
    poll_interval_s: float = 1000.0,
    metrics: RouterMetrics | None = None,
) -> AsyncIterator[EndpointPool]:
    """Return a pool that has polled once, and by default does not poll again."""
    client = NodeClient(connect_timeout_s=1.0, stall_timeout_s=5.0)
    config = RouterConfig(
        engine_dir=Path("unused"),
        model="tiny",
        nodes=tuple(EndpointConfig(endpoint_id=i, url=url) for i, url in nodes.items()),
        snapshot_poll_interval_s=poll_interval_s,
        max_snapshot_age_s=MAX_AGE_S,
    )
    pool = EndpointPool(config, client, clock, metrics or RouterMetrics())
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()
        client.close()


def usable_ids(pool: EndpointPool, clock: ManualClock) -> list[str]:
    offered = pool.offer(clock.now_s(), num_tokens=1)
    return [name for name, flag in zip(pool.fleet.endpoint_ids, offered, strict=True) if flag]


def send(pool: EndpointPool, clock: ManualClock, *, num_prompt_tokens: int = 1) -> Dispatch:
    """Send a sequence to node-0."""
    request = make_routing_request(num_prompt_tokens=num_prompt_tokens)
    return pool.begin_dispatch(request, TO_NODE_0, clock.now_s())


async def test_a_node_is_usable_until_its_snapshot_is_too_old(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        clock.time_s += MAX_AGE_S
        assert usable_ids(pool, clock) == ["node-0"]

        clock.time_s += 0.001

        assert usable_ids(pool, clock) == []
        assert "not heard of for 3000.0 s" in str(pool.obstacles(clock.now_s())["node-0"])


async def test_a_draining_node_is_not_used(node: FakeNode) -> None:
    node.is_draining = True
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        assert usable_ids(pool, clock) == []
        assert pool.obstacles(clock.now_s()) == {"node-0": "draining"}


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        pytest.param("is_ill", True, "503: ill, as the test says", id="unhealthy"),
        pytest.param("model", "other", "serves 'other'", id="another model"),
        pytest.param("endpoint_id", "node-9", "is node 'node-9'", id="another node"),
    ],
)
async def test_a_node_with_an_obstacle_is_not_used_and_the_obstacle_is_named(
    node: FakeNode, attribute: str, value: object, reason: str
) -> None:
    setattr(node, attribute, value)
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        assert usable_ids(pool, clock) == []
        assert reason in str(pool.obstacles(clock.now_s())["node-0"])


async def test_a_node_that_nobody_answers_for_is_not_used() -> None:
    clock = ManualClock()
    with bound_socket() as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with started_pool({"node-0": url}, clock) as pool:
            assert usable_ids(pool, clock) == []
            assert "does not answer" in str(pool.obstacles(clock.now_s())["node-0"])


async def test_what_was_sent_since_the_snapshot_counts_as_load(node: FakeNode) -> None:
    """The node reports 5 queued tokens; 10 and 7 were sent since; the 7 have begun to answer."""
    node.num_queued_prompt_tokens = 5
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        send(pool, clock, num_prompt_tokens=10)
        begun = send(pool, clock, num_prompt_tokens=7)
        pool.note_first_token(begun)
        ended = send(pool, clock, num_prompt_tokens=99)
        pool.end_dispatch(ended)

        figures = pool.fleet.figures

        assert figures.num_queued_tokens.tolist() == [15]
        assert figures.num_decoding.tolist() == [1]


async def test_a_failed_node_comes_back_with_its_next_snapshot(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        pool.mark_failed("node-0", "as the test says")
        assert usable_ids(pool, clock) == []

        # The poll before the last one that the node saw has certainly been taken in.
        await polls(node, 2)

        assert usable_ids(pool, clock) == ["node-0"]


async def test_what_becomes_of_a_node_is_logged_once(node: FakeNode) -> None:
    clock = ManualClock()
    with structlog.testing.capture_logs() as lines:
        async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
            node.is_ill = True
            pool.mark_failed("node-0", "as the test says")
            pool.mark_failed("node-0", "as the test says again")
            await until(lambda: "ill" in str(pool.obstacles(clock.now_s())["node-0"]))
            node.is_ill = False
            await until(lambda: usable_ids(pool, clock) == ["node-0"])
            await polls(node, 2)

    who = {"endpoint_id": "node-0", "url": node.url}
    came = {**who, "event": "node_available", "log_level": "info"}
    failed = {"event": "node_unavailable", "log_level": "warning", "reason": "as the test says"}
    assert lines == [came, {**who, **failed}, came]


async def test_a_node_that_comes_late_is_logged_twice() -> None:
    node = FakeNode()
    with bound_socket() as closed:
        port = closed.getsockname()[1]
    clock, url = ManualClock(), f"http://127.0.0.1:{port}"
    with structlog.testing.capture_logs() as lines:
        async with started_pool({"node-0": url}, clock, poll_interval_s=0.01) as pool:
            with node.serve(port=port):
                await until(lambda: usable_ids(pool, clock) == ["node-0"])

    unavailable, available = lines
    assert unavailable["event"] == "node_unavailable"
    assert "does not answer" in unavailable["reason"]
    assert available["event"] == "node_available"


def line(node: FakeNode, **changes: object) -> bytes:
    snapshot = msgspec.structs.replace(node.snapshot(), **changes)
    return msgspec.json.encode(snapshot) + b"\n"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def test_streamed_snapshots_are_taken_in_as_they_come(node: FakeNode) -> None:
    """The poll says 5 queued tokens, the stream 70, 500 ms old; what was sent before counts."""
    node.num_queued_prompt_tokens = 5
    node.snapshot_lines = asyncio.Queue()
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        await asyncio.to_thread(node.wait_until, lambda n: n.num_streams == 1, "a stream")
        assert pool.fleet.figures.num_queued_tokens.tolist() == [5]
        send(pool, clock, num_prompt_tokens=10)
        clock.time_s += 1.0
        node.num_queued_prompt_tokens = 70
        queue = make_queue_summary((2.0, 3.0, 0.4))

        node.tell(line(node, queue=queue, age_s=0.5))
        await until(lambda: bool(pool.fleet.figures.num_queued_tokens[0] == 70))

        assert pool.fleet.due_s[0, 0] == pytest.approx(101.0 - IN_FLIGHT_S - 0.5 + 2.0)
        assert pool.fleet.weight[0, 0] == 3.0
        clock.time_s += MAX_AGE_S - 2 * IN_FLIGHT_S
        assert usable_ids(pool, clock) == ["node-0"]
        clock.time_s += 2 * IN_FLIGHT_S
        assert usable_ids(pool, clock) == []
        node.tell(None)


async def test_what_may_have_been_on_its_way_when_a_snapshot_was_sent_counts_as_missing(
    node: FakeNode,
) -> None:
    node.snapshot_lines = asyncio.Queue()
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        send(pool, clock, num_prompt_tokens=10)
        node.num_queued_prompt_tokens = 70

        node.tell(line(node))
        await until(lambda: bool(pool.fleet.figures.num_queued_tokens[0] == 80))
        node.tell(None)


def has_polls_and_streams(node: FakeNode, *, num: int) -> bool:
    return node.num_polls == num and node.num_streams == num


async def test_a_node_is_polled_again_when_its_stream_ends_and_then_listened_to(
    node: FakeNode,
) -> None:
    node.snapshot_lines = asyncio.Queue()
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        for num in (1, 2, 3):
            met = partial(has_polls_and_streams, num=num)
            await asyncio.to_thread(node.wait_until, met, f"{num} polls and streams")
            assert usable_ids(pool, clock) == ["node-0"]
            node.tell(None)
        node.tell(None)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param((b"no JSON\n",), id="a foreign line"),
        pytest.param(("another",), id="a snapshot of another process"),
    ],
)
async def test_a_stream_that_makes_no_sense_is_left_for_a_poll(
    node: FakeNode, lines: tuple[bytes | str, ...]
) -> None:
    node.snapshot_lines = asyncio.Queue()
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        await asyncio.to_thread(node.wait_until, lambda n: n.num_streams == 1, "a stream")
        for sent in lines:
            node.tell(line(node, instance_id=sent) if isinstance(sent, str) else sent)

        await asyncio.to_thread(node.wait_until, lambda n: n.num_polls >= 2, "another poll")
        assert usable_ids(pool, clock) == ["node-0"]
        node.tell(None)
        node.tell(None)


async def test_a_drain_on_the_stream_takes_the_node_out(node: FakeNode) -> None:
    node.snapshot_lines = asyncio.Queue()
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        node.tell(line(node, is_draining=True))

        await until(lambda: usable_ids(pool, clock) == [])
        assert pool.obstacles(clock.now_s()) == {"node-0": "draining"}
        node.tell(None)


@pytest.mark.parametrize(
    ("is_satisfiable", "seconds", "num_tokens", "expected"),
    [
        pytest.param(True, 0.9, 1, ("in_time", "in_time"), id="as expected"),
        pytest.param(True, 1.0, 1, ("in_time", "late"), id="late after all"),
        pytest.param(False, 0.9, 3, ("late", "in_time"), id="in time after all, counted once"),
        pytest.param(True, 1.0, 0, ("in_time", "late"), id="ended late without a token"),
        pytest.param(True, 0.9, 0, None, id="ended early without a token: nobody knows"),
        pytest.param(None, 0.9, 1, None, id="nothing was predicted"),
    ],
)
async def test_what_was_predicted_of_first_tokens_is_counted_against_what_came(
    node: FakeNode,
    *,
    is_satisfiable: bool | None,
    seconds: float,
    num_tokens: int,
    expected: tuple[str, str] | None,
) -> None:
    """The first token is due within 1 s."""
    metrics = RouterMetrics()
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, metrics=metrics) as pool:
        decision = RoutingDecision("node-0", None, "as the test says", is_satisfiable)
        dispatch = pool.begin_dispatch(make_routing_request(arrival_s=100.0), decision, 100.0)
        clock.time_s += seconds
        for _ in range(num_tokens):
            pool.note_first_token(dispatch)
        pool.end_dispatch(dispatch)

    text = metrics.render({}, num_waiting=0).decode()
    counted = re.findall(r'predicted_total\{actual="(\w+)",predicted="(\w+)"\} (\S+)', text)
    assert counted == ([] if expected is None else [(expected[1], expected[0], "1.0")])


def lose_requests(pool: EndpointPool, clock: ManualClock, count: int) -> None:
    """So many sequences are on node-0 when it fails."""
    dispatches = [send(pool, clock) for _ in range(count)]
    for dispatch in dispatches:
        pool.lose_node(dispatch, "as the test says")
        pool.end_dispatch(dispatch)


async def polls(node: FakeNode, count: int) -> None:
    """Wait until a node was polled so many times more."""
    num_polls = node.num_polls + count
    await asyncio.to_thread(node.wait_until, lambda n: n.num_polls >= num_polls, "more polls")


async def test_a_node_that_fails_again_and_again_is_left_out_for_a_while(node: FakeNode) -> None:
    """Three failures cost a second; then there is room for one request, then for all."""
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        lose_requests(pool, clock, 3)
        await polls(node, 2)
        assert "failed 3 times in a row" in str(pool.obstacles(clock.now_s())["node-0"])

        clock.time_s += 1.0
        assert usable_ids(pool, clock) == ["node-0"]
        probe = send(pool, clock)
        assert usable_ids(pool, clock) == []
        pool.note_first_token(probe)

        assert usable_ids(pool, clock) == ["node-0"]


async def test_failures_of_a_process_are_not_held_against_the_next_one(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        late = send(pool, clock)
        lose_requests(pool, clock, 3)
        node.instance_id = "another process"
        await polls(node, 4)
        for _ in range(3):
            pool.lose_node(late, "lost with the process before")

        assert usable_ids(pool, clock) == ["node-0"]


async def test_a_node_that_comes_back_begins_slowly_while_there_are_others(
    node: FakeNode,
) -> None:
    """It takes 64 sequences a step: 6 at first, 32 after half of 10 s, then as many as come."""
    other = FakeNode("node-1")
    clock = ManualClock()
    with other.serve() as server:
        nodes = {"node-0": node.url, "node-1": server.url}
        async with started_pool(nodes, clock, poll_interval_s=0.01) as pool:
            assert len(usable_ids(pool, clock)) == 2
            node.instance_id = "another process"
            await polls(node, 4)
            counts: list[float] = []
            for _ in range(3):
                while "node-0" in usable_ids(pool, clock) and len(counts) < 100:
                    send(pool, clock)
                    counts.append(clock.time_s)
                clock.time_s += 5.0

            assert [counts.count(s) for s in (100.0, 105.0)] == [6, 26]
            assert counts.count(110.0) == 100 - 32, "no bound any more"


async def test_a_lone_node_that_comes_back_takes_everything(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        node.instance_id = "another process"
        await polls(node, 4)
        for _ in range(10):
            send(pool, clock)

        assert usable_ids(pool, clock) == ["node-0"]


async def test_a_sequence_on_a_removed_node_ends_without_harm_to_the_next_of_that_id(
    node: FakeNode,
) -> None:
    """It even fails three times, for which a node is left out."""
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        dispatches = [send(pool, clock) for _ in range(3)]
        pool.remove("node-0")
        assert pool.obstacles(clock.now_s()) == {}
        assert pool.max_sequence_tokens() == 256, "a node was there"

        pool.add(EndpointConfig(endpoint_id="node-0", url=node.url))
        await until(lambda: usable_ids(pool, clock) == ["node-0"])
        for dispatch in dispatches:
            assert pool.url_of(dispatch) == node.url
            pool.note_first_token(dispatch)
            pool.lose_node(dispatch, "as the test says")
            pool.end_dispatch(dispatch)

        assert usable_ids(pool, clock) == ["node-0"]


async def test_limits_are_known_while_all_nodes_are_away(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        pool.mark_failed("node-0", "as the test says")

        assert pool.max_sequence_tokens() == 256


async def test_the_longest_sequence_is_bounded_by_context_and_by_kv(node: FakeNode) -> None:
    """10 blocks of 16 tokens hold 160, and the last token needs none; the context is 256."""
    node.num_device_blocks = 10
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        assert pool.max_sequence_tokens() == 161
