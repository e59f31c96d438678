"""The variants of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import validate_model

# A model comes from one place; sections of settings are merged key by key.
_REPLACED_WHOLE = ("source",)


def recipe_variants(recipe: TrtLlmRecipe, recipe_path: Path) -> list[TrtLlmRecipe]:
    """Return the recipes that the `matrix` section describes, in its order.

    Raises:
        ConfigError: there is no such section, a variant is no recipe, or two would have one
            directory or name. Whatever is wrong is found before anything is built.
    """
    if not recipe.matrix:
        raise ConfigError(
            f"{recipe_path}: has no section `matrix`; write one (name of a variant -> keys that "
            "differ), or build the recipe without --matrix"
        )
    base = recipe.model_dump(mode="json", exclude={"matrix"}, exclude_unset=True)
    variants = []
    for name, changes in recipe.matrix.items():
        values = _merged(base, {"name": f"{recipe.name}-{name}"} | changes)
        if recipe.output_dir is not None and "output_dir" not in changes:
            values["output_dir"] = str(recipe.output_dir.with_name(str(values["name"])))
        source = f"{recipe_path}: matrix.{name}"
        variants.append(validate_model(values, TrtLlmRecipe, source=source))
    for key in ("name", "output_dir"):
        values_of_key = [getattr(v, key) for v in variants if getattr(v, key) is not None]
        for value in values_of_key:
            if values_of_key.count(value) > 1:
                raise ConfigError(
                    f"{recipe_path}: matrix: two variants have {key} {value}; give each its own"
                )
    return variants


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, change in changes.items():
        match merged.get(key), change:
            case dict() as old, dict() if key not in _REPLACED_WHOLE:
                merged[key] = _merged(old, change)
            case _:
                merged[key] = change
    return merged
