"""Entry point of the executor process; the node's HTTP process starts it."""

from __future__ import annotations

import signal
import sys

from orchestrator.command_line.compose import load_engine
from orchestrator.command_line.logs import configure_logging
from orchestrator.command_line.processes import die_with_parent
from orchestrator.config import NodeConfig
from orchestrator.executor_process import run_executor


def main() -> int:
    """Run `CONFIG_JSON ADDRESS`: a NodeConfig, and the socket of the HTTP process."""
    # Even if the engine hangs: the node that takes the place of ours needs its device memory.
    die_with_parent(signal.SIGKILL)
    config = NodeConfig.model_validate_json(sys.argv[1])
    configure_logging(component=f"{config.endpoint_id} executor")
    return run_executor(sys.argv[2], lambda: load_engine(config))


if __name__ == "__main__":
    sys.exit(main())
