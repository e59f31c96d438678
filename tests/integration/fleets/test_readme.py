"""The README's commands, run as written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.deployments import until

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.+)$", README, flags=re.MULTILINE)
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    """`make serve`, the README's first command, from start to Ctrl-C."""
    with subprocess.Popen(["make", "serve"], cwd=ROOT, start_new_session=True) as process:
        try:
            until(lambda: _is_healthy(process), "make serve answers", timeout_s=100)
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to make and what it runs
            process.wait(60)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{URL}/health")


def _is_healthy(process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "make serve has ended"
    try:
        return httpx.get(f"{URL}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


PAGES = ("quickstart.md", *sorted(f"how-to/{p.name}" for p in (ROOT / "docs/how-to").glob("*.md")))


def commands_of(page: str) -> list[str]:
    """The commands of a page, but for those that are marked as needing more than this machine."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"^( *)```console( gpu)?\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [
        line.strip().removeprefix("$ ")
        for _, mark, block in blocks
        if not mark
        for line in block.splitlines()
        if line.strip().startswith("$ ")
    ]


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A folder that looks like a clone; what commands write stays in it."""
    for entry in ROOT.iterdir():
        if entry.name != ".git":
            (tmp_path / entry.name).symlink_to(entry)
    yield tmp_path
    subprocess.run([".venv/bin/proserve", "down"], cwd=tmp_path, check=False, capture_output=True)


# Before those that need `served`, which listens on the same port until the last test here.
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_the_commands_of_a_page_work_one_after_the_other(page: str, clone: Path) -> None:
    said = {}
    for command in commands_of(page):
        result = subprocess.run(
            ["bash", "-c", command], cwd=clone, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        said[command] = result.stdout
    for start, expected in (
        ("curl --no-progress-meter -N", "data: [DONE]"),
        (".venv/bin/proserve top", "node-0"),
        ("ID=", "first token"),
        (".venv/bin/proserve bench", "report: bench.html"),
    ):
        for command, output in said.items():
            if command.startswith(start):
                assert expected in output, command


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["make serve", "make test"]


def test_make_test_is_the_command_that_runs_this() -> None:
    """It cannot be run inside itself; that it would run pytest here is what can be shown."""
    plan = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert " .venv/bin/python -m pytest " in plan.stdout.splitlines()[-1]


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not c.startswith("make")], ids=lambda c: c[:30]
)
def test_a_command_of_the_readme_works(command: str) -> None:
    result = subprocess.run(
        command, shell=True, cwd=ROOT, input="Hello!\n\n", capture_output=True, text=True,
        check=False, timeout=90,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert "smollm2-135m" in result.stdout
    assert "error" not in result.stdout


@pytest.mark.usefixtures("served")
def test_the_python_example_prints_an_answer() -> None:
    (example,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)

    result = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=False, timeout=90
    )

    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 3
