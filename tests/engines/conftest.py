from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_dirs import smollm2_engine_dir
from tests.engines.contract_engines import EngineMaker


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return smollm2_engine_dir()


@pytest.fixture(params=["simulated", "torch"])
def make_engine(request: pytest.FixtureRequest) -> Iterator[EngineMaker]:
    """Makes engines of each kind in turn."""
    maker = EngineMaker(request.param)
    yield maker
    maker.close_all()


@pytest.fixture(params=["torch"])
def make_model_engine(request: pytest.FixtureRequest) -> Iterator[EngineMaker]:
    """Makes engines of each kind that computes tokens from a model in turn."""
    maker = EngineMaker(request.param)
    yield maker
    maker.close_all()
