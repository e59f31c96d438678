"""`proserve bench`: the same trace, live, under several schedulers or routing policies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.core.errors import ConfigError, ProServeError
from orchestrator.core.gain import Outcome, RequestRecord
from orchestrator.core.slo import PriorityClass
from orchestrator.simulation.trace import Trace, at_rate, capped, part_of
from orchestrator.yaml_config import load_yaml_model

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0
_LARGEST_TOKEN_ID = 40_000
"""Prompts are made up of ids below; which ones does not change what a step costs."""

_SMALLEST_TOKEN_ID = 100


class BenchFailed(ProServeError):
    """A deployment did not become healthy, or refuses everything."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A deployment in which one thing is different."""

    name: str
    scheduler: str | None
    """None keeps the file's, as `policy` does."""

    policy: str | None


@dataclass(frozen=True, slots=True)
class Load:
    """What every variant is sent."""

    trace: Trace
    classes: tuple[PriorityClass, ...]
    """Of each request."""


@dataclass(frozen=True, slots=True)
class VariantRun:
    """What clients saw of a variant."""

    variant: Variant
    records: tuple[RequestRecord, ...]


def variants(schedulers: Sequence[str], policies: Sequence[str]) -> list[Variant]:
    """Return every combination.

    Raises:
        ConfigError: there are fewer than two.
    """
    pairs = itertools.product(schedulers or (None,), policies or (None,))
    found = [
        Variant(" with ".join(name for name in pair if name) or "as in the file", *pair)
        for pair in pairs
    ]
    if len(found) < 2:
        raise ConfigError(
            f"{len(found)} variant to run, a comparison needs two or more: repeat --scheduler or "
            "--policy"
        )
    return found


def make_load(
    config: DeploymentConfig,
    trace: Trace,
    *,
    num_requests: int,
    requests_per_s: float,
    max_model_len: int,
    max_output_tokens: int,
    seed: int,
) -> Load:
    """Return the first requests of a trace at this rate, each of any of the deployment's classes.

    Raises:
        ConfigError: the trace has fewer requests.
    """
    if num_requests > len(trace):
        raise ConfigError(f"--num-requests is {num_requests:,}, the trace has {len(trace):,}")
    part, _ = capped(
        part_of(trace, num_requests, 0),
        max_model_len=max_model_len,
        max_output_tokens=max_output_tokens,
    )
    draw = random.Random(seed)
    classes = [each.to_priority_class() for each in config.router.classes]
    return Load(
        at_rate(part, requests_per_s), tuple(draw.choice(classes) for _ in range(num_requests))
    )


def changed(content: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Return the content of a deployment file as a variant has it."""
    found: dict[str, Any] = json.loads(json.dumps(content))
    if variant.scheduler is not None:
        for node in (*found.get("nodes", ()), *found.get("node_groups", ())):
            node["scheduler"] = variant.scheduler
    if variant.policy is not None:
        found.setdefault("router", {})["policy"] = variant.policy
    found.get("router", {}).pop("num_replicas", None)  # `serve` starts one router
    return found


def run_variant(
    file: Path, variant: Variant, load: Load, *, on_answer: Callable[[], None]
) -> VariantRun:
    """Serve a variant of a deployment file, send the load, and stop it.

    Raises:
        BenchFailed: it did not become healthy.
        ConfigError: the variant is no valid deployment.
    """
    with tempfile.TemporaryDirectory(prefix="proserve-bench-") as name:
        path = Path(name) / "deployment.yaml"
        path.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), variant)))
        config = load_yaml_model(path, DeploymentConfig)
        with _serving(path, config) as url:
            records = asyncio.run(_send_all(url, load, on_answer))
    return VariantRun(variant, tuple(records))


@contextlib.contextmanager
def _serving(path: Path, config: DeploymentConfig) -> Iterator[str]:
    url = f"http://127.0.0.1:{config.router.port}"
    log = path.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.command_line.main", "serve", str(path)],
            stdout=output,
            stderr=output,
        )
    try:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise BenchFailed(f"the deployment did not start: {log.read_text()[-2_000:]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def _send_all(url: str, load: Load, on_answer: Callable[[], None]) -> list[RequestRecord]:
    limits = httpx.Limits(max_connections=None)
    started_s = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def send(index: int) -> RequestRecord:
            at_s = float(load.trace.arrival_s[index])
            await asyncio.sleep(at_s + started_s - time.monotonic())
            record = await _send(client, model, load, index)
            on_answer()
            return record

        return await asyncio.gather(*(send(index) for index in range(len(load.classes))))


async def _send(client: httpx.AsyncClient, model: str, load: Load, index: int) -> RequestRecord:
    arrival_s, draw = time.monotonic(), random.Random(index)
    priority_class = load.classes[index]
    num_output_tokens = int(load.trace.num_output_tokens[index])
    body = {
        "model": model,
        "prompt": [
            draw.randrange(_SMALLEST_TOKEN_ID, _LARGEST_TOKEN_ID)
            for _ in range(load.trace.num_input_tokens[index])
        ],
        "max_tokens": num_output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "priority": priority_class.name,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    token_times_s: list[float] = []
    with contextlib.suppress(httpx.HTTPError):  # a request that failed, as its record says
        async for num_tokens in _num_tokens(client, body):
            token_times_s += [time.monotonic()] * (num_tokens - len(token_times_s))
    is_finished = len(token_times_s) == num_output_tokens
    return RequestRecord(
        request_id=str(index),
        arrival_s=arrival_s,
        slo=priority_class.slo,
        weight=priority_class.weight,
        priority_class=priority_class.name,
        client=load.trace.clients[index],
        num_expected_tokens=num_output_tokens,
        token_times_s=tuple(token_times_s),
        outcome=Outcome.FINISHED if is_finished else Outcome.FAILED,
    )


async def _num_tokens(client: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncIterator[int]:
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != httpx.codes.OK:
            return
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage")
                if usage is not None:
                    yield usage["completion_tokens"]
