"""Processes on one core, and what all processes of one command have cost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@contextmanager
def running(
    command: Sequence[str], *, core: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a command and all that it starts on one core; yield its process id."""
    with log.open("wb") as output:
        # taskset, not a function in the child: forking a process with an event loop is unsafe.
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def cpu_s(pid: int) -> float:
    """Return the processor time that a process and its living descendants have used."""
    found = dict(_all_processes())
    total_s = 0.0
    for each, (_, used_s) in found.items():
        ancestor = each
        while ancestor in found and ancestor != pid:
            ancestor = found[ancestor][0]
        if ancestor == pid:
            total_s += used_s
    return total_s


def _all_processes() -> Iterator[tuple[int, tuple[int, float]]]:
    """Yield each process with its parent and its processor time."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        # The command's name, in parentheses, may hold anything.
        fields = stat.rpartition(")")[2].split()
        yield int(entry.name), (int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)
