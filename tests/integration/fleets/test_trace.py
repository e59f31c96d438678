"""`proserve trace` of a request that went through everything."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.integration.deployments import Deployment, running, write_deployment

BLOCK_BYTES = 737_280
"""16 tokens of SmolLM2-135M in fp32."""

NUM_TOKENS = 120
WANTED = ("preempted", "offload", "onboard", "resumed")


async def ask(client: httpx.AsyncClient, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    body = {
        "model": "smollm2-135m",
        "prompt": [draw.randrange(100, 40_000) for _ in range(250)],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        # With so much time all run together, and none is given up.
        "slo": {"ttft_ms": 600_000, "tpot_ms": 600_000},
    }
    answer = await client.post("/v1/completions", json=body, headers={"x-request-id": f"r-{seed}"})
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def trace(deployment: Deployment, request_id: str) -> list[str]:
    """Return the lines of `proserve trace`."""
    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.command_line.main",
         "trace", request_id, "--url", deployment.url],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    return result.stdout.splitlines()


async def find_tried_one(client: httpx.AsyncClient, num_requests: int) -> tuple[str, str]:
    """Return id and node of the first request that was pushed out and has come back."""
    while True:
        for seed in range(num_requests):
            answer = await client.get(f"/dashboard/requests/r-{seed}")
            if answer.status_code != httpx.codes.OK:
                continue
            for told in answer.json()["stories"]:
                names = {event["name"] for event in told["story"]["events"]}
                if names.issuperset(WANTED) and "finished" not in names:
                    return f"r-{seed}", told["told_by"]
        await asyncio.sleep(0.05)


async def test_a_request_that_went_through_everything_tells_it_all(
    engine_dir: Path, tmp_path: Path
) -> None:
    """Pushed out, copied away, copied back, resumed; then its node's engine hangs, and it goes on
    elsewhere. The node's HTTP service lives on and tells its part."""
    path = write_deployment(
        tmp_path,
        engine_dir,
        num_nodes=2,
        engine={
            "dtype": "float32",
            "device_kv_bytes": 50 * BLOCK_BYTES,
            "host_kv_bytes": "256MiB",
            "num_threads": 1,
        },
        node={
            "max_model_len": 500,
            "kv_cache": {"offload_threshold_blocks": 1},
            "stall_timeout_s": 10.0,
        },
        restarts={"max_unhealthy_s": 600},
    )
    with running(path) as deployment:
        async with httpx.AsyncClient(base_url=deployment.url, timeout=200) as client:
            answers = [asyncio.create_task(ask(client, seed)) for seed in range(6)]
            request_id, node = await find_tried_one(client, len(answers))
            engine_pid = deployment.engine_pid(int(node.removeprefix("node-")))
            os.kill(engine_pid, signal.SIGSTOP)
            try:
                done = await asyncio.gather(*answers)
                lines = await asyncio.to_thread(trace, deployment, request_id)
            finally:
                os.kill(engine_pid, signal.SIGKILL)

    answer = done[int(request_id.removeprefix("r-"))]
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    assert lines[0] == f"{answer['id']} (X-Request-Id {request_id})"
    told = [(line.split()[2], line.split(maxsplit=3)[3]) for line in lines[1:]]
    events = [(who, text.partition(":")[0]) for who, text in told]
    (other,) = {"node-0", "node-1"} - {node}
    for earlier, later in (
        (("router", "accepted"), ("router", "sent")),
        ((node, "received"), (node, "prefill")),
        ((node, "preempted"), (node, "onboard")),
        ((node, "onboard"), (node, "resumed")),
        ((node, "resumed"), ("router", "node lost")),
        (("router", "node lost"), (other, "received")),
        ((other, "received"), (other, "prefill")),
        ((other, "prefill"), ("router", "ended")),
    ):
        assert events.index(earlier) < len(events) - 1 - events[::-1].index(later), lines
    sent = [text for who, text in told if who == "router" and text.startswith("sent: ")]
    assert len(sent) == 2
    assert f"node {node}" in sent[0]
    assert f"node {other}" in sent[1]
    resumed_from = int(sent[1].partition("num delivered tokens ")[2])
    assert 0 < resumed_from < NUM_TOKENS
    assert f"num delivered tokens {resumed_from}" in next(t for w, t in told if w == other)
    assert events[-1] == ("router", "ended")
    assert f"status 200, num completion tokens {NUM_TOKENS}" in told[-1][1]
