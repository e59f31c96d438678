"""Load clients that nobody here wrote, against the embedded model behind the router.

    python -m benchmarks.load_clients

Starts `proserve serve` with the small model, and lets aiperf and guidellm measure it offline, each
from an environment of its own (3 GB, made at the first run). Both must end well and report no
failed request. With `--json` their own reports go to `benchmarks/results/load_clients/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.peer_environments import NotInstallable, install
from benchmarks.shared.reporting import RESULTS, argument_parser, report
from tests.integration.deployments import running, write_deployment

ROOT = Path(__file__).resolve().parents[1]
ENGINE_DIR = Path("built_engines/smollm2-135m")
"""Below ROOT, from where the clients run, so that no report names a path of this machine."""

MODEL = "smollm2-135m"
OUTPUT_DIR = Path("build/load_clients")
CONCURRENCY = 8
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 32
SLO_MS = {"ttft": 5000, "tpot": 300}
"""What guidellm judges by; that of class normal in configs/deployments/local.yaml."""

TIMEOUT_S = 900


@dataclass(frozen=True)
class LoadClient:
    """One client and what it says of a run."""

    name: str
    requirements: Sequence[str]
    arguments: Callable[[str, int], Sequence[str]]
    """From the router's address and the number of requests."""

    figures: Callable[[], dict[str, Any]]
    """Of the run that has just ended, read from its reports."""

    reports: Sequence[str]
    """File names in OUTPUT_DIR to keep."""


def _aiperf_arguments(url: str, num_requests: int) -> Sequence[str]:
    return (
        *("profile", "--url", url, "--model", MODEL, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", f"./{ENGINE_DIR}", "--use-server-token-count"),
        *("--concurrency", str(CONCURRENCY), "--request-count", str(num_requests)),
        *("--synthetic-input-tokens-mean", str(PROMPT_TOKENS)),
        *("--output-tokens-mean", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"),
        *("--ui", "none", "--output-artifact-dir", str(OUTPUT_DIR)),
    )


def _aiperf_figures() -> dict[str, Any]:
    found = json.loads((ROOT / OUTPUT_DIR / "profile_export_aiperf.json").read_text())
    return {
        "version": found["aiperf_version"],
        "completed": int(found["request_count"]["avg"]),
        "failed": sum(error["count"] for error in found["error_summary"]),
        "ttft_ms_p50": round(found["time_to_first_token"]["p50"]),
        "ttft_ms_p99": round(found["time_to_first_token"]["p99"]),
        "tpot_ms_p50": round(found["inter_token_latency"]["p50"], 1),
        "output_tokens_per_s": round(found["output_token_throughput"]["avg"], 1),
    }


def _guidellm_arguments(url: str, num_requests: int) -> Sequence[str]:
    data = f"prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    slo = f"slo.ttft_ms={SLO_MS['ttft']},slo.tpot_ms={SLO_MS['tpot']}"
    return (
        *("run", "--backend", f"kind=openai_http,target={url},model={MODEL}"),
        *("--profile", f"kind=concurrent,streams={CONCURRENCY}"),
        *("--constraint", f"kind=max_requests,count={num_requests}"),
        *("--tokenizer", f"kind=hf_auto,model={ENGINE_DIR}"),
        *("--data", f"kind=synthetic_text,{data}"),
        *("--metrics", f"kind=generative,{slo}"),
        *("--output", "kind=console"),
        *("--output", f"kind=csv,path={OUTPUT_DIR}/guidellm.csv"),
        *("--output", f"kind=json,path={OUTPUT_DIR}/guidellm.json"),
        "--disable-console-interactive",
    )


def _guidellm_figures() -> dict[str, Any]:
    found = json.loads((ROOT / OUTPUT_DIR / "guidellm.json").read_text())
    (benchmark,) = found["benchmarks"]
    metrics = benchmark["metrics"]
    successful = {
        name: metrics[name]["successful"]
        for name in ("time_to_first_token_ms", "inter_token_latency_ms", "output_tokens_per_second")
    }
    totals = metrics["request_totals"]
    return {
        "version": found["metadata"]["guidellm_version"],
        "completed": totals["successful"],
        "failed": totals["errored"] + totals["incomplete"],
        "ttft_ms_p50": round(successful["time_to_first_token_ms"]["percentiles"]["p50"]),
        "ttft_ms_p99": round(successful["time_to_first_token_ms"]["percentiles"]["p99"]),
        "tpot_ms_p50": round(successful["inter_token_latency_ms"]["percentiles"]["p50"], 1),
        "output_tokens_per_s": round(successful["output_tokens_per_second"]["mean"], 1),
    }


CLIENTS = (
    LoadClient(
        "aiperf",
        ("aiperf==0.13.0",),
        _aiperf_arguments,
        _aiperf_figures,
        ("profile_export_aiperf.json", "profile_export_aiperf.csv"),
    ),
    LoadClient(
        "guidellm",
        ("torch==2.13.0", "guidellm==0.8.1"),  # torch named, or its build with CUDA comes along
        _guidellm_arguments,
        _guidellm_figures,
        ("guidellm.csv", "guidellm.txt"),
    ),
)


def measure(client: LoadClient, url: str, num_requests: int) -> dict[str, Any]:
    """Run one client from start to end; return its figures and its command."""
    try:
        commands = install(client.name, client.requirements)
    except NotInstallable as error:
        return {"skipped": str(error)}
    arguments = client.arguments(url, num_requests)
    # Offline, aiperf refuses even a tokenizer that is here.
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    result = subprocess.run(
        [commands / client.name, *arguments],
        cwd=ROOT,
        env=environment | {"COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    (ROOT / OUTPUT_DIR / f"{client.name}.txt").write_text(result.stdout)
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr)
        sys.exit(f"{client.name} ended with status {result.returncode}; its output is above")
    return client.figures() | {"client_command": " ".join([client.name, *arguments])}


def keep_reports(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy the clients' reports to the results, without the path of this checkout."""
    target = RESULTS / "load_clients"
    target.mkdir(parents=True, exist_ok=True)
    for client in CLIENTS:
        if "skipped" not in figures[client.name]:
            for name in client.reports:
                text = (ROOT / OUTPUT_DIR / name).read_text()
                (target / name).write_text(text.replace(f"{ROOT}/", ""))


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, help="of each client", default=None)
    arguments = parser.parse_args()
    figures = measure_all(arguments)
    if arguments.json is not None:
        keep_reports(figures)
    report(figures, file_name=arguments.json)
    if failed := [name for name, one in figures.items() if one.get("failed")]:
        sys.exit(f"requests of {', '.join(failed)} failed")


def measure_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return each client's figures."""
    num_requests = arguments.num_requests or (16 if arguments.quick else 64)
    shutil.rmtree(ROOT / OUTPUT_DIR, ignore_errors=True)
    (ROOT / OUTPUT_DIR).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as directory:
        path = write_deployment(Path(directory), ROOT / ENGINE_DIR)
        with running(path) as deployment:
            return {c.name: measure(c, deployment.url, num_requests) for c in CLIENTS}


if __name__ == "__main__":
    main()
