"""The real model with too little KV memory: what offload to the host saves.

    python -m benchmarks.kv_pressure

Sends the same list of streaming requests to `proserve serve` again and again: three of four are
short, high class and due in seconds, the others long texts that can wait, at half the weight.
First with all the device memory it wants, then with a quarter of what that run used at most. The
quarter has a host pool, and moves blocks as it should, or each time without one part of that: no
copies ahead of need, no copy budget, or no copies at all, so that preempted requests are computed
again.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.shared.live_load import (
    NODE_PORT,
    Lengths,
    LiveRequest,
    make_requests,
    scores,
    send_all,
    serving,
)
from benchmarks.shared.reporting import argument_parser, report
from orchestrator.core.gain import GainTable
from orchestrator.core.slo import PriorityClass, Slo

HIGH = PriorityClass("high", weight=2.0, slo=Slo(ttft_s=3.0, tpot_s=0.4))
HIGH_SHARE = 0.75
HIGH_PROMPT, HIGH_OUTPUT = Lengths(4.2, 0.5, 8, 200), Lengths(3.7, 0.4, 8, 100)
"""Questions of some 75 tokens and answers of some 45."""

LOW = PriorityClass("low", weight=1.0, slo=Slo(ttft_s=30.0, tpot_s=1.5))
LOW_PROMPT, LOW_OUTPUT = Lengths(6.6, 0.4, 200, 1500), Lengths(4.2, 0.4, 16, 150)
"""Texts of some 800 tokens, each as much KV as seven questions, and summaries of some 70."""

PRECISION = {"dtype": "float32"}
KV_BLOCK_BYTES = 16 * 30 * 2 * 3 * 64 * 4
"""16 tokens, 30 layers, keys and values, 3 heads of 64."""

MAX_SEQUENCE_TOKENS = LOW_PROMPT.most + LOW_OUTPUT.most

NODE_URL = f"http://127.0.0.1:{NODE_PORT}"
POLL_S = 0.2

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "synchronous": {"offload": "synchronous"},
    "no copy budget": {"copy_budget": False},
    "recompute": {"offload": "never", "prefix_caching": False},
}
"""What a node's section `kv_cache` says, by what it takes away."""


def make_mix(count: int) -> list[LiveRequest]:
    """Return Poisson arrivals of both classes, one a second in all."""
    num_high = round(count * HIGH_SHARE)
    high = make_requests(num_high, seed=0, prompt=HIGH_PROMPT, output=HIGH_OUTPUT, classes=[HIGH])
    low = make_requests(
        count - num_high, seed=1, prompt=LOW_PROMPT, output=LOW_OUTPUT, classes=[LOW]
    )
    return [replace(request, at_s=request.at_s / HIGH_SHARE) for request in high] + [
        replace(request, at_s=request.at_s / (1 - HIGH_SHARE)) for request in low
    ]


def node_metrics() -> dict[str, float]:
    """Return the node's KV metrics by name and labels."""
    text = httpx.get(f"{NODE_URL}/metrics").text
    return {
        "/".join([sample.name.removeprefix("proserve_node_"), *sample.labels.values()]): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "_kv_" in sample.name or "preemptions_total" in sample.name
    }


class PeakUse:
    """Watches how many device blocks are in use while it is entered."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakUse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_S):
            self.num_blocks = max(self.num_blocks, int(node_metrics()["kv_blocks/device/used"]))


def run(
    requests: list[LiveRequest],
    requests_per_s: float,
    *,
    engine: Mapping[str, Any] = {},
    node: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Serve with these settings, send the list, and return the figures."""
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(
            "slide-batching", Path(directory), classes=(HIGH, LOW), engine=engine, node=node
        ) as url,
    ):
        with PeakUse() as peak:
            records = asyncio.run(send_all(url, requests, requests_per_s=requests_per_s))
        metrics = node_metrics()
    table = GainTable(records)
    high = table.by_class()[HIGH.name]
    assert high.ttft_s is not None, "some request of the high class has its first token"
    return {
        **scores(table),
        "high_ttft_p90_s": round(high.ttft_s.p90, 3),
        "peak_device_blocks": peak.num_blocks,
        "preemptions": metrics["preemptions_total"],
        "offloaded_mb": round(metrics["kv_copied_bytes_total/offload"] / 1e6, 1),
        "onboarded_mb": round(metrics["kv_copied_bytes_total/onboard"] / 1e6, 1),
        "exposed_copy_s": round(metrics["kv_copy_seconds_total/exposed"], 3),
        "hidden_copy_s": round(metrics["kv_copy_seconds_total/hidden"], 3),
        "kept_tokens": metrics["kv_tokens_total/kept"],
        "recomputed_tokens": metrics["kv_tokens_total/lost"],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--requests-per-s", type=float, default=0.5)
    arguments = parser.parse_args()
    count = 6 if arguments.quick else arguments.num_requests
    requests = make_mix(count)
    rate = 4.0 if arguments.quick else arguments.requests_per_s
    results: dict[str, dict[str, Any]] = {}

    def note(name: str, **settings: Mapping[str, Any]) -> None:
        results[name] = run(requests, rate, **settings)
        print(name, results[name])

    note("unlimited", engine=PRECISION)
    # The longest request must fit.
    least = -(-MAX_SEQUENCE_TOKENS // 16)
    num_blocks = max(results["unlimited"]["peak_device_blocks"] // 4, least)
    size = PRECISION | {"device_kv_bytes": num_blocks * KV_BLOCK_BYTES}
    limits = {"max_model_len": MAX_SEQUENCE_TOKENS}
    with_host = {**size, "host_kv_bytes": 1 << 30}
    note("quarter", engine=with_host, node=limits)
    ablations = ABLATIONS if not arguments.quick else {"recompute": ABLATIONS["recompute"]}
    for name, kv_cache in ablations.items():
        engine = size if kv_cache.get("offload") == "never" else with_host
        note(f"quarter, {name}", engine=engine, node=limits | {"kv_cache": kv_cache})
    unlimited_s = results["unlimited"]["high_ttft_p90_s"]
    miss = 1 - results["quarter"]["tdg_ratio"]
    report(
        {
            "num_requests": count,
            "requests_per_s": rate,
            "num_device_blocks_of_quarter": num_blocks,
            "runs": results,
            "high_ttft_p90_ratio": {
                name: round(figures["high_ttft_p90_s"] / unlimited_s, 3)
                for name, figures in results.items()
            },
            "normalised_miss": {
                name: round((1 - figures["tdg_ratio"]) / miss, 3)
                for name, figures in results.items()
                if miss > 0
            },
        },
        file_name=arguments.json,
    )


if __name__ == "__main__":
    main()
