"""The real small model served as a prebuilt TensorRT-LLM engine: router, HTTP service, executor
process, scheduler and the engine's driver are those of production; the engine itself is the
stand-ins' reference, on the CPU."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.deployments import Deployment, running, write_deployment
from tests.trtllm.reference_engine import write_llama_engine
from tests.trtllm.stand_in_path import stand_in_environment

pytestmark = pytest.mark.slow

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


NUM_TOKENS = 24

NUM_PATIENT_TOKENS = 80
"""Some seconds' work, so that a visitor still meets the request where the machine is busy."""


def chat(prompt: str, *, num_tokens: int = NUM_TOKENS, **more: Any) -> dict[str, Any]:
    """Return a request for a greedy answer of so many tokens."""
    return {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def answer(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    response = await client.post("/v1/chat/completions", json=request)
    assert response.status_code == httpx.codes.OK, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


async def answers(
    deployment: Deployment, prompts: Sequence[str], *, num_tokens: int = NUM_TOKENS
) -> list[str]:
    """Return greedy answers to all prompts, asked at the same time."""
    requests = [chat(prompt, num_tokens=num_tokens) for prompt in prompts]
    async with httpx.AsyncClient(base_url=deployment.url, timeout=200.0) as client:
        return await asyncio.gather(*(answer(client, request) for request in requests))


@pytest.fixture(scope="module")
def trtllm(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """22 blocks on the device: the longest sequence that is taken."""
    path = write_deployment(
        tmp_path_factory.mktemp("deployment"),
        reference_dir,
        engine={
            "kind": "trtllm",
            "device": "cpu",
            "device_kv_bytes": 22 * BLOCK_BYTES,
            "host_kv_bytes": "256MiB",
        },
        node={"max_model_len": 350, "kv_cache": {"offload_threshold_blocks": 1}},
    )
    with running(path, environment=stand_in_environment()) as value:
        yield value


async def test_answers_are_those_of_the_embedded_engine(
    deployment: Deployment, trtllm: Deployment
) -> None:
    assert await answers(trtllm, QUESTIONS) == await answers(deployment, QUESTIONS)


class Figures:
    """What became of a node's KV blocks since this was made."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._before = self._read()

    def since(self) -> dict[str, float]:
        """Return preemptions, and bytes copied each way."""
        return {name: value - self._before[name] for name, value in self._read().items()}

    def _read(self) -> dict[str, float]:
        copied = "proserve_node_kv_copied_bytes_total"
        return {
            name: self._deployment.node_metric(name)
            for name in (
                "proserve_node_preemptions_total",
                f'{copied}{{direction="offload"}}',
                f'{copied}{{direction="onboard"}}',
            )
        }


async def test_answers_stay_the_same_though_every_request_is_pushed_out_and_comes_back(
    deployment: Deployment, trtllm: Deployment
) -> None:
    """One request after the other, which can wait, meets a visitor that cannot and needs three
    quarters of the memory. They share no block but the first, of the chat template."""
    prompts = [f"{question} {STORY}" for question in QUESTIONS[:2]]
    found = []
    async with httpx.AsyncClient(base_url=trtllm.url, timeout=200.0) as client:
        for index, prompt in enumerate(prompts):
            figures, pieces, visit = Figures(trtllm), [], None
            patient = chat(
                prompt,
                num_tokens=NUM_PATIENT_TOKENS,
                stream=True,
                priority="low",
                slo={"ttft_ms": 60_000, "tpot_ms": 60_000},
            )
            # Due before the patient one, and not too late even where the machine is busy: for a
            # request that is late anyway nobody is pushed out.
            urgent = chat(
                f"{index} {STORY}{STORY}",
                num_tokens=1,
                priority="high",
                slo={"ttft_ms": 30_000, "tpot_ms": 30_000},
            )
            async with client.stream("POST", "/v1/chat/completions", json=patient) as stream:
                async for line in stream.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    pieces += [choice["delta"].get("content", "") for choice in choices]
                    if visit is None and any(pieces):
                        visit = asyncio.create_task(answer(client, urgent))
            assert visit is not None
            await visit
            found.append("".join(pieces))
            since = figures.since()
            assert all(value > 0 for value in since.values()), since

    assert found == await answers(deployment, prompts, num_tokens=NUM_PATIENT_TOKENS)
