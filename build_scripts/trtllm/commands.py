"""The commands that make an engine, from a recipe alone.

Each runs in a folder of its own, in which `checkpoint` and `engine` name what the commands before
it made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from build_scripts.trtllm.recipe import HubSource, TrtLlmRecipe
from engines.trtllm.launch import mpirun_command

CHECKPOINT_DIR = "checkpoint"
ENGINE_DIR = "engine"
PROFILE_DIR = "profile"

QUANTIZE_SCRIPT = Path("examples/quantization/quantize.py")
_LLAMA_SCRIPT = Path("examples/models/core/llama/convert_checkpoint.py")
CONVERT_SCRIPTS = {
    "llama": _LLAMA_SCRIPT,
    "mistral": _LLAMA_SCRIPT,
    "mixtral": _LLAMA_SCRIPT,  # upstream's Mixtral is its Llama with experts
    "qwen": Path("examples/models/core/qwen/convert_checkpoint.py"),
}
"""Family -> script, below the TensorRT-LLM repository."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What the commands of a machine are called, and where they find their input."""

    python: str
    trtllm_build: str
    tensorrt_llm_dir: Path
    """Checkout of the TensorRT-LLM repository."""

    model_dir: Path
    calibration_dir: Path | None
    """Data set of the recipe's own; None if it names one on the Hub."""


ANYWHERE = Programs(
    python="python",
    trtllm_build="trtllm-build",
    tensorrt_llm_dir=Path("TensorRT-LLM"),
    model_dir=Path("model"),
    calibration_dir=None,
)
"""Without a place of any machine: with it, equal commands mean equal work."""


def download_command(source: HubSource, python: str) -> tuple[str, ...]:
    """Return the command that downloads the model, as a build does before its commands."""
    return (python, "-m", "build_scripts.trtllm.hub", source.hub, source.revision)


def build_commands(
    recipe: TrtLlmRecipe, programs: Programs
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the commands of a build in their order: checkpoint, engine, profile."""
    return (
        _checkpoint_command(recipe, programs),
        _engine_command(recipe, programs),
        _profile_command(recipe, programs),
    )


def checkpoint_script(recipe: TrtLlmRecipe) -> Path:
    """Return the script that makes the checkpoint, below the TensorRT-LLM repository."""
    if recipe.checkpoint.is_calibrated:
        return QUANTIZE_SCRIPT
    return CONVERT_SCRIPTS[recipe.checkpoint.family]


def _checkpoint_command(recipe: TrtLlmRecipe, programs: Programs) -> tuple[str, ...]:
    """Return the command that converts or quantises the model into a TensorRT-LLM checkpoint."""
    checkpoint = recipe.checkpoint
    options: dict[str, object] = {
        "model_dir": programs.model_dir,
        "output_dir": CHECKPOINT_DIR,
        "dtype": checkpoint.dtype,
        "tp_size": checkpoint.tp_size,
        "pp_size": checkpoint.pp_size,
    }
    switches: tuple[str, ...] = ()
    match checkpoint.quantization:
        case "fp8" | "int4_awq":
            options |= {
                "qformat": checkpoint.quantization,
                "calib_dataset": programs.calibration_dir or checkpoint.calibration.dataset,
                "calib_size": checkpoint.calibration.num_samples,
                "calib_max_seq_length": checkpoint.calibration.max_seq_len,
            }
            if checkpoint.kv_cache_dtype is not None:
                options["kv_cache_dtype"] = checkpoint.kv_cache_dtype
        case "int8_weight_only" | "int4_weight_only":
            switches = ("--use_weight_only",)
            options["weight_only_precision"] = checkpoint.quantization.removesuffix("_weight_only")
    script = programs.tensorrt_llm_dir / checkpoint_script(recipe)
    return (programs.python, str(script), *_flags(options), *switches)


def _engine_command(recipe: TrtLlmRecipe, programs: Programs) -> tuple[str, ...]:
    """Return the command that compiles the checkpoint into one engine per rank."""
    options: dict[str, object] = {
        "checkpoint_dir": CHECKPOINT_DIR,
        "output_dir": ENGINE_DIR,
        "max_beam_width": 1,
        **recipe.limits.model_dump(exclude_none=True),
        **recipe.plugins.model_dump(),
        # Over a paged cache it goes with an FP8 cache alone; trtllm-build changes it otherwise.
        "use_fp8_context_fmha": "enable" if recipe.checkpoint.kv_cache_dtype else "disable",
        "workers": recipe.checkpoint.tp_size,
    }
    return (programs.trtllm_build, *_flags(options))


def _profile_command(recipe: TrtLlmRecipe, programs: Programs) -> tuple[str, ...]:
    """Return the command that measures the engine."""
    settings = recipe.profile.model_dump_json(exclude_defaults=True)
    module = "build_scripts.trtllm.profile_step"
    command = (programs.python, "-m", module, ENGINE_DIR, PROFILE_DIR, "--settings", settings)
    num_ranks = recipe.checkpoint.tp_size
    return command if num_ranks == 1 else tuple(mpirun_command(command, num_ranks))


def _flags(options: dict[str, object]) -> tuple[str, ...]:
    return tuple(word for name, value in options.items() for word in (f"--{name}", str(value)))
