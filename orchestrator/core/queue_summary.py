"""What a scheduler holds at one moment, small enough to be sent to routers many times a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np

from orchestrator.core.kv_cache import KVCacheManager
from orchestrator.core.latency import BatchLatencyModel, Floats, LatencyProfile
from orchestrator.core.ports import QueueSummary, SchedulerLoad
from orchestrator.core.request import Request
from orchestrator.core.request_table import RequestTable
from orchestrator.core.slo import DeadlineAnchor

MAX_ENTRIES = 64
"""Entries of a summary's queue; about 2 kB of JSON. More requests share entries."""


class _Queue(TypedDict):
    """The columns about prefills of a `QueueSummary`."""

    due_in_s: tuple[float | None, ...]
    weight: tuple[float, ...]
    work_s: tuple[float, ...]
    num_prefills: tuple[int, ...]


def scheduler_load(table: RequestTable, kv: KVCacheManager, *, num_last: int) -> SchedulerLoad:
    """Return what a scheduler's table and cache hold, and so many requests that are in the table
    no more, as they get their last token from the step that runs."""
    is_prefill = table.num_output_tokens == 0
    num_holders = int(np.count_nonzero(table.num_blocks))
    return SchedulerLoad(
        num_waiting=len(table) - num_holders,
        num_running=num_holders + num_last,
        num_decoding=len(table) - int(np.count_nonzero(is_prefill)) + num_last,
        num_queued_prompt_tokens=int(table.num_uncomputed_tokens[is_prefill].sum()),
        num_free_device_blocks=kv.num_free_device_blocks,
        num_device_blocks=kv.num_device_blocks,
        kv_blocks=kv.counts(),
    )


def summarise(
    table: RequestTable, model: BatchLatencyModel, now_s: float, *, latency_budget_s: float
) -> QueueSummary:
    """Return the summary of a table; `latency_budget_s` is the last step's, may be infinite."""
    num_uncomputed = table.num_uncomputed_tokens - table.num_restorable_tokens
    is_prefill = (table.num_output_tokens == 0) | (num_uncomputed > 1)
    is_decode = ~is_prefill
    queue = _grouped(
        due_in_s=table.deadline_s()[is_prefill] - now_s,
        weight=table.weight[is_prefill],
        work_s=table.work_s(model)[is_prefill],
        num_prefills=np.ones(int(is_prefill.sum())),
    )
    return QueueSummary(
        **queue,
        decode_context_tokens=int(table.num_computed_tokens[is_decode].sum()),
        decode_weight=float(table.weight[is_decode].sum()),
        min_decode_tpot_s=_finite(float(table.tpot_s[is_decode].min(initial=math.inf))),
        max_weight=float(table.weight.max(initial=0.0)),
        latency_budget_s=_finite(latency_budget_s),
        latency_profile=model.corrected_profile(),
    )


def with_received(
    load: SchedulerLoad,
    queue: QueueSummary,
    received: Sequence[Request],
    now_s: float,
) -> tuple[SchedulerLoad, QueueSummary]:
    """Return what a scheduler held at `now_s` and what it has yet to take in, as one."""
    if not received:
        return load, queue
    new = [request for request in received if not request.is_decoding]
    waiting = [math.inf if due is None else due for due in queue.due_in_s]
    due_in_s, weight, work_s = _uncomputed(received, queue.latency_profile, now_s)
    grouped = _grouped(
        due_in_s=np.array([*waiting, *due_in_s]),
        weight=np.array([*queue.weight, *weight]),
        work_s=np.array([*queue.work_s, *work_s]),
        num_prefills=np.array([*queue.num_prefills, *(1.0 for _ in received)]),
    )
    return (
        replace(
            load,
            num_waiting=load.num_waiting + len(received),
            num_decoding=load.num_decoding + len(received) - len(new),
            num_queued_prompt_tokens=load.num_queued_prompt_tokens
            + sum(request.num_uncomputed_tokens for request in new),
        ),
        replace(queue, **grouped, max_weight=max(queue.max_weight, *weight)),
    )


def summarise_unplanned(
    prefills: Sequence[Request],
    decodes: Sequence[Request],
    profile: LatencyProfile,
    now_s: float,
) -> QueueSummary:
    """Return the summary of an engine that schedules by itself, which is priced by its profile as
    it was measured, and which has no budget of latency."""
    due_in_s, weight, work_s = _uncomputed(prefills, profile, now_s)
    queue = _grouped(
        due_in_s=np.array(due_in_s),
        weight=np.array(weight),
        work_s=np.array(work_s),
        num_prefills=np.ones(len(prefills)),
    )
    min_tpot_s = min((request.spec.slo.tpot_s for request in decodes), default=math.inf)
    return QueueSummary(
        **queue,
        decode_context_tokens=sum(request.num_tokens for request in decodes),
        decode_weight=sum(request.spec.weight for request in decodes),
        min_decode_tpot_s=_finite(min_tpot_s),
        max_weight=max((r.spec.weight for r in (*prefills, *decodes)), default=0.0),
        latency_budget_s=None,
        latency_profile=profile,
    )


def _uncomputed(
    requests: Sequence[Request], profile: LatencyProfile, now_s: float
) -> tuple[list[float], list[float], list[float]]:
    """Return when the next token of each is due, its gain, and the work before it; nothing of
    them has been computed here."""
    anchor = DeadlineAnchor.FIXED
    return (
        [request.next_token_deadline_s(anchor) - now_s for request in requests],
        [request.spec.weight for request in requests],
        [profile.prefill_s(request.num_uncomputed_tokens, 0) for request in requests],
    )


def _grouped(*, due_in_s: Floats, weight: Floats, work_s: Floats, num_prefills: Floats) -> _Queue:
    """Return prefills in the order of their deadlines in at most MAX_ENTRIES entries.

    Where they are more, all overdue ones share the first entry, because they have nothing left to
    gain, and the others are dealt out evenly.
    """
    order = np.argsort(due_in_s, kind="stable")
    due_in_s = due_in_s[order]
    num_rows = len(order)
    starts = np.arange(num_rows)
    if num_rows > MAX_ENTRIES:
        num_overdue = int(np.searchsorted(due_in_s, 0.0, side="right"))
        num_entries = min(num_rows - num_overdue, MAX_ENTRIES - 1)
        starts = np.linspace(num_overdue, num_rows, num_entries, endpoint=False).astype(np.int64)
        if num_overdue:
            starts = np.concatenate(([0], starts))

    def sums(column: Floats) -> list[float]:
        if num_rows == 0:
            return []
        values: list[float] = np.add.reduceat(column[order], starts).tolist()
        return values

    return _Queue(
        due_in_s=tuple(_finite(due) for due in due_in_s[starts].tolist()),
        weight=tuple(sums(weight)),
        work_s=tuple(sums(work_s)),
        num_prefills=tuple(int(count) for count in sums(num_prefills)),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
