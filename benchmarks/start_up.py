"""From `proserve serve` to the first answer of the real model, several times in a row.

python -m benchmarks.start_up
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import yaml

from benchmarks.shared.reporting import argument_parser, report

ROOT = Path(__file__).parents[1]


def first_answer_s(deployment: Path) -> float:
    """Start the deployment, wait for one streamed token, stop it; return the seconds to it."""
    port = yaml.safe_load(deployment.read_text())["router"]["port"]
    url = f"http://127.0.0.1:{port}"
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.command_line.main", "serve", str(deployment)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                if process.poll() is not None:
                    sys.exit(f"the service ended with status {process.returncode}")
                try:
                    if client.get("/health").status_code == httpx.codes.OK:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.02)
            model = client.get("/v1/models").json()["data"][0]["id"]
            body = {"model": model, "prompt": "Hello", "max_tokens": 1}
            client.post("/v1/completions", json=body).raise_for_status()
        return time.monotonic() - started_s
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--deployment", type=Path, default=ROOT / "configs/deployments/local.yaml")
    arguments = parser.parse_args()
    seconds = [first_answer_s(arguments.deployment) for _ in range(2 if arguments.quick else 5)]
    report(
        {
            "first_answer_s_median": round(statistics.median(seconds), 2),
            "first_answer_s": [round(s, 2) for s in seconds],
        },
        file_name=arguments.json,
    )


if __name__ == "__main__":
    main()
