from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from build_scripts.build_engine import load_recipe
from build_scripts.trtllm.matrix import recipe_variants
from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.core.errors import ConfigError
from tests.build_scripts.trtllm.fake_machine import recipe_values


def load(tmp_path: Path, **changes: object) -> TrtLlmRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(tmp_path, **changes), sort_keys=False))
    recipe = load_recipe(path)
    assert isinstance(recipe, TrtLlmRecipe)
    return recipe


LIMITS = {"max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"kind": "onnx"}, "kind: must be 'gguf' or 'trtllm', got 'onnx'"),
    "no source": ({"source": {}}, r"source\.hub: this key is required"),
    "branch": (
        {"source": {"hub": "a/b", "revision": "main"}},
        r"source\.revision: must match pattern .*, got 'main'",
    ),
    "two sources": (
        {"source": {"path": "model", "hub": "a/b"}},
        r"source\.hub: unknown key 'hub'",
    ),
    "unknown family": ({"checkpoint": {"family": "gpt2"}}, r"checkpoint\.family"),
    "unknown key": (
        {"checkpoint": {"family": "llama", "tpsize": 2}},
        "unknown key 'tpsize'; did you mean 'tp_size'",
    ),
    "pipeline": ({"checkpoint": {"family": "llama", "pp_size": 2}}, r"checkpoint\.pp_size"),
    "fp8 trap": (
        {"checkpoint": {"family": "llama", "kv_cache_dtype": "fp8"}},
        "kv_cache_dtype is fp8 with quantization none: trtllm-build would turn paged context "
        "attention off without an error, and chunked prefill needs it; set quantization to fp8 "
        "too, or leave kv_cache_dtype out",
    ),
    "fp8 kernels": (
        {"plugins": {"gemm_plugin": "fp8"}},
        r"plugins\.gemm_plugin is fp8, but checkpoint\.quantization is none; set both, or neither",
    ),
    "more tokens than fit": (
        {"limits": LIMITS | {"max_num_tokens": 257}},
        "max_num_tokens is 257, but max_batch_size requests of max_seq_len hold 256; lower it",
    ),
    "best step too large": (
        {"limits": LIMITS | {"opt_num_tokens": 65}},
        "opt_num_tokens is 65, more than max_num_tokens 64; lower it",
    ),
    "step smaller than a block": (
        {"limits": LIMITS | {"max_num_tokens": 8}},
        r"limits\.max_num_tokens is 8, less than one KV block of plugins\.tokens_per_block 16",
    ),
    "odd block": (
        {"plugins": {"tokens_per_block": 24}},
        "tokens_per_block is 24, it must be a power of two",
    ),
    "needed plugin off": (
        {"plugins": {"use_paged_context_fmha": "disable"}},
        r"plugins\.use_paged_context_fmha: must be 'enable', got 'disable'",
    ),
    "several profiles": (
        {"plugins": {"multiple_profiles": "enable"}},
        r"plugins\.multiple_profiles: must be 'disable', got 'enable'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml:(\d+:\d+:)? .*{message}"):
        load(tmp_path, **changes)


def test_a_recipe_without_kind_is_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nmax_model_len: 8\nlimits: {}\n")

    with pytest.raises(ConfigError, match="unknown key 'limits'"):
        load_recipe(path)


def test_a_variant_changes_only_what_it_names(tmp_path: Path) -> None:
    changes = {
        "wide": {"limits": {"max_batch_size": 32}, "source": {"hub": "a/b", "revision": COMMIT}},
        "named": {"name": "other", "checkpoint": {"quantization": "int4_awq"}},
    }
    base = load(tmp_path, matrix=changes)

    wide, named = recipe_variants(base, Path("recipe.yaml"))

    assert wide.name == "tiny-wide"
    assert wide.output_dir == tmp_path / "engines" / "tiny-wide"
    assert wide.limits == base.limits.model_copy(update={"max_batch_size": 32})
    assert wide.source.description == f"a/b@{COMMIT}"
    assert named.name == "other"
    assert named.checkpoint.quantization == "int4_awq"
    assert named.checkpoint.family == base.checkpoint.family
    assert (wide.matrix, named.matrix) == ({}, {})


def test_a_variant_that_is_no_recipe_is_refused_by_its_name(tmp_path: Path) -> None:
    recipe = load(tmp_path, matrix={"a": {}, "b": {"limits": {"max_batch": 1}}})

    with pytest.raises(ConfigError, match=r"recipe\.yaml: matrix\.b: .*unknown key 'max_batch'"):
        recipe_variants(recipe, Path("recipe.yaml"))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ({"a": {"name": "x"}, "b": {"name": "x"}}, "two variants have name x"),
        (
            {"a": {"output_dir": "here"}, "b": {"output_dir": "here"}},
            "two variants have output_dir here; give each its own",
        ),
    ],
)
def test_variants_that_would_overwrite_each_other_are_refused(
    tmp_path: Path, matrix: dict[str, Any], message: str
) -> None:
    recipe = load(tmp_path, matrix=matrix)

    with pytest.raises(ConfigError, match=message):
        recipe_variants(recipe, Path("recipe.yaml"))


def test_a_recipe_without_variants_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no section `matrix`"):
        recipe_variants(load(tmp_path), Path("recipe.yaml"))
