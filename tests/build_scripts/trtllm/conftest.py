from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from build_scripts.build_engine import build_engine
from tests.build_scripts.trtllm.fake_machine import FakeMachine, make_machine


def _enter(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process build on a machine, whose engines are not measured really."""
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(machine.folder / "site"))
    monkeypatch.setattr(sys, "executable", str(machine.python))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine on which this process can build, and nothing has been built."""
    machine = make_machine(tmp_path)
    _enter(machine, monkeypatch)
    return machine


@pytest.fixture(scope="session")
def finished_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine and the work folder that a build of the recipe leaves."""
    machine = make_machine(tmp_path_factory.mktemp("machine"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        _enter(machine, monkeypatch)
        build_engine(machine.recipe)
    return machine.engine_dir.parent


@pytest.fixture
def built(machine: FakeMachine, finished_engines: Path) -> FakeMachine:
    """A machine on which the recipe has been built."""
    shutil.copytree(finished_engines, machine.engine_dir.parent)
    return machine
