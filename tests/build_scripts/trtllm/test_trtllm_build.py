"""Builds with real subprocesses: the programs are stand-ins, everything around them is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from build_scripts.build_engine import build_engine, build_matrix, main
from engines.manifest import read_manifest
from orchestrator.core.errors import BuildError, ConfigError, EngineDirectoryError
from tests.build_scripts.trtllm.fake_machine import ROOT, FakeMachine, recipe_values, write_model
from tests.integration.deployments import is_alive, until

ALL = ["convert_checkpoint", "trtllm-build", "profile"]
FILES = {
    "config.json",
    "manifest.json",
    "rank0.engine",
    "tokenizer.json",
    "tokenizer_config.json",
}


def content(engine_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in engine_dir.iterdir()}


def test_a_built_directory_is_whole(machine: FakeMachine) -> None:
    assert build_engine(machine.recipe) == machine.engine_dir

    assert machine.calls() == ALL
    assert {path.name for path in machine.engine_dir.iterdir()} == FILES
    manifest = read_manifest(machine.engine_dir)
    assert set(manifest.files) == FILES - {"manifest.json"}
    assert manifest.model_name == "tiny"
    assert manifest.block_size_tokens == 16
    assert manifest.max_model_len == 256
    assert manifest.vocab_size == 420
    assert manifest.bos_token_id is None
    assert manifest.eos_token_ids == (2, 0)
    assert manifest.weight_precision == f"bfloat16, from {machine.folder / 'model'}"
    assert manifest.created_with["tensorrt_llm"] == "1.2.1+reference"


def test_an_engine_of_several_ranks_has_a_file_for_each(machine: FakeMachine) -> None:
    machine.write_recipe(checkpoint={"family": "llama", "tp_size": 2})

    build_engine(machine.recipe)

    assert machine.calls() == ALL
    assert set(read_manifest(machine.engine_dir).files) >= {"rank0.engine", "rank1.engine"}


def test_unchanged_input_is_a_no_op_that_says_so(
    built: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (built.engine_dir / "manifest.json").stat()

    built.recipe.write_text("# a comment changes nothing\n" + built.recipe.read_text())
    build_engine(built.recipe)

    assert built.calls() == []
    assert (built.engine_dir / "manifest.json").stat() == before
    assert "is up to date" in capsys.readouterr().err.splitlines()[-1]


def test_a_moved_model_or_checkout_is_no_change(built: FakeMachine) -> None:
    for name in ("model", "TensorRT-LLM"):
        (built.folder / name).rename(built.folder / f"moved-{name}")
    built.write_recipe(
        source={"path": str(built.folder / "moved-model")},
        tensorrt_llm_dir=str(built.folder / "moved-TensorRT-LLM"),
    )

    build_engine(built.recipe)

    assert built.calls() == []


VALUES = recipe_values(Path())
CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dtype": ({"checkpoint": {"family": "llama", "dtype": "float16"}}, ALL),
    "limits": ({"limits": VALUES["limits"] | {"max_batch_size": 8}}, ALL[1:]),
    "plugins": ({"plugins": {"tokens_per_block": 32}}, ALL[1:]),
    "profile": ({"profile": VALUES["profile"] | {"num_repeats": 4}}, ALL[2:]),
    "name": ({"name": "other"}, []),
}


@pytest.mark.parametrize(("changes", "reruns"), CHANGES.values(), ids=CHANGES)
def test_a_changed_line_reruns_only_what_depends_on_it(
    built: FakeMachine, changes: dict[str, Any], reruns: list[str]
) -> None:
    """The work folder carries the recipe's name: under another one, everything is made anew."""
    before = read_manifest(built.engine_dir)
    built.write_recipe(**changes)

    build_engine(built.recipe)

    assert built.calls() == (ALL if "name" in changes else reruns)
    assert read_manifest(built.engine_dir) != before


def change_weights(machine: FakeMachine) -> None:
    write_model(machine.folder / "model", weights=b"other weights")


def change_script(machine: FakeMachine) -> None:
    (script,) = (machine.folder / "TensorRT-LLM").rglob("llama/convert_checkpoint.py")
    script.write_text(script.read_text() + "# changed\n")


def change_tokenizer(machine: FakeMachine) -> None:
    path = machine.folder / "model" / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def change_end_token(machine: FakeMachine) -> None:
    (machine.folder / "model" / "generation_config.json").write_text('{"eos_token_id": 1}')


def damage_engine(machine: FakeMachine) -> None:
    """A directory of its own file, so that the kept result is not damaged with it."""
    path = machine.engine_dir / "rank0.engine"
    path.unlink()
    path.write_bytes(b"damaged")


def damage_kept_results(machine: FakeMachine) -> None:
    """The checkpoint is not read, for the engine that was made from it is whole."""
    for name in ("checkpoint-*/rank0.safetensors", "profile-*/profile.json"):
        (path,) = machine.work_dir.glob(name)
        path.write_bytes(b"damaged")
    damage_engine(machine)


@pytest.mark.parametrize(
    ("change", "reruns"),
    [
        (change_weights, ALL),
        (change_script, ALL),
        (change_tokenizer, []),
        (change_end_token, []),
        (damage_engine, []),
        (damage_kept_results, ["profile"]),
    ],
)
def test_changed_files_rerun_only_what_depends_on_them(
    built: FakeMachine, change: Callable[[FakeMachine], None], reruns: list[str]
) -> None:
    before = (built.engine_dir / "manifest.json").stat().st_ino
    change(built)

    build_engine(built.recipe)

    assert built.calls() == reruns
    assert (built.engine_dir / "manifest.json").stat().st_ino != before
    read_manifest(built.engine_dir)


def test_force_runs_everything_again(built: FakeMachine) -> None:

    build_engine(built.recipe, force=True)

    assert built.calls() == ALL


@pytest.mark.parametrize("step", ["checkpoint", "build", "profile"])
def test_a_failed_step_shows_its_last_lines_and_where_all_are(
    machine: FakeMachine, step: str
) -> None:
    machine.behave(**{step: {"fail": "CUDA out of memory"}})

    with pytest.raises(BuildError, match="failed with exit status 3") as error:
        build_engine(machine.recipe)

    lines = str(error.value).splitlines()
    assert lines[-2] == "    CUDA out of memory"
    log = Path(lines[-1].removeprefix("all of it is in "))
    assert log.read_text().startswith("$ ")
    assert log.read_text().endswith("CUDA out of memory\n")
    assert not machine.engine_dir.exists()


def test_a_build_goes_on_after_the_step_that_failed(machine: FakeMachine) -> None:
    machine.behave(build={"fail": "no"})
    with pytest.raises(BuildError):
        build_engine(machine.recipe)
    machine.behave()
    machine.calls()

    build_engine(machine.recipe)

    assert machine.calls() == ALL[1:]
    read_manifest(machine.engine_dir)


def test_a_failed_build_leaves_the_old_engine_alone(built: FakeMachine) -> None:
    before = content(built.engine_dir)
    built.behave(build={"fail": "no"})
    built.write_recipe(plugins={"tokens_per_block": 32})

    with pytest.raises(BuildError):
        build_engine(built.recipe)

    assert content(built.engine_dir) == before


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (
            {"max_num_tokens": 64},
            r"limits\.max_num_tokens: the recipe says 128, build_config\.max_num_tokens of the "
            "engine is 64",
        ),
        (
            {"gemm_plugin": "disable"},
            r"plugins\.gemm_plugin: the recipe says auto, build_config\.plugin_config\.gemm_plugin "
            "of the engine is False",
        ),
    ],
)
def test_a_rewritten_option_is_noticed(
    machine: FakeMachine, rewrite: dict[str, object], message: str
) -> None:
    machine.behave(build={"rewrite": rewrite})

    with pytest.raises(BuildError, match=message):
        build_engine(machine.recipe)

    assert machine.calls() == ALL[:2]
    assert not machine.engine_dir.exists()


def test_an_engine_that_could_not_be_served_is_refused_before_it_is_measured(
    machine: FakeMachine,
) -> None:
    machine.behave(build={"rewrite": {"use_paged_context_fmha": "disable"}})

    with pytest.raises(EngineDirectoryError, match="use_paged_context_fmha is false"):
        build_engine(machine.recipe)

    assert machine.calls() == ALL[:2]


@contextmanager
def build_in_another_process(machine: FakeMachine) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "build_scripts.build_engine", str(machine.recipe)]
    with subprocess.Popen(
        command, env=machine.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.mark.parametrize("step", ["checkpoint", "build"])
def test_ctrl_c_ends_the_command_and_the_next_build_goes_on(
    machine: FakeMachine, step: str
) -> None:
    machine.behave(**{step: {"hang": True}})
    with build_in_another_process(machine) as process:
        until(machine.hanging.exists, "the program hangs")
        program = int(machine.hanging.read_text())
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on after the last finished step" in output
    assert not is_alive(program)
    assert not list(machine.work_dir.glob("attempt-*"))
    machine.behave()
    machine.calls()

    build_engine(machine.recipe)

    assert machine.calls() == (ALL if step == "checkpoint" else ALL[1:])
    read_manifest(machine.engine_dir)


def test_a_killed_build_goes_on_beside_what_it_left_running(machine: FakeMachine) -> None:
    """SIGKILL gives no chance to end the command: it goes on, in a folder that nobody reads."""
    machine.behave(build={"hang": True})
    with build_in_another_process(machine) as process:
        until(machine.hanging.exists, "the program hangs")
        program = int(machine.hanging.read_text())
        process.kill()
        process.communicate(timeout=60)
    try:
        machine.behave()
        machine.calls()

        build_engine(machine.recipe)

        assert is_alive(program)
        assert machine.calls() == ALL[1:]
        read_manifest(machine.engine_dir)
        assert not list(machine.work_dir.glob("attempt-*"))
    finally:
        os.kill(program, signal.SIGKILL)


def test_results_that_no_build_needs_any_more_are_removed(built: FakeMachine) -> None:
    built.write_recipe(plugins={"tokens_per_block": 32})

    build_engine(built.recipe)

    assert len(list(built.work_dir.glob("checkpoint-*/"))) == 1
    assert len(list(built.work_dir.glob("engine-*/"))) == 1


MATRIX: dict[str, dict[str, Any]] = {
    "small": {"limits": {"max_batch_size": 4}},
    "large": {"limits": {"max_batch_size": 32}},
    "int8": {"checkpoint": {"quantization": "int8_weight_only"}},
}


def test_a_matrix_builds_every_variant_and_what_they_share_once(
    machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.write_recipe(matrix=MATRIX)

    engine_dirs = build_matrix(machine.recipe)

    assert machine.calls() == [*ALL, *ALL[1:], *ALL]
    manifests = [read_manifest(engine_dir) for engine_dir in engine_dirs]
    assert [m.model_name for m in manifests] == ["tiny-small", "tiny-large", "tiny-int8"]
    assert manifests[2].weight_precision.startswith("int8_weight_only with bfloat16")
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert lines == [
        f"{manifest.model_name}: ready in {engine_dir}"
        for manifest, engine_dir in zip(manifests, engine_dirs, strict=True)
    ]


def test_a_matrix_goes_on_after_a_variant_that_fails(machine: FakeMachine) -> None:
    """A variant whose engine cannot be replaced stands in for any failure."""
    machine.write_recipe(matrix=MATRIX)
    foreign = machine.folder / "engines" / "tiny-small" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")

    with pytest.raises(BuildError, match="1 of 3 engines failed: tiny-small"):
        build_matrix(machine.recipe)

    assert foreign.read_text() == "years of work"
    for name in ("tiny-large", "tiny-int8"):
        read_manifest(machine.folder / "engines" / name)


def test_a_matrix_in_which_nothing_changed_is_a_no_op(machine: FakeMachine) -> None:
    machine.write_recipe(matrix=MATRIX)
    build_matrix(machine.recipe)
    machine.calls()

    build_matrix(machine.recipe)

    assert machine.calls() == []


def test_a_forced_matrix_makes_what_variants_share_once(machine: FakeMachine) -> None:
    machine.write_recipe(matrix=MATRIX)

    assert main([str(machine.recipe), "--matrix", "--force"]) == 0
    assert machine.calls() == [*ALL, *ALL[1:], *ALL]


def test_a_directory_with_files_of_others_is_never_replaced(machine: FakeMachine) -> None:
    machine.engine_dir.mkdir(parents=True)
    (machine.engine_dir / "thesis.txt").write_text("years of work")

    with pytest.raises(EngineDirectoryError, match=r"holds thesis\.txt, which no build wrote"):
        build_engine(machine.recipe)

    assert machine.calls() == []


def test_a_model_that_is_not_there_is_refused_before_anything_runs(machine: FakeMachine) -> None:
    machine.write_recipe(source={"path": str(machine.folder / "nowhere")})

    with pytest.raises(ConfigError, match=r"nowhere: no such folder; correct `source\.path`"):
        build_engine(machine.recipe)

    assert machine.calls() == []
