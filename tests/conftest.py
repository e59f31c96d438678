"""Shared by all tests: what cannot run on this machine, or this engine, is skipped, visibly."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

FLEETS = "tests/integration/fleets/"
"""Tests of deployments with several nodes, each of which keeps this machine busy."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option with which the engine contract runs on an engine of TensorRT-LLM's own."""
    parser.addoption(
        "--trtllm-engine",
        type=Path,
        metavar="DIR",
        help="run the tests of the engine contract on this TensorRT-LLM engine directory",
    )


def pytest_configure() -> None:
    """Let programs that tests start hear Ctrl-C: those started by one that ignores it would not,
    as everything that a shell runs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # known where pytest-xdist is
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and all fleets to the same one: beside a second fleet, nodes
    would wait for a processor for longer than a test's patience."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class OneFleetAtATime(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return FLEETS if nodeid.startswith(FLEETS) else super()._split_scope(nodeid)

    return OneFleetAtATime(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes longest first, so that no process is left alone with it at the end.

    Skip tests marked `tiny_model` where another model's engine is tested, and tests marked `gpu`
    without a device; torch is imported only if there are any."""
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not item.nodeid.startswith(FLEETS), item.path not in long_files))
    if config.getoption("--trtllm-engine") is not None:
        for item in items:
            if item.get_closest_marker("tiny_model"):
                item.add_marker(pytest.mark.skip(reason="is about the tests' tiny model"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
