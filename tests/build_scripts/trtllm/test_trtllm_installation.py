from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_scripts.build_engine import build_engine
from orchestrator.core.errors import BuildError, ConfigError, EngineError
from tests.build_scripts.trtllm.fake_machine import ROOT, FakeMachine


def test_without_tensorrt_llm_a_build_fails_at_once_with_one_line() -> None:
    recipe = ROOT / "configs" / "engines" / "llama-3.1-8b.yaml"

    result = subprocess.run(
        [sys.executable, "-m", "build_scripts.build_engine", str(recipe)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert result.stderr == (
        "error: tensorrt_llm is not installed, which recipes of kind trtllm are built with: run "
        "`pip install tensorrt-llm==1.2.1` on a machine with an NVIDIA GPU; --dry-run works "
        "without it\n"
    )


def install(machine: FakeMachine, version: str) -> None:
    (old,) = (machine.folder / "site").glob("*.dist-info")
    new = old.with_name(f"tensorrt_llm-{version}.dist-info")
    old.rename(new)
    (new / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n"
    )


def test_another_version_is_refused(machine: FakeMachine) -> None:
    install(machine, "1.3.0rc21")

    with pytest.raises(
        BuildError, match=r"tensorrt_llm 1\.3\.0rc21 is installed, .* `pip install tensorrt-llm=="
    ):
        build_engine(machine.recipe)


def test_a_package_without_its_compiler_is_refused(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    (machine.folder / "bin" / "trtllm-build").unlink()

    with pytest.raises(BuildError, match=r"trtllm-build is neither beside .* nor on PATH"):
        build_engine(machine.recipe)


def test_a_compiler_beside_python_is_found(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `.venv/bin/proserve build`, without activating the environment."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    build_engine(machine.recipe)

    assert "trtllm-build" in machine.calls()


def test_several_ranks_without_a_launcher_are_refused(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine.folder / "bin" / "mpirun").unlink()
    monkeypatch.setenv("PATH", str(machine.folder / "bin"))
    machine.write_recipe(checkpoint={"family": "llama", "tp_size": 2})

    with pytest.raises(BuildError, match=r"mpirun is not on PATH; an engine of 2 ranks"):
        build_engine(machine.recipe)

    assert machine.calls() == []


def test_a_missing_checkout_is_refused_with_the_way_to_it(machine: FakeMachine) -> None:
    shutil.rmtree(machine.folder / "TensorRT-LLM")

    with pytest.raises(ConfigError) as error:
        build_engine(machine.recipe)

    assert str(error.value) == (
        f"{machine.folder}/TensorRT-LLM/examples/models/core/llama/convert_checkpoint.py: no such "
        "file; the conversion scripts are not in the wheel: `git clone --depth 1 --branch v1.2.1 "
        "https://github.com/NVIDIA/TensorRT-LLM`, and name that folder in the recipe's "
        "tensorrt_llm_dir or in TENSORRT_LLM_DIR"
    )


def test_a_checkout_of_another_release_is_refused(machine: FakeMachine) -> None:
    version_file = machine.folder / "TensorRT-LLM" / "tensorrt_llm" / "version.py"
    version_file.write_text('__version__ = "1.1.0"\n')

    with pytest.raises(ConfigError, match=r"is TensorRT-LLM 1\.1\.0, whose scripts write other"):
        build_engine(machine.recipe)


def test_the_environment_names_a_checkout_for_recipes_that_do_not(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (machine.folder / "TensorRT-LLM").rename(tmp_path / "elsewhere")
    machine.write_recipe(tensorrt_llm_dir=None)
    monkeypatch.setenv("TENSORRT_LLM_DIR", str(tmp_path / "elsewhere"))

    build_engine(machine.recipe)

    assert machine.calls()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpu_is_refused_before_anything_runs(machine: FakeMachine) -> None:
    machine.write_recipe(profile={"device": "cuda"})

    with pytest.raises(EngineError, match="sees no CUDA device here; build and measure on the GPU"):
        build_engine(machine.recipe)

    assert machine.calls() == []
