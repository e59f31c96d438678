"""Which process computes which part of an engine that is split over several GPUs.

The collective operations inside an engine find their peers through MPI: the plugin library takes
its rank from `MPI_COMM_WORLD` and sends NCCL's unique id over it. So all ranks of an engine must
be one MPI job, rank i computing `rank{i}.engine`, and nothing but an MPI launcher can make one.

Source: getUniqueId and getComm in cpp/tensorrt_llm/common/opUtils.cpp, IpcMemory in
tensorrt_llm/_ipc_utils.py.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.errors import EngineError

_RANK_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH and what descends from it
)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One process among those that run an engine together."""

    rank: int = 0
    """Rank 0 schedules and samples; the others follow it."""

    num_ranks: int = 1
    meeting_point: Path | None = None
    """Socket through which the others find rank 0; None for a single process."""


ALONE = RankPlace()
"""Of a process that runs an engine by itself."""


def launched_place(environ: Mapping[str, str], meeting_point: Path) -> RankPlace:
    """Return where the MPI launcher has put this process; without one it is alone.

    Raises:
        EngineError: the launcher's variables make no sense.
    """
    for rank_key, size_key in _RANK_VARIABLES:
        if rank_key not in environ:
            continue
        try:
            rank, num_ranks = int(environ[rank_key]), int(environ[size_key])
        except (KeyError, ValueError) as error:
            raise EngineError(
                f"{rank_key} is {environ[rank_key]!r} and {size_key} is {environ.get(size_key)!r};"
                " both must be numbers, as mpirun sets them"
            ) from error
        return RankPlace(rank, num_ranks, meeting_point if num_ranks > 1 else None)
    return ALONE


def end_rank(status: int, place: RankPlace) -> int:
    """Return the exit status of this process, or end it here and now if it is one of several and
    its status is bad.

    An ordinary end would go through `MPI_Finalize`, which waits for all ranks; those may be waiting
    for this one, inside a collective operation. The launcher ends them when it sees this one end.
    """
    if status != 0 and place.num_ranks > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def mpirun_command(command: Sequence[str], num_ranks: int) -> list[str]:
    """Return what starts `command` once for each rank, on this machine."""
    # Open MPI would bind each rank to one core, or to those of one socket; rank 0 has threads that
    # copy and a Python that schedules, and the kernel places them better.
    return ["mpirun", "-n", str(num_ranks), "--bind-to", "none", *command]
