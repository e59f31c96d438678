"""An engine whose ranks are processes of their own; what they say to each other is in
`test_rank_group.py`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.trtllm.engine import TrtLlmEngine
from engines.trtllm.launch import RankPlace
from orchestrator.core.errors import EngineLost
from tests.engines.step_driver import StepDriver, random_requests
from tests.engines.trtllm.fake_engines import write_engine
from tests.engines.trtllm.rank_process import OPTIONS, start_rank
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.reference_engine import fake_spec

pytestmark = pytest.mark.usefixtures("stand_ins")

NUM_TOKENS = 9
WAIT_S = 60.0
"""Upper bound of every wait; reached only if something hangs."""


class Ranks:
    """Processes of the ranks of one engine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, engine_dir: Path, num_ranks: int, *, first: int) -> RankPlace:
        """Start all ranks from `first` on; return the place of rank 0."""
        places = [
            RankPlace(rank, num_ranks, self._directory / "ranks.sock") for rank in range(num_ranks)
        ]
        self.processes += [start_rank(engine_dir, place) for place in places[first:]]
        return places[0]

    def statuses(self) -> list[int]:
        """Return how they ended, once they have."""
        return [process.wait(WAIT_S) for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path)
    yield ranks
    ranks.end()


def test_ranks_compute_together_until_one_is_killed(tmp_path: Path, ranks: Ranks) -> None:
    """Rank 1 ends by itself when rank 0 closes, rank 2 was killed."""
    spec = fake_spec(tp_size=3, vocab_size=511)
    engine_dir = write_engine(tmp_path, spec)
    engine = TrtLlmEngine(engine_dir, OPTIONS, ranks.start(engine_dir, 3, first=1))
    driver = StepDriver(engine, *random_requests(5, 18, 33, max_tokens=NUM_TOKENS))
    assert driver.run(chunk_tokens=6) == {
        name: FakeModel(spec).tokens(request.spec.prompt_token_ids, NUM_TOKENS)
        for name, request in driver.requests.items()
    }

    ranks.processes[1].kill()
    ranks.processes[1].wait(WAIT_S)
    later = StepDriver(engine, *random_requests(4))
    for _ in range(2):
        with pytest.raises(EngineLost, match="rank 2 of the engine has ended"):
            later.step({"4": 4})
    engine.close()

    assert ranks.statuses() == [0, -9]


def test_the_others_end_when_rank_0_is_killed(tmp_path: Path, ranks: Ranks) -> None:
    engine_dir = write_engine(tmp_path, fake_spec(tp_size=2))
    ranks.start(engine_dir, 2, first=0)
    rank_0 = ranks.processes[0]
    assert rank_0.stdout is not None
    assert rank_0.stdout.readline() == b"ready\n"

    rank_0.kill()

    assert ranks.statuses() == [-9, 0]
