"""What only an engine that TensorRT-LLM has built can show: `make trtllm-acceptance` runs this."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.contract_engines import EngineMaker, engine_maker
from tests.engines.step_driver import StepDriver, random_requests, tokens_alone

NUM_REQUESTS = 4
NUM_TOKENS = 12
"""Output tokens of each, as `tokens_alone` has them."""


@pytest.fixture
def make_live_engine(live_engine_dir: Path) -> Iterator[EngineMaker]:
    with engine_maker("live", live_engine_dir) as maker:
        yield maker


@pytest.mark.parametrize("waits_for_transfers", [False, True])
def test_blocks_that_were_on_the_host_are_read_as_they_were_written(
    make_live_engine: EngineMaker, *, waits_for_transfers: bool
) -> None:
    """Requests of two blocks and more leave the device, another one writes over what they had, and
    they come back in one step that goes on with them."""
    size = make_live_engine(num_device_blocks=1, max_model_len=1).capabilities.block_size_tokens
    lengths = [(2 + index) * size + 3 for index in range(NUM_REQUESTS)]
    names = [str(length) for length in lengths]
    num_blocks = sum(-(-(length + NUM_TOKENS) // size) for length in lengths)
    engine = make_live_engine(
        num_device_blocks=num_blocks,
        num_host_blocks=num_blocks,
        max_model_len=num_blocks * size,
    )
    intruder = (num_blocks - 1) * size
    requests = random_requests(*lengths, intruder, max_tokens=NUM_TOKENS)
    driver = StepDriver(engine, *requests)
    for _ in range(2):
        for name in names:
            driver.step({name: 256})
    for name in names:
        driver.run_until_ended(driver.offload(name))
        driver.preempt(name)
    for _ in range(-(-intruder // 256)):
        driver.step({str(intruder): 256})
    driver.preempt(str(intruder))

    driver.step(
        dict.fromkeys(names, 2 * size),
        transfers=[driver.onboard(name) for name in names],
        waits_for_transfers=waits_for_transfers,
    )
    while any(name in driver.unfinished() for name in names):
        driver.step({name: 16 for name in names if name in driver.unfinished()})

    found = {name: driver.outputs()[name] for name in names}
    make_live_engine.assert_same_tokens(found, tokens_alone(engine, *lengths))


def test_a_closed_engine_gives_its_memory_back(make_live_engine: EngineMaker) -> None:
    """Ten engines one after another, each with a pool of its own."""
    for _ in range(10):
        engine = make_live_engine()
        assert tokens_alone(engine, 9)["9"]
        make_live_engine.close(engine)
