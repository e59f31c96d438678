"""Schedulers to compare with, behind the same protocol as SlideBatching."""

from __future__ import annotations

import math

from orchestrator.core.batch_scheduler import BatchScheduler, ScheduleOrder
from orchestrator.core.request import Request


class FcfsScheduler(BatchScheduler):
    """First come, first served, with chunked prefill up to the token cap of a step.

    Blind to deadlines and weights. When KV blocks run out the latest arrivals give theirs up.
    """

    def _order(self, now_s: float) -> ScheduleOrder:
        del now_s
        oldest_first = sorted(self._requests.values(), key=lambda r: (r.arrival_s, r.request_id))
        return ScheduleOrder(oldest_first, budget_s=math.inf)

    def _may_preempt(self, candidate: Request, victim: Request, now_s: float) -> bool:
        return True
