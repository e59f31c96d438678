"""The decoder of Triton kernels, against the plain one; without a GPU, in Triton's interpreter.

What needs a GPU, as CUDA graphs do, is in tests/gpu.
"""

from __future__ import annotations

import pytest

from orchestrator.core.ports import Engine
from tests.engines.step_driver import StepDriver, random_requests
from tests.engines.tiny_llama import tiny_config, tiny_engine
from tests.engines.triton_engine import TritonEngine

pytest.importorskip("triton")


def test_chunks_and_decodes_side_by_side_give_the_tokens_of_the_plain_decoder() -> None:
    """Pieces of 9 tokens, so that all but the first have cached tokens before them; the last piece
    of one token is a decode. In the end, three decodes are padded to four."""

    def make_driver(engine: Engine) -> StepDriver:
        return StepDriver(engine, *random_requests(1, 7, 19, max_tokens=3))

    outputs = make_driver(TritonEngine(tiny_config(), max_num_seqs=4)).run(chunk_tokens=9)

    assert outputs == make_driver(tiny_engine()).run(chunk_tokens=9)


def test_blocks_come_back_in_the_step_that_reads_them() -> None:
    """Layer by layer, for which decodes do without a graph too."""

    def outputs(engine: Engine) -> dict[str, list[int]]:
        driver = StepDriver(engine, *random_requests(9, 4, max_tokens=3))
        driver.step({"9": 9})
        driver.run_until_ended(driver.offload("9"))
        driver.preempt("9")
        driver.step({"4": 4})
        transfer = driver.onboard("9")
        driver.step({"9": 1, "4": 1}, transfers=[transfer])
        return driver.run(chunk_tokens=8)

    expected = outputs(tiny_engine(num_device_blocks=6, num_host_blocks=2))
    engine = TritonEngine(tiny_config(), num_device_blocks=6, num_host_blocks=2)

    assert outputs(engine) == expected
    engine.close()
