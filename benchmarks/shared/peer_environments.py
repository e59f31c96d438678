"""Other projects' programs, each in a virtual environment of its own under `build/peers`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = Path(__file__).resolve().parents[2] / "build/peers"


class NotInstallable(Exception):
    """A program cannot be had here; the message says why."""


def install(name: str, requirements: Sequence[str]) -> Path:
    """Return the folder of the commands of an environment with these requirements, which is made
    unless it is there already.

    Raises:
        NotInstallable: it cannot be made.
    """
    directory = PEERS / name
    stamp, wanted = directory / ".installed", "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return directory / "bin"
    pip = [str(directory / "bin/python"), "-m", "pip", "install", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(directory)],
        [*pip, "--disable-pip-version-check", *requirements],
    ):
        print(" ".join(command), file=sys.stderr)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            last = (result.stderr.strip() or "no message").splitlines()[-1]
            raise NotInstallable(f"{name}: {last}")
    stamp.write_text(wanted)
    return directory / "bin"
