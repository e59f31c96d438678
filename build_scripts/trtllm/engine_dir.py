"""Puts an engine directory together from what the steps of a build made."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from pathlib import Path

from build_scripts.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from build_scripts.trtllm.model_files import CHAT_TEMPLATE_FILE, ModelFiles
from build_scripts.trtllm.profile_file import EngineProfile
from build_scripts.trtllm.recipe import TrtLlmRecipe
from engines.manifest import EngineManifest, hash_files, write_manifest
from engines.trtllm.engine_config import CONFIG_FILE, read_engine_config

_FILES = {CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE}
_RANK_FILE = re.compile(r"rank\d+\.engine")
_PACKAGES = ("tensorrt_llm", "torch", "tokenizers")


def is_built_file(name: str) -> bool:
    """Return whether a build writes files of this name."""
    return name in _FILES or _RANK_FILE.fullmatch(name) is not None


def write_engine_dir(
    staging: Path,
    recipe: TrtLlmRecipe,
    model: ModelFiles,
    *,
    built_dir: Path,
    profile: EngineProfile,
    build_hash: str,
) -> None:
    """Fill an empty folder with all that serving takes.

    Engines are linked, not copied, where the file system can: a result stays for the next build.
    """
    config = read_engine_config(built_dir)
    for path in sorted(built_dir.iterdir()):
        if is_built_file(path.name):
            _link(path, staging / path.name)
    for name in model.tokenizer_files:
        shutil.copyfile(model.folder / name, staging / name)
    write_manifest(
        staging,
        EngineManifest(
            model_name=recipe.name,
            block_size_tokens=config.tokens_per_block,
            max_model_len=config.max_seq_len,
            vocab_size=config.vocab_size,
            bos_token_id=model.bos_token_id,
            eos_token_ids=model.eos_token_ids,
            weight_precision=_precision(recipe),
            created_with={name: importlib.metadata.version(name) for name in _PACKAGES},
            build_hash=build_hash,
            files=hash_files(staging, sorted(path.name for path in staging.iterdir())),
            latency_profile=profile.latency,
            copy_profile=profile.copies,
            profile_conditions=profile.conditions,
        ),
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _precision(recipe: TrtLlmRecipe) -> str:
    checkpoint = recipe.checkpoint
    weights: str = checkpoint.dtype
    if checkpoint.quantization != "none":
        weights = f"{checkpoint.quantization} with {checkpoint.dtype}"
    if checkpoint.kv_cache_dtype is not None:
        weights += f", KV cache in {checkpoint.kv_cache_dtype}"
    return f"{weights}, from {recipe.source.description}"
