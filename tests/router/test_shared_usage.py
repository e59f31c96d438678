"""What several workers count together, in virtual time; each has its own sight of one file."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.errors import ConfigError
from router.errors import TooManyRequests
from router.rate_limits import ClientLimiter, Demand, Limits, Rate
from router.shared_usage import SharedUsage
from router.waiting_room import WaitingRoom

NUM_WORKERS = 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "usage"
    SharedUsage.create(found, num_workers=NUM_WORKERS)
    return found


@pytest.fixture
def stores(path: Path) -> list[SharedUsage]:
    return [SharedUsage(path, num_workers=NUM_WORKERS, worker=w) for w in range(NUM_WORKERS)]


def limiters(stores: list[SharedUsage], limits: Limits, name: str = "acme") -> list[ClientLimiter]:
    return [ClientLimiter(name, limits, store) for store in stores]


def remaining(limiter: ClientLimiter, what: str, now_s: float = 0.0) -> int:
    return int(dict(limiter.headers(now_s))[f"x-ratelimit-remaining-{what}"])


@pytest.mark.parametrize(("per_s", "burst"), [(7.3, 10), (100.0, 250)])
def test_requests_pass_at_the_rate_within_one_per_cent_over_all_workers(
    stores: list[SharedUsage], per_s: float, burst: int
) -> None:
    """In the time of 1,000 at the rate, `burst + 1000` pass; more come, to any worker."""
    draw = random.Random(burst)
    workers = limiters(stores, Limits(requests=Rate(per_s, burst)))
    start_s = now_s = 1e6
    num_passed = 0
    while now_s <= start_s + 1000 / per_s:
        try:
            draw.choice(workers).take_request(now_s)
            num_passed += 1
        except TooManyRequests:
            pass
        now_s += draw.expovariate(per_s * 20)

    assert num_passed == pytest.approx(burst + 1000, rel=0.01)


def test_tokens_are_used_at_the_rate_within_one_per_cent_over_all_workers(
    stores: list[SharedUsage],
) -> None:
    """Requests of 5 + 20 tokens use 5 + 10, and end one worker later than they came. In the time
    of 10,000 tokens `burst + 10000` are used."""
    workers = limiters(stores, Limits(tokens=Rate(10.0, 1000)))
    now_s, num_used, number = 0.0, 0, 0
    running = workers[0].reserve(Demand(5, 20, num_sequences=1), now_s)
    while now_s <= 10_000 / 10.0:
        number += 1
        try:
            following = workers[number % NUM_WORKERS].reserve(Demand(5, 20, num_sequences=1), now_s)
        except TooManyRequests as refusal:
            now_s += refusal.retry_after_s
            continue
        running.close(num_used_tokens=15)
        num_used += 15
        running = following

    assert num_used == pytest.approx(1000 + 10_000, rel=0.01)


def test_answers_at_the_same_time_are_bounded_over_all_workers(stores: list[SharedUsage]) -> None:
    first, second, third = limiters(stores, Limits(max_concurrent_sequences=3))
    running = first.reserve(Demand(1, 1, num_sequences=2), 0.0)
    second.reserve(Demand(1, 1, num_sequences=1), 0.0)
    with pytest.raises(TooManyRequests, match="3 made at a time and 3 are"):
        third.reserve(Demand(1, 1, num_sequences=1), 0.0)

    running.close(num_used_tokens=2)

    third.reserve(Demand(1, 1, num_sequences=2), 0.0)


def test_clients_are_counted_apart_in_whatever_order_workers_meet_them(
    stores: list[SharedUsage],
) -> None:
    limits = Limits(requests=Rate(1.0, 5))
    names = ["acme", "other", "third"]
    orders = [names, names[::-1], names]
    by_worker = [
        {name: ClientLimiter(name, limits, store) for name in order}
        for store, order in zip(stores, orders, strict=True)
    ]
    by_worker[0]["acme"].take_request(0.0)
    by_worker[1]["acme"].take_request(0.0)
    by_worker[2]["other"].take_request(0.0)

    assert [
        [remaining(limiters_of[name], "requests") for name in names] for limiters_of in by_worker
    ] == [[3, 4, 5]] * NUM_WORKERS


def test_all_workers_fill_one_waiting_room(stores: list[SharedUsage]) -> None:
    """Of 4 places 2 are taken by acme in one worker; its share of the others, 0.5 * 2, is less."""
    first, second, third = (
        WaitingRoom(4, ["only"], reserved_fraction=0.0, client_share=0.5, store=store)
        for store in stores
    )
    places = first.enter("acme", 2)
    full = second.obstacle("only", "acme", 1)
    assert full is not None
    assert full.code == "client_share_full"
    second.enter("other", 2)
    queue = third.obstacle("only", "third", 1)
    assert queue is not None
    assert queue.code == "queue_full"
    assert third.num_waiting == 4

    places[0].leave()

    assert third.obstacle("only", "third", 1) is None


def test_what_a_dead_worker_held_comes_back_and_nothing_else(
    path: Path, stores: list[SharedUsage]
) -> None:
    """Of 100 tokens each worker has reserved 30; the second dies, 100 - 60 are left."""
    limits = Limits(Rate(1.0, 10), Rate(1.0, 100), max_concurrent_sequences=10)
    workers = limiters(stores, limits)
    rooms = [
        WaitingRoom(9, ["only"], reserved_fraction=0.0, client_share=1e9, store=store)
        for store in stores
    ]
    running = []
    for worker, room in zip(workers, rooms, strict=True):
        worker.take_request(0.0)
        running.append(worker.reserve(Demand(10, 20, num_sequences=2), 0.0))
        room.enter("acme", 2)

    stores[0].give_up(1)

    assert remaining(workers[2], "tokens") == 40
    assert remaining(workers[2], "requests") == 7
    assert rooms[2].num_waiting == 4
    assert stores[2].of_client("acme").num_waiting.total() == 4
    assert stores[2].of_client("acme").num_sequences.total() == 4
    running[0].close(num_used_tokens=30)
    running[2].close(num_used_tokens=30)
    assert remaining(workers[2], "tokens") == 40
    successor = ClientLimiter("acme", limits, SharedUsage(path, num_workers=NUM_WORKERS, worker=1))
    assert remaining(successor, "tokens") == 40


def test_while_workers_have_different_limits_what_is_taken_stays_the_same(
    stores: list[SharedUsage],
) -> None:
    """The clients file changes; one worker has seen it, another has not yet. 8 are taken in
    all, of 10 or 20, and 4 of them come back in a second under the new limits."""
    first, second, _ = limiters(stores, Limits(requests=Rate(1.0, 10)))
    for _ in range(6):
        first.take_request(0.0)
    first.set_limits(Limits(requests=Rate(4.0, 20)), 0.0)
    first.take_request(0.0)
    second.take_request(0.0)

    assert remaining(first, "requests") == 12
    assert remaining(second, "requests") == 2
    second.set_limits(Limits(requests=Rate(4.0, 20)), 0.0)
    assert remaining(second, "requests", now_s=1.0) == 16


TAKE = """
import sys
from pathlib import Path
from router.errors import TooManyRequests
from router.rate_limits import ClientLimiter, Limits, Rate
from router.shared_usage import SharedUsage
store = SharedUsage(Path(sys.argv[1]), num_workers=3, worker=int(sys.argv[2]))
limiter = ClientLimiter("acme", Limits(requests=Rate(1.0, 20_000)), store)
num_passed = 0
print("ready", flush=True)
sys.stdin.readline()
try:
    while True:
        limiter.take_request(0.0)
        num_passed += 1
except TooManyRequests:
    print(num_passed)
"""


def test_no_two_processes_take_the_same_one(path: Path) -> None:
    """All see the same moment, in which 20,000 may pass."""
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", TAKE, str(path), str(worker)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for worker in range(NUM_WORKERS)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        outputs = [worker.communicate()[0] for worker in workers]

    num_passed = [int(output) for output in outputs]
    assert sum(num_passed) == 20_000


HOLD = """
import sys, time
from pathlib import Path
from router.shared_usage import SharedUsage
with SharedUsage(Path(sys.argv[1]), num_workers=3, worker=0).exclusively():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker that has locked the file and does not go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def test_a_worker_that_dies_leaves_nothing_locked(
    holder: subprocess.Popen[str], stores: list[SharedUsage]
) -> None:
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()

    limiter = ClientLimiter("acme", Limits(requests=Rate(1.0, 5)), stores[1])
    limiter.take_request(0.0)

    assert remaining(limiter, "requests") == 4


def test_one_client_too_many_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = SharedUsage.create(tmp_path / "usage", num_workers=2, max_clients=2)
    store.of_client("a")
    store.of_client("b")
    store.of_client("a")

    with pytest.raises(ConfigError, match=r"client 'c' is one too many: .* has had 2 since"):
        store.of_client("c")
