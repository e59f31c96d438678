"""Nodes that are killed, stopped and started again under streams: no client notices anything.

Everything is real: `proserve serve`, its processes, the model, OpenAI's client.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.chaos import (
    Answer,
    Killer,
    OnEvent,
    ask,
    ask_all,
    ask_until_whole,
    chaos_deployment,
    go_on,
    running_nodes,
)
from tests.integration.deployments import Deployment, running, until

# Each node that comes back loads PyTorch and the model; on a busy machine that takes a while.
pytestmark = pytest.mark.slow

NUM_REQUESTS, MAX_TOKENS, CONCURRENCY = 24, 48, 8
LONG = 200
"""Tokens of a request that is alone on its node; it takes seconds."""

NUM_EVENTS_EACH = MAX_TOKENS + 1
"""What the client of a request receives: its tokens, and their number."""

RESUMED = 'proserve_router_retries_total{after_tokens="true"}'
OWNED_BLOCKS = 'proserve_node_kv_blocks{place="device",state="used"}'


@pytest.fixture(scope="module")
def trio(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three nodes; tests leave them running, perhaps as other processes."""
    path = chaos_deployment(
        tmp_path_factory.mktemp("chaos"), engine_dir, node={"stall_timeout_s": 5.0}
    )
    with running(path) as deployment:
        yield deployment


@pytest.fixture
async def client(trio: Deployment) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{trio.url}/v1", api_key="x", max_retries=0, timeout=120
    ) as opened:
        yield opened


def busy_node(deployment: Deployment) -> int:
    """Return the node that holds the KV blocks of the only request, as soon as it says so."""
    found: list[int] = []

    def is_found() -> bool:
        found[:] = [
            node
            for node in running_nodes(deployment)
            if deployment.node_metric(OWNED_BLOCKS, node=node) > 0
        ]
        return len(found) == 1

    until(is_found, "one node reports the request")
    return found[0]


async def test_killing_nodes_costs_no_request_and_changes_no_token(
    trio: Deployment, client: openai.AsyncOpenAI
) -> None:
    """Three nodes die, one after each quarter of all events, and each takes its streams along."""
    calm = await ask_all(client, NUM_REQUESTS, max_tokens=MAX_TOKENS, concurrency=CONCURRENCY)
    every_events = NUM_REQUESTS * NUM_EVENTS_EACH // 4 + 1
    killer = Killer(trio, every_events=every_events, seed=1)

    disturbed = await ask_all(
        client,
        NUM_REQUESTS,
        max_tokens=MAX_TOKENS,
        concurrency=CONCURRENCY,
        on_event=killer.note_event,
    )

    assert disturbed == calm
    assert all(a == Answer(a.text, MAX_TOKENS, "length") for a in disturbed)
    assert len(killer.killed) == 3
    assert trio.router_metric(RESUMED) > 0


@pytest.mark.parametrize("process", ["node", "engine"])
async def test_a_stopped_process_costs_no_request_and_changes_no_token(
    trio: Deployment, client: openai.AsyncOpenAI, process: str
) -> None:
    """SIGSTOP: nothing ends and no connection breaks, there is just silence. The router notices
    that of a node, a node that of its engine. When the process goes on, the node is used again
    and holds nothing of what it had."""
    (calm,) = await ask_all(client, 1, max_tokens=LONG, concurrency=1)
    resumed = trio.router_metric(RESUMED)
    stopped: list[tuple[int, int]] = []

    async def stop_the_busy_node() -> None:
        if not stopped:
            node = busy_node(trio)
            pid = trio.node_pid(node) if process == "node" else trio.engine_pid(node)
            os.kill(pid, signal.SIGSTOP)
            stopped.append((node, pid))

    try:
        disturbed = await ask(client, 0, max_tokens=LONG, on_event=stop_the_busy_node)
    finally:
        for _, pid in stopped:
            os.kill(pid, signal.SIGCONT)

    assert disturbed == calm
    assert trio.router_metric(RESUMED) == resumed + 1
    ((node, _),) = stopped
    until(lambda: node in running_nodes(trio), "the node is healthy again")
    until(lambda: trio.node_metric(OWNED_BLOCKS, node=node) == 0, "its blocks are free")


async def test_a_client_that_does_not_read_while_its_node_dies_gets_everything_later(
    trio: Deployment, client: openai.AsyncOpenAI
) -> None:
    """It reads one event, and the rest only when the node that died is back."""
    (calm,) = await ask_all(client, 1, max_tokens=LONG, concurrency=1)
    killed: list[int] = []

    async def kill_and_wait() -> None:
        if not killed:
            node = busy_node(trio)
            os.kill(trio.node_pid(node), signal.SIGKILL)
            killed.append(node)
            until(lambda: node not in running_nodes(trio), "the node is gone")
            until(lambda: node in running_nodes(trio), "the node is back")

    disturbed = await ask(client, 0, max_tokens=LONG, on_event=kill_and_wait)

    assert killed
    assert disturbed == calm


async def test_clients_with_keys_get_their_answers_from_a_router_that_was_killed(
    trio: Deployment, client: openai.AsyncOpenAI
) -> None:
    """Two answers are greedy, two are drawn without a seed. The router dies when a third of their
    events has come. The supervisor starts it again, clients repeat their requests, and their
    answers begin anew with the tokens of the calm run."""
    router_pid = trio.router_pid()
    num_events = 0

    async def ask_four(on_event: OnEvent = go_on) -> list[tuple[Answer, int]]:
        asking = [
            ask_until_whole(
                client,
                index,
                f"order-{index}",
                max_tokens=MAX_TOKENS,
                on_event=on_event,
                temperature=float(index % 2),
            )
            for index in range(4)
        ]
        return list(await asyncio.gather(*asking))

    async def kill_in_the_middle() -> None:
        nonlocal num_events
        num_events += 1
        if num_events == 4 * NUM_EVENTS_EACH // 3:
            os.kill(router_pid, signal.SIGKILL)

    calm = await ask_four()
    disturbed = await ask_four(kill_in_the_middle)

    assert [answer for answer, _ in disturbed] == [answer for answer, _ in calm]
    assert all(a == Answer(a.text, MAX_TOKENS, "length") for a, _ in disturbed)
    assert max(num_sent for _, num_sent in disturbed) > 1
    assert trio.router_pid() != router_pid
