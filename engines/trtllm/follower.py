"""The life of every rank but the first: it does what rank 0 says, and ends when that does."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engines.block_copies import CopyBlocks, copy_blocks
from engines.trtllm.launch import RankPlace
from engines.trtllm.rank_lines import LeaderLine
from engines.trtllm.rank_messages import (
    RankFailed,
    RankLoaded,
    RankReady,
    RankReport,
    RankStep,
    TakePool,
)
from engines.trtllm.rank_worker import LoadedRank, RankWorker
from orchestrator.core.errors import EngineError

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5.0
"""So long a rank that has failed waits for rank 0 to say so. Rank 0 cannot if it waits for this
rank inside the engine."""


def run_follower(
    place: RankPlace,
    load: Callable[[], LoadedRank],
    *,
    copy_blocks: CopyBlocks = copy_blocks,
) -> int:
    """Follow rank 0 until it ends; return an exit status. Why this rank ends before that is told
    to rank 0 and logged.

    `copy_blocks` is for tests that delay or break copies.
    """
    try:
        line = LeaderLine(place)
    except EngineError as error:
        logger.error("rank stopped: %s", error)
        return 1
    try:
        loaded = load()
        line.send(RankLoaded(loaded.count_device_blocks()))
        match line.receive():
            case TakePool(num_device_blocks):
                worker = loaded.take_pool(num_device_blocks, copy_blocks=copy_blocks)
                line.send(RankReady())
                _do_steps(worker, line)
                worker.close()
    # RuntimeError and ValueError: TensorRT or PyTorch failed in a step.
    except (EngineError, RuntimeError, ValueError) as error:
        logger.error("rank stopped: %s", error)
        line.send(RankFailed(str(error)))
        # The launcher ends rank 0 when it sees this process end.
        line.wait_for_end(LAST_WORDS_S)
        return 1
    finally:
        line.close()
    return 0


def _do_steps(worker: RankWorker, line: LeaderLine) -> None:
    with worker.on_stream():
        while isinstance(step := line.receive(), RankStep):
            worker.copies.start(step.transfers)
            if step.waits_for_transfers:
                worker.copies.hold_compute()
            if step.arrays is not None:
                worker.enqueue(step.arrays.widened())
            elif step.waits_for_one:
                worker.copies.wait_for_one()
            worker.wait()
            line.send(RankReport(worker.copies.finish_step()))
