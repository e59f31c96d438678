"""A node whose engine is split over two ranks: HTTP service, an executor process that becomes
mpirun, and two ranks over the stand-ins' fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from orchestrator.config import NodeConfig
from orchestrator.core.request import SamplingParams
from orchestrator.wire import GenerateRequest
from tests.running_node import Node, body, running_node, until
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.fake_mpirun import write_mpirun
from tests.trtllm.reference_engine import fake_spec, write_fake_engine
from tests.trtllm.stand_in_path import stand_in_environment

# Starting three processes takes seconds of CPU.
pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = fake_spec(tp_size=2, vocab_size=511)
BLOCK_BYTES = 1536
NUM_TOKENS = 20


def multi_gpu_node(
    directory: Path, environment: Mapping[str, str]
) -> AbstractAsyncContextManager[Node]:
    """20 blocks of 4 tokens are on the device."""
    engine_dir = write_fake_engine(directory / "engine", SPEC)
    section = {
        "kind": "trtllm",
        "directory": str(engine_dir),
        "device": "cpu",
        "device_kv_bytes": 20 * BLOCK_BYTES,
        "host_kv_bytes": 100 * BLOCK_BYTES,
    }
    limits = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "max_model_len": 64}
    config = NodeConfig.model_validate(
        {"endpoint_id": "node-t", "port": 8101, "engine": section} | limits
    )
    variables = [f"{name}={value}" for name, value in environment.items()]
    executor = (sys.executable, "-m", "orchestrator.command_line.executor")
    return running_node("env", *variables, *executor, config.model_dump_json())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    directory = tmp_path_factory.mktemp("node")
    environment = stand_in_environment()
    environment["PATH"] = f"{write_mpirun(directory / 'bin')}{os.pathsep}{environment['PATH']}"
    async with multi_gpu_node(directory, environment) as value:
        yield value


def rank_process(rank: int, *, mpirun: int) -> int:
    """Return the process id of a rank."""
    ranks = Path(f"/proc/{mpirun}/task/{mpirun}/children").read_text().split()
    place = f"OMPI_COMM_WORLD_RANK={rank}".encode()
    (found,) = [pid for pid in ranks if place in Path(f"/proc/{pid}/environ").read_bytes()]
    return int(found)


def prompt_of(index: int) -> tuple[int, ...]:
    return tuple((31 * index + place) % 511 for place in range(3 + 5 * index))


def request(index: int) -> GenerateRequest:
    greedy = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    return msgspec.structs.replace(body(f"r{index}", *prompt_of(index)), sampling=greedy)


async def test_short_of_blocks_every_request_gets_its_own_tokens(node: Node) -> None:
    """Six requests grow to 6 to 12 blocks each: 53 in all, of 20."""
    answers = await asyncio.gather(*(node.generate(request(index)) for index in range(6)))

    for index, events in enumerate(answers):
        tokens = [token for event in events for token in event.new_token_ids]
        assert tokens == FakeModel(SPEC).tokens(prompt_of(index), NUM_TOKENS)
    assert await node.metric("proserve_node_preemptions_total") > 0


async def test_a_rank_that_is_killed_ends_the_node(node: Node) -> None:
    """Last, as the node is done for. Its processes are mpirun and two ranks."""
    os.kill(rank_process(1, mpirun=node.service.executor.pid), signal.SIGKILL)

    async def is_unhealthy() -> bool:
        return (await node.client.get("/health")).status_code == 503

    await until(is_unhealthy, "the node has noticed")
    health = (await node.client.get("/health")).json()
    assert "the engine process ended with status 9" in health["message"]
    assert health["is_final"]


async def test_without_mpirun_the_node_says_what_is_missing(tmp_path: Path) -> None:
    environment = stand_in_environment() | {"PATH": str(tmp_path)}
    async with multi_gpu_node(tmp_path, environment) as node:
        health = await node.client.get("/health")

    assert health.status_code == 503
    assert "built for 2 ranks" in health.text
    assert "a node starts them with mpirun, if it is installed" in health.text
