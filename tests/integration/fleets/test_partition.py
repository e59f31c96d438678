"""Nodes on other hosts that are cut off, come back, and are reached over bad links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.deployments import WAIT_S, until
from tests.integration.distant import DistantDeployment, Streamed, distant_deployment
from tests.integration.netlab import obstacle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]

NUM_TOKENS = 100
"""Seconds of work for a node, so that it is cut off in the middle."""

PROMPT = "The travellers had reached the"
ABORTED = 'proserve_node_requests_total{finish_reason="abort"}'


@pytest.fixture(scope="module")
def distant(
    engine_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DistantDeployment]:
    with distant_deployment(tmp_path_factory.mktemp("distant"), engine_dir) as deployment:
        yield deployment


@pytest.fixture
async def http(distant: DistantDeployment) -> AsyncIterator[httpx.AsyncClient]:
    distant.heal()
    async with httpx.AsyncClient(base_url=distant.url, timeout=WAIT_S) as client:
        yield client


async def test_a_stream_goes_on_elsewhere_while_its_node_is_cut_off_which_then_comes_back(
    distant: DistantDeployment, http: httpx.AsyncClient
) -> None:
    calm = await distant.stream(http, PROMPT, num_tokens=NUM_TOKENS)
    cut: list[str] = []

    def on_token(num_tokens: int) -> None:
        if num_tokens == 10:
            cut.append(distant.busy_node())
            distant.node(cut[0]).link.is_cut = True

    resumed = await distant.stream(http, PROMPT, num_tokens=NUM_TOKENS, on_token=on_token)
    [endpoint_id] = cut
    until(lambda: endpoint_id not in distant.known_nodes(), "its lease has ended")
    distant.heal()

    assert calm.is_whole
    assert resumed.is_whole
    assert resumed.text == calm.text
    assert resumed.summary["tokens"] == NUM_TOKENS
    assert resumed.summary["retries"] == 1
    assert resumed.summary["node"] != endpoint_id
    # It has not gone on for nobody, and is used again.
    until(lambda: distant.node_metric(endpoint_id, ABORTED) == 1, "the node has given it up")
    again = [await distant.stream(http, PROMPT, num_tokens=2) for _ in range(2)]
    assert {streamed.summary["node"] for streamed in again} == {"node-0", "node-1"}


async def test_a_node_that_is_cut_off_before_its_first_token_costs_no_request(
    distant: DistantDeployment, http: httpx.AsyncClient
) -> None:
    """Requests in turn: one of the two goes to the node that is not there any more."""
    distant.nodes[0].link.is_cut = True

    both = await asyncio.gather(*(distant.stream(http, PROMPT, num_tokens=8) for _ in range(2)))

    assert all(streamed.is_whole for streamed in both)
    assert {streamed.summary["node"] for streamed in both} == {"node-1"}
    assert sorted(streamed.summary["retries"] for streamed in both) == [0, 1]
    assert both[0].text == both[1].text


async def test_links_that_lose_and_delay_change_no_answer(
    distant: DistantDeployment, http: httpx.AsyncClient
) -> None:
    def ask() -> list[asyncio.Task[Streamed]]:
        prompts = [f"Chapter {index}. {PROMPT}" for index in range(8)]
        return [asyncio.create_task(distant.stream(http, p, num_tokens=16)) for p in prompts]

    calm = await asyncio.gather(*ask())
    for host in distant.nodes:
        host.link.delay_s, host.link.jitter_s, host.link.loss = 0.02, 0.01, 0.03

    bad = await asyncio.gather(*ask())

    assert all(streamed.is_whole for streamed in bad)
    assert [streamed.text for streamed in bad] == [streamed.text for streamed in calm]
