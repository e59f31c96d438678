"""A directory that appears complete or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the right to make `target`; a second process waits here until the first is done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its place if the block succeeds.

    If it fails, `target` stays as it was. The caller holds `exclusive(target)`, so what a
    killed process left behind may be removed.
    """
    staging = target.with_name(f".{target.name}.building")
    replaced = target.with_name(f".{target.name}.replaced")
    for left_behind in (staging, replaced):
        shutil.rmtree(left_behind, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
