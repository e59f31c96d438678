from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_dirs import smollm2_engine_dir
from tests.integration.deployments import Deployment, running, write_deployment


@pytest.fixture(scope="session")
def engine_dir() -> Path:
    """The real small model, built if need be."""
    return smollm2_engine_dir()


@pytest.fixture(scope="session")
def deployment(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One node behind a router, shared by tests that leave it as they found it.

    In float32, whose answers are the same on every machine.
    """
    directory = tmp_path_factory.mktemp("deployment")
    path = write_deployment(directory, engine_dir, engine={"dtype": "float32"})
    with running(path) as value:
        yield value
