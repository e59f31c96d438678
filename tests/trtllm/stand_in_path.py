"""Puts the stand-ins for `tensorrt` and `tensorrt_llm` on a path, and takes them off again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STAND_INS = Path(__file__).parent / "stand_ins"

_PACKAGES = ("tensorrt", "tensorrt_llm")


def stand_in_environment() -> dict[str, str]:
    """Return the environment of a process that finds the stand-ins."""
    folders = [str(ROOT), str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


@contextmanager
def stand_ins_importable() -> Iterator[None]:
    """Let this process import the stand-ins until the end of the block; then forget them.

    Raises:
        RuntimeError: one of the packages is imported already.
    """
    if loaded := _loaded():
        raise RuntimeError(f"already imported: {', '.join(loaded)}")
    sys.path.insert(0, str(STAND_INS))
    try:
        yield
    finally:
        sys.path.remove(str(STAND_INS))
        for name in _loaded():
            del sys.modules[name]


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
