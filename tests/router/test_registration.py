"""Nodes that register themselves at a router."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from orchestrator.node_api import NodeService, create_node_app
from orchestrator.peers import Secret
from orchestrator.registrar import Registrar
from orchestrator.wire import NodeRegistration
from router.app import create_app
from router.config import EndpointConfig, RegistrationConfig, RouterConfig
from router.endpoints import EndpointPool
from router.errors import Refused
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.registration import Registrations
from router.tokenizer import Tokenizer
from tests.integration.deployments import until as until_true
from tests.router.clocks import ManualClock
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Stall, saying
from tests.router.servers import DEADLINE_S, RunningServer
from tests.router.test_endpoints import until, usable_ids

SECRET = "sesame-sesame-sesame"
URL = "http://10.0.0.1:8101"
OTHER_URL = "http://10.0.0.2:8101"


def registration_of(
    endpoint_id: str = "node-0", *, url: str = URL, instance_id: str = "first"
) -> NodeRegistration:
    return NodeRegistration(endpoint_id, instance_id, url)


def config_at(directory: Path, *, max_nodes: int = 3) -> RegistrationConfig:
    secret_file = directory / "secret"
    secret_file.write_text(f"{SECRET}\n")
    return RegistrationConfig(secret_file=secret_file, lease_s=10.0, max_nodes=max_nodes)


@asynccontextmanager
async def registrations_at(
    directory: Path, clock: ManualClock, *, is_started: bool = False
) -> AsyncIterator[tuple[Registrations, EndpointPool]]:
    """A pool with the one configured node `fixed`; unless it is started, it asks nobody."""
    config = RouterConfig(
        engine_dir=Path("unused"),
        model="tiny",
        nodes=(EndpointConfig(endpoint_id="fixed", url=OTHER_URL),) if not is_started else (),
        registration=config_at(directory),
        snapshot_poll_interval_s=0.01,
        max_snapshot_age_s=3000.0,
    )
    client = NodeClient(connect_timeout_s=1.0, stall_timeout_s=5.0)
    metrics = RouterMetrics()
    pool = EndpointPool(config, client, clock, metrics)
    if is_started:
        await pool.start()
    try:
        yield Registrations(config_at(directory), pool, clock, metrics), pool
    finally:
        await pool.stop()
        client.close()


async def test_a_node_stays_for_as_long_as_it_renews_its_lease_of_10_s(tmp_path: Path) -> None:
    clock = ManualClock()
    async with registrations_at(tmp_path, clock) as (registrations, pool):
        assert registrations.register(registration_of()).lease_s == 10.0
        clock.time_s += 9.9
        registrations.register(registration_of())
        clock.time_s += 9.9
        registrations.expire()
        assert list(pool.fleet.endpoint_ids) == ["fixed", "node-0"]

        clock.time_s += 0.1
        registrations.expire()

        assert list(pool.fleet.endpoint_ids) == ["fixed"]


async def test_a_lease_does_not_run_while_the_router_hears_nobody(tmp_path: Path) -> None:
    """It was stopped for 9 s."""
    clock = ManualClock()
    async with registrations_at(tmp_path, clock) as (registrations, pool):
        registrations.register(registration_of())
        clock.time_s += 18.9
        registrations.expire(unheard_s=9.0)
        assert "node-0" in pool

        clock.time_s += 0.1
        registrations.expire()

        assert "node-0" not in pool


async def test_a_router_that_was_stopped_forgets_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of its event loop is a minute ahead behind the first pause, a 20th of a second."""
    clock = ManualClock()
    async with registrations_at(tmp_path, clock) as (registrations, pool):
        loop = asyncio.get_running_loop()
        loop_time, has_swept = loop.time, asyncio.Event()
        ahead_s, expire = 0.0, registrations.expire

        def sweep(*, unheard_s: float = 0.0) -> None:
            expire(unheard_s=unheard_s)
            has_swept.set()

        monkeypatch.setattr("router.registration.SWEEPS_PER_LEASE", 200)
        monkeypatch.setattr(registrations, "expire", sweep)
        registrations.register(registration_of())
        has_swept.clear()
        await registrations.start()
        await asyncio.sleep(0)
        ahead_s, clock.time_s = 60.0, clock.time_s + 60.0
        monkeypatch.setattr(loop, "time", lambda: loop_time() + ahead_s)

        await has_swept.wait()
        await registrations.stop()

        assert "node-0" in pool


async def test_a_configured_node_is_not_displaced(tmp_path: Path) -> None:
    async with registrations_at(tmp_path, ManualClock()) as (registrations, pool):
        with pytest.raises(Refused, match="'fixed' is one of the router's configuration") as found:
            registrations.register(registration_of("fixed"))
        registrations.leave("fixed", "first")

        assert found.value.status == 409
        assert "fixed" in pool


async def test_there_is_a_limit_to_the_nodes_that_register(tmp_path: Path) -> None:
    """Three, the configured one aside; one that leaves makes room."""
    async with registrations_at(tmp_path, ManualClock()) as (registrations, pool):
        for name in ("a", "b", "c"):
            registrations.register(registration_of(name))
        with pytest.raises(Refused, match="3 nodes are registered, as many as") as found:
            registrations.register(registration_of("d"))
        assert found.value.status == 503

        registrations.leave("b", "first")
        registrations.register(registration_of("d"))

        assert list(pool.fleet.endpoint_ids) == ["a", "c", "d", "fixed"]


@pytest.mark.parametrize(
    ("endpoint_id", "url", "reason"),
    [
        ("node-0", "ftp://10.0.0.1", "is not the address of a service"),
        ("node-0", "10.0.0.1:8101", "is not the address of a service"),
        ("node-0", "http://user:word@10.0.0.1", "has more than scheme, host and port"),
        ("node-0", "http://10.0.0.1/v1", "has more than scheme, host and port"),
        ("node-0", "http://10.0.0.1:99999", "has an impossible port"),
        ("node-0", "http://" + "a" * 600, "at most 512 characters"),
        ("no de", URL, "endpoint_id"),
    ],
)
async def test_impossible_nodes_are_refused_with_the_reason(
    tmp_path: Path, endpoint_id: str, url: str, reason: str
) -> None:
    async with registrations_at(tmp_path, ManualClock()) as (registrations, pool):
        with pytest.raises(Refused, match=reason):
            registrations.register(registration_of(endpoint_id, url=url))

        assert list(pool.fleet.endpoint_ids) == ["fixed"]


async def test_a_process_that_was_replaced_cannot_take_its_successor_along(
    tmp_path: Path,
) -> None:
    async with registrations_at(tmp_path, ManualClock()) as (registrations, pool):
        registrations.register(registration_of(instance_id="old"))
        registrations.register(registration_of(instance_id="new"))

        registrations.leave("node-0", "old")
        assert "node-0" in pool
        registrations.leave("node-0", "new")
        assert "node-0" not in pool


async def test_a_node_that_comes_from_elsewhere_replaces_one_that_is_silent(
    tmp_path: Path, node: FakeNode
) -> None:
    """The first address leads nowhere; the second one answers."""
    clock = ManualClock()
    async with registrations_at(tmp_path, clock, is_started=True) as (registrations, pool):
        registrations.register(registration_of(url="http://127.0.0.1:9", instance_id="old"))

        registrations.register(registration_of(url=node.url, instance_id="new"))

        await until(lambda: usable_ids(pool, clock) == ["node-0"])


async def test_a_node_cannot_take_the_id_of_one_that_answers(
    tmp_path: Path, node: FakeNode
) -> None:
    clock = ManualClock()
    async with registrations_at(tmp_path, clock, is_started=True) as (registrations, pool):
        registrations.register(registration_of(url=node.url, instance_id="one"))
        await until(lambda: usable_ids(pool, clock) == ["node-0"])
        clock.time_s += 7.0

        with pytest.raises(Refused, match=r"answers there, and its lease lasts for another 3\.0 s"):
            registrations.register(registration_of(url=OTHER_URL, instance_id="two"))

        registrations.register(registration_of(url=OTHER_URL, instance_id="one"))
        assert usable_ids(pool, clock) == [], "the same process may move"


# --- over HTTP --------------------------------------------------------------------------------


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def lonely(
    tmp_path: Path, start_router: RouterFactory, clock: ManualClock
) -> Iterator[RunningRouter]:
    """A router without nodes at which nodes may register."""
    with start_router(
        [], registration=config_at(tmp_path), clock=clock, max_snapshot_age_s=3000.0
    ) as router:
        yield router


def register(router: RunningRouter, url: str, *, secret: str | None = SECRET) -> httpx.Response:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    body = {"endpoint_id": "node-0", "instance_id": "first", "url": url}
    return router.http.post("/internal/v1/nodes", json=body, headers=headers)


def leave(router: RunningRouter, *, secret: str = SECRET) -> httpx.Response:
    return router.http.delete(
        "/internal/v1/nodes/node-0?instance_id=first",
        headers={"authorization": f"Bearer {secret}"},
    )


def wait_until_usable(router: RunningRouter) -> None:
    """Ask until a node can be used; the test's own timeout bounds it."""
    while router.http.get("/health").status_code != 200:
        pass


def test_without_a_node_requests_are_refused_and_with_one_they_are_served(
    lonely: RunningRouter, node: FakeNode
) -> None:
    refused = lonely.complete()
    assert refused.status_code == 503
    assert "no node is registered" in refused.json()["error"]["message"]
    assert lonely.complete(response_format={"type": "json_object"}).status_code == 503

    assert register(lonely, node.url).json() == {"lease_s": 10.0}
    wait_until_usable(lonely)

    assert lonely.complete().status_code == 200
    assert leave(lonely).status_code == 204
    assert lonely.complete().status_code == 503
    assert 'endpoint_usable{endpoint_id="node-0"}' not in lonely.http.get("/metrics").text
    assert lonely.metric('proserve_router_registrations_total{event="left"}') == 1


@pytest.mark.parametrize("secret", [None, "another-secret-of-the-length", SECRET + "x"])
def test_without_the_secret_nobody_registers_or_signs_off(
    lonely: RunningRouter, node: FakeNode, secret: str | None
) -> None:
    refused = register(lonely, node.url, secret=secret)

    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_secret")
    assert SECRET not in refused.text
    assert lonely.http.get("/health").json()["nodes"] == {}
    register(lonely, node.url)
    assert leave(lonely, secret=secret or "wrong").status_code == 401
    assert "node-0" in lonely.http.get("/health").json()["nodes"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"endpoint_id": 1}', b"x" * 9000])
def test_what_is_no_registration_is_refused(lonely: RunningRouter, content: bytes) -> None:
    headers = {"authorization": f"Bearer {SECRET}", "content-type": "application/json"}

    answer = lonely.http.post("/internal/v1/nodes", content=content, headers=headers)

    assert answer.status_code in (400, 413)


def test_a_router_without_registration_has_no_such_route(quiet_router: RunningRouter) -> None:
    assert register(quiet_router, URL).status_code == 404


def test_what_a_forgotten_node_works_on_is_finished_there(
    lonely: RunningRouter, node: FakeNode, clock: ManualClock
) -> None:
    """Its lease ends in the middle of a stream."""
    whole = saying([72, 105, 33])
    node.script = lambda request: [whole(request)[0], Stall(), *whole(request)[1:]]
    register(lonely, node.url)
    wait_until_usable(lonely)
    body = {"model": "tiny", "prompt": "Hi", "stream": True, "max_wait_ms": 60_000}
    with lonely.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        clock.time_s += 10.0
        while lonely.http.get("/health").json()["nodes"]:
            pass

        node.release()
        rest = list(lines)

    assert first.startswith("data: {")
    assert rest[-2] == "data: [DONE]"
    assert len(node.requests) == 1


@contextmanager
def running_router(
    engine_dir: Path, tokenizer: Tokenizer, secret: Path, *, port: int = 0
) -> Iterator[RunningServer]:
    config = RouterConfig(
        engine_dir=engine_dir,
        model="scripted",
        registration=RegistrationConfig(secret_file=secret, lease_s=1.0),
        snapshot_poll_interval_s=0.02,
    )
    with RunningServer(create_app(config, tokenizer=tokenizer), port=port) as server:
        yield server


def test_a_real_node_registers_finds_a_router_that_restarts_and_leaves(
    engine_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The node's executor is a process of its own, with a scripted engine: token i is the first
    of the prompt plus i."""
    config_at(tmp_path)
    secret = tmp_path / "secret"
    command = (sys.executable, "-m", "tests.scripted_engine")
    service = NodeService("node-t", command, stall_timeout_s=5.0)
    node = RunningServer(create_node_app(service))

    http = httpx.Client(timeout=DEADLINE_S, trust_env=False, verify=False)

    def wait_for(router: RunningServer, expected: dict[str, str]) -> None:
        url = f"{router.url}/health"
        until_true(lambda: http.get(url).json()["nodes"] == expected, f"nodes are {expected}")

    with http, running_router(engine_dir, tokenizer, secret) as router:
        service.registrar = Registrar(
            NodeRegistration("node-t", service.instance_id, node.url),
            [router.url],
            Secret(SECRET),
            service.metrics,
        )
        with node:
            wait_for(router, {"node-t": "ready"})
            body = {"model": "scripted", "prompt": [70], "max_tokens": 3}
            answer = http.post(f"{router.url}/v1/completions", json=body).json()
            router.kill()
            with running_router(engine_dir, tokenizer, secret, port=router.port) as successor:
                wait_for(successor, {"node-t": "ready"})
                node.__exit__(None, None, None)
                wait_for(successor, {})

    assert answer["choices"][0]["text"] == tokenizer.decode([70, 71, 72])
