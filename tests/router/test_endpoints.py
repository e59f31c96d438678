"""The pool against real nodes, on a clock that the tests move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router.config import EndpointConfig, RouterSettings
from router.endpoints import EndpointPool
from router.node_client import NodeClient
from tests.router.clocks import ManualClock
from tests.router.fake_node import FakeNode
from tests.router.servers import bound_socket

MAX_AGE_S = 2000.0


@asynccontextmanager
async def started_pool(
    nodes: dict[str, str], clock: ManualClock, *, poll_interval_s: float = 1000.0
) -> AsyncIterator[EndpointPool]:
    """Return a pool that has polled once, and by default does not poll again."""
    client = NodeClient(connect_timeout_s=1.0, stall_timeout_s=5.0)
    pool = EndpointPool(
        [EndpointConfig(endpoint_id=i, url=url) for i, url in nodes.items()],
        client,
        clock,
        model="tiny",
        settings=RouterSettings(
            snapshot_poll_interval_s=poll_interval_s, max_snapshot_age_s=MAX_AGE_S
        ),
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()
        await client.close()


def usable_ids(pool: EndpointPool, clock: ManualClock) -> list[str]:
    return [view.endpoint_id for view in pool.views(clock.now_s())]


async def test_a_node_is_usable_until_its_snapshot_is_too_old(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock) as pool:
        clock.time_s = 100.0 + MAX_AGE_S
        assert usable_ids(pool, clock) == ["node-0"]

        clock.time_s += 0.001

        assert usable_ids(pool, clock) == []
        assert "not heard of for 2000.0 s" in str(pool.obstacles(clock.now_s())["node-0"])


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
        pool.begin_dispatch("node-0", num_prompt_tokens=10)
        begun = pool.begin_dispatch("node-0", num_prompt_tokens=7)
        begun.has_first_token = True
        ended = pool.begin_dispatch("node-0", num_prompt_tokens=99)
        pool.end_dispatch("node-0", ended)

        (view,) = pool.views(clock.now_s())

        assert view.num_queued_prompt_tokens == 15
        assert view.num_decoding == 1


async def test_a_failed_node_comes_back_with_its_next_snapshot(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        pool.mark_failed("node-0", "as the test says")
        assert usable_ids(pool, clock) == []

        # The poll before the last one that the node saw has certainly been taken in.
        await polls(node, 2)

        assert usable_ids(pool, clock) == ["node-0"]


def lose_requests(pool: EndpointPool, count: int) -> None:
    """So many sequences are on node-0 when it fails."""
    dispatches = [pool.begin_dispatch("node-0", num_prompt_tokens=1) for _ in range(count)]
    for dispatch in dispatches:
        pool.lose_node("node-0", dispatch, "as the test says")
        pool.end_dispatch("node-0", dispatch)


async def polls(node: FakeNode, count: int) -> None:
    """Wait until a node was polled so many times more."""
    num_polls = node.num_polls + count
    await asyncio.to_thread(node.wait_until, lambda n: n.num_polls >= num_polls, "more polls")


async def test_a_node_that_fails_again_and_again_is_left_out_for_a_while(node: FakeNode) -> None:
    """Three failures cost a second; then there is room for one request, then for all."""
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        lose_requests(pool, 3)
        await polls(node, 2)
        assert "failed 3 times in a row" in str(pool.obstacles(clock.now_s())["node-0"])

        clock.time_s += 1.0
        assert usable_ids(pool, clock) == ["node-0"]
        probe = pool.begin_dispatch("node-0", num_prompt_tokens=1)
        assert usable_ids(pool, clock) == []
        pool.note_token("node-0", probe)

        assert usable_ids(pool, clock) == ["node-0"]


async def test_failures_of_a_process_are_not_held_against_the_next_one(node: FakeNode) -> None:
    clock = ManualClock()
    async with started_pool({"node-0": node.url}, clock, poll_interval_s=0.01) as pool:
        late = pool.begin_dispatch("node-0", num_prompt_tokens=1)
        lose_requests(pool, 3)
        node.instance_id = "another process"
        await polls(node, 4)
        for _ in range(3):
            pool.lose_node("node-0", late, "lost with the process before")

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
                    pool.begin_dispatch("node-0", num_prompt_tokens=1)
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
            pool.begin_dispatch("node-0", num_prompt_tokens=1)

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
