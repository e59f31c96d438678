"""Messages survive the way over the wire."""

from __future__ import annotations

import math

import msgspec

from orchestrator.core.ports import QueueSummary
from orchestrator.wire import NodeSnapshot
from tests.factories import make_request, make_scheduler, run_step


def make_snapshot(queue: QueueSummary) -> NodeSnapshot:
    load = make_scheduler().load()
    return NodeSnapshot("node-0", "first", 7, 0.25, load, queue, is_draining=True)


def test_a_snapshot_says_the_same_after_its_way_as_json() -> None:
    """With a running request, prompts with and without a deadline, and an infinite budget."""
    scheduler = make_scheduler(make_request("a", ttft_s=0.1))
    _, now_s = run_step(scheduler, 0.0)
    scheduler.add_request(make_request("b", ttft_s=0.3, weight=1.5))
    scheduler.add_request(make_request("c", ttft_s=math.inf))
    snapshot = make_snapshot(scheduler.queue_summary(now_s))

    data = msgspec.json.encode(snapshot)

    assert msgspec.json.decode(data, type=NodeSnapshot) == snapshot
    assert snapshot.queue.due_in_s[1] is None


def test_a_snapshot_of_a_long_queue_stays_small() -> None:
    """10,000 prompts in fewer than 8 kB, at ten of which a second a router listens."""
    scheduler = make_scheduler(
        *(make_request(f"r{i}", ttft_s=1.0 + i / 7, weight=1 / 3) for i in range(10_000))
    )

    data = msgspec.json.encode(make_snapshot(scheduler.queue_summary(0.5)))

    assert len(data) < 8000
