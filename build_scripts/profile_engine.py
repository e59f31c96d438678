"""Measures an engine's steps and copies, and fits its latency and copy profile.

    python -m build_scripts.profile_engine ENGINE_DIR [--device cuda] [--dtype bfloat16]

replaces the profiles in the directory's manifest with those of this machine.

Source: ProServe, offline profiling (section 2.2 of this project's specification).
"""

from __future__ import annotations

import argparse
import itertools
import math
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
from engines.torch_engine.engine import NUM_LAYER_GROUPS
from engines.torch_engine.precision import KV_DTYPES, Dtype, resolve_dtype
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


def engine_options(
    settings: ProfileSettings, dtype: Dtype, *, max_model_len: int
) -> TorchEngineOptions:
    """Return how to run an engine so that every step of the profile that can run, does."""
    return TorchEngineOptions(
        device=settings.device,
        dtype=dtype,
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
            more than `grid.max_mean_error`, also after all steps were measured some more.
    """
    limits = engine.capabilities
    runnable = (pieces for pieces in mixed_steps(grid) if fits(pieces, limits))
    mixed = list(itertools.islice(runnable, grid.num_mixed_steps))
    grids = [p for p in prefill_grid(grid) + decode_grid(grid) if fits(p, limits)]
    measurement = _Measurement(engine, grids + mixed, grid, vocab_size=vocab_size)
    measurement.run(on_progress)
    fit = _fit_until_sound(measurement, grid, first_mixed=len(grids))
    return MeasuredProfile(
        fit.profile,
        ProfileConditions(
            device=device,
            dtype=dtype,
            num_threads=torch.get_num_threads(),
            hardware=hardware_name(device),
            torch_version=torch.__version__,
            num_samples=fit.num_samples,
            mean_absolute_percentage_error=fit.error,
            held_out_percentage_error=fit.held_out_error,
        ),
    )


def measure_torch_copies(layout: KVLayout, settings: ProfileSettings, dtype: Dtype) -> CopyProfile:
    """Return how long copies of the torch engine's KV blocks take.

    Raises:
        EngineError: as `measure_copy_profile`.
    """
    return measure_copy_profile(
        layout,
        KV_DTYPES[dtype],
        settings.device,
        num_layer_groups=NUM_LAYER_GROUPS,
        max_s=settings.max_s,
    )


_MAX_NUM_RUNS = 4
"""So often all steps are measured before their fit is refused. The shortest durations count, so
other work on the machine spoils a fit only if it spoils the same step in every run."""


class _Measurement:
    """How long steps take on an engine, the shortest of all times that they were run."""

    def __init__(
        self,
        engine: Engine,
        steps: Sequence[Sequence[Piece]],
        grid: StepGrid,
        *,
        vocab_size: int,
    ) -> None:
        self._engine, self._steps, self._grid = engine, steps, grid
        self._plans = PlanMaker(engine.capabilities, vocab_size=vocab_size)
        self._shortest_s = [math.inf for _ in steps]

    def samples(self) -> list[StepSample]:
        """Return each step with its shortest duration."""
        return [
            StepSample(sum((piece.shape for piece in pieces), BatchShape()), step_s)
            for pieces, step_s in zip(self._steps, self._shortest_s, strict=True)
        ]

    def run(self, on_progress: Callable[[float], None] = lambda _: None) -> None:
        """Measure every step `num_repeats` times, or at least once if that takes too long.

        Repetitions go round all steps, so that a burst of other work on the machine spoils one
        repetition of several steps and not all of one step.
        """
        engine, steps, grid = self._engine, self._steps, self._grid
        # First runs are slower: memory is touched, kernels are chosen.
        for pieces in (max(steps, key=lambda p: p[0].num_new_tokens), max(steps, key=len)):
            engine.step(self._plans.plan(pieces))
        started_s = time.perf_counter()
        for repeat in range(grid.num_repeats):
            for index, pieces in enumerate(steps):
                spent_s = time.perf_counter() - started_s
                if repeat > 0 and spent_s > grid.max_s:
                    break
                step_s = engine.step(self._plans.plan(pieces)).step_s
                self._shortest_s[index] = min(self._shortest_s[index], step_s)
                share = (repeat + (index + 1) / len(steps)) / grid.num_repeats
                on_progress(max(share, min(spent_s / grid.max_s, 1.0)) if repeat else share)
        on_progress(1.0)
        engine.step(self._plans.plan(()))  # so that the engine forgets the last requests


@dataclass(frozen=True, slots=True)
class _Fit:
    profile: LatencyProfile
    num_samples: int
    error: float
    held_out_error: float
    """Mean absolute percentage errors, as fractions."""


def _fit_until_sound(measurement: _Measurement, grid: StepGrid, *, first_mixed: int) -> _Fit:
    """Return the fit of what was measured; measure more as long as it is refused."""
    for _ in range(_MAX_NUM_RUNS - 1):
        try:
            return _fit(measurement.samples(), grid, first_mixed=first_mixed)
        except EngineError:
            measurement.run()
    return _fit(measurement.samples(), grid, first_mixed=first_mixed)


def _fit(samples: Sequence[StepSample], grid: StepGrid, *, first_mixed: int) -> _Fit:
    """Return the fit of the grids and every second mixed step; the others only check it."""
    fitted = [*samples[:first_mixed], *samples[first_mixed::2]]
    held_out = samples[first_mixed + 1 :: 2] or fitted
    profile = fit_latency_profile(fitted)
    error = mean_absolute_percentage_error(profile, fitted)
    if error > grid.max_mean_error:
        raise EngineError(
            f"the latency fit is off by {error:.0%} on average, the limit is "
            f"{grid.max_mean_error:.0%}; is something else using the machine? profile again"
        )
    held_out_error = mean_absolute_percentage_error(profile, held_out)
    return _Fit(profile, len(fitted), error, held_out_error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Measure an engine directory on this machine.")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "int8"], default="auto")
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
        config = read_config(options.engine_dir)
        dtype = resolve_dtype(settings.dtype, device=settings.device, config=config)
        engine = TorchEngine.load(
            options.engine_dir,
            engine_options(settings, dtype, max_model_len=manifest.max_model_len),
        )
        with work_progress(console) as progress:
            advance = progress.part("Profiling", 1.0)
            measured = profile_engine(
                engine,
                settings,
                device=settings.device,
                dtype=dtype,
                vocab_size=manifest.vocab_size,
                on_progress=advance,
            )
        engine.close()
        layout = config.kv_layout(manifest.block_size_tokens)
        copy_profile = measure_torch_copies(layout, settings, dtype)
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
    copies = describe_copies(copy_profile, layout, KV_DTYPES[dtype])
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
