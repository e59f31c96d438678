"""One rank of an engine in a process of its own, as an MPI launcher would start it.

    python -m tests.engines.trtllm.rank_process ENGINE_DIR MEETING_POINT RANK NUM_RANKS

Rank 0 says "ready" and waits until its standard input ends; the others follow it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engines.engine_options import EngineOptions
from engines.trtllm.engine import TrtLlmEngine, load_rank
from engines.trtllm.follower import run_follower
from engines.trtllm.launch import RankPlace
from tests.trtllm.stand_in_path import stand_in_environment

OPTIONS = EngineOptions(
    device="cpu",
    num_device_blocks=128,
    num_host_blocks=64,
    max_num_batched_tokens=256,
    max_num_seqs=16,
    max_model_len=256,
)


def start_rank(engine_dir: Path, place: RankPlace) -> subprocess.Popen[bytes]:
    """Start one rank."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.engines.trtllm.rank_process",
            str(engine_dir),
            str(place.meeting_point),
            str(place.rank),
            str(place.num_ranks),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=stand_in_environment(),
    )


def main() -> int:
    engine_dir, meeting_point = Path(sys.argv[1]), Path(sys.argv[2])
    place = RankPlace(int(sys.argv[3]), int(sys.argv[4]), meeting_point)
    if place.rank > 0:
        return run_follower(place, lambda: load_rank(engine_dir, OPTIONS, place))
    engine = TrtLlmEngine(engine_dir, OPTIONS, place)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
