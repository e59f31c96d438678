from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integration.deployments import Deployment


def chat(deployment: Deployment, *arguments: str, stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.command_line.main", "chat", "--url", deployment.url,
         "--temperature", "0", "--max-tokens", "24", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"},
    )  # fmt: skip


def test_a_conversation_shows_answers_and_speed(deployment: Deployment) -> None:
    """The second question needs the first answer: the conversation is sent whole."""
    result = chat(
        deployment, stdin="What is the capital of France?\nIn which country is that city?\n\n"
    )

    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "France" in result.stdout
    assert result.stdout.count("tokens/s") == 2
    assert "first after" in result.stdout


def test_a_refused_turn_says_why(deployment: Deployment) -> None:
    result = chat(deployment, "--priority", "vip", stdin="Hello?\n\n")

    assert result.returncode == 2
    assert "vip" in result.stderr
