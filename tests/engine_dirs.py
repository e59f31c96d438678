"""Engine directories that tests run on; built once, then reused by every later run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from build_scripts.build_engine import build_engine

ROOT = Path(__file__).parent.parent
SMOLLM2_RECIPE = ROOT / "configs/engines/smollm2-135m.yaml"


@cache
def smollm2_engine_dir() -> Path:
    """Return the real model's engine directory, where `make engine` puts it."""
    return build_engine(SMOLLM2_RECIPE, ROOT / "built_engines/smollm2-135m")
