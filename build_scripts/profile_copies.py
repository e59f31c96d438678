"""Measures how long copies of KV blocks take and fits a `CopyProfile`.

Source: ProServe, block copy time (equation 15 of this project's specification).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from engines.kv_copies import KVCopies
from engines.kv_pool import KVLayout, KVPool
from orchestrator.core.errors import EngineError
from orchestrator.core.kv_transfer import CopyProfile, KVTransfer, TransferDirection

_MAX_S = 3.0
_NUM_REPEATS = 7
# 64 blocks of a 7B model, and of one with 135M parameters too.
_MAX_COPY_BYTES = 128 * 1024**2
_BLOCK_COUNTS = (1, 4, 16, 64, 256, 1024)
_MIN_COUNTS = 3
_NEGLIGIBLE_S = 1e-9

_OPPOSITE = {
    TransferDirection.OFFLOAD: TransferDirection.ONBOARD,
    TransferDirection.ONBOARD: TransferDirection.OFFLOAD,
}


@dataclass(frozen=True, slots=True)
class CopyCase:
    """What is copied in one measurement."""

    direction: TransferDirection
    is_contended: bool
    """While twice as many blocks go the other way, so that it is so to the end."""

    num_blocks: int


def measure_copy_profile(
    layout: KVLayout, dtype: torch.dtype, device: str, *, num_layer_groups: int, max_s: float
) -> CopyProfile:
    """Return how long copies of blocks of this shape take on an idle machine.

    Blocks are copied in `num_layer_groups` parts, or as many as there are layers. Takes up to
    `max_s`, 4 s at most, and, for as long, the memory of 192 blocks of a 7B model on either side.

    Raises:
        EngineError: the measurements do not behave like copies, or the memory is not there.
    """
    counts = _block_counts(layout.block_bytes(dtype))
    num_blocks = 3 * max(counts)  # a contended copy and the one against it
    pool = KVPool(
        layout,
        num_blocks,
        num_host_blocks=num_blocks,
        dtype=dtype,
        device=torch.device(device),
    )
    copies = KVCopies(pool, num_layer_groups=min(num_layer_groups, layout.num_layers))
    try:
        stopwatch = _Stopwatch(copies, num_blocks)
        return fit_copy_profile(_measure(stopwatch, counts, min(max_s, _MAX_S)))
    finally:
        copies.close()
        pool.close()


def fit_copy_profile(durations_s: Mapping[CopyCase, float]) -> CopyProfile:
    """Return the non-negative constants that minimise the squared relative error.

    Raises:
        EngineError: copies seem to cost nothing.
    """
    kinds = list(itertools.product(TransferDirection, (False, True)))
    rows = np.zeros((len(durations_s), len(kinds) + 1))
    for row, case in zip(rows, durations_s, strict=True):
        row[kinds.index((case.direction, case.is_contended))] = case.num_blocks
        row[-1] = 1
    measured_s = np.array(list(durations_s.values()))
    solution, _ = nnls(rows / measured_s[:, None], np.ones(len(measured_s)))
    solution[solution < _NEGLIGIBLE_S] = 0.0  # dust of the solver is no cost
    block_s = dict(zip(kinds, solution.tolist(), strict=False))
    try:
        return CopyProfile(
            onboard_block_s=block_s[TransferDirection.ONBOARD, False],
            offload_block_s=block_s[TransferDirection.OFFLOAD, False],
            contended_onboard_block_s=block_s[TransferDirection.ONBOARD, True],
            contended_offload_block_s=block_s[TransferDirection.OFFLOAD, True],
            start_s=float(solution[-1]),
        )
    except ValueError as error:
        raise EngineError(f"the fit over {len(measured_s)} copies failed: {error}") from error


def describe_copies(profile: CopyProfile, layout: KVLayout, dtype: torch.dtype) -> str:
    """Return one line for a person."""
    block_bytes = layout.block_bytes(dtype)

    def rate(block_s: float) -> str:
        return f"{block_bytes / block_s / 1e9:.1f} GB/s" if block_s else "no time"

    return (
        f"Copy profile: onboard {rate(profile.onboard_block_s)} "
        f"({rate(profile.contended_onboard_block_s)} beside an offload), "
        f"offload {rate(profile.offload_block_s)} "
        f"({rate(profile.contended_offload_block_s)} beside an onboard), "
        f"{profile.start_s * 1000:.2f} ms to start, blocks of {block_bytes:,} bytes"
    )


def _block_counts(block_bytes: int) -> tuple[int, ...]:
    fitting = [count for count in _BLOCK_COUNTS if count * block_bytes <= _MAX_COPY_BYTES]
    return (*fitting, *_BLOCK_COUNTS[len(fitting) : _MIN_COUNTS])


def _measure(stopwatch: _Stopwatch, counts: Sequence[int], max_s: float) -> dict[CopyCase, float]:
    """Return a duration for each case: the shortest of copies that are alone, since disturbances
    only add time; the median of contended ones, which may be disturbed too little."""
    cases = [
        CopyCase(direction, is_contended, count)
        for count in counts
        for direction in TransferDirection
        for is_contended in (False, True)
    ]
    for case in cases[-4:]:  # first copies are slower: memory is touched
        stopwatch.copy_s(case)
    seconds: dict[CopyCase, list[float]] = defaultdict(list)
    started_s = time.perf_counter()
    for repeat in range(_NUM_REPEATS):
        for case in cases:
            if repeat > 0 and time.perf_counter() - started_s > max_s:
                break
            seconds[case].append(stopwatch.copy_s(case))
    return {
        case: statistics.median(values) if case.is_contended else min(values)
        for case, values in seconds.items()
    }


class _Stopwatch:
    """Runs copies of blocks that lie scattered, as after hours of serving."""

    def __init__(self, copies: KVCopies, num_blocks: int) -> None:
        self._copies = copies
        generator = np.random.default_rng(0)
        self._device_blocks = generator.permutation(num_blocks).tolist()
        self._host_blocks = generator.permutation(num_blocks).tolist()
        self._transfer_ids: Iterator[int] = itertools.count()

    def copy_s(self, case: CopyCase) -> float:
        """Return how long the case took: until the host knew of its end, or, of a contended
        one, while it was copied."""
        count = case.num_blocks
        measured = self._transfer(case.direction, slice(0, count))
        transfers = [measured]
        if case.is_contended:
            transfers.append(self._transfer(_OPPOSITE[case.direction], slice(count, 3 * count)))
        busy_s: dict[int, float] = {}
        started_s = time.perf_counter()
        # The one against it first, so that it has begun.
        self._copies.start(reversed(transfers))
        while self._copies.in_flight:
            self._copies.wait_for_one()
            report = self._copies.finish_step()
            if report.failed:
                raise EngineError(f"a copy failed: {', '.join(report.failed.values())}")
            busy_s |= report.busy_s
        if case.is_contended:
            return busy_s[measured.transfer_id]
        return time.perf_counter() - started_s

    def _transfer(self, direction: TransferDirection, blocks: slice) -> KVTransfer:
        return KVTransfer(
            next(self._transfer_ids),
            "profile",
            direction,
            tuple(self._device_blocks[blocks]),
            tuple(self._host_blocks[blocks]),
        )
