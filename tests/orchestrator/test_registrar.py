"""A node's side of a registration, against routers that follow a script, in no time."""

from __future__ import annotations

import asyncio
import json

import httpx
import structlog

from orchestrator.metrics import NodeMetrics
from orchestrator.peers import Secret
from orchestrator.registrar import FIRST_PAUSE_S, MAX_PAUSE_S, Registrar
from orchestrator.wire import NodeRegistration

SECRET = "sesame-sesame-sesame"
A, B = "http://router-a:8000", "http://router-b:8000"

Answer = httpx.Response | Exception
LEASE = httpx.Response(200, json={"lease_s": 9.0})


class Routers:
    """Answers as told, in turn, and after the last answer never; notes who was asked what."""

    def __init__(self, **answers: list[Answer]) -> None:
        self.requests: list[httpx.Request] = []
        self._answers = {host: iter(script) for host, script in answers.items()}
        self.num_done = 0
        """Routers that have given all their answers."""

        self.are_done = asyncio.Event()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.method == "DELETE":
            return httpx.Response(204)
        answer = next(self._answers[request.url.host.replace("-", "_")], None)
        if answer is None:
            self.num_done += 1
            if self.num_done == len(self._answers):
                self.are_done.set()
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer


def make_registrar(
    routers: Routers, *urls: str, metrics: NodeMetrics | None = None
) -> tuple[Registrar, list[float]]:
    """Return a registrar and the pauses that it makes, none of which takes any time."""
    pauses_s: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses_s.append(seconds)
        await asyncio.sleep(0)

    registrar = Registrar(
        NodeRegistration("node-0", "this process", "http://node:8101"),
        urls,
        Secret(SECRET),
        metrics or NodeMetrics(),
        http=httpx.AsyncClient(transport=httpx.MockTransport(routers.handle)),
        sleep=sleep,
    )
    return registrar, pauses_s


async def run(registrar: Registrar, routers: Routers) -> None:
    """Run until the routers have given all their answers, then leave."""
    registrar.start()
    async with asyncio.timeout(20):
        await routers.are_done.wait()
    await registrar.close()


async def test_it_says_who_it_is_and_renews_at_a_third_of_the_lease() -> None:
    """Of 9 s: after 3 s, or up to half of that sooner."""
    routers = Routers(router_a=[LEASE, LEASE])
    registrar, pauses_s = make_registrar(routers, A)

    await run(registrar, routers)

    first = routers.requests[0]
    assert str(first.url) == f"{A}/internal/v1/nodes"
    assert first.headers["authorization"] == f"Bearer {SECRET}"
    assert json.loads(first.content) == {
        "endpoint_id": "node-0",
        "instance_id": "this process",
        "url": "http://node:8101",
    }
    assert len(pauses_s) == 2
    assert all(1.5 <= pause_s <= 3.0 for pause_s in pauses_s)


async def test_pauses_grow_while_a_router_fails_and_begin_anew_after_a_lease() -> None:
    """Twelve failures: doubled each time up to 5 s, and half of it is drawn."""
    down: list[Answer] = [httpx.ConnectError("refused")] * 12
    routers = Routers(router_a=[*down, LEASE, httpx.Response(401, text="wrong secret")])
    registrar, pauses_s = make_registrar(routers, A)

    await run(registrar, routers)

    limits_s = [min(FIRST_PAUSE_S * 2**n, MAX_PAUSE_S) for n in range(12)] + [3.0, FIRST_PAUSE_S]
    assert all(
        limit_s / 2 <= pause_s <= limit_s
        for pause_s, limit_s in zip(pauses_s, limits_s, strict=True)
    )


async def test_a_router_that_is_away_does_not_keep_another_one_waiting() -> None:
    routers = Routers(router_a=[httpx.ConnectTimeout("")] * 3, router_b=[LEASE] * 3)
    metrics = NodeMetrics()
    registrar, _ = make_registrar(routers, A, B, metrics=metrics)
    registrar.start()
    async with asyncio.timeout(20):
        await routers.are_done.wait()

    text = metrics.render(None).decode()
    await registrar.close()

    assert f'proserve_node_registered{{router="{A}"}} 0.0' in text
    assert f'proserve_node_registered{{router="{B}"}} 1.0' in text


async def test_leaving_tells_every_router_once_and_ends_the_renewals() -> None:
    routers = Routers(router_a=[LEASE], router_b=[httpx.ConnectError("refused")])
    registrar, _ = make_registrar(routers, A, B)

    await run(registrar, routers)
    await registrar.leave()

    deletes = [str(r.url) for r in routers.requests if r.method == "DELETE"]
    path = "internal/v1/nodes/node-0?instance_id=this%20process"
    assert sorted(url.replace("+", "%20") for url in deletes) == [f"{A}/{path}", f"{B}/{path}"]
    assert routers.requests[-1].method == "DELETE"


async def test_only_changes_are_logged_and_never_the_secret() -> None:
    wrong = httpx.Response(401, text="the secret is wrong")
    foreign = httpx.Response(200, text="a page")
    routers = Routers(router_a=[wrong, wrong, foreign, LEASE, LEASE, wrong])
    registrar, _ = make_registrar(routers, A)

    with structlog.testing.capture_logs() as lines:
        await run(registrar, routers)

    assert [line["event"] for line in lines] == [
        "not_registered",
        "not_registered",
        "registered",
        "not_registered",
    ]
    assert lines[0]["reason"] == "it answers 401: the secret is wrong"
    assert "foreign answer" in lines[1]["reason"]
    assert SECRET not in str(lines)
