"""The step of a build that measures the engine.

    python -m build_scripts.trtllm.profile_step ENGINE PROFILE [--settings JSON]

ENGINE is what trtllm-build made, PROFILE a folder to make. An engine of several ranks is measured
by as many of these processes, which mpirun starts: the first one measures, the others follow it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from build_scripts.profile_copies import describe_copies, measure_copy_profile
from build_scripts.profile_engine import describe, profile_engine
from build_scripts.trtllm.profile_file import EngineProfile
from build_scripts.trtllm.recipe import EngineProfileSettings
from engines.engine_options import EngineOptions
from engines.trtllm.engine import TrtLlmEngine, load_rank
from engines.trtllm.engine_config import TrtLlmEngineConfig, read_engine_config
from engines.trtllm.follower import run_follower
from engines.trtllm.launch import ALONE, end_rank, launched_place
from engines.trtllm.rank_worker import kv_dtype, kv_layout
from orchestrator.core.errors import ProServeError
from orchestrator.core.ports import Engine

_MEETING_POINT = Path("ranks.sock")
"""Relative: the ranks run in one folder, and a socket's path may have 107 characters only."""


def measure(
    engine: Engine, config: TrtLlmEngineConfig, settings: EngineProfileSettings
) -> tuple[EngineProfile, list[str]]:
    """Return what was measured of an engine, which is closed, and lines about it for a person.

    Raises:
        EngineError: the measurements do not behave like a model's steps or like copies.
    """
    try:
        measured = profile_engine(
            engine,
            settings,
            device=settings.device,
            dtype=config.dtype,
            vocab_size=config.vocab_size,
        )
    finally:
        engine.close()  # its KV pool leaves no room for another
    layout, dtype = kv_layout(config), kv_dtype(config)
    copies = measure_copy_profile(
        layout, dtype, settings.device, num_layer_groups=1, max_s=settings.max_s
    )
    lines = [describe(measured), describe_copies(copies, layout, dtype)]
    return EngineProfile(measured.profile, copies, measured.conditions), lines


def engine_options(config: TrtLlmEngineConfig, settings: EngineProfileSettings) -> EngineOptions:
    """Return how to run an engine so that every step that it was built for can be measured."""
    return EngineOptions(
        device=settings.device,
        num_device_blocks=settings.num_device_blocks,
        max_num_batched_tokens=config.max_num_tokens,
        max_num_seqs=config.max_batch_size,
        max_model_len=config.max_seq_len,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, as one rank; return its exit status."""
    parser = argparse.ArgumentParser(description="Measure a TensorRT-LLM engine that was built.")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("profile_dir", type=Path)
    parser.add_argument("--settings", default="{}", help="profile section of a recipe, as JSON")
    command = parser.parse_args(arguments)
    console, place = Console(), ALONE
    try:
        settings = EngineProfileSettings.model_validate_json(command.settings)
        config = read_engine_config(command.engine_dir)
        options = engine_options(config, settings)
        place = launched_place(os.environ, _MEETING_POINT)
        if place.rank > 0:
            load = partial(load_rank, command.engine_dir, options, place)
            return end_rank(run_follower(place, load), place)
        engine = TrtLlmEngine(command.engine_dir, options, place, has_manifest=False)
        profile, lines = measure(engine, config, settings)
    except ProServeError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return end_rank(1, place)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    profile.write(command.profile_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
