"""What the ranks of one engine say to each other, all of them threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engines.block_copies import CopyBlocks, copy_blocks
from engines.trtllm import rank_lines
from engines.trtllm.engine import TrtLlmEngine, load_rank
from engines.trtllm.follower import run_follower
from engines.trtllm.launch import RankPlace
from engines.trtllm.rank_lines import LeaderLine
from engines.trtllm.rank_worker import RankWorker
from orchestrator.core.errors import EngineError, EngineLost, EngineStepError
from orchestrator.core.kv_transfer import TransferDirection
from orchestrator.core.ports import ScheduledRequest
from tests.engines.copies import BrokenCopies, HeldCopies, offload, slow_copies
from tests.engines.step_driver import StepDriver, make_plan, random_requests
from tests.engines.trtllm.fake_engines import make_options, sign, write_engine
from tests.factories import make_request
from tests.trtllm.engine_spec import engine_bytes
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.reference_engine import fake_spec

pytestmark = pytest.mark.usefixtures("stand_ins")

NUM_TOKENS = 9
OPTIONS = make_options(num_host_blocks=64)
SPEC = fake_spec(tp_size=2, vocab_size=511)
"""512 columns of logits, of which the last one is padding and the likeliest token."""

BLOCK_BYTES = 3 * 2 * 2 * 4 * 8 * 4
"""Of one rank: 3 layers, K and V, 2 heads, 4 tokens, 8 numbers of 4 bytes."""


class Group:
    """Rank 0 as an engine, and rank 1 in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._engine: TrtLlmEngine | None = None
        self._thread = threading.Thread()
        self._status: int | None = None

    def start(
        self,
        engine_dir: Path,
        *,
        copy_blocks: CopyBlocks = copy_blocks,
        num_device_blocks: int = 128,
    ) -> TrtLlmEngine:
        """Return the engine; rank 1 copies with `copy_blocks`, and has room for so many blocks."""
        places = [RankPlace(rank, 2, self._directory / "ranks.sock") for rank in range(2)]
        options = replace(OPTIONS, num_device_blocks=num_device_blocks)

        def follow() -> None:
            self._status = run_follower(
                places[1],
                lambda: load_rank(engine_dir, options, places[1]),
                copy_blocks=copy_blocks,
            )

        self._thread = threading.Thread(target=follow, daemon=True)
        self._thread.start()
        self._engine = TrtLlmEngine(engine_dir, OPTIONS, places[0])
        return self._engine

    def end(self) -> int | None:
        """Close rank 0, unless that was done, and return how rank 1 ended."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._thread.ident is not None:
            self._thread.join()
        return self._status


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path)
    yield group
    group.end()


def expected_tokens(driver: StepDriver) -> dict[str, list[int]]:
    return {
        name: FakeModel(SPEC).tokens(request.spec.prompt_token_ids, NUM_TOKENS)
        for name, request in driver.requests.items()
    }


@pytest.mark.parametrize("waits_for_transfers", [False, True])
def test_tokens_are_those_of_one_rank_whatever_is_moved(
    tmp_path: Path, group: Group, *, waits_for_transfers: bool
) -> None:
    """18 tokens are 4 full blocks. Rank 1's engine checks every step, and its copies are late."""
    engine = group.start(write_engine(tmp_path, SPEC), copy_blocks=slow_copies)
    driver = StepDriver(engine, *random_requests(5, 18, 33, max_tokens=NUM_TOKENS))
    driver.step(dict.fromkeys(driver.requests, 20))
    transfer = driver.offload("18")
    output = driver.step({"5": 1, "33": 7}, transfers=[transfer])
    offloaded_bytes = output.copies.offloaded_bytes
    while transfer.transfer_id not in output.completed_transfers:
        output = driver.step({})
        offloaded_bytes += output.copies.offloaded_bytes
    driver.preempt("18")
    onboard = driver.onboard("18")

    output = driver.step(
        {"18": 9, "5": 1}, transfers=[onboard], waits_for_transfers=waits_for_transfers
    )

    assert output.completed_transfers == (onboard.transfer_id,)
    assert offloaded_bytes == output.copies.onboarded_bytes == 2 * 4 * BLOCK_BYTES
    assert driver.run(chunk_tokens=6) == expected_tokens(driver)
    assert group.end() == 0


def test_an_offload_has_ended_when_every_rank_has_ended_it(tmp_path: Path, group: Group) -> None:
    held = HeldCopies(TransferDirection.OFFLOAD)
    engine = group.start(write_engine(tmp_path, SPEC), copy_blocks=held)
    driver = StepDriver(engine, *random_requests(5, 18))
    driver.step({"18": 18})
    transfer = driver.offload("18")
    seen = [driver.step({"5": 5}, transfers=[transfer])]
    # Rank 0 has ended its part by then, or does so while it waits.
    seen += [driver.step({"5": 1}) for _ in range(3)]

    held.let_go()
    while not seen[-1].completed_transfers:
        seen.append(driver.step({}))

    assert [output.completed_transfers for output in seen[:4]] == [()] * 4
    assert seen[-1].completed_transfers == (transfer.transfer_id,)
    assert len(seen) > 4


@pytest.mark.parametrize("direction", list(TransferDirection))
def test_a_copy_that_fails_on_one_rank_has_failed(
    tmp_path: Path, group: Group, direction: TransferDirection
) -> None:
    """Transfer 1 is the offload, 2 the onboard. Whoever reads a block that was not brought gets
    no token; the request beside it does."""
    broken_id = 1 if direction is TransferDirection.OFFLOAD else 2
    engine = group.start(write_engine(tmp_path, SPEC), copy_blocks=BrokenCopies(broken_id))
    driver = StepDriver(engine, *random_requests(5, 18))
    driver.step({"18": 18})
    output = driver.step({}, transfers=[driver.offload("18")])
    while not (output.completed_transfers or output.failed_transfers):
        output = driver.step({})
    if direction is TransferDirection.ONBOARD:
        driver.preempt("18")
        output = driver.step({"5": 5, "18": 9}, transfers=[driver.onboard("18")])

        assert output.new_token_ids.keys() == {"5"}
        assert output.failed == {}
    assert output.failed_transfers == {broken_id: "the link is down"}


def test_all_ranks_have_as_many_blocks_as_the_smallest_has_room_for(
    tmp_path: Path, group: Group
) -> None:
    engine = group.start(write_engine(tmp_path, SPEC), num_device_blocks=77)

    assert engine.capabilities.num_device_blocks == 77
    assert group.end() == 0


def test_a_rank_that_cannot_load_its_engine_says_why(tmp_path: Path, group: Group) -> None:
    engine_dir = write_engine(tmp_path, SPEC)
    (engine_dir / "rank1.engine").write_bytes(b"an engine for another GPU")
    sign(engine_dir)

    with pytest.raises(EngineLost, match=r"rank 1 .* failed: .*rank1\.engine: TensorRT cannot"):
        group.start(engine_dir)

    assert group.end() == 1


def test_a_rank_that_fails_in_a_step_takes_the_engine_with_it(tmp_path: Path, group: Group) -> None:
    """Rank 1's engine was built for 8 tokens a step."""
    engine_dir = write_engine(tmp_path, SPEC)
    small = replace(SPEC, max_num_tokens=8, rank=1)
    (engine_dir / "rank1.engine").write_bytes(engine_bytes(small))
    sign(engine_dir)
    engine = group.start(engine_dir)
    driver = StepDriver(engine, *random_requests(8, 9))
    driver.step({"8": 8})

    with pytest.raises(EngineLost, match=r"rank 1 of the engine failed: input_ids cannot have"):
        driver.step({"9": 9})

    assert group.end() == 1


def test_a_device_that_fails_while_the_others_wait_for_it_is_the_end_of_all(
    tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 says nothing, as if it waited for rank 0 inside the engine."""
    held = HeldCopies(TransferDirection.ONBOARD)
    engine = group.start(write_engine(tmp_path, SPEC), copy_blocks=held)
    driver = StepDriver(engine, *random_requests(5, 18))
    driver.step({"18": 18})
    output = driver.step({}, transfers=[driver.offload("18")])
    while not output.completed_transfers:
        output = driver.step({})
    driver.preempt("18")

    def fail(_: RankWorker) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(RankWorker, "check_device", fail)
    with pytest.raises(EngineLost, match="rank 0's device has failed: an illegal memory access"):
        driver.step({"5": 5}, transfers=[driver.onboard("18")])
    held.let_go()

    assert group.end() == 0


def test_a_step_that_rank_0_cannot_start_is_the_end_of_all(tmp_path: Path, group: Group) -> None:
    """Rank 0's engine was built for 8 tokens a step; rank 1 computes the step, and waits."""
    engine_dir = write_engine(tmp_path, SPEC)
    (engine_dir / "rank0.engine").write_bytes(engine_bytes(replace(SPEC, max_num_tokens=8)))
    sign(engine_dir)
    engine = group.start(engine_dir)
    driver = StepDriver(engine, *random_requests(9))

    with pytest.raises(EngineLost, match=r"input_ids cannot have .* the other ranks wait for"):
        driver.step({"9": 9})

    assert group.end() == 0


def test_a_plan_that_is_refused_reaches_no_other_rank(tmp_path: Path, group: Group) -> None:
    """Its transfer is reported with the next step."""
    engine = group.start(write_engine(tmp_path, SPEC))
    bad = ScheduledRequest(make_request("bad", num_prompt_tokens=10), 0, 10, [1])

    with pytest.raises(EngineStepError, match="10 tokens in 1 blocks, which hold 4"):
        engine.step(make_plan(bad, transfers=[offload(7, [3], [4])]))

    driver = StepDriver(engine, *random_requests(5, max_tokens=NUM_TOKENS))
    assert driver.step({"5": 5}).failed_transfers.keys() == {7}
    assert driver.run(chunk_tokens=9) == expected_tokens(driver)
    assert group.end() == 0


def test_a_rank_without_rank_0_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_lines, "MEETING_TIMEOUT_S", 0.0)
    place = RankPlace(1, 2, tmp_path / "nobody.sock")

    with pytest.raises(EngineError, match=r"rank 1 has found no rank 0 at .*nobody\.sock"):
        LeaderLine(place)
