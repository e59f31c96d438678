"""What a build finds of TensorRT-LLM on this machine: the package, its compiler, its scripts.

The package is looked at, never imported: that takes long, and joins an MPI world that the
commands of the build must then not join.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from build_scripts.trtllm.commands import checkpoint_script
from build_scripts.trtllm.recipe import TrtLlmRecipe
from engines.trtllm.engine_rules import SUPPORTED_VERSION, is_supported_version
from orchestrator.core.errors import BuildError, ConfigError

REPOSITORY_VARIABLE = "TENSORRT_LLM_DIR"
_DEFAULT_REPOSITORY = Path("TensorRT-LLM")
_VERSION_FILE = Path("tensorrt_llm/version.py")
_COMPILER = "trtllm-build"
_INSTALL = f"pip install tensorrt-llm=={SUPPORTED_VERSION}"


def check_installed() -> None:
    """Raise BuildError, in one line, unless the TensorRT-LLM that builds engines is installed."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise BuildError(
            "tensorrt_llm is not installed, which recipes of kind trtllm are built with: run "
            f"`{_INSTALL}` on a machine with an NVIDIA GPU; --dry-run works without it"
        )
    version = importlib.metadata.version("tensorrt_llm")
    if not is_supported_version(version):
        raise BuildError(
            f"tensorrt_llm {version} is installed, engines are built with {SUPPORTED_VERSION}, the "
            f"last stable release that has them and the one that serving runs; `{_INSTALL}`"
        )
    if shutil.which(compiler()) is None:
        raise BuildError(
            f"{_COMPILER} is neither beside {sys.executable} nor on PATH; it comes with the "
            f"package: `{_INSTALL}`"
        )


def compiler() -> str:
    """Return `trtllm-build` beside this Python or on PATH; its bare name if it is nowhere."""
    beside = str(Path(sys.executable).with_name(_COMPILER))
    return shutil.which(beside) or shutil.which(_COMPILER) or _COMPILER


def check_launcher(recipe: TrtLlmRecipe) -> None:
    """Raise BuildError if the engine has several ranks and nothing here can start them."""
    num_ranks = recipe.checkpoint.tp_size
    if num_ranks > 1 and shutil.which("mpirun") is None:
        raise BuildError(
            f"mpirun is not on PATH; an engine of {num_ranks} ranks (checkpoint.tp_size) is "
            "measured and served by as many processes that it starts; install Open MPI"
        )


def repository_dir(recipe: TrtLlmRecipe) -> Path:
    """Return where a checkout of the TensorRT-LLM repository lies, or would."""
    from_environment = os.environ.get(REPOSITORY_VARIABLE)
    return recipe.tensorrt_llm_dir or Path(from_environment or _DEFAULT_REPOSITORY)


def find_script(recipe: TrtLlmRecipe) -> Path:
    """Return the script that makes the checkpoint.

    Raises:
        ConfigError: there is no checkout, or it is one of another release.
    """
    folder = repository_dir(recipe)
    script = folder / checkpoint_script(recipe)
    way_out = (
        "the conversion scripts are not in the wheel: `git clone --depth 1 --branch "
        f"v{SUPPORTED_VERSION} https://github.com/NVIDIA/TensorRT-LLM`, and name that folder in "
        f"the recipe's tensorrt_llm_dir or in {REPOSITORY_VARIABLE}"
    )
    if not script.is_file():
        raise ConfigError(f"{script}: no such file; {way_out}")
    version_file = folder / _VERSION_FILE
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    version = re.search(r'^__version__ = "(.+)"', text, flags=re.MULTILINE)
    if version and not is_supported_version(version[1]):
        raise ConfigError(
            f"{folder}: is TensorRT-LLM {version[1]}, whose scripts write other checkpoints than "
            f"trtllm-build {SUPPORTED_VERSION} reads; {way_out}"
        )
    return script
