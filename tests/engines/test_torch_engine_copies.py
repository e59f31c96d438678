"""Steps of the tiny model that move KV blocks: tokens, failures, and plans that are refused."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.core.errors import EngineError, EngineStepError
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import CopyFigures, ScheduledRequest
from orchestrator.core.request import Request
from tests.engines.copies import BrokenCopies, HeldCopies, offload, onboard, slow_copies
from tests.engines.step_driver import StepDriver, make_plan
from tests.engines.tiny_llama import BLOCK_SIZE_TOKENS, tiny_config, tiny_engine
from tests.factories import make_request

NUM_TOKENS = 12
CONFIG = tiny_config(num_hidden_layers=5)


def make_requests(*prompt_lengths: int) -> list[Request]:
    """Named by their prompt's length, with random prompts."""
    generator = random.Random(0)
    return [
        make_request(
            str(length),
            prompt_token_ids=[generator.randrange(97) for _ in range(length)],
            max_tokens=NUM_TOKENS,
        )
        for length in prompt_lengths
    ]


def undisturbed(*prompt_lengths: int) -> dict[str, list[int]]:
    """Return each request's tokens when nothing is ever moved."""
    driver = StepDriver(tiny_engine(CONFIG), *make_requests(*prompt_lengths))
    return driver.run(chunk_tokens=256)


def run_until_ended(driver: StepDriver, transfer: KVTransfer) -> None:
    """Step without computing until the copy is reported."""
    output = driver.step({}, transfers=[transfer])
    while transfer.transfer_id not in output.completed_transfers:
        output = driver.step({})


def overwritten(driver: StepDriver, name: str, *, by: str) -> None:
    """Preempt a request whose blocks are on the host; another computes over what it had."""
    run_until_ended(driver, driver.offload(name))
    driver.preempt(name)
    driver.step({by: 256})


@pytest.mark.parametrize("waits_for_transfers", [False, True])
@pytest.mark.parametrize("num_layer_groups", [1, 2, 4, 9])
def test_onboarded_blocks_can_be_read_by_the_step_that_brings_them(
    num_layer_groups: int, *, waits_for_transfers: bool
) -> None:
    """Three requests come back, their copies late and in groups, to a pool that another one has
    written all over in between. Three, because a token now and then comes out right by chance:
    without the wait in `KVCopies.before_layer`, or in `hold_compute`, this fails."""
    engine = tiny_engine(
        CONFIG, num_device_blocks=70, num_host_blocks=40, copy_blocks=slow_copies,
        num_layer_groups=num_layer_groups,
    )  # fmt: skip
    moved = ("17", "24", "35")
    driver = StepDriver(engine, *make_requests(17, 24, 35, 150))
    for _ in range(4):
        driver.step(dict.fromkeys(moved, 35))
    for name in moved:
        run_until_ended(driver, driver.offload(name))
        driver.preempt(name)
    driver.step({"150": 150})
    driver.preempt("150")

    output = driver.step(
        dict.fromkeys(moved, 4),
        transfers=[driver.onboard(name) for name in moved],
        waits_for_transfers=waits_for_transfers,
    )

    assert output.new_token_ids.keys() == set(moved)
    assert driver.run(chunk_tokens=256) == undisturbed(17, 24, 35, 150)
    engine.close()


def test_what_is_not_onboarded_is_computed_again() -> None:
    """Of 10 blocks on the host 6 come back; the rest of the prompt is computed in chunks of 7,
    beside another request's decodes."""
    engine = tiny_engine(CONFIG, num_device_blocks=30, num_host_blocks=10, copy_blocks=slow_copies)
    driver = StepDriver(engine, *make_requests(40, 50))
    driver.step({"40": 40})
    overwritten(driver, "40", by="50")

    driver.step({"50": 1, "40": 7}, transfers=[driver.onboard("40", num_blocks=6)])

    assert driver.run(chunk_tokens=7) == undisturbed(40, 50)
    engine.close()


def test_a_request_goes_on_while_its_blocks_are_offloaded() -> None:
    """Decodes write behind the full blocks, so that the copy is of what they held."""
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = tiny_engine(CONFIG, num_device_blocks=30, num_host_blocks=8, copy_blocks=held)
    driver = StepDriver(engine, *make_requests(21, 64))
    driver.step({"21": 21})

    output = driver.step({"21": 1}, transfers=[driver.offload("21")])
    assert output.completed_transfers == ()
    for _ in range(4):
        assert driver.step({"21": 1}).completed_transfers == ()
    held.let_go()
    assert driver.step({}).completed_transfers == (1,)
    driver.preempt("21")
    driver.step({"64": 64})
    driver.step({"21": 256}, transfers=[driver.onboard("21")])

    assert driver.run(chunk_tokens=256) == undisturbed(21, 64)
    engine.close()


def test_random_moves_between_steps_do_not_change_tokens() -> None:
    lengths = (9, 16, 25, 33, 47)
    engine = tiny_engine(CONFIG, num_device_blocks=80, num_host_blocks=400, num_layer_groups=3)
    driver = StepDriver(engine, *make_requests(*lengths))
    generator = random.Random(2)
    on_host: set[str] = set()
    while names := driver.unfinished():
        moved = generator.choice(names)
        transfers = []
        if moved in on_host:
            driver.preempt(moved)
            transfers = [driver.onboard(moved)]
            on_host.remove(moved)
        elif driver.requests[moved].num_computed_tokens >= BLOCK_SIZE_TOKENS:
            run_until_ended(driver, driver.offload(moved))
            on_host.add(moved)
        chosen = {*generator.sample(names, generator.randint(1, len(names))), moved}
        driver.step({name: generator.choice([1, 3, 20]) for name in chosen}, transfers=transfers)

    assert driver.outputs() == undisturbed(*lengths)
    engine.close()


def test_a_request_whose_onboard_failed_gets_no_token_and_can_be_computed_again() -> None:
    """Transfer 2 is the onboard of `20`; `9`, beside it, is not disturbed."""
    engine = tiny_engine(CONFIG, num_host_blocks=5, copy_blocks=BrokenCopies(2))
    driver = StepDriver(engine, *make_requests(9, 20))
    driver.step({"9": 9, "20": 20})
    run_until_ended(driver, driver.offload("20"))
    driver.preempt("20")

    output = driver.step({"9": 1, "20": 8}, transfers=[driver.onboard("20")])

    assert output.failed_transfers == {2: "the link is down"}
    assert output.new_token_ids.keys() == {"9"}
    assert output.failed == {}
    driver.preempt("20")
    assert driver.run(chunk_tokens=256) == undisturbed(9, 20)


def test_a_request_that_shares_a_block_whose_onboard_failed_gets_no_token() -> None:
    engine = tiny_engine(CONFIG, num_host_blocks=1, copy_blocks=BrokenCopies(1))
    part = ScheduledRequest(make_request("other"), 4, 6, (3, 5, 7))

    output = engine.step(make_plan(part, transfers=[onboard(1, [3], [0])]))

    assert output.new_token_ids == {}
    assert output.failed == {}
    assert output.failed_transfers.keys() == {1}


def test_a_failed_offload_harms_nobody() -> None:
    engine = tiny_engine(CONFIG, num_host_blocks=5, copy_blocks=BrokenCopies(1))
    driver = StepDriver(engine, *make_requests(20))
    driver.step({"20": 20})

    output = driver.step({}, transfers=[driver.offload("20")])

    assert output.failed_transfers == {1: "the link is down"}
    assert driver.run(chunk_tokens=256) == undisturbed(20)


def test_copies_are_counted() -> None:
    """Two blocks of 5 layers x 2 x 2 heads x 4 tokens x 8 numbers x 4 bytes, each way."""
    engine = tiny_engine(CONFIG, num_host_blocks=5)
    two_blocks_bytes = 2 * 5 * 2 * 2 * 4 * 8 * 4

    out = engine.step(make_plan(transfers=[offload(1, [0, 1], [0, 1])])).copies
    back = engine.step(make_plan(transfers=[onboard(2, [2, 3], [0, 1])])).copies

    assert (out.offloaded_bytes, out.onboarded_bytes) == (two_blocks_bytes, 0)
    assert (back.offloaded_bytes, back.onboarded_bytes) == (0, two_blocks_bytes)
    assert engine.step(make_plan()).copies == CopyFigures()


def test_a_step_that_failed_is_told_of_by_the_next_one() -> None:
    """The plan is refused before anything is started, so that both copies have failed."""
    engine = tiny_engine(CONFIG, num_host_blocks=5)
    transfers = [offload(1, [0], [0]), onboard(2, [1], [9])]

    with pytest.raises(EngineStepError, match="transfer 2 of request r names host block 9 of 5"):
        engine.step(make_plan(transfers=transfers))
    output = engine.step(make_plan())

    assert output.failed_transfers.keys() == {1, 2}
    assert "names host block 9" in output.failed_transfers[1]
    assert engine.step(make_plan()).failed_transfers == {}


def test_closing_with_copies_in_flight_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = tiny_engine(CONFIG, num_host_blocks=5, copy_blocks=held)
    part = ScheduledRequest(make_request(), 0, 10, (0, 1, 2))
    engine.step(make_plan(part, transfers=[offload(1, [3, 4], [0, 1]), offload(2, [5], [2])]))

    closing = threading.Thread(target=engine.close)
    closing.start()
    held.let_go(2)
    closing.join()

    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    ("transfers", "message"),
    [
        ([offload(1, [], [])], "transfer 1 of request r has 0 device blocks and 0 host blocks"),
        ([onboard(1, [0, 1], [0])], "has 2 device blocks and 1 host blocks"),
        ([onboard(1, [0, 16], [0, 1])], "names device block 16 of 16"),
        ([offload(1, [-1], [0])], "names device block -1 of 16"),
        ([offload(1, [0], [8])], "names host block 8 of 8"),
        ([onboard(1, [0], [-1])], "names host block -1 of 8"),
        ([offload(1, [0], [0]), offload(1, [1], [1])], "transfer id 1 is used 2 times"),
        ([offload(1, [0, 0], [0, 1])], "device block 0 is offloaded 2 times"),
        ([offload(1, [0], [1]), offload(2, [3], [1])], "host block 1 is offloaded to 2 times"),
        ([onboard(1, [5], [1]), onboard(2, [5], [2])], "device block 5 is onboarded to 2 times"),
        ([onboard(1, [5, 6], [1, 1])], "host block 1 is onboarded 2 times"),
        ([offload(1, [5], [0]), onboard(2, [5], [1])], "device block 5 is onboarded to while"),
        ([offload(1, [5], [0]), onboard(2, [6], [0])], "host block 0 is onboarded before its"),
        ([offload(1, [12], [0])], "request a writes to device block 12 while it is offloaded"),
    ],
)
def test_transfers_that_break_the_contract_are_refused(
    transfers: Sequence[KVTransfer], message: str
) -> None:
    """The request writes tokens [4, 10), so to the second and third of its blocks."""
    engine = tiny_engine(num_device_blocks=16, num_host_blocks=8)
    part = ScheduledRequest(make_request("a"), 4, 6, (11, 12, 13, 14))

    with pytest.raises(EngineStepError, match=message) as caught:
        engine.step(make_plan(part, transfers=transfers))

    assert caught.value.request_ids == ("a",)


def test_transfers_without_host_blocks_are_refused() -> None:
    with pytest.raises(EngineStepError, match="1 KV transfers; this engine has no host blocks"):
        tiny_engine().step(make_plan(transfers=[offload(1, [0], [0])]))


def test_blocks_that_are_only_read_can_be_offloaded_meanwhile() -> None:
    engine = tiny_engine(num_device_blocks=16, num_host_blocks=8)
    part = ScheduledRequest(make_request("a"), 4, 6, (11, 12, 13, 14))

    output = engine.step(make_plan(part, transfers=[offload(1, [11, 14], [0, 1])]))

    assert output.new_token_ids.keys() == {"a"}


def test_a_block_is_protected_until_its_offload_is_reported() -> None:
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = tiny_engine(num_device_blocks=16, num_host_blocks=8, copy_blocks=held)
    part = ScheduledRequest(make_request("a"), 4, 6, (11, 12, 13))
    reader = ScheduledRequest(make_request("b"), 0, 10, (0, 1, 2))
    engine.step(make_plan(reader, transfers=[offload(1, [12], [0])]))

    with pytest.raises(EngineStepError, match="writes to device block 12 while"):
        engine.step(make_plan(part))
    held.let_go()
    assert engine.step(make_plan()).completed_transfers == (1,)

    assert engine.step(make_plan(part)).new_token_ids.keys() == {"a"}


def test_layer_groups_are_at_most_the_layers() -> None:
    assert tiny_engine(num_layer_groups=9).capabilities.num_layer_groups == 2
    assert tiny_engine(CONFIG).capabilities.num_layer_groups == 4


def test_capabilities_tell_the_host_blocks() -> None:
    assert tiny_engine(num_host_blocks=7).capabilities.num_host_blocks == 7
    assert tiny_engine().capabilities.num_host_blocks == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_host_blocks": -1}, "num_host_blocks is -1, it must be at least 0"),
        ({"num_layer_groups": 0}, "num_layer_groups is 0, it must be at least 1"),
        ({"device_memory_fraction": 0.0}, "device_memory_fraction is 0.0, it must be above 0"),
        ({"device_memory_fraction": 1.5}, "device_memory_fraction is 1.5, .* at most 1"),
        ({"num_device_blocks": None}, "num_device_blocks is not set; on the CPU it must be"),
        (
            {"num_host_blocks": 10**12},
            r"take [\d,]+ of main memory, [\d,]+ are free .*lower device_kv",
        ),
        (
            {"num_device_blocks": 10**12},
            r"take [\d,]+ of main memory, [\d,]+ are free .*lower device_kv",
        ),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        tiny_engine(**changes)


def test_an_engine_without_transfers_starts_no_thread() -> None:
    before = set(threading.enumerate())
    engine = tiny_engine(num_host_blocks=4)

    engine.step(make_plan(ScheduledRequest(make_request(), 0, 10, (0, 1, 2))))

    assert set(threading.enumerate()) == before
