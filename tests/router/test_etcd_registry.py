"""Nodes and routers that find each other through a real etcd."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import msgspec
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.core.errors import ConfigError
from orchestrator.etcd import (
    EtcdClient,
    EtcdUnavailable,
    KeyGone,
    KeyValue,
    RegistryConfig,
    WatchBehind,
)
from orchestrator.etcd_registrar import EtcdRegistrar, node_key
from orchestrator.metrics import NodeMetrics
from orchestrator.node_api import NodeService, create_node_app
from orchestrator.wire import NodeRegistration
from router.app import create_app
from router.config import RouterConfig
from router.endpoints import EndpointPool
from router.etcd_registry import EtcdRegistry
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.tokenizer import Tokenizer
from tests.etcd_server import EtcdServer, needs_etcd, running_etcd
from tests.integration.deployments import until as until_true
from tests.router import sse
from tests.router.fake_node import FakeNode
from tests.router.servers import DEADLINE_S, RunningServer
from tests.router.test_endpoints import until
from tests.running_node import until as until_async

pytestmark = needs_etcd

LEASE_S = 2


class SystemClock:
    def now_s(self) -> float:
        return time.monotonic()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def config(etcd: EtcdServer, request: pytest.FixtureRequest) -> RegistryConfig:
    """Every test has keys of its own."""
    return config_of(etcd.url, prefix=f"/{request.node.name}")


def config_of(*urls: str, prefix: str = "/proserve") -> RegistryConfig:
    return RegistryConfig(endpoints=urls, prefix=prefix, lease_s=LEASE_S)


@pytest.fixture
async def client(config: RegistryConfig) -> AsyncIterator[EtcdClient]:
    value = EtcdClient(config)
    yield value
    await value.close()


@asynccontextmanager
async def registered(
    config: RegistryConfig, endpoint_id: str, url: str
) -> AsyncIterator[EtcdRegistrar]:
    registration = NodeRegistration(endpoint_id, f"process of {url}", url)
    registrar = EtcdRegistrar(config, registration, NodeMetrics())
    registrar.start()
    try:
        yield registrar
    finally:
        await registrar.close()


@asynccontextmanager
async def following(config: RegistryConfig) -> AsyncIterator[EndpointPool]:
    """Yield the pool of a router that follows etcd."""
    router_config = RouterConfig(
        engine_dir=Path("unused"), model="tiny", registry=config, snapshot_poll_interval_s=0.02
    )
    metrics, clock = RouterMetrics(), SystemClock()
    node_client = NodeClient(connect_timeout_s=0.5, stall_timeout_s=5.0)
    pool = EndpointPool(router_config, node_client, clock, metrics)
    registry = EtcdRegistry(config, pool, clock, metrics)
    await pool.start()
    await registry.start()
    try:
        yield pool
    finally:
        await registry.stop()
        await pool.stop()
        node_client.close()


def knows(pool: EndpointPool, *endpoint_ids: str) -> Callable[[], bool]:
    return lambda: set(pool.obstacles(time.monotonic())) == set(endpoint_ids)


def uses(pool: EndpointPool, endpoint_id: str) -> Callable[[], bool]:
    return lambda: pool.obstacles(time.monotonic()).get(endpoint_id, "gone") is None


@pytest.fixture
def other() -> Iterator[FakeNode]:
    fake = FakeNode("node-1")
    with fake.serve() as server:
        fake.url = server.url
        yield fake


# --- The client ----------------------------------------------------------------------------


async def test_keys_end_with_their_lease(client: EtcdClient, config: RegistryConfig) -> None:
    key = f"{config.prefix}/a"
    lease = await client.grant(LEASE_S)
    await client.put(key, b"1", lease)
    found = await client.get(key)
    assert found is not None
    assert found.value == b"1"
    assert await client.renew(lease)

    await client.revoke(lease)

    assert await client.get(key) is None
    assert not await client.renew(lease)


async def test_a_key_is_written_only_if_it_is_as_it_was(
    client: EtcdClient, config: RegistryConfig
) -> None:
    key, lease = f"{config.prefix}/a", await client.grant(LEASE_S)

    assert await client.put_if_unchanged(key, b"1", lease, 0)
    assert not await client.put_if_unchanged(key, b"2", lease, 0)
    found = await client.get(key)
    assert found is not None
    assert await client.put_if_unchanged(key, b"2", lease, found.mod_revision)


async def test_a_watch_tells_all_changes_in_order_from_a_revision_on(
    client: EtcdClient, config: RegistryConfig
) -> None:
    """Also those from before it began; keys beside the prefix do not count."""
    lease = await client.grant(LEASE_S)
    await client.put(f"{config.prefix}/a", b"0", lease)
    found, revision = await client.list(f"{config.prefix}/")
    for name, value in (("a", b"1"), ("b", b"2")):
        await client.put(f"{config.prefix}/{name}", value, lease)
    await client.put(f"{config.prefix}0", b"beside", lease)
    await client.revoke(lease)

    changes: list[KeyValue | KeyGone] = []
    async for batch in client.watch(f"{config.prefix}/", from_revision=revision + 1, silence_s=5.0):
        changes += batch
        if len(changes) == 4:
            break

    assert [pair.value for pair in found] == [b"0"]
    assert [c.value for c in changes if isinstance(c, KeyValue)] == [b"1", b"2"]
    gone = [c.key for c in changes[2:] if isinstance(c, KeyGone)]
    assert sorted(gone) == [f"{config.prefix}/a", f"{config.prefix}/b"]


async def test_a_watch_that_would_begin_too_early_says_so(
    client: EtcdClient, config: RegistryConfig, etcd: EtcdServer
) -> None:
    lease = await client.grant(LEASE_S)
    for value in (b"1", b"2", b"3"):
        await client.put(f"{config.prefix}/a", value, lease)
    _, revision = await client.list(f"{config.prefix}/")
    async with httpx.AsyncClient() as http:
        done = await http.post(f"{etcd.url}/v3/kv/compaction", json={"revision": str(revision)})
    assert done.status_code == 200

    with pytest.raises(WatchBehind, match="is forgotten"):
        async for _ in client.watch(f"{config.prefix}/", from_revision=1, silence_s=5.0):
            pass


async def test_a_user_proves_who_it_is_also_when_its_token_has_ended(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("sesame\n")
    with running_etcd(tmp_path) as server:
        async with httpx.AsyncClient(base_url=f"{server.url}/v3/auth") as http:
            for path, body in (
                ("user/add", {"name": "root", "password": "sesame"}),
                ("role/add", {"name": "root"}),
                ("user/grant", {"user": "root", "role": "root"}),
                ("enable", {}),
            ):
                assert (await http.post(f"/{path}", json=body)).status_code == 200
        config = config_of(server.url)
        stranger = EtcdClient(config)
        user = EtcdClient(config.model_copy(update={"username": "root", "password_file": password}))

        with pytest.raises(EtcdUnavailable, match="user name is empty"):
            await stranger.list("/")
        assert await user.list("/")
        server.kill()
        server.start()  # Which has forgotten all tokens.
        for _ in range(2):
            with suppress(EtcdUnavailable):
                await user.list("/")
        assert await user.list("/")
        await stranger.close()
        await user.close()


async def test_a_silent_watch_ends(client: EtcdClient, config: RegistryConfig) -> None:
    with pytest.raises(EtcdUnavailable, match="ReadTimeout"):
        async for _ in client.watch(f"{config.prefix}/", from_revision=0, silence_s=0.2):
            pass


async def test_calls_go_on_at_the_next_server(etcd: EtcdServer) -> None:
    client = EtcdClient(config_of("http://127.0.0.1:9", etcd.url))

    assert await client.grant(LEASE_S)
    assert await client.grant(LEASE_S)
    await client.close()


async def test_no_server_is_an_error_that_names_all() -> None:
    client = EtcdClient(config_of("http://127.0.0.1:9", "http://127.0.0.1:10"))

    with pytest.raises(EtcdUnavailable, match=r":9/v3/lease/grant: .*:10/v3/lease/grant: "):
        await client.grant(LEASE_S)
    await client.close()


@pytest.mark.parametrize("content", ["<html>", "[]", "{}"])
async def test_an_answer_that_is_not_etcds_is_no_answer(content: str) -> None:
    """As of a proxy, or a wrong port; nothing that follows etcd may end by it."""

    async def somebody(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(content)(scope, receive, send)

    with RunningServer(somebody) as server:
        client = EtcdClient(config_of(server.url))

        with pytest.raises(EtcdUnavailable):
            await client.grant(LEASE_S)
        with pytest.raises(EtcdUnavailable):
            await client.list("/")
        with pytest.raises(EtcdUnavailable):
            async for _ in client.watch("/", from_revision=1, silence_s=1.0):
                pass
        await client.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoints": []}, "at least 1 item"),
        ({"prefix": "proserve"}, "pattern"),
        ({"username": "me"}, "username and password_file go together"),
        ({"cert_file": "x"}, "cert_file and key_file go together"),
        ({"ca_file": "x"}, "with https:// endpoints only"),
        ({"lease_s": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RegistryConfig.model_validate({"endpoints": ["http://127.0.0.1:2379"], **settings})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    settings = {"endpoints": ["https://127.0.0.1:2379"], "ca_file": tmp_path / "ca"}
    with pytest.raises(ConfigError, match="ca_file, cert_file or key_file cannot be used"):
        EtcdClient(RegistryConfig.model_validate(settings))
    settings = {"endpoints": ["http://127.0.0.1:2379"], "username": "me"}
    with pytest.raises(ConfigError, match=r"password_file .*No such file"):
        EtcdClient(RegistryConfig.model_validate({**settings, "password_file": tmp_path / "p"}))


# --- Nodes and routers ---------------------------------------------------------------------


async def test_routers_see_nodes_come_move_and_go(
    config: RegistryConfig, node: FakeNode, other: FakeNode
) -> None:
    async with following(config) as first, following(config) as second:
        async with registered(config, "node-0", node.url):
            async with registered(config, "node-1", other.url):
                for pool in (first, second):
                    await until(knows(pool, "node-0", "node-1"))
            # A node that leaves is kept while it answers, for one more lease.
            other.is_ill = True
            for pool in (first, second):
                await until(knows(pool, "node-0"))
        async with registered(config, "node-0", other.url):
            other.is_ill, other.endpoint_id = False, "node-0"
            for pool in (first, second):
                await until(uses(pool, "node-0"))


async def test_a_node_whose_id_another_has_comes_when_that_has_left(
    config: RegistryConfig, node: FakeNode, other: FakeNode
) -> None:
    other.endpoint_id = "node-0"
    async with following(config) as pool:
        async with registered(config, "node-0", node.url):
            await until(uses(pool, "node-0"))
            waiting = registered(config, "node-0", other.url)
            second = await waiting.__aenter__()
            await until(lambda: node.num_polls > 20)
            assert other.num_polls == 0
            assert not second.has_lost_lease
        await until(lambda: other.num_polls > 0)
        await waiting.__aexit__(None, None, None)


async def test_a_node_that_was_started_anew_has_its_id_at_once(
    config: RegistryConfig, client: EtcdClient, node: FakeNode
) -> None:
    """Its lease of before lasts on; the address tells that it is the same node."""
    before = NodeRegistration("node-0", "process before", node.url)
    key = node_key(config, "node-0")
    await client.put(key, msgspec.json.encode(before), await client.grant(3600))

    async with registered(config, "node-0", node.url):

        async def is_its_own() -> bool:
            found = await client.get(key)
            return found is not None and b"process of" in found.value

        await until_async(is_its_own, "the new process is registered")


def test_after_a_routers_death_another_one_gives_the_same_answer(
    config: RegistryConfig, engine_dir: Path, tokenizer: Tokenizer
) -> None:
    """Of a drawn answer, whose client has seen a part of it and repeats its request by key. The
    node is real but for its engine, whose token i is the first of the prompt plus i."""
    command = (sys.executable, "-m", "tests.scripted_engine")
    service = NodeService("node-t", command, stall_timeout_s=5.0)
    node = RunningServer(create_node_app(service))
    registration = NodeRegistration("node-t", service.instance_id, node.url)
    service.registrar = EtcdRegistrar(config, registration, service.metrics)
    settings = RouterConfig(engine_dir=engine_dir, model="scripted", registry=config)
    apps = [create_app(settings, tokenizer=tokenizer) for _ in range(2)]
    body = {"model": "scripted", "prompt": [70], "max_tokens": 150, "stream": True}
    headers = {"idempotency-key": "order-66"}
    http = httpx.Client(timeout=DEADLINE_S, trust_env=False)

    with http, node, RunningServer(apps[0]) as first, RunningServer(apps[1]) as second:
        for router in (first, second):
            url = f"{router.url}/health"
            until_true(lambda url=url: http.get(url).is_success, "the router has the node")  # type: ignore[misc]
        with http.stream("POST", f"{first.url}/v1/completions", json=body, headers=headers) as part:
            chunks = sse.arriving(part)
            seen = "".join(next(chunks)["choices"][0]["text"] for _ in range(3))
            first.kill()
        whole = http.post(f"{second.url}/v1/completions", json=body, headers=headers)

    *chunks_of_second, done = sse.parsed(whole.text)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks_of_second)
    assert done == "[DONE]"
    assert text == tokenizer.decode(list(range(70, 220)))
    assert text.startswith(seen)


async def test_routing_goes_on_while_etcd_is_away_or_hangs_or_has_forgotten_all(
    config: RegistryConfig,
    client: EtcdClient,
    etcd: EtcdServer,
    node: FakeNode,
    other: FakeNode,
) -> None:
    """After each of these a node that comes is seen, and those that were there never went."""
    async with following(config) as pool, registered(config, "node-0", node.url) as registrar:
        await until(knows(pool, "node-0"))
        await until(uses(pool, "node-0"))
        was_used: list[bool] = []

        async def look() -> None:
            while True:
                was_used.append(uses(pool, "node-0")())
                await asyncio.sleep(0.02)

        looking = asyncio.create_task(look())
        etcd.kill()
        await until(lambda: registrar.has_lost_lease)
        etcd.start()
        async with registered(config, "node-1", other.url):
            await until(knows(pool, "node-0", "node-1"))
            await until(lambda: not registrar.has_lost_lease)

        etcd.hold()
        await until(lambda: registrar.has_lost_lease)
        etcd.let_go()
        await until(lambda: not registrar.has_lost_lease)
        await until(knows(pool, "node-0"))

        etcd.wipe()

        async def is_back() -> bool:
            return await client.get(node_key(config, "node-0")) is not None

        await until_async(is_back, "it has registered again")
        async with registered(config, "node-1", other.url):
            await until(knows(pool, "node-0", "node-1"))
        looking.cancel()

    assert all(was_used)
