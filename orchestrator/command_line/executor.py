"""Entry point of the executor process; the node's HTTP process starts it.

For an engine that is split over several GPUs it becomes mpirun, which starts this entry point once
for each of them: rank 0 is the executor, the others follow it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from engines.trtllm.follower import run_follower
from engines.trtllm.launch import ALONE, end_rank, launched_place, mpirun_command
from orchestrator.command_line import processes
from orchestrator.command_line.compose import load_engine, load_follower, num_ranks
from orchestrator.command_line.logs import configure_logging
from orchestrator.config import NodeConfig
from orchestrator.core.errors import EngineError
from orchestrator.executor_process import run_executor

logger = logging.getLogger(__name__)


def main() -> int:
    """Run `CONFIG_JSON ADDRESS`: a NodeConfig, and the socket of the HTTP process."""
    # Even if the engine hangs: the node that takes the place of ours needs its device memory.
    processes.die_with_parent(signal.SIGKILL)
    config, address = NodeConfig.model_validate_json(sys.argv[1]), sys.argv[2]
    configure_logging(component=f"{config.endpoint_id} executor")
    meeting_point = Path(address.removeprefix("ipc://")).with_name("ranks.sock")
    try:
        place = launched_place(os.environ, meeting_point)
    except EngineError as error:
        logger.error("executor not started: %s", error)
        return 1
    ranks = num_ranks(config)
    # Without mpirun, loading says that it is missing.
    if ranks > 1 and place == ALONE and shutil.which("mpirun"):
        processes.become(
            mpirun_command([sys.executable, "-m", __spec__.name, *sys.argv[1:]], ranks)
        )
    if place.rank > 0:
        configure_logging(component=f"{config.endpoint_id} rank {place.rank}")
        return end_rank(run_follower(place, lambda: load_follower(config, place)), place)
    return end_rank(run_executor(address, lambda: load_engine(config, place)), place)


if __name__ == "__main__":
    sys.exit(main())
