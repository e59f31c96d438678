from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.command_line.launch.state_dir import StateDir
from orchestrator.core.errors import ConfigError


def test_only_its_owner_looks_into_it(tmp_path: Path) -> None:
    directory = StateDir.of("demo", parent=tmp_path / "state")
    directory.create()
    directory.create()

    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.name == "demo"


def test_one_process_has_it(tmp_path: Path) -> None:
    directory = StateDir.of("demo", parent=tmp_path)
    directory.create()

    first = directory.lock()
    assert first is not None
    assert directory.lock() is None
    os.close(first)
    second = directory.lock()
    assert second is not None
    os.close(second)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is no name for a deployment"),
        ("../other", "is no name for a deployment"),
        ("x" * 41, "is no name for a deployment"),
        (".hidden", "is no name for a deployment"),
    ],
)
def test_what_is_no_name_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StateDir.of(name, parent=tmp_path)


def test_a_place_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a socket's path may have 107; set PROSERVE_STATE_DIR"):
        StateDir.of("demo", parent=tmp_path / ("x" * 100))
