"""Whether an engine directory has to be built, and may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engines.manifest import MANIFEST_FILE, read_manifest
from orchestrator.core.errors import EngineDirectoryError


def reason_to_build(target: Path, build_hash: str) -> str | None:
    """Return why the directory has to be built; None if it is up to date."""
    if not target.exists():
        return "it does not exist"
    try:
        manifest = read_manifest(target)
    except EngineDirectoryError as error:
        return f"damaged: {error}"
    return None if manifest.build_hash == build_hash else "its recipe or source has changed"


def check_replaceable(target: Path, is_built_file: Callable[[str], bool]) -> None:
    """Raise EngineDirectoryError if something is there that a build did not write.

    `is_built_file` says of a file name whether a build writes such files, beside the manifest.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise EngineDirectoryError(f"{target} is a file; choose another output directory")
    names = sorted(path.name for path in target.iterdir())
    foreign = [name for name in names if name != MANIFEST_FILE and not is_built_file(name)]
    if foreign:
        raise EngineDirectoryError(
            f"{target} holds {foreign[0]}, which no build wrote; remove it or choose another "
            "output directory"
        )
