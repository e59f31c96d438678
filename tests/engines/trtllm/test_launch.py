from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from engines.trtllm.launch import ALONE, RankPlace, end_rank, launched_place, mpirun_command
from orchestrator.core.errors import EngineError

SOCKET = Path("run/ranks.sock")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, ALONE),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ALONE),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, RankPlace(0, 4, SOCKET)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, RankPlace(3, 4, SOCKET)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, RankPlace(1, 2, SOCKET)),
    ],
)
def test_a_process_is_where_its_launcher_has_put_it(
    environ: Mapping[str, str], place: RankPlace
) -> None:
    assert launched_place(environ, SOCKET) == place


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "0", "PMI_SIZE": "two"},
    ],
)
def test_variables_that_no_launcher_sets_are_refused(environ: Mapping[str, str]) -> None:
    with pytest.raises(EngineError, match="both must be numbers, as mpirun sets them"):
        launched_place(environ, SOCKET)


def test_a_rank_that_fails_ends_without_the_exit_at_which_others_would_be_awaited() -> None:
    script = (
        "import atexit, threading, pathlib\n"
        "from engines.trtllm.launch import RankPlace, end_rank\n"
        "atexit.register(threading.Event().wait)\n"
        "print('last words')\n"
        "end_rank(3, RankPlace(1, 2, pathlib.Path('ranks.sock')))\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )

    assert (result.returncode, result.stdout) == (3, "last words\n")


@pytest.mark.parametrize(("status", "place"), [(0, RankPlace(1, 2, SOCKET)), (1, ALONE)])
def test_other_processes_end_as_always(status: int, place: RankPlace) -> None:
    assert end_rank(status, place) == status


def test_mpirun_starts_the_command_once_per_rank_wherever_the_kernel_likes() -> None:
    assert mpirun_command(["python", "-m", "x"], 4) == [
        "mpirun", "-n", "4", "--bind-to", "none", "python", "-m", "x",
    ]  # fmt: skip
