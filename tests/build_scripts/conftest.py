from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_dirs import smollm2_engine_dir


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return smollm2_engine_dir()
