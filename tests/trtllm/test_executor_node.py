"""A node with `engine: {kind: trtllm-executor}`, end to end: HTTP service, executor process, the
adapter on the strict stubs, and the fake executor with a thread of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from orchestrator.config import NodeConfig
from orchestrator.core.request import FinishReason, SamplingParams
from orchestrator.wire import ErrorBody, NodeDescription
from tests.running_node import Node, body, running_node, until
from tests.scripted_engine import RAISE, REFUSE
from tests.trtllm.served_engine_dir import BLOCK_BYTES, write_served_engine_dir

# Starting an executor process takes seconds of CPU, so tests that leave it whole share one.
pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_BLOCKS = 100


def executor_node(engine_dir: Path, **engine: Any) -> AbstractAsyncContextManager[Node]:
    section = {
        "kind": "trtllm-executor",
        "directory": str(engine_dir),
        "device": "cpu",
        "device_kv_bytes": NUM_BLOCKS * BLOCK_BYTES,
    }
    config = NodeConfig.model_validate(
        {"endpoint_id": "node-t", "port": 8101, "engine": section | engine}
    )
    command = (sys.executable, "-m", "tests.trtllm.executor_node", config.model_dump_json())
    return running_node(*command)


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return write_served_engine_dir(tmp_path / "engine")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    engine_dir = write_served_engine_dir(tmp_path_factory.mktemp("node") / "engine")
    async with executor_node(engine_dir) as value:
        yield value


async def test_tokens_stream_and_end_with_a_reason(node: Node) -> None:
    events = await node.generate(body())

    assert [e.new_token_ids for e in events] == [(5,), (6,), (7,)]
    assert [e.finish_reason for e in events] == [None, None, FinishReason.LENGTH]


async def test_the_node_describes_what_it_serves(node: Node) -> None:
    answer = await node.client.get("/v1/node")

    description = msgspec.json.decode(answer.content, type=NodeDescription)
    assert description.model == "fake"
    assert description.capabilities.num_device_blocks == NUM_BLOCKS
    assert description.latency_profile.prefill_token_s == 0.001


async def test_steps_and_requests_are_counted(engine_dir: Path) -> None:
    """A prompt of 2 tokens and 3 output tokens: one prefill step, two decode steps. On a node of
    its own: steps of other tests' requests may be reported late."""
    async with executor_node(engine_dir) as node:
        await node.generate(body())

        async def is_counted() -> bool:
            return await node.metric('proserve_node_tokens_total{work="decode"}') == 2

        await until(is_counted, "the last step is reported")
        assert await node.metric('proserve_node_requests_total{finish_reason="length"}') == 1
        assert await node.metric("proserve_node_step_seconds_count") >= 3
        assert await node.metric("proserve_node_step_prediction_error_ratio_count") == 0


async def test_short_of_blocks_every_request_gets_all_its_tokens(node: Node) -> None:
    """Twenty requests that grow to 13 blocks each want 260 of 100: pauses are certain."""
    answers = await asyncio.gather(
        *(node.generate(body(f"r{i}", 1000 * i + 5, max_tokens=200)) for i in range(20))
    )

    for index, events in enumerate(answers):
        tokens = [token for event in events for token in event.new_token_ids]
        assert tokens == list(range(1000 * index + 5, 1000 * index + 205))
        assert sum(e.finish_reason is not None for e in events) == 1
    assert await node.metric("proserve_node_preemptions_total") > 0


async def test_a_valuable_request_overtakes_all_that_wait(engine_dir: Path) -> None:
    """Blocks for one request at a time; the last one to arrive has the largest weight."""
    ended: list[str] = []

    async def generate(node: Node, name: str, weight: float) -> None:
        await node.generate(body(name, 5, max_tokens=60, weight=weight))
        ended.append(name)

    async with executor_node(engine_dir, device_kv_bytes=4 * BLOCK_BYTES) as node:
        low = [asyncio.create_task(generate(node, f"low{i}", 1.0)) for i in range(3)]
        await until(lambda: node.runs(3), "three requests are known to the executor")
        await generate(node, "high", 4.0)
        await asyncio.gather(*low)

    assert ended[0] == "high"


async def test_a_client_that_leaves_frees_its_blocks(node: Node) -> None:
    request = msgspec.json.encode(body(max_tokens=1500))
    async with node.client.stream("POST", "/v1/generate", content=request) as answer:
        await anext(answer.aiter_lines())
        await until(lambda: node.runs(1), "the request is reported as running")

    async def blocks_are_free() -> bool:
        return (await node.snapshot()).load.num_free_device_blocks == NUM_BLOCKS

    await until(blocks_are_free, "the blocks are free")
    assert await node.metric('proserve_node_requests_total{finish_reason="abort"}') == 1
    assert len(await node.generate(body("next"))) == 3


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (SamplingParams(max_tokens=3, seed=0, num_logprobs=1), "logprobs are asked for"),
        (SamplingParams(max_tokens=3, seed=0, presence_penalty=1.0), "presence_penalty is 1.0"),
    ],
)
async def test_what_the_executor_does_otherwise_ends_with_an_error(
    node: Node, sampling: SamplingParams, words: str
) -> None:
    (event,) = await node.generate(msgspec.structs.replace(body(), sampling=sampling))

    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert words in event.error


async def test_a_request_that_never_fits_is_answered_with_400(node: Node) -> None:
    answer = await node.client.post(
        "/v1/generate", content=msgspec.json.encode(body(max_tokens=1700))
    )

    assert answer.status_code == 400
    assert (
        "KV blocks, the node has 100" in msgspec.json.decode(answer.content, type=ErrorBody).message
    )


async def test_failures_end_their_requests_and_not_the_node(node: Node) -> None:
    for marker in (REFUSE, RAISE):
        (failed,) = await node.generate(body("bad", 5, marker))

        assert failed.finish_reason is FinishReason.ERROR
        assert failed.error is not None
        assert "as the prompt asked" in failed.error
        assert len(await node.generate(body("good"))) == 3


async def test_an_engine_that_only_fails_is_given_up(engine_dir: Path) -> None:
    """The node turns unhealthy, so that a router sends its requests elsewhere."""
    async with executor_node(engine_dir) as node:
        for index in range(3):
            await node.generate(body(f"bad{index}", 5, RAISE))

        async def is_unhealthy() -> bool:
            return (await node.client.get("/health")).status_code == 503

        await until(is_unhealthy, "the engine is given up")
        assert "failed 3 times in a row" in (await node.client.get("/health")).text


async def test_an_engine_that_cannot_be_loaded_says_why(engine_dir: Path) -> None:
    (engine_dir / "rank0.engine").write_bytes(b"something else")
    async with executor_node(engine_dir) as node:
        health = await node.client.get("/health")

    assert health.status_code == 503
    assert "rank0.engine: has 14 bytes, the build wrote 13" in health.text
