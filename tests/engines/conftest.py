from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_dirs import smollm2_engine_dir
from tests.engines.contract_engines import EngineMaker, engine_maker


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return smollm2_engine_dir()


@pytest.fixture(params=["simulated", "torch", "trtllm"])
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineMaker]:
    """Makes engines of each kind in turn."""
    with engine_maker(request.param, tmp_path) as maker:
        yield maker


@pytest.fixture(params=["torch", "trtllm"])
def make_model_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineMaker]:
    """Makes engines of each kind that computes tokens from a model in turn."""
    with engine_maker(request.param, tmp_path) as maker:
        yield maker
