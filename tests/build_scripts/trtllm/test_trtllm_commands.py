"""The commands of a build, held against the recorded command lines of TensorRT-LLM."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from build_scripts.build_engine import commands_of, load_recipe, main
from build_scripts.trtllm.commands import ANYWHERE, build_commands
from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.command_line.main import app
from orchestrator.core.errors import ConfigError
from tests.build_scripts.trtllm.fake_machine import ROOT, recipe_values
from tests.trtllm.cli_surface import PROGRAMS, UnknownCommandLine, parse

SHIPPED = {
    "llama-3.1-8b",
    "llama-3.1-8b-fp8",
    "mixtral-8x7b",
    "qwen2.5-7b",
    "qwen3-32b-tp2",
}
RECIPES = ROOT / "configs" / "engines"


def recipe(**changes: object) -> TrtLlmRecipe:
    return TrtLlmRecipe.model_validate(recipe_values(Path("machine"), **changes))


def check_line(line: str) -> dict[str, object]:
    """Return the options of a printed command of TensorRT-LLM; fail if it has unrecorded ones."""
    words = shlex.split(line)
    if Path(words[0]).name == "trtllm-build":
        return parse("trtllm-build", words[1:])
    (script,) = (program for program in PROGRAMS if words[1].endswith(program))
    return parse(script, words[2:])


def options_of(recipe: TrtLlmRecipe) -> tuple[dict[str, object], dict[str, object]]:
    """Return the options of the checkpoint's and of the engine's command."""
    checkpoint, engine, _ = build_commands(recipe, ANYWHERE)
    return check_line(shlex.join(checkpoint)), check_line(shlex.join(engine))


def test_the_shipped_recipes_are_all_there() -> None:
    kinds = {path.stem: load_recipe(path).kind for path in RECIPES.glob("*.yaml")}

    assert {name for name, kind in kinds.items() if kind == "trtllm"} == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_option_of_a_shipped_recipe_is_recorded(name: str) -> None:
    download, checkpoint, engine, profile = commands_of(RECIPES / f"{name}.yaml")

    check_line(checkpoint)
    check_line(engine)
    assert "build_scripts.trtllm.hub" in shlex.split(download)
    assert "build_scripts.trtllm.profile_step" in shlex.split(profile)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_recipe_is_named_after_its_file(name: str) -> None:
    assert load_recipe(RECIPES / f"{name}.yaml").name == name


def test_the_page_about_tensorrt_llm_lists_the_shipped_recipes() -> None:
    page = (ROOT / "docs" / "tensorrt-llm.md").read_text()

    assert set(re.findall(r"^\| `(\S+)\.yaml` \|", page, flags=re.MULTILINE)) == SHIPPED


@pytest.mark.parametrize(
    "wrong", ["--no_such_option 1", "--max_batch_size many", "--gemm_plugin int4", "--max_batch 1"]
)
def test_an_unrecorded_option_would_be_noticed(wrong: str) -> None:
    _, _, engine, _ = commands_of(RECIPES / "llama-3.1-8b.yaml")

    with pytest.raises(UnknownCommandLine):
        check_line(f"{engine} {wrong}")


def test_what_serving_depends_on_is_always_asked_for() -> None:
    _, engine = options_of(recipe())

    assert engine == {
        "checkpoint_dir": "checkpoint",
        "output_dir": "engine",
        "max_beam_width": 1,
        "max_batch_size": 16,
        "max_num_tokens": 128,
        "max_seq_len": 256,
        "kv_cache_type": "paged",
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": "enable",
        "multiple_profiles": "disable",
        "streamingllm": "disable",
        "gpt_attention_plugin": "auto",
        "tokens_per_block": 16,
        "gemm_plugin": "auto",
        "moe_plugin": "auto",
        "gemm_swiglu_plugin": "disable",
        "low_latency_gemm_plugin": "disable",
        "reduce_fusion": "disable",
        "use_fused_mlp": "enable",
        "use_fp8_context_fmha": "disable",
        "workers": 1,
    }


CHECKPOINTS: dict[str, tuple[dict[str, Any], str, dict[str, object]]] = {
    "converted": (
        {"family": "llama", "dtype": "float16", "tp_size": 2},
        "examples/models/core/llama/convert_checkpoint.py",
        {"dtype": "float16", "tp_size": 2},
    ),
    "mixtral is a llama": (
        {"family": "mixtral"},
        "examples/models/core/llama/convert_checkpoint.py",
        {"dtype": "bfloat16", "tp_size": 1},
    ),
    "weights in 8 bits": (
        {"family": "qwen", "quantization": "int8_weight_only"},
        "examples/models/core/qwen/convert_checkpoint.py",
        {
            "dtype": "bfloat16",
            "tp_size": 1,
            "use_weight_only": True,
            "weight_only_precision": "int8",
        },
    ),
    "calibrated": (
        {"family": "qwen", "quantization": "fp8", "kv_cache_dtype": "fp8"},
        "examples/quantization/quantize.py",
        {
            "dtype": "bfloat16",
            "tp_size": 1,
            "qformat": "fp8",
            "kv_cache_dtype": "fp8",
            "calib_dataset": "cnn_dailymail",
            "calib_size": 512,
            "calib_max_seq_length": 512,
        },
    ),
}


@pytest.mark.parametrize(
    ("checkpoint", "script", "expected"), CHECKPOINTS.values(), ids=CHECKPOINTS
)
def test_the_precision_decides_the_script_and_its_options(
    checkpoint: dict[str, Any], script: str, expected: dict[str, object]
) -> None:
    recipe_of_it = recipe(checkpoint=checkpoint)
    places = {"model_dir": "model", "output_dir": "checkpoint", "pp_size": 1}

    assert build_commands(recipe_of_it, ANYWHERE)[0][1] == f"TensorRT-LLM/{script}"
    assert options_of(recipe_of_it)[0] == expected | places


def test_an_fp8_cache_brings_fp8_attention() -> None:
    checkpoint = {"family": "llama", "quantization": "fp8", "kv_cache_dtype": "fp8"}

    assert options_of(recipe(checkpoint=checkpoint))[1]["use_fp8_context_fmha"] == "enable"


def test_an_engine_of_several_ranks_is_compiled_and_measured_by_as_many() -> None:
    _, engine, profile = build_commands(
        recipe(checkpoint={"family": "llama", "tp_size": 2}), ANYWHERE
    )

    assert parse("trtllm-build", engine[1:])["workers"] == 2
    assert profile[:3] == ("mpirun", "-n", "2")


def test_a_dry_run_prints_commands_without_looking_at_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither model nor checkout nor TensorRT-LLM is there. Paths do not depend on the folder in
    which the commands are run; words with blanks are quoted."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TENSORRT_LLM_DIR", str(tmp_path / "my TensorRT-LLM"))

    result = CliRunner().invoke(app, ["build", str(RECIPES / "llama-3.1-8b.yaml"), "--dry-run"])

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(
        f"{sys.executable} '{tmp_path}/my TensorRT-LLM/examples/models/core/llama/"
        "convert_checkpoint.py' --model_dir /"
    )


def test_the_dry_run_of_a_matrix_has_each_variant_under_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    text = (RECIPES / "llama-3.1-8b.yaml").read_text()
    path.write_text(f"{text}\nmatrix: {{a: {{}}, b: {{checkpoint: {{dtype: float16}}}}}}\n")

    assert main([str(path), "--matrix", "--dry-run"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# llama-3.1-8b-a",
        "# llama-3.1-8b-b",
    ]
    assert "--dtype float16" in lines[7]


@pytest.mark.parametrize("option", ["--dry-run", "--matrix"])
def test_a_recipe_that_runs_no_commands_is_refused(option: str) -> None:
    path = RECIPES / "smollm2-135m.yaml"

    result = CliRunner().invoke(app, ["build", str(path), option])

    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"{path}: {option} is for recipes of kind trtllm; leave it out"


def test_one_directory_for_several_engines_is_refused() -> None:
    arguments = ["build", str(RECIPES / "llama-3.1-8b.yaml"), "--matrix", "--output-dir", "here"]

    result = CliRunner().invoke(app, arguments)

    assert isinstance(result.exception, ConfigError)
    assert "--output-dir names one directory" in str(result.exception)
