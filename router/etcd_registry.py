"""A router's nodes as etcd knows them: every router of a deployment sees the same ones.

A watch that is silent may be calm or dead. So each router writes a key of its own once a second
under what it watches, and one that does not see its own key any more begins anew: it lists all
nodes, and watches from that revision on. While etcd is away, the nodes are those known last.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from contextlib import aclosing

import msgspec
import structlog

from orchestrator.core.backoff import backoff_s
from orchestrator.core.errors import ConfigError
from orchestrator.core.ports import Clock
from orchestrator.etcd import EtcdClient, EtcdUnavailable, KeyGone, KeyValue, RegistryConfig
from orchestrator.wire import NodeRegistration
from orchestrator.yaml_config import validate_model
from router.config import EndpointConfig
from router.endpoints import EndpointPool
from router.metrics import RouterMetrics

BEAT_S = 1.0
"""Between two writes of a router's own key."""

MAX_SILENCE_S = 3.0
"""A watch on which nothing was heard for so long is dead."""

SWEEP_S = 0.25
"""Between two looks at nodes that have vanished."""

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
"""Between tries to reach etcd."""

_decoder = msgspec.json.Decoder(NodeRegistration)
_log = structlog.get_logger("router")


class EtcdRegistry:
    """Keeps a pool's nodes those of etcd. Belongs to one event loop."""

    def __init__(
        self, config: RegistryConfig, pool: EndpointPool, clock: Clock, metrics: RouterMetrics
    ) -> None:
        """Raises ConfigError: as `EtcdClient`."""
        self._config = config
        self._pool = pool
        self._clock = clock
        self._metrics = metrics
        self._client = EtcdClient(config)
        self._beat_client = EtcdClient(config)
        """By itself, so that a server that hangs is not asked for both."""

        self._nodes_prefix = f"{config.prefix}/nodes/"
        self._own_key = f"{config.prefix}/routers/{uuid.uuid4().hex}"
        self._nodes: dict[str, EndpointConfig] = {}
        self._vanished_until_s: dict[str, float] = {}
        """Of nodes whose key is gone, until when they are kept while they answer."""

        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Follow etcd until `stop`."""
        self._tasks = [
            asyncio.create_task(self._follow(), name="follow etcd"),
            asyncio.create_task(self._beat(), name="beat in etcd"),
            asyncio.create_task(self._keep_sweeping(), name="sweep vanished nodes"),
        ]

    async def stop(self) -> None:
        """End that."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()
        await self._beat_client.close()

    async def _follow(self) -> None:
        num_failures = 0
        while True:
            try:
                found, revision = await self._client.list(self._nodes_prefix)
                self._take_all(found)
                changes = self._client.watch(
                    f"{self._config.prefix}/",
                    from_revision=revision + 1,
                    silence_s=MAX_SILENCE_S,
                )
                async with aclosing(changes):
                    async for batch in changes:
                        num_failures = 0
                        self._metrics.registry_is_followed.set(1)
                        for change in batch:
                            self._take(change)
            except EtcdUnavailable as error:
                num_failures += 1
                self._metrics.registry_is_followed.set(0)
                if num_failures == 1:
                    _log.warning("registry_lost", reason=str(error), in_force="the last nodes")
            pause_s = backoff_s(num_failures, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _beat(self) -> None:
        lease: str | None = None
        while True:
            try:
                if lease is None or not await self._beat_client.renew(lease):
                    lease = await self._beat_client.grant(self._config.lease_s)
                await self._beat_client.put(self._own_key, b"", lease)
            except EtcdUnavailable:
                pass  # The watch says so.
            await asyncio.sleep(BEAT_S)

    def _take_all(self, found: tuple[KeyValue, ...]) -> None:
        listed = {pair.key.removeprefix(self._nodes_prefix) for pair in found}
        for endpoint_id in self._nodes.keys() - listed:
            self._note_vanished(endpoint_id)
        for pair in found:
            self._take(pair)

    def _take(self, change: KeyValue | KeyGone) -> None:
        if not change.key.startswith(self._nodes_prefix):
            return
        endpoint_id = change.key.removeprefix(self._nodes_prefix)
        if isinstance(change, KeyGone):
            self._note_vanished(endpoint_id)
            return
        try:
            node = _node_of(endpoint_id, change.value)
        except (ConfigError, msgspec.MsgspecError) as error:
            _log.error("registration_invalid", key=change.key, reason=str(error))
            return
        self._vanished_until_s.pop(endpoint_id, None)
        known = self._nodes.get(endpoint_id)
        if known == node:
            return
        if known is not None:
            self._forget(endpoint_id, "it has moved", outcome="left")
        self._nodes[endpoint_id] = node
        self._pool.add(node)
        self._metrics.registrations("joined").inc()
        self._metrics.registered_nodes.set(len(self._nodes))
        _log.info("node_joined", endpoint_id=endpoint_id, url=node.url)

    def _note_vanished(self, endpoint_id: str) -> None:
        if endpoint_id in self._nodes:
            until_s = self._clock.now_s() + self._config.lease_s
            self._vanished_until_s.setdefault(endpoint_id, until_s)

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Forget nodes whose keys are gone, as soon as they do not answer, or after one more lease.

        An etcd that has lost its keys would else take all nodes away at once, which register anew
        within that time.
        """
        for endpoint_id, until_s in list(self._vanished_until_s.items()):
            is_gone = not self._pool.is_reachable(endpoint_id)
            if is_gone or self._clock.now_s() >= until_s:
                self._forget(endpoint_id, "its registration is gone", outcome="expired")

    def _forget(self, endpoint_id: str, reason: str, *, outcome: str) -> None:
        node = self._nodes.pop(endpoint_id)
        self._vanished_until_s.pop(endpoint_id, None)
        self._pool.remove(endpoint_id)
        self._metrics.registrations(outcome).inc()
        self._metrics.registered_nodes.set(len(self._nodes))
        _log.info("node_left", endpoint_id=endpoint_id, url=node.url, reason=reason)


def _node_of(endpoint_id: str, value: bytes) -> EndpointConfig:
    registration = _decoder.decode(value)
    if registration.endpoint_id != endpoint_id:
        raise ConfigError(f"it is of another node, {registration.endpoint_id!r}")
    data = {"endpoint_id": registration.endpoint_id, "url": registration.url}
    return validate_model(data, EndpointConfig, source="registration")
