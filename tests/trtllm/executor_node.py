"""A node's executor process as configured, with the fake executor in place of TensorRT-LLM.

python -m tests.trtllm.executor_node CONFIG_JSON ADDRESS
"""

from __future__ import annotations

import sys

from orchestrator.command_line.executor import main
from tests.scripted_engine import STEP_S
from tests.trtllm.fake_executor import implement_executor
from tests.trtllm.stub_modules import stub_modules

if __name__ == "__main__":
    with stub_modules(version="1.2.1+reference") as stubs:
        implement_executor(stubs, step_s=STEP_S)
        sys.exit(main())
