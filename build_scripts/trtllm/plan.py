"""The steps that make an engine: which commands, and what each depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from build_scripts.trtllm.commands import (
    ANYWHERE,
    CHECKPOINT_DIR,
    ENGINE_DIR,
    PROFILE_DIR,
    Programs,
    build_commands,
)
from build_scripts.trtllm.recipe import TrtLlmRecipe
from build_scripts.trtllm.workspace import Step
from engines.manifest import FileEntry
from engines.trtllm.engine_rules import SUPPORTED_VERSION


@dataclass(frozen=True, slots=True)
class Contents:
    """What the files and the machine that a build depends on are."""

    model: Mapping[str, FileEntry]
    """Weights and architecture."""

    tokenizer: Mapping[str, FileEntry]
    eos_token_ids: tuple[int, ...]
    calibration: Mapping[str, FileEntry]
    """The recipe's own data set; empty without one."""

    script: FileEntry
    """What makes the checkpoint."""

    hardware: str
    """An engine runs on the kind of GPU that it was compiled on."""


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The commands of one engine, in order."""

    checkpoint: Step
    engine: Step
    profile: Step
    build_hash: str
    """Of everything that decides what is in the engine directory."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return (self.checkpoint, self.engine, self.profile)


def plan_build(recipe: TrtLlmRecipe, programs: Programs, contents: Contents) -> BuildPlan:
    """Return the steps of a recipe. A changed line of it changes the steps that depend on it."""
    checkpoint_command, engine_command, profile_command = build_commands(recipe, programs)
    checkpoint_work, engine_work, _ = build_commands(recipe, ANYWHERE)
    model = dict(contents.model)
    if recipe.checkpoint.is_calibrated:  # reads texts, as tokens
        model |= contents.tokenizer
    checkpoint = Step(
        CHECKPOINT_DIR,
        checkpoint_command,
        inputs={
            "command": checkpoint_work,
            "model": _as_json(model),
            "calibration": _as_json(contents.calibration),
            "script": asdict(contents.script),
            "tensorrt_llm": SUPPORTED_VERSION,
        },
    )
    engine = Step(
        ENGINE_DIR,
        engine_command,
        inputs={"command": engine_work, "hardware": contents.hardware},
        needs=(checkpoint,),
    )
    profile = Step(
        PROFILE_DIR,
        profile_command,
        inputs={"settings": recipe.profile.model_dump(mode="json")},
        needs=(engine,),
    )
    everything = [
        recipe.name,
        profile.key,
        _as_json(contents.tokenizer),
        contents.eos_token_ids,
    ]
    build_hash = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    return BuildPlan(checkpoint, engine, profile, build_hash)


def _as_json(entries: Mapping[str, FileEntry]) -> dict[str, dict[str, Any]]:
    return {name: asdict(entry) for name, entry in entries.items()}
