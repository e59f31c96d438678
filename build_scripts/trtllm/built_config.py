"""Compares what trtllm-build made with what the recipe asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from build_scripts.trtllm.recipe import TrtLlmRecipe
from engines.trtllm.engine_config import TrtLlmEngineConfig, read_config_json, read_engine_config
from engines.trtllm.engine_rules import value_at
from orchestrator.core.errors import BuildError

_WEIGHTS = {
    "none": None,
    "fp8": "FP8",
    "int4_awq": "W4A16_AWQ",
    "int8_weight_only": "W8A16",
    "int4_weight_only": "W4A16",
}
"""Quantisation -> how a checkpoint names it."""


def check_built_engine(recipe: TrtLlmRecipe, engine_dir: Path) -> TrtLlmEngineConfig:
    """Return the configuration of an engine that can be served and is what the recipe says.

    trtllm-build changes options that do not go together, and says so in its log alone.

    Raises:
        EngineDirectoryError: the engine cannot be served.
        BuildError: it is another one than asked for. Has one line per difference.
    """
    config = read_engine_config(engine_dir)
    values = read_config_json(engine_dir)
    differences = [
        f"{key}: the recipe says {wanted}, {built_key} of the engine is {built}"
        for key, wanted, built_key in _requested(recipe)
        if (built := value_at(values, built_key)) not in _spellings(wanted, config.dtype)
    ]
    if differences:
        raise BuildError(
            "trtllm-build made another engine than was asked for; its log says why\n"
            + "\n".join(differences)
            + "\nwrite into the recipe what can be built"
        )
    return config


def _requested(recipe: TrtLlmRecipe) -> Iterator[tuple[str, object, str]]:
    """Yield (key of the recipe, its value in trtllm-build's words, key of `config.json`)."""
    checkpoint = recipe.checkpoint
    yield "checkpoint.dtype", checkpoint.dtype, "pretrained_config.dtype"
    yield "checkpoint.tp_size", checkpoint.tp_size, "pretrained_config.mapping.tp_size"
    quantization = "pretrained_config.quantization"
    yield (
        "checkpoint.quantization",
        _WEIGHTS[checkpoint.quantization],
        f"{quantization}.quant_algo",
    )
    kv_cache = checkpoint.kv_cache_dtype and checkpoint.kv_cache_dtype.upper()
    yield "checkpoint.kv_cache_dtype", kv_cache, f"{quantization}.kv_cache_quant_algo"
    for name, limit in recipe.limits.model_dump(exclude_none=True).items():
        yield f"limits.{name}", limit, f"build_config.{name}"
    for name, value in recipe.plugins.model_dump(exclude={"kv_cache_type"}).items():
        yield f"plugins.{name}", value, f"build_config.plugin_config.{name}"


def _spellings(wanted: object, dtype: str) -> tuple[object, ...]:
    """Return how `config.json` may write a value."""
    match wanted:
        case "enable":
            return (True,)
        case "disable":
            return (False, None)
        case "auto":
            return ("auto", dtype)
    return (wanted,)
