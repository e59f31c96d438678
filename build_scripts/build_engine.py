"""Turns a model into an engine directory, as a recipe says.

    python -m build_scripts.build_engine configs/engines/smollm2-135m.yaml [--force]

A recipe of kind `trtllm` is built by `build_scripts.trtllm`. Of any other, the directory holds

    config.json              architecture, in Hugging Face's keys
    model.safetensors        weights, in Hugging Face's names
    tokenizer.json           and tokenizer_config.json, with the chat template
    manifest.json            limits, checksums, versions, the latency and the copy profile
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from build_scripts.packaged_file import find_checkpoint
from build_scripts.progress import WorkProgress, work_progress
from build_scripts.recipe import EngineRecipe
from build_scripts.staging import exclusive, staged
from build_scripts.target import check_replaceable, reason_to_build
from build_scripts.trtllm.build import Target, build_targets, dry_run_lines
from build_scripts.trtllm.matrix import recipe_variants
from build_scripts.trtllm.recipe import TrtLlmRecipe
from engines.manifest import EngineManifest, FileEntry, hash_files, write_manifest
from orchestrator.core.errors import ConfigError, ProServeError
from orchestrator.yaml_config import load_yaml_model

if TYPE_CHECKING:
    from build_scripts.gguf_checkpoint import GgufCheckpoint
    from build_scripts.profile_engine import MeasuredProfile
    from engines.torch_engine.precision import Dtype

_CONTENT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_PACKAGES = ("gguf", "numpy", "safetensors", "tokenizers", "torch")


class _RecipeKind(BaseModel):
    """What of a recipe says which build reads the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    kind: Literal["gguf", "trtllm"] = "gguf"
    """Name of the build."""


def load_recipe(path: Path) -> EngineRecipe | TrtLlmRecipe:
    """Return the recipe in a file, of either kind.

    Raises:
        ConfigError: it cannot be read or does not fit its kind.
    """
    match load_yaml_model(path, _RecipeKind).kind:
        case "gguf":
            return load_yaml_model(path, EngineRecipe)
        case "trtllm":
            return load_yaml_model(path, TrtLlmRecipe)


def build_engine(recipe_path: Path, output_dir: Path | None = None, *, force: bool = False) -> Path:
    """Return the engine directory of a recipe, built unless it is already there.

    A directory whose input is unchanged and whose files are whole is left alone, unless
    `force`; a damaged one is built again. Other processes that build the same directory wait.

    Raises:
        ConfigError: the recipe, or what it names, cannot be used.
        EngineDirectoryError: the output directory holds something that no build wrote, or the
            engine that was built cannot be served.
        EngineError: the engine that was built cannot be profiled.
        BuildError: a command of the build failed.
    """
    recipe = load_recipe(recipe_path)
    if isinstance(recipe, TrtLlmRecipe):
        target = Target.of(recipe, output_dir)
        build_targets([target], recipe.name, force=force)
        return target.engine_dir
    return _build_from_gguf(recipe, output_dir, force=force)


def build_matrix(recipe_path: Path, *, force: bool = False) -> list[Path]:
    """Return the engine directories of a recipe's variants, each built as by `build_engine`.

    Raises:
        ConfigError, BuildError: as `build_engine`; the others are built all the same.
    """
    recipe = _trtllm_recipe(recipe_path, "--matrix")
    targets = [Target.of(variant) for variant in recipe_variants(recipe, recipe_path)]
    build_targets(targets, recipe.name, force=force)
    return [target.engine_dir for target in targets]


def commands_of(recipe_path: Path, *, matrix: bool = False) -> list[str]:
    """Return the commands that a build would run, one a line, quoted for a shell.

    Raises:
        ConfigError: the recipe cannot be used, or is of a kind that runs no commands.
    """
    recipe = _trtllm_recipe(recipe_path, "--dry-run")
    return dry_run_lines(recipe_variants(recipe, recipe_path) if matrix else [recipe])


def run(
    recipe_path: Path, output_dir: Path | None, *, force: bool, matrix: bool, dry_run: bool
) -> None:
    """Do what the options of a command line ask for; commands go to standard output.

    Raises:
        ConfigError: two options contradict each other.
        ConfigError, EngineDirectoryError, EngineError, BuildError: as `build_engine`.
    """
    if matrix and output_dir is not None:
        raise ConfigError(
            "--output-dir names one directory, --matrix makes several; leave one of them out, or "
            "write an output_dir into each variant"
        )
    if dry_run:
        lines = commands_of(recipe_path, matrix=matrix)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    elif matrix:
        build_matrix(recipe_path, force=force)
    else:
        build_engine(recipe_path, output_dir, force=force)


def _trtllm_recipe(path: Path, option: str) -> TrtLlmRecipe:
    recipe = load_recipe(path)
    if not isinstance(recipe, TrtLlmRecipe):
        raise ConfigError(f"{path}: {option} is for recipes of kind trtllm; leave it out")
    return recipe


def _build_from_gguf(recipe: EngineRecipe, output_dir: Path | None, *, force: bool) -> Path:
    console = Console(stderr=True)
    target = output_dir or recipe.output_dir or Path("built_engines") / recipe.name
    source = find_checkpoint(recipe.source)
    build_hash = recipe.build_hash(FileEntry.of(source).sha256)
    with exclusive(target):
        reason = "forced" if force else reason_to_build(target, build_hash)
        if reason is None:
            console.print(f"{target} is up to date", highlight=False, soft_wrap=True)
            return target
        check_replaceable(target, _CONTENT_FILES.__contains__)
        console.print(f"Building {target} ({reason})", highlight=False, soft_wrap=True)
        with staged(target) as staging, work_progress(console) as progress:
            _build(recipe, source, staging, build_hash, progress)
    console.print(f"{target} is ready", highlight=False, soft_wrap=True)
    return target


def _build(
    recipe: EngineRecipe, source: Path, staging: Path, build_hash: str, progress: WorkProgress
) -> None:
    # They need torch, which takes seconds to import: too long for a build that does nothing.
    from build_scripts.gguf_checkpoint import GgufCheckpoint
    from build_scripts.profile_copies import describe_copies
    from build_scripts.profile_engine import describe, measure_torch_copies
    from build_scripts.tokenizer_files import write_tokenizer_files
    from engines.torch_engine.precision import KV_DTYPES, resolve_dtype

    checkpoint = GgufCheckpoint(source)
    config, vocabulary = checkpoint.config(), checkpoint.vocabulary()
    if recipe.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {recipe.max_model_len}, the model was trained for "
            f"{config.max_position_embeddings} tokens at most"
        )
    eos_token_ids = [vocabulary.eos_token_id]
    for token in recipe.additional_eos_tokens:
        if token not in vocabulary.tokens:
            raise ConfigError(f"additional_eos_tokens: the model has no token {token!r}")
        eos_token_ids.append(vocabulary.tokens.index(token))

    config_text = json.dumps(
        config.to_dict()
        | {
            "bos_token_id": vocabulary.bos_token_id,
            "eos_token_id": eos_token_ids,
            "dtype": "float32",
        },
        indent=2,
    )
    (staging / "config.json").write_text(config_text + "\n", encoding="utf-8")
    write_tokenizer_files(staging, vocabulary, max_model_len=recipe.max_model_len)
    _write_weights(checkpoint, staging, progress)
    dtype = resolve_dtype(recipe.profile.dtype, device=recipe.profile.device, config=config)
    measured = _profile(recipe, dtype, staging, progress)
    layout = config.kv_layout(recipe.block_size_tokens)
    copy_profile = measure_torch_copies(layout, recipe.profile, dtype)
    write_manifest(
        staging,
        EngineManifest(
            model_name=recipe.name,
            block_size_tokens=recipe.block_size_tokens,
            max_model_len=recipe.max_model_len,
            vocab_size=config.vocab_size,
            bos_token_id=None,  # the checkpoint's add_bos_token is False
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
            weight_precision=f"float32, dequantised from {checkpoint.precision}",
            created_with={name: importlib.metadata.version(name) for name in _PACKAGES},
            build_hash=build_hash,
            files=hash_files(staging, _CONTENT_FILES),
            latency_profile=measured.profile,
            copy_profile=copy_profile,
            profile_conditions=measured.conditions,
        ),
    )
    copies = describe_copies(copy_profile, layout, KV_DTYPES[dtype])
    for line in (describe(measured), copies):
        progress.console.print(line, highlight=False, soft_wrap=True)


def _write_weights(checkpoint: GgufCheckpoint, staging: Path, progress: WorkProgress) -> None:
    """Write the dequantised weights as float32: scale times integer plus offset has more
    digits than bfloat16 keeps, and every smaller precision can still be made at load."""
    from safetensors.numpy import save_file

    advance = progress.part("Reading weights", checkpoint.num_tensors)
    tensors = {}
    for name, values in checkpoint.tensors():
        tensors[name] = values
        advance(len(tensors))
    path = staging / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes it readable for its owner alone; a service may run as someone else.
    path.chmod((staging / "config.json").stat().st_mode)


def _profile(
    recipe: EngineRecipe, dtype: Dtype, staging: Path, progress: WorkProgress
) -> MeasuredProfile:
    """Profile the engine over the files that were just written, as serving will read them."""
    from build_scripts.profile_engine import engine_options, profile_engine
    from engines.torch_engine import TorchEngine
    from engines.torch_engine.weights import read_config, read_tensors

    config = read_config(staging)
    engine = TorchEngine(
        config,
        read_tensors(staging),
        engine_options(recipe.profile, dtype, max_model_len=recipe.max_model_len),
        block_size_tokens=recipe.block_size_tokens,
    )
    try:
        return profile_engine(
            engine,
            recipe.profile,
            device=recipe.profile.device,
            dtype=dtype,
            vocab_size=config.vocab_size,
            on_progress=progress.part("Profiling", 1.0),
        )
    finally:
        engine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Build an engine directory from a recipe.")
    parser.add_argument("recipe", type=Path, help="YAML file, such as those in configs/engines")
    parser.add_argument("--output-dir", type=Path, help="in place of the recipe's")
    parser.add_argument("--force", action="store_true", help="build even if nothing has changed")
    parser.add_argument("--matrix", action="store_true", help="build every variant of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    options = parser.parse_args(arguments)
    try:
        run(
            options.recipe,
            options.output_dir,
            force=options.force,
            matrix=options.matrix,
            dry_run=options.dry_run,
        )
    except ProServeError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # as shells say it
    return 0


if __name__ == "__main__":
    sys.exit(main())
