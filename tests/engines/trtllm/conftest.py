from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trtllm.stand_in_path import stand_ins_importable


@pytest.fixture
def stand_ins() -> Iterator[None]:
    """TensorRT-LLM's stand-ins can be imported, inside functions, during this test alone."""
    with stand_ins_importable():
        yield
