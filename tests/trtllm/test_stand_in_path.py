from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trtllm.stand_in_path import STAND_INS, stand_in_environment, stand_ins_importable

PACKAGES = ("tensorrt", "tensorrt_llm")


def origins() -> list[str | None]:
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    return [None if spec is None else spec.origin for spec in specs]


def test_the_stand_ins_come_and_go() -> None:
    before = origins()

    with stand_ins_importable():
        from tensorrt_llm.runtime import Session

        assert Session.__module__ in sys.modules
        assert origins() == [str(STAND_INS / package / "__init__.py") for package in PACKAGES]

    assert origins() == before
    assert not [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    assert str(STAND_INS) not in sys.path


def test_they_go_when_the_block_fails() -> None:
    with pytest.raises(ModuleNotFoundError, match="builder"), stand_ins_importable():
        importlib.import_module("tensorrt_llm.builder")

    assert str(STAND_INS) not in sys.path
    assert "tensorrt_llm" not in sys.modules


def test_they_do_not_mix_with_packages_that_are_imported_already() -> None:
    with stand_ins_importable():
        import tensorrt

        with (
            pytest.raises(RuntimeError, match="already imported: tensorrt"),
            stand_ins_importable(),
        ):
            pass
        assert sys.modules["tensorrt"] is tensorrt


def test_a_process_finds_them(tmp_path: Path) -> None:
    code = "import tensorrt, tensorrt_llm; print(tensorrt_llm.__version__)"

    printed = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=stand_in_environment(), text=True
    )

    assert printed == "1.2.1+reference\n"
