"""Measures an engine's steps and copies, and fits its latency and copy profile.

    python -m build_scripts.profile_engine ENGINE_DIR [--device cuda] [--dtype bfloat16]

replaces the profiles in the directory's manifest with those of this machine.

Source: ProServe, offline profiling (section 2.2 of this project's specification).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from build_scripts.hardware import hardware_name
from build_scripts.latency_fit import (
    StepSample,
    fit_latency_profile,
    mean_absolute_percentage_error,
)
from build_scripts.profile_copies import describe_copies, measure_copy_profile
from build_scripts.profile_plans import (
    Piece,
    PlanMaker,
    decode_grid,
    fits,
    mixed_steps,
    prefill_grid,
)
from build_scripts.progress import work_progress
from build_scripts.recipe import ProfileSettings, StepGrid
from engines.kv_pool import KVLayout
from engines.manifest import ProfileConditions, read_manifest, write_manifest
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.engine import DTYPES, NUM_LAYER_GROUPS
from engines.torch_engine.weights import read_config
from orchestrator.core.errors import EngineError, ProServeError
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import BatchShape, LatencyProfile
from orchestrator.core.ports import Engine


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    """A fit and what it was made under."""

    profile: LatencyProfile
    conditions: ProfileConditions


def engine_options(settings: ProfileSettings, *, max_model_len: int) -> TorchEngineOptions:
    """Return how to run an engine so that every step of the profile that can run, does."""
    return TorchEngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        num_device_blocks=settings.num_device_blocks,
        max_num_batched_tokens=2 * max(settings.prefill_new_tokens)
        + max(settings.decode_batch_sizes),
        max_num_seqs=max(settings.decode_batch_sizes) + 1,
        max_model_len=max_model_len,
        num_threads=settings.num_threads,
    )


def profile_engine(
    engine: Engine,
    grid: StepGrid,
    *,
    device: str,
    dtype: str,
    vocab_size: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> MeasuredProfile:
    """Return the latency profile of an idle engine.

    `device` and `dtype` are where and in which precision it runs, for the record. `on_progress`
    is called with the share that is done, from 0 to 1.

    Raises:
        EngineError: the measurements do not behave like a model's steps, or the fit is off by
            more than `grid.max_mean_error`.
    """
    limits = engine.capabilities
    runnable = (pieces for pieces in mixed_steps(grid) if fits(pieces, limits))
    mixed = list(itertools.islice(runnable, grid.num_mixed_steps))
    grids = [p for p in prefill_grid(grid) + decode_grid(grid) if fits(p, limits)]
    steps = grids + mixed
    samples = _measure(engine, steps, grid, vocab_size=vocab_size, on_progress=on_progress)
    first_mixed = len(grids)
    fitted = samples[:first_mixed] + samples[first_mixed::2]
    held_out = samples[first_mixed + 1 :: 2] or fitted
    profile = fit_latency_profile(fitted)
    error = mean_absolute_percentage_error(profile, fitted)
    if error > grid.max_mean_error:
        raise EngineError(
            f"the latency fit is off by {error:.0%} on average, the limit is "
            f"{grid.max_mean_error:.0%}; is something else using the machine? profile again"
        )
    return MeasuredProfile(
        profile,
        ProfileConditions(
            device=device,
            dtype=dtype,
            num_threads=torch.get_num_threads(),
            hardware=hardware_name(device),
            torch_version=torch.__version__,
            num_samples=len(fitted),
            mean_absolute_percentage_error=error,
            held_out_percentage_error=mean_absolute_percentage_error(profile, held_out),
        ),
    )


def measure_torch_copies(layout: KVLayout, settings: ProfileSettings) -> CopyProfile:
    """Return how long copies of the torch engine's KV blocks take.

    Raises:
        EngineError: as `measure_copy_profile`.
    """
    return measure_copy_profile(
        layout,
        DTYPES[settings.dtype],
        settings.device,
        num_layer_groups=NUM_LAYER_GROUPS,
        max_s=settings.max_s,
    )


def _measure(
    engine: Engine,
    steps: Sequence[Sequence[Piece]],
    grid: StepGrid,
    *,
    vocab_size: int,
    on_progress: Callable[[float], None],
) -> list[StepSample]:
    """Return the shortest duration of each step.

    Repetitions go round all steps, so that a burst of other work on the machine spoils one
    repetition of several steps and not all of one step.
    """
    plans = PlanMaker(engine.capabilities, vocab_size=vocab_size)
    # First runs are slower: memory is touched, kernels are chosen.
    for pieces in (max(steps, key=lambda p: p[0].num_new_tokens), max(steps, key=len)):
        engine.step(plans.plan(pieces))
    durations: list[list[float]] = [[] for _ in steps]
    started_s = time.perf_counter()
    for repeat in range(grid.num_repeats):
        for index, (pieces, seconds) in enumerate(zip(steps, durations, strict=True)):
            spent_s = time.perf_counter() - started_s
            if repeat > 0 and spent_s > grid.max_s:
                break
            seconds.append(engine.step(plans.plan(pieces)).step_s)
            by_count = (repeat + (index + 1) / len(steps)) / grid.num_repeats
            on_progress(max(by_count, min(spent_s / grid.max_s, 1.0)) if repeat else by_count)
    on_progress(1.0)
    engine.step(plans.plan(()))  # so that the engine forgets the last requests
    return [
        StepSample(sum((piece.shape for piece in pieces), BatchShape()), min(seconds))
        for pieces, seconds in zip(steps, durations, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Measure an engine directory on this machine.")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--max-s", type=float, default=40.0)
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    settings = ProfileSettings(
        device=options.device,
        dtype=options.dtype,
        num_threads=options.num_threads,
        max_s=options.max_s,
    )
    try:
        manifest = read_manifest(options.engine_dir, verify_files=False)
        engine = TorchEngine.load(
            options.engine_dir, engine_options(settings, max_model_len=manifest.max_model_len)
        )
        with work_progress(console) as progress:
            advance = progress.part("Profiling", 1.0)
            measured = profile_engine(
                engine,
                settings,
                device=settings.device,
                dtype=settings.dtype,
                vocab_size=manifest.vocab_size,
                on_progress=advance,
            )
        engine.close()
        layout = read_config(options.engine_dir).kv_layout(manifest.block_size_tokens)
        copy_profile = measure_torch_copies(layout, settings)
        write_manifest(
            options.engine_dir,
            replace(
                manifest,
                latency_profile=measured.profile,
                copy_profile=copy_profile,
                profile_conditions=measured.conditions,
            ),
        )
    except ProServeError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 1
    copies = describe_copies(copy_profile, layout, DTYPES[settings.dtype])
    for line in (describe(measured), copies):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def describe(measured: MeasuredProfile) -> str:
    """Return one line for a person."""
    conditions = measured.conditions
    return (
        f"Latency profile: {conditions.num_samples} steps, error "
        f"{conditions.mean_absolute_percentage_error:.1%} fitted, "
        f"{conditions.held_out_percentage_error:.1%} on unseen mixed steps "
        f"({conditions.dtype} on {conditions.hardware}, {conditions.num_threads} threads)"
    )


if __name__ == "__main__":
    sys.exit(main())
