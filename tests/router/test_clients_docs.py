"""docs/clients.md: its commands work, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from router.metrics import RouterMetrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
API_PAGE = (ROOT / "docs" / "api.md").read_text()


def test_the_commands_work(tmp_path: Path) -> None:
    (block,) = re.findall(r"```console\n(.*?)```", PAGE, flags=re.S)
    commands = [line.removeprefix("$ proserve ") for line in block.splitlines()]
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "orchestrator.command_line.main", *command.split()],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    ]

    first, second, table = outputs
    for token in (first, second):
        assert token.split("_")[1] in table
    assert "2030-01-31" in table


def test_every_metric_that_is_named_exists() -> None:
    known = RouterMetrics().render({}, num_waiting=0).decode()
    rows = re.findall(r"^\| `(proserve_router_\w+)", PAGE, flags=re.M)

    assert len(rows) == 8
    assert [name for name in rows if f"# TYPE {name} " not in known] == []


def test_every_code_that_is_named_is_one_of_the_api() -> None:
    codes = set(re.findall(r"\b(?:400|401|403|429) `(\w+)`", PAGE))

    assert len(codes) == 6
    assert {code for code in codes if f"`{code}`" not in API_PAGE} == set()
