"""Runs one command of a build, with its output in a file."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from orchestrator.core.errors import BuildError

TAIL_LINES = 12
"""Of a failed command's output, shown with the error."""

_TAIL_BYTES = 16_384
_GRACE_S = 10.0
"""A command that is stopped may take this long to end by itself."""


def run_command(name: str, command: Sequence[str], *, cwd: Path, log: Path) -> None:
    """Run a command in a folder to its end; what it prints goes into `log`, nowhere else.

    If this process is interrupted, the command and all it started are ended first. `name` is what
    errors call it.

    Raises:
        BuildError: it cannot be started, or fails. Shows the end of the log and where it is.
    """
    with log.open("wb") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        try:
            # A process group of its own: Ctrl-C reaches this process alone, which then ends the
            # whole group, whatever the command itself makes of the signal.
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            raise BuildError(f"{name}: {command[0]}: {error.strerror}") from error
        try:
            status = process.wait()
        finally:
            _end_group(process)
    if status != 0:
        raise BuildError(
            f"{name} {_ending(status)}; its output ends with\n{_tail(log)}\nall of it is in {log}"
        )


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the command, and what it started and left behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(status: int) -> str:
    if status >= 0:
        return f"failed with exit status {status}"
    name = signal.Signals(-status).name
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])
