"""A router that serves https, as a process of its own."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trustme

from orchestrator.core.errors import ConfigError
from router.config import TlsConfig
from tests.integration.deployments import free_port, until
from tests.router.fake_node import FakeNode, saying


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    certificate = authority.issue_cert("127.0.0.1")
    files = {name: tmp_path / f"{name}.pem" for name in ("cert_file", "key_file")}
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(files["cert_file"], append=True)
    certificate.private_key_pem.write_to_path(files["key_file"])
    return {name: str(path) for name, path in files.items()}


@contextmanager
def router_process(path: Path, config: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    path.write_bytes(msgspec.json.encode(config))  # JSON is YAML
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.command_line.main", "router", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_clients_that_trust_its_authority_are_served_and_http_is_not(
    engine_dir: Path, tmp_path: Path, node: FakeNode, authority: trustme.CA, tls: dict[str, str]
) -> None:
    node.script = saying([70, 71, 72])
    port = free_port()
    config = {
        "engine_dir": str(engine_dir),
        "model": "tiny",
        "port": port,
        "nodes": [{"endpoint_id": node.endpoint_id, "url": node.url}],
        "tls": tls,
    }
    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    def is_ready() -> bool:
        try:
            return http.get("/health").is_success
        except httpx.ConnectError:
            return False

    with (
        router_process(tmp_path / "router.yaml", config),
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust) as http,
    ):
        until(is_ready, "the router serves")
        body = {"model": "tiny", "prompt": "Hi", "stream": True}
        answer = http.post("/v1/completions", json=body)
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"https://127.0.0.1:{port}/health")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{port}/health")

    assert answer.text.endswith("data: [DONE]\n\n")


def test_files_that_do_not_belong_together_are_refused_at_once(
    authority: trustme.CA, tls: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(other)
    config = TlsConfig.model_validate(tls)

    config.check()
    for key_file in (other, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match=f"key_file {key_file} cannot be used"):
            config.model_copy(update={"key_file": key_file}).check()
