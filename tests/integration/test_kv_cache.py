"""KV that is kept: equal beginnings are computed once, wherever their blocks are by then."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.deployments import Deployment, running, until, write_deployment

BLOCK_BYTES = 737_280
"""16 tokens of SmolLM2-135M in fp32."""

SHARED = 'proserve_node_kv_tokens_total{outcome="shared"}'
PREFILLED = 'proserve_node_tokens_total{work="prefill"}'
PREEMPTED = "proserve_node_preemptions_total"
ONBOARDED = 'proserve_node_kv_copied_bytes_total{direction="onboard"}'
ON_HOST = 'proserve_node_kv_blocks{place="host",state="cached"}'


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(count)]


PREFIX = tokens(0, 512)


def memory(*, num_blocks: int) -> dict[str, object]:
    return {
        "dtype": "float32",
        "device_kv_bytes": num_blocks * BLOCK_BYTES,
        "host_kv_bytes": "256MiB",
    }


def complete(deployment: Deployment, prompt: list[int], max_tokens: int = 1, **other: str) -> str:
    answer = httpx.post(
        f"{deployment.url}/v1/completions",
        json={
            "model": "smollm2-135m",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **other,
        },
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def computed_and_shared(deployment: Deployment) -> tuple[float, float]:
    return deployment.node_metric(PREFILLED), deployment.node_metric(SHARED)


@pytest.fixture(scope="module")
def small(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """80 blocks on the device, a little more than two prompts; room for all on the host."""
    path = write_deployment(
        tmp_path_factory.mktemp("small"),
        engine_dir,
        engine=memory(num_blocks=80),
        node={"max_model_len": 1024, "kv_cache": {"offload_threshold_blocks": 1}},
    )
    with running(path) as deployment:
        yield deployment


def test_an_equal_beginning_is_computed_once(deployment: Deployment) -> None:
    complete(deployment, [*PREFIX, *tokens(1, 20)])
    computed, shared = computed_and_shared(deployment)

    complete(deployment, [*PREFIX, *tokens(2, 20)])

    until(lambda: deployment.node_metric(SHARED) > shared, "the step is counted")
    assert computed_and_shared(deployment) == (computed + 20, shared + 512)


def test_another_user_shares_nothing(deployment: Deployment) -> None:
    prompt = [*tokens(3, 100), 5]
    complete(deployment, prompt, user="somebody")
    computed, shared = computed_and_shared(deployment)

    complete(deployment, prompt, user="somebody else")

    until(lambda: deployment.node_metric(PREFILLED) > computed, "the step is counted")
    assert computed_and_shared(deployment) == (computed + 101, shared)


def test_an_equal_beginning_comes_back_from_the_host(small: Deployment) -> None:
    """Offloaded while the first request decodes, pushed out of the device by two others."""
    question = [*PREFIX, *tokens(4, 20)]
    expected = complete(small, question, max_tokens=8)
    complete(small, [*PREFIX, *tokens(5, 20)], max_tokens=30)
    until(lambda: small.node_metric(ON_HOST) >= 32, "the beginning is on the host")
    for seed in (6, 7):
        complete(small, tokens(seed, 700), max_tokens=30)
    computed, shared = computed_and_shared(small)
    onboarded = small.node_metric(ONBOARDED)

    # Not a question of before, whose own blocks might come back too.
    complete(small, [*PREFIX, *tokens(8, 20)])

    until(lambda: small.node_metric(SHARED) > shared, "the step is counted")
    assert computed_and_shared(small) == (computed + 20, shared + 512)
    assert small.node_metric(ONBOARDED) == onboarded + 32 * BLOCK_BYTES
    assert complete(small, question, max_tokens=8) == expected


async def stream_events(client: httpx.AsyncClient, prompt: list[int]) -> list[dict[str, object]]:
    # With so much time all requests run together, however slow the machine is just now.
    slo = {"ttft_ms": 600_000, "tpot_ms": 600_000}
    body = {"model": "smollm2-135m", "prompt": prompt, "max_tokens": 300, "stream": True}
    body |= {"ignore_eos": True, "slo": slo}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.is_error:  # not even a first token
            return [json.loads(await answer.aread())]
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_an_engine_killed_among_copies_ends_every_stream_once(
    engine_dir: Path, tmp_path: Path
) -> None:
    """Three prompts fill the memory; as soon as their answers need more, blocks are on the move."""
    path = write_deployment(
        tmp_path,
        engine_dir,
        engine=memory(num_blocks=60),
        node={"max_model_len": 800, "kv_cache": {"offload_threshold_blocks": 1}},
        router={"max_attempts": 1},  # or the streams would go on when the node is back
    )
    with running(path) as deployment:
        async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as client:
            streams = [
                asyncio.create_task(stream_events(client, tokens(seed, 300))) for seed in range(3)
            ]
            await asyncio.to_thread(
                until, lambda: deployment.node_metric(PREEMPTED) > 0, "memory is short"
            )
            os.kill(deployment.engine_pid(0), signal.SIGKILL)
            answers = await asyncio.gather(*streams)

    for events in answers:
        assert ["error" in event for event in events] == [False] * (len(events) - 1) + [True]
        assert "engine process ended with status -9" in json.dumps(events[-1])
