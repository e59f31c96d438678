"""The real small model served as a prebuilt TensorRT-LLM engine: router, HTTP service, executor
process, scheduler and the engine's driver are those of production; the engine itself is the
stand-ins' reference, on the CPU."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.integration.deployments import Deployment, running, write_deployment
from tests.trtllm.reference_engine import write_llama_engine
from tests.trtllm.stand_in_path import stand_in_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BLOCK_BYTES = 737_280
"""16 tokens of SmolLM2-135M in fp32."""

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "Who wrote Hamlet, and when?",
)
STORY = "The quick brown fox jumps over the lazy dog and runs away from the angry farmer. " * 8


@pytest.fixture(scope="module")
def reference_dir(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `engine_dir` as TensorRT-LLM would have built it."""
    return write_llama_engine(tmp_path_factory.mktemp("trtllm") / "smollm2", engine_dir)


async def answers(
    deployment: Deployment, prompts: Sequence[str], num_tokens: int = 24
) -> list[str]:
    """Return greedy answers to all prompts, asked at the same time."""
    async with httpx.AsyncClient(base_url=deployment.url, timeout=200.0) as client:

        async def ask(prompt: str) -> str:
            response = await client.post(
                "/v1/chat/completions",
                json={
                    "model": "smollm2-135m",
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": num_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                },
            )
            assert response.status_code == httpx.codes.OK, response.text
            text: str = response.json()["choices"][0]["message"]["content"]
            return text

        return await asyncio.gather(*map(ask, prompts))


@pytest.fixture(scope="module")
def trtllm(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """28 blocks on the device: two of the prompts with the story."""
    path = write_deployment(
        tmp_path_factory.mktemp("deployment"),
        reference_dir,
        engine={
            "kind": "trtllm",
            "device": "cpu",
            "device_kv_bytes": 28 * BLOCK_BYTES,
            "host_kv_bytes": "256MiB",
        },
        node={"max_model_len": 400, "kv_cache": {"offload_threshold_blocks": 1}},
    )
    with running(path, environment=stand_in_environment()) as value:
        yield value


async def test_answers_are_those_of_the_embedded_engine(
    deployment: Deployment, trtllm: Deployment
) -> None:
    assert await answers(trtllm, QUESTIONS) == await answers(deployment, QUESTIONS)


async def test_answers_stay_the_same_where_memory_is_so_short_that_requests_are_pushed_out(
    deployment: Deployment, trtllm: Deployment
) -> None:
    """Both prompts fit into the memory, but not with their answers. They begin differently, so
    that they share no blocks."""
    prompts = [f"{question} {STORY}" for question in QUESTIONS[:2]]

    found = await answers(trtllm, prompts, num_tokens=100)

    assert found == await answers(deployment, prompts, num_tokens=100)
    assert trtllm.node_metric("proserve_node_preemptions_total") > 0
    for direction in ("offload", "onboard"):
        name = f'proserve_node_kv_copied_bytes_total{{direction="{direction}"}}'
        assert trtllm.node_metric(name) > 0
