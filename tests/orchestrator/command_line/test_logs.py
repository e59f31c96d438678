"""What a process writes to standard error when that is no terminal."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import logging, structlog
from orchestrator.command_line.logs import configure_logging
configure_logging(component="router")
structlog.get_logger("router").info("request", request_id="job-1", error=None)
logging.getLogger("uvicorn.error").warning("two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("router.app").exception("a bug")
"""


def test_every_line_of_the_log_is_one_json_object() -> None:
    """Ours, those of libraries, and what an exception says over several lines."""
    answer = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )

    ours, foreign, bug = map(json.loads, answer.stderr.splitlines())

    assert {k: v for k, v in ours.items() if k != "timestamp"} == {
        "event": "request",
        "request_id": "job-1",
        "error": None,
        "component": "router",
        "level": "info",
    }
    assert foreign["event"] == "two\nlines"
    assert "ZeroDivisionError" in bug["exception"]
