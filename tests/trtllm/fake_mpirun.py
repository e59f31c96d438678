"""Stands in for Open MPI's `mpirun`, as far as its conduct matters to a node.

    python -m tests.trtllm.fake_mpirun -n NUM_RANKS --bind-to none COMMAND...

Starts COMMAND once for each rank, tells each its place by environment variables, hands SIGTERM on,
and ends the whole job when one rank ends badly.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def write_mpirun(directory: Path) -> Path:
    """Write an executable `mpirun` into a new folder, and return the folder."""
    directory.mkdir()
    script = directory / "mpirun"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {__name__} "$@"\n')
    script.chmod(0o755)
    return directory


def main() -> int:
    """Run the job; return the status of the first rank that ended badly, or 0."""
    match sys.argv[1:]:
        case ["-n", num_ranks, "--bind-to", "none", *command]:
            pass
        case other:
            raise SystemExit(f"mpirun: unknown arguments: {other}")
    place = {"OMPI_COMM_WORLD_SIZE": num_ranks}
    ranks = {}
    for rank in range(int(num_ranks)):
        environment = os.environ | place | {"OMPI_COMM_WORLD_RANK": str(rank)}
        process = subprocess.Popen(command, env=environment)
        ranks[process.pid] = process

    def end_all(*_: object) -> None:
        for process in ranks.values():
            process.kill()

    signal.signal(signal.SIGTERM, end_all)
    status = 0
    while ranks:
        pid, wait_status = os.wait()
        process = ranks.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(wait_status)
        if process.returncode != 0 and status == 0:
            status = abs(process.returncode)
            end_all()
    return status


if __name__ == "__main__":
    sys.exit(main())
