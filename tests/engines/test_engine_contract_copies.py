"""What `core.ports.Engine` promises of KV transfers, on every engine: which are reported, that they
change no token, and which are refused."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence

import pytest

from orchestrator.core.errors import EngineStepError
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import CopyFigures, ScheduledRequest
from tests.engines.contract_engines import BLOCK_BYTES, EngineMaker
from tests.engines.copies import BrokenCopies, HeldCopies, offload, onboard, slow_copies
from tests.engines.step_driver import (
    StepDriver,
    make_plan,
    random_requests,
    reload_together,
    tokens_alone,
)
from tests.engines.tiny_llama import BLOCK_SIZE_TOKENS
from tests.factories import make_request

# Prompts are a few blocks of 4 tokens long. `test_live_engine.py` moves blocks of other sizes.
pytestmark = pytest.mark.tiny_model


def overwritten(driver: StepDriver, name: str, *, by: str) -> None:
    """Preempt a request whose blocks are on the host; another computes over what it had."""
    driver.run_until_ended(driver.offload(name))
    driver.preempt(name)
    driver.step({by: 256})


# --- every engine ---------------------------------------------------------------------------


def test_each_copy_is_reported_once(make_engine: EngineMaker) -> None:
    """Offloads are left to run beside later steps; onboards end with the step that starts them."""
    driver = StepDriver(make_engine(num_host_blocks=200), *random_requests(20, 30, 40))
    reports: Counter[int] = Counter()
    driver.step({"20": 20, "30": 30, "40": 40})
    offloads = [driver.offload(name) for name in ("20", "30", "40")]
    for transfer in offloads:
        reports.update(driver.step({"20": 1}, transfers=[transfer]).completed_transfers)
    while reports.keys() != {1, 2, 3}:
        reports.update(driver.step({}).completed_transfers)
    driver.preempt("30")
    driver.preempt("40")
    onboards = [driver.onboard("30"), driver.onboard("40")]

    output = driver.step({"30": 20}, transfers=onboards)

    reports.update(output.completed_transfers)
    for _ in range(3):
        reports.update(driver.step({}).completed_transfers)
    assert reports == Counter([1, 2, 3, 4, 5])
    assert set(output.completed_transfers) == {4, 5}


def test_a_step_without_computation_waits_for_a_copy(make_engine: EngineMaker) -> None:
    driver = StepDriver(make_engine(num_host_blocks=16), *random_requests(30))
    driver.step({"30": 30})

    output = driver.step({}, transfers=[driver.offload("30")])

    assert output.completed_transfers == (1,)


def test_copies_are_counted(make_engine: EngineMaker) -> None:
    """Two blocks each way."""
    engine = make_engine(num_host_blocks=5)

    out = engine.step(make_plan(transfers=[offload(1, [0, 1], [0, 1])])).copies
    back = engine.step(make_plan(transfers=[onboard(2, [2, 3], [0, 1])])).copies

    assert (out.offloaded_bytes, out.onboarded_bytes) == (2 * BLOCK_BYTES, 0)
    assert (back.offloaded_bytes, back.onboarded_bytes) == (0, 2 * BLOCK_BYTES)
    assert engine.step(make_plan()).copies == CopyFigures()


# --- engines that compute tokens ------------------------------------------------------------


@pytest.mark.parametrize("waits_for_transfers", [False, True])
def test_onboarded_blocks_can_be_read_by_the_step_that_brings_them(
    make_model_engine: EngineMaker, *, waits_for_transfers: bool
) -> None:
    """Their copies are late."""
    engine = make_model_engine(num_device_blocks=70, num_host_blocks=40, copy_blocks=slow_copies)

    output, tokens = reload_together(engine, waits_for_transfers=waits_for_transfers)

    assert output.new_token_ids.keys() == {"17", "24", "35"}
    assert tokens == tokens_alone(make_model_engine(), 17, 24, 35, 150)


def test_what_is_not_onboarded_is_computed_again(make_model_engine: EngineMaker) -> None:
    """Of 10 blocks on the host 6 come back; the rest of the prompt is computed in chunks of 7,
    beside another request's decodes."""
    engine = make_model_engine(num_device_blocks=30, num_host_blocks=10, copy_blocks=slow_copies)
    driver = StepDriver(engine, *random_requests(40, 50))
    driver.step({"40": 40})
    overwritten(driver, "40", by="50")

    driver.step({"50": 1, "40": 7}, transfers=[driver.onboard("40", num_blocks=6)])

    assert driver.run(chunk_tokens=7) == tokens_alone(make_model_engine(), 40, 50)


def test_a_request_goes_on_while_its_blocks_are_offloaded(make_model_engine: EngineMaker) -> None:
    """Decodes write behind the full blocks, so that the copy is of what they held."""
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = make_model_engine(num_device_blocks=30, num_host_blocks=8, copy_blocks=held)
    driver = StepDriver(engine, *random_requests(21, 64))
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

    assert driver.run(chunk_tokens=256) == tokens_alone(make_model_engine(), 21, 64)


def test_random_moves_between_steps_do_not_change_tokens(make_model_engine: EngineMaker) -> None:
    lengths = (9, 16, 25, 33, 47)
    engine = make_model_engine(num_device_blocks=80, num_host_blocks=400)
    driver = StepDriver(engine, *random_requests(*lengths))
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
            driver.run_until_ended(driver.offload(moved))
            on_host.add(moved)
        chosen = {*generator.sample(names, generator.randint(1, len(names))), moved}
        driver.step({name: generator.choice([1, 3, 20]) for name in chosen}, transfers=transfers)

    assert driver.outputs() == tokens_alone(make_model_engine(), *lengths)


def test_a_request_whose_onboard_failed_gets_no_token_and_can_be_computed_again(
    make_model_engine: EngineMaker,
) -> None:
    """Transfer 2 is the onboard of `20`; `9`, beside it, is not disturbed."""
    engine = make_model_engine(num_host_blocks=5, copy_blocks=BrokenCopies(2))
    driver = StepDriver(engine, *random_requests(9, 20))
    driver.step({"9": 9, "20": 20})
    driver.run_until_ended(driver.offload("20"))
    driver.preempt("20")

    output = driver.step({"9": 1, "20": 8}, transfers=[driver.onboard("20")])

    assert output.failed_transfers == {2: "the link is down"}
    assert output.new_token_ids.keys() == {"9"}
    assert output.failed == {}
    driver.preempt("20")
    assert driver.run(chunk_tokens=256) == tokens_alone(make_model_engine(), 9, 20)


def test_a_request_that_shares_a_block_whose_onboard_failed_gets_no_token(
    make_model_engine: EngineMaker,
) -> None:
    engine = make_model_engine(num_host_blocks=1, copy_blocks=BrokenCopies(1))
    part = ScheduledRequest(make_request("other"), 4, 6, (3, 5, 7))

    output = engine.step(make_plan(part, transfers=[onboard(1, [3], [0])]))

    assert output.new_token_ids == {}
    assert output.failed == {}
    assert output.failed_transfers.keys() == {1}


def test_a_failed_offload_harms_nobody(make_model_engine: EngineMaker) -> None:
    engine = make_model_engine(num_host_blocks=5, copy_blocks=BrokenCopies(1))
    driver = StepDriver(engine, *random_requests(20))
    driver.step({"20": 20})

    output = driver.step({}, transfers=[driver.offload("20")])

    assert output.failed_transfers == {1: "the link is down"}
    assert driver.run(chunk_tokens=256) == tokens_alone(make_model_engine(), 20)


def test_a_step_that_failed_is_told_of_by_the_next_one(make_model_engine: EngineMaker) -> None:
    """The plan is refused before anything is started, so that both copies have failed."""
    engine = make_model_engine(num_host_blocks=5)
    transfers = [offload(1, [0], [0]), onboard(2, [1], [9])]

    with pytest.raises(EngineStepError, match="transfer 2 of request r names host block 9 of 5"):
        engine.step(make_plan(transfers=transfers))
    output = engine.step(make_plan())

    assert output.failed_transfers.keys() == {1, 2}
    assert "names host block 9" in output.failed_transfers[1]
    assert engine.step(make_plan()).failed_transfers == {}


def test_closing_with_copies_in_flight_leaves_no_thread(make_model_engine: EngineMaker) -> None:
    before = set(threading.enumerate())
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = make_model_engine(num_host_blocks=5, copy_blocks=held)
    part = ScheduledRequest(make_request(), 0, 10, (0, 1, 2))
    engine.step(make_plan(part, transfers=[offload(1, [3, 4], [0, 1]), offload(2, [5], [2])]))

    closing = threading.Thread(target=make_model_engine.close, args=(engine,))
    closing.start()
    held.let_go(2)
    closing.join()

    assert set(threading.enumerate()) == before


def test_an_engine_without_transfers_starts_no_thread(make_model_engine: EngineMaker) -> None:
    before = set(threading.enumerate())
    engine = make_model_engine(num_host_blocks=4)

    engine.step(make_plan(ScheduledRequest(make_request(), 0, 10, (0, 1, 2))))

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
    make_model_engine: EngineMaker, transfers: Sequence[KVTransfer], message: str
) -> None:
    """The request writes tokens [4, 10), so to the second and third of its blocks."""
    engine = make_model_engine(num_device_blocks=16, num_host_blocks=8)
    part = ScheduledRequest(make_request("a"), 4, 6, (11, 12, 13, 14))

    with pytest.raises(EngineStepError, match=message) as caught:
        engine.step(make_plan(part, transfers=transfers))

    assert caught.value.request_ids == ("a",)


def test_transfers_without_host_blocks_are_refused(make_model_engine: EngineMaker) -> None:
    with pytest.raises(EngineStepError, match="1 KV transfers; this engine has no host blocks"):
        make_model_engine().step(make_plan(transfers=[offload(1, [0], [0])]))


def test_blocks_that_are_only_read_can_be_offloaded_meanwhile(
    make_model_engine: EngineMaker,
) -> None:
    engine = make_model_engine(num_device_blocks=16, num_host_blocks=8)
    part = ScheduledRequest(make_request("a"), 4, 6, (11, 12, 13, 14))

    output = engine.step(make_plan(part, transfers=[offload(1, [11, 14], [0, 1])]))

    assert output.new_token_ids.keys() == {"a"}


def test_a_block_is_protected_until_its_offload_is_reported(
    make_model_engine: EngineMaker,
) -> None:
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = make_model_engine(num_device_blocks=16, num_host_blocks=8, copy_blocks=held)
    part = ScheduledRequest(make_request("a"), 4, 6, (11, 12, 13))
    reader = ScheduledRequest(make_request("b"), 0, 10, (0, 1, 2))
    engine.step(make_plan(reader, transfers=[offload(1, [12], [0])]))

    with pytest.raises(EngineStepError, match="writes to device block 12 while"):
        engine.step(make_plan(part))
    held.let_go()
    assert engine.step(make_plan()).completed_transfers == (1,)

    assert engine.step(make_plan(part)).new_token_ids.keys() == {"a"}
