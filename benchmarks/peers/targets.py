"""What is measured: our router, the floor, and other projects' routers, each with its own
environment under `build/peers`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

from benchmarks.peers.mock_worker import MODEL
from benchmarks.shared.peer_environments import PEERS, NotInstallable, install
from router.keys import make_key

ROOT = Path(__file__).resolve().parents[2]
ENGINE_DIR = ROOT / "built_engines/smollm2-135m"

KEY = make_key()
"""The one API key, in our clients file and as LiteLLM's master key."""


@dataclass(frozen=True)
class Place:
    """Where a target runs."""

    port: int
    metrics_port: int
    worker_urls: Sequence[str]
    directory: Path
    """For its files."""


@dataclass(frozen=True)
class Target:
    """One router to measure."""

    name: str
    command: Callable[[Place], list[str]]
    health_path: str = "/health"
    requirement: str | None = None
    """What pip installs for it; None if nothing."""

    environment: Mapping[str, str] = field(default_factory=dict)

    def install(self) -> None:
        """Make its environment if there is none yet.

        Raises:
            NotInstallable: it cannot be made.
        """
        if self.requirement is not None:
            install(self.name, [self.requirement])


def _ours(place: Place, *, num_workers: int = 1) -> list[str]:
    """Return our router with everything on: GoRouting, keys, limits that are counted and never
    reached, metrics, and a log line for each request."""
    clients = place.directory / "clients.yaml"
    limits = {
        "requests_per_s": 1e6,
        "tokens_per_min": 10**12,
        "max_concurrent_sequences": 10**6,
    }
    key = {"key_id": KEY.key_id, "sha256": KEY.sha256}
    client = {"name": "bench", "priority_class": "high", "default_class": "normal"}
    clients.write_text(yaml.safe_dump({"clients": [{**client, "limits": limits, "keys": [key]}]}))
    config = place.directory / "router.yaml"
    settings = {
        "port": place.port,
        "num_workers": num_workers,
        "engine_dir": str(ENGINE_DIR),
        "model": MODEL,
        "policy": "gorouting",
        "clients_file": str(clients),
        "nodes": [
            {"endpoint_id": f"mock-{index}", "url": url}
            for index, url in enumerate(place.worker_urls)
        ],
    }
    config.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "orchestrator.command_line.main", "router", str(config)]


def _passthrough(place: Place) -> list[str]:
    module = "benchmarks.peers.passthrough"
    return [sys.executable, "-m", module, str(place.port), *place.worker_urls]


def _rust_router(name: str, *words: str, log_level: str = "warn") -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        python = str(PEERS / name / "bin/python")
        where = ["--host", "127.0.0.1", "--port", str(place.port)]
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(place.metrics_port)]
        workers = ["--worker-urls", *place.worker_urls, "--worker-startup-check-interval", "1"]
        policy = ["--policy", "round_robin", "--log-level", log_level]
        return [python, "-m", *words, *where, *policy, *workers, *metrics]

    return command


def _smg(place: Place) -> list[str]:
    return [*_rust_router("smg", "smg", "launch")(place), "--disable-tokenizer-autoload"]


def _litellm(place: Place) -> list[str]:
    config = place.directory / "litellm.yaml"
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {
                "model": f"openai/{MODEL}",
                "api_base": f"{url}/v1",
                "api_key": "none",
            },
        }
        for url in place.worker_urls
    ]
    config.write_text(yaml.safe_dump({"model_list": models}))
    where = ["--host", "127.0.0.1", "--port", str(place.port)]
    return [str(PEERS / "litellm/bin/litellm"), "--config", str(config), *where]


def _haproxy(place: Place) -> list[str]:
    workers = "".join(
        f"  server mock{index} {url.removeprefix('http://')}\n"
        for index, url in enumerate(place.worker_urls)
    )
    config = place.directory / "haproxy.cfg"
    # Without http-no-delay it gathers the events of a stream.
    config.write_text(
        "global\n  nbthread 1\n  maxconn 4096\n"
        "defaults\n  mode http\n  option http-no-delay\n  timeout connect 5s\n"
        "  timeout client 60s\n  timeout server 60s\n"
        f"frontend in\n  bind 127.0.0.1:{place.port}\n  default_backend mocks\n"
        f"backend mocks\n  balance roundrobin\n{workers}"
    )
    return ["haproxy", "-f", str(config)]


@dataclass(frozen=True)
class _DebianTarget(Target):
    """A target that comes as a package of Debian."""

    def install(self) -> None:
        if shutil.which(self.name) is not None:
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise NotInstallable(f"needs root: apt-get install {self.name}")
        command = ["apt-get", "install", "--yes", "--no-install-recommends", self.name]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            raise NotInstallable(f"failed: {' '.join(command)}")


TARGETS = (
    Target("ours", _ours),
    Target("ours-2-workers", partial(_ours, num_workers=2)),
    Target("passthrough", _passthrough),
    Target(
        "sglang-router",
        _rust_router("sglang-router", "sglang_router.launch_router"),
        requirement="sglang-router==0.3.2",
    ),
    Target("smg", _smg, requirement="smg==1.13.0"),
    Target(
        "vllm-router",
        _rust_router("vllm-router", "vllm_router.launch_router", log_level="warning"),
        requirement="vllm-router==0.1.17",
    ),
    Target(
        "litellm",
        _litellm,
        health_path="/health/liveliness",
        requirement="litellm[proxy]==1.106.2",
        environment={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it retries a download first
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_MASTER_KEY": KEY.token,
        },
    ),
    _DebianTarget("haproxy", _haproxy),
)
