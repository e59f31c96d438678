"""The `proserve` command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.deployments import free_port

ROOT = Path(__file__).parents[3]

NODE = "{endpoint_id: %s, port: %d, engine: {directory: %s, device_kv_bytes: 64MiB}}"


def proserve(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.command_line.main", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )


def test_help_lists_every_command() -> None:
    result = proserve("--help")

    assert result.returncode == 0
    for command in ("serve", "node", "router", "build", "chat"):
        assert command in result.stdout


def test_a_missing_file_is_one_line_and_no_traceback() -> None:
    result = proserve("serve", "nowhere.yaml")

    assert result.returncode == 2
    assert "nowhere.yaml" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("[]", "nodes"),
        (f"[{NODE % ('a', 8101, 'x')}, {NODE % ('b', 8101, 'x')}]", "127.0.0.1:8101"),
        (f"[{NODE % ('a', 8101, 'x')}]\nrouter: {{port: 0}}", "router.port is 0"),
        ("[]\n'[/x]': 1", "[/x]"),
        (f"[{NODE % ('a', 8101, 'x')}]\nrouter: {{num_replicas: 2}}", "proserve up"),
        (f"[{NODE % ('a', 8101, 'x')}, {NODE % ('a', 8102, 'x')}]", "endpoint_id"),
    ],
)
def test_a_wrong_deployment_is_refused_before_anything_starts(
    tmp_path: Path, nodes: str, words: str
) -> None:
    assert_is_refused(tmp_path, f"nodes: {nodes}\n", words)


def test_a_missing_engine_directory_is_named(tmp_path: Path) -> None:
    node = NODE % ("a", free_port(), "no/such/dir")
    deployment = f"nodes: [{node}]\nrouter: {{port: {free_port()}}}\n"

    assert_is_refused(tmp_path, deployment, "no/such/dir")


def assert_is_refused(tmp_path: Path, deployment: str, words: str) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(deployment)

    result = proserve("serve", str(path))

    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_chat_without_a_service_says_so() -> None:
    result = proserve("chat", "--url", "http://127.0.0.1:9")

    assert result.returncode == 2
    assert "http://127.0.0.1:9" in result.stderr
    assert "proserve serve" in result.stderr
