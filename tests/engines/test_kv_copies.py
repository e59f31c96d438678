"""Copies between the pools on the CPU, whose lanes are threads."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from engines.block_copies import BlockPieces, CopyBlocks, copy_blocks
from engines.kv_copies import CopyReport, KVCopies, layer_groups
from engines.kv_pool import KVLayout, KVPool
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import CopyFigures
from tests.engines.copies import BrokenCopies, HeldCopies, offload, onboard

LAYOUT = KVLayout(num_layers=5, num_kv_heads=2, block_size_tokens=4, head_dim=3)
BLOCK_BYTES = 5 * 2 * 2 * 4 * 3 * 4


def make_pool() -> KVPool:
    """Eight blocks on either side; every number of the device tells its block and place."""
    pool = KVPool(LAYOUT, 8, num_host_blocks=8, dtype=torch.float32, device=torch.device("cpu"))
    pool.blocks.copy_(torch.arange(pool.blocks.numel()).view_as(pool.blocks))
    pool.host_blocks.fill_(-1)
    return pool


def make_copies(
    pool: KVPool | None = None, copy: CopyBlocks = copy_blocks, *, num_layer_groups: int = 2
) -> KVCopies:
    return KVCopies(pool or make_pool(), num_layer_groups=num_layer_groups, copy_blocks=copy)


def finish_all(copies: KVCopies) -> CopyReport:
    """Wait for all copies of the step, then report."""
    copies.hold_compute()
    return copies.finish_step()


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "sizes"),
    [
        (32, 1, [32]),
        (5, 5, [1, 1, 1, 1, 1]),
        (32, 4, [4, 6, 9, 13]),
        (32, 8, [1, 1, 2, 3, 4, 5, 6, 10]),
        (3, 2, [1, 2]),
    ],
)
def test_layer_groups_grow(num_layers: int, num_groups: int, sizes: list[int]) -> None:
    """32 layers in 4: 32 / (1 + 1.5 + 1.5^2 + 1.5^3) is 3.9. In 8, that would be less than one
    layer; they grow by 1.39."""
    groups = layer_groups(num_layers, num_groups)

    assert [group.stop - group.start for group in groups] == sizes
    assert [group.start for group in groups[1:]] == [group.stop for group in groups[:-1]]


def test_layers_are_never_left_out() -> None:
    for num_layers in range(1, 81):
        for num_groups in range(1, num_layers + 1):
            groups = layer_groups(num_layers, num_groups)

            assert (groups[0].start, groups[-1].stop) == (0, num_layers)
            assert len(groups) == num_groups
            assert all(group.stop > group.start for group in groups)


@pytest.mark.parametrize("num_layer_groups", [1, 2, 5])
def test_blocks_come_back_as_they_went(num_layer_groups: int) -> None:
    """Blocks 1, 2 lie side by side on both sides, 5 and 3 do not; block 0 is not touched."""
    pool = make_pool()
    before = pool.blocks.clone()
    copies = make_copies(pool, num_layer_groups=num_layer_groups)

    copies.start([offload(1, [1, 2, 5, 3], [4, 5, 0, 7])])
    assert finish_all(copies).completed == (1,)
    pool.blocks.zero_()
    copies.start([onboard(2, [6, 7, 1, 2], [4, 5, 0, 7])])
    assert copies.finish_step().completed == (2,)

    assert torch.equal(pool.blocks[[6, 7, 1, 2]], before[[1, 2, 5, 3]])
    assert pool.blocks[[0, 3, 4, 5]].count_nonzero() == 0
    assert torch.equal(pool.host_blocks[[4, 5, 0, 7]], before[[1, 2, 5, 3]])
    assert bool((pool.host_blocks[[1, 2, 3, 6]] == -1).all())


def test_a_layer_waits_for_its_own_group_alone() -> None:
    """Five layers in two groups, [0, 2) and [2, 5), of two transfers each."""
    pool = make_pool()
    held = HeldCopies(TransferDirection.ONBOARD)
    copies = make_copies(pool, held)

    copies.start([onboard(1, [0], [0]), onboard(2, [1], [1])])
    copies_of_first_group = 2
    held.let_go(copies_of_first_group)
    copies.before_layer(0)
    copies.before_layer(1)

    assert bool((pool.blocks[:2, :2] == -1).all())
    assert bool((pool.blocks[:2, 2:] >= 0).all())

    held.let_go(2)
    copies.before_layer(2)

    assert bool((pool.blocks[:2] == -1).all())
    assert copies.finish_step().completed == (1, 2)


def test_a_group_is_put_on_its_lane_when_the_computation_gets_to_the_one_before() -> None:
    """Else the host would be busy with all copies before the first layer is started."""
    begun: list[int] = []

    def noting(transfer: KVTransfer, pieces: BlockPieces) -> None:
        begun.append(pieces.layers.start)
        copy_blocks(transfer, pieces)

    copies = make_copies(copy=noting, num_layer_groups=5)

    copies.start([onboard(1, [0], [0])])
    copies.before_layer(0)
    assert set(begun) <= {0, 1}
    copies.before_layer(1)
    assert set(begun) <= {0, 1, 2}

    assert copies.finish_step().completed == (1,)
    assert begun == [0, 1, 2, 3, 4]


def test_an_onboard_does_not_wait_for_an_offload() -> None:
    held = HeldCopies(TransferDirection.OFFLOAD)
    copies = make_copies(copy=held)

    copies.start([offload(1, [0], [0]), onboard(2, [1], [1])])

    assert copies.finish_step().completed == (2,)
    held.let_go()
    copies.wait_for_one()
    assert copies.finish_step().completed == (1,)


def test_an_offload_is_reported_once_with_the_step_it_ended_before() -> None:
    held = HeldCopies(TransferDirection.OFFLOAD)
    copies = make_copies(copy=held)
    first, second = offload(1, [0], [0]), offload(2, [1, 2], [1, 2])

    copies.start([first, second])
    assert copies.finish_step().completed == ()
    assert list(copies.in_flight) == [first, second]

    held.let_go()
    copies.start([])
    copies.wait_for_one()
    assert copies.finish_step().completed == (1,)
    assert list(copies.in_flight) == [second]

    held.let_go()
    copies.start([])
    copies.wait_for_one()
    assert copies.finish_step().completed == (2,)
    assert copies.finish_step() == CopyReport((), {}, {}, CopyFigures())


def test_waiting_with_nothing_in_flight_returns_at_once() -> None:
    copies = make_copies()
    copies.start([])

    copies.wait_for_one()

    assert copies.finish_step() == CopyReport((), {}, {}, CopyFigures())


@pytest.mark.parametrize("make", [offload, onboard])
@pytest.mark.parametrize(
    ("error", "message"),
    [(RuntimeError("no luck"), "no luck"), (RuntimeError(), "RuntimeError")],
)
def test_a_failed_copy_is_reported_and_the_next_ones_go_on(
    make: type, error: RuntimeError, message: str
) -> None:
    copies = make_copies(copy=BrokenCopies(1, error=error))

    copies.start([make(1, [0, 1], [0, 1]), make(2, [2], [2])])
    report = finish_all(copies)

    assert report.failed == {1: message}
    assert report.completed == (2,)
    copies.start([make(3, [3], [3])])
    assert finish_all(copies).completed == (3,)


def test_broken_onboards_are_known_before_the_report() -> None:
    broken = onboard(1, [0], [0])
    copies = make_copies(copy=BrokenCopies(1))

    copies.start([broken, onboard(2, [1], [1])])

    assert copies.broken_onboards() == [broken]


def test_figures_count_what_ended_well() -> None:
    copies = make_copies(copy=BrokenCopies(3))

    copies.start([offload(1, [0, 1, 2], [0, 1, 2]), onboard(2, [4], [4]), onboard(3, [5], [5])])
    report = finish_all(copies)

    assert report.figures.offloaded_bytes == 3 * BLOCK_BYTES
    assert report.figures.onboarded_bytes == BLOCK_BYTES
    assert report.busy_s.keys() == {1, 2}
    assert report.figures.copy_s == pytest.approx(sum(report.busy_s.values()))


def test_a_step_that_waits_for_nothing_exposes_nothing() -> None:
    held = HeldCopies(TransferDirection.OFFLOAD)
    copies = make_copies(copy=held)
    copies.start([offload(1, [0], [0])])

    copies.before_layer(0)

    assert copies.finish_step().figures.exposed_s == 0
    held.let_go()


def test_a_step_given_up_is_told_of_by_the_next_report() -> None:
    """1 had begun and goes on to its end; 2 never began."""
    copies = make_copies()
    begun = onboard(1, [0], [0])

    copies.start([begun])
    copies.give_up_step([begun, onboard(2, [1], [1])], "the step failed")
    copies.start([])
    assert not copies.waits_by_layer
    copies.wait_for_one()
    report = copies.finish_step()

    assert report.completed == (1,)
    assert report.failed == {2: "the step failed"}
    assert copies.finish_step() == CopyReport((), {}, {}, CopyFigures())


def test_every_copy_of_many_is_reported_exactly_once() -> None:
    """Steps of random copies, every fifth of which fails, over a pool that is never checked."""
    generator = random.Random(0)
    broken = set(range(0, 300, 5))
    copies = make_copies(copy=BrokenCopies(*broken))
    reported: list[int] = []
    failed: set[int] = set()
    started = 0
    while started < 300 or copies.in_flight:
        count = min(generator.randint(0, 4), 300 - started)
        transfers = [
            generator.choice([offload, onboard])(started + i, [i, i + 4], [i, i + 4])
            for i in range(count)
        ]
        started += count
        copies.start(transfers)
        if generator.random() < 0.2:
            copies.give_up_step(transfers, "no reason")
            continue
        if not transfers:
            copies.wait_for_one()
        report = copies.finish_step()
        reported += [*report.completed, *report.failed]
        failed |= report.failed.keys()

    assert sorted(reported) == list(range(300))
    assert failed == broken


@pytest.mark.parametrize("direction", TransferDirection)
def test_closing_joins_the_threads_with_copies_in_flight(direction: TransferDirection) -> None:
    before = set(threading.enumerate())
    held = HeldCopies(direction)
    copies = make_copies(copy=held)
    make = offload if direction is TransferDirection.OFFLOAD else onboard
    copies.start([make(1, [0], [0]), make(2, [1], [1])])
    assert set(threading.enumerate()) > before

    closing = threading.Thread(target=copies.close)
    closing.start()
    held.let_go(4)
    closing.join()

    assert set(threading.enumerate()) == before


def test_a_pool_without_host_blocks_has_none() -> None:
    pool = KVPool(LAYOUT, 2, dtype=torch.float32, device=torch.device("cpu"))

    assert pool.host_blocks.shape == (0, 5, 2, 2, 4, 3)
