"""Three real nodes that are killed and stopped all the time, under streams that must not notice.

    python -m benchmarks.chaos --num-requests 300

Starts `proserve serve` with the small model, streams all requests over OpenAI's client once in
peace and once while, every few seconds, a random node is killed (the supervisor starts it again)
or stopped for a while. Three quarters of the requests are greedy, the others are drawn with a
seed; one client in ten reads slowly. What counts: how many requests complete, and how many texts
are those of the calm run. It is `tests/integration/fleets/test_chaos.py` for longer.

With `--router-restarts` the router is killed too, each time a tenth of the answers are complete.
Clients then send idempotency keys, and repeat a request until its answer is whole; the drawn
answers name no seed.

A few seeded texts may differ without any fault: floating-point sums depend on the batch that a
token was computed in, and a draw that falls between two tokens to the seventh digit then takes
the other one. So may, less often, a greedy text with two tokens equally likely to the last digit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from benchmarks.shared.reporting import argument_parser, report
from tests.integration.chaos import (
    Answer,
    ask,
    ask_until_whole,
    chaos_deployment,
    running_nodes,
)
from tests.integration.deployments import Deployment, running, until

ENGINE_DIR = Path(__file__).parents[1] / "built_engines/smollm2-135m"
CONCURRENCY = 16
MAX_TOKENS = 32
PAUSE_S = (5.0, 10.0)
"""Between two faults, at random."""

STOPPED_S = 8.0
"""Longer than the router's stall timeout."""

SLOW_EVENT_S = 0.25
"""A slow client takes this long over each event."""

SETTINGS: dict[str, Any] = {"node": {"max_num_seqs": 32}}


@dataclass(frozen=True)
class Client:
    """One request and how its answer is read."""

    index: int
    is_seeded: bool
    is_slow: bool
    has_key: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """Return its sampling parameters."""
        if not self.is_seeded:
            return {}
        return {"temperature": 0.8} | ({} if self.has_key else {"seed": self.index})


def make_clients(count: int, *, have_keys: bool) -> list[Client]:
    """Return them in order: every fourth seeded, every tenth slow."""
    return [
        Client(i, is_seeded=i % 4 == 3, is_slow=i % 10 == 5, has_key=have_keys)
        for i in range(count)
    ]


class RouterKiller:
    """Kills the router each time so many answers have become complete, but for the last: at a pace
    in time, a slow machine would not get to the end of any."""

    def __init__(self, deployment: Deployment, *, every_answers: int, num_answers: int) -> None:
        self._deployment = deployment
        self._every_answers = every_answers
        self._num_left = num_answers
        self.num_kills = 0

    def note_answer(self) -> None:
        """An answer is complete."""
        self._num_left -= 1
        if self._num_left > 0 and self._num_left % self._every_answers == 0:
            with contextlib.suppress(ValueError):  # it is being started
                os.kill(self._deployment.router_pid(), signal.SIGKILL)
                self.num_kills += 1


async def run(
    openai_client: openai.AsyncOpenAI,
    clients: Sequence[Client],
    *,
    with_slow_ones: bool,
    router_killer: RouterKiller | None = None,
) -> list[Answer | str]:
    """Return each client's answer, or the error that it got instead."""
    at_once = asyncio.Semaphore(CONCURRENCY)

    async def serve(client: Client) -> Answer | str:
        async def linger() -> None:
            if with_slow_ones and client.is_slow:
                await asyncio.sleep(SLOW_EVENT_S)

        asked: dict[str, Any] = {
            "max_tokens": MAX_TOKENS,
            "on_event": linger,
            **client.parameters,
        }
        async with at_once:
            try:
                if client.has_key:
                    key = f"chaos-{client.index}"
                    answer, _ = await ask_until_whole(openai_client, client.index, key, **asked)
                    if router_killer is not None:
                        router_killer.note_answer()
                    return answer
                return await ask(openai_client, client.index, **asked)
            except openai.APIError as error:
                return str(error)

    return list(await asyncio.gather(*map(serve, clients)))


async def disturb(deployment: Deployment, faults: Counter[str], seed: int) -> None:
    """Kill and stop nodes until cancelled: two kills for each stop."""
    draw = random.Random(seed)
    stopped: set[asyncio.Task[None]] = set()
    while True:
        await asyncio.sleep(draw.uniform(*PAUSE_S))
        nodes = await asyncio.to_thread(running_nodes, deployment)
        if not nodes:
            continue
        pid = deployment.node_pid(draw.choice(nodes))
        fault = draw.choice(["kill", "kill", "stop"])
        faults[fault] += 1
        if fault == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGSTOP)
            stopped.add(asyncio.create_task(_continue_later(pid)))


async def _continue_later(pid: int) -> None:
    try:
        await asyncio.sleep(STOPPED_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            os.kill(pid, signal.SIGCONT)


async def measure(
    deployment: Deployment, num_requests: int, *, kills_routers: bool
) -> dict[str, Any]:
    """Run both passes and return the figures."""
    clients = make_clients(num_requests, have_keys=kills_routers)
    faults: Counter[str] = Counter()
    async with openai.AsyncOpenAI(
        base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0, timeout=600
    ) as openai_client:
        calm = await run(openai_client, clients, with_slow_ones=False)
        if failed := [answer for answer in calm if isinstance(answer, str)]:
            sys.exit(f"the calm run failed: {failed[0]}")
        started_s = time.monotonic()
        disturbing = asyncio.create_task(disturb(deployment, faults, seed=1))
        router_killer = RouterKiller(
            deployment, every_answers=max(4, num_requests // 10), num_answers=num_requests
        )
        answers = await run(
            openai_client, clients, with_slow_ones=True, router_killer=router_killer
        )
        disturbing.cancel()
        await asyncio.wait({disturbing})
    await asyncio.to_thread(until, deployment.has_healthy_router, "the router is back")
    errors = [answer for answer in answers if isinstance(answer, str)]
    identical = [a == b for a, b in zip(answers, calm, strict=True)]
    return {
        "num_requests": num_requests,
        "num_completed": num_requests - len(errors),
        "num_with_all_tokens_once": sum(
            isinstance(a, Answer) and a.num_tokens == MAX_TOKENS for a in answers
        ),
        **{
            f"num_{name}_identical": f"{sum(found)} of {len(found)}"
            for name, found in (
                ("greedy", [i for i, c in zip(identical, clients, strict=True) if not c.is_seeded]),
                ("seeded", [i for i, c in zip(identical, clients, strict=True) if c.is_seeded]),
            )
        },
        "num_kills": faults["kill"],
        "num_stops": faults["stop"],
        "num_router_kills": router_killer.num_kills,
        **({} if kills_routers else _retries(deployment)),
        "disturbed_s": round(time.monotonic() - started_s, 1),
        "errors": errors[:5],
    }


def _retries(deployment: Deployment) -> dict[str, int]:
    """Return what the router counted; one that was killed has taken its counts along."""
    return {
        name: int(
            deployment.router_metric(
                f'proserve_router_retries_total{{after_tokens="{after_tokens}"}}'
            )
        )
        for name, after_tokens in (
            ("num_resumed_after_tokens", "true"),
            ("num_retried_before_tokens", "false"),
        )
    }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--router-restarts", action="store_true", help="kill the router too")
    arguments = parser.parse_args()
    num_requests = 24 if arguments.quick else arguments.num_requests
    with tempfile.TemporaryDirectory(prefix="proserve-chaos-") as directory:
        path = chaos_deployment(Path(directory), ENGINE_DIR, **SETTINGS)
        with running(path) as deployment:
            figures = asyncio.run(
                measure(deployment, num_requests, kills_routers=arguments.router_restarts)
            )
    report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
