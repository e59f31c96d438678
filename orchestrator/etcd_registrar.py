"""A node's registration in etcd, under a lease that it renews for as long as it is to be used."""

from __future__ import annotations

import asyncio
import random
import time

import msgspec
import structlog

from orchestrator.core.backoff import backoff_s
from orchestrator.core.errors import ProServeError
from orchestrator.etcd import EtcdClient, EtcdUnavailable, RegistryConfig
from orchestrator.metrics import NodeMetrics
from orchestrator.registrar import FIRST_PAUSE_S, MAX_PAUSE_S, RENEWALS_PER_LEASE
from orchestrator.wire import NodeRegistration

_decoder = msgspec.json.Decoder(NodeRegistration)
_log = structlog.get_logger(__name__)


class _Taken(ProServeError):
    """Another node has the id."""


class EtcdRegistrar:
    """Keeps one node registered."""

    def __init__(
        self, config: RegistryConfig, registration: NodeRegistration, metrics: NodeMetrics
    ) -> None:
        """Raises ConfigError: as `EtcdClient`."""
        self._config = config
        self._client = EtcdClient(config)
        self._registration = registration
        self._key = node_key(config, registration.endpoint_id)
        self._metrics = metrics
        self._lease: str | None = None
        self._renewed_s: float | None = None
        """When the last successful renewal was sent; None before the first."""

        self._task: asyncio.Task[None] | None = None
        self._failure: str | None = ""

    @property
    def has_lost_lease(self) -> bool:
        """Return whether the node was registered, and is not any more for all it knows."""
        renewed_s = self._renewed_s
        return renewed_s is not None and time.monotonic() - renewed_s > self._config.lease_s

    def start(self) -> None:
        """Register and stay registered until `leave`."""
        self._metrics.registered("etcd").set(0)
        self._task = asyncio.create_task(self._stay_registered(), name="register in etcd")

    async def leave(self) -> None:
        """End the registration. Routers notice it too if etcd does not hear that."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = self._renewed_s = None
        self._metrics.registered("etcd").set(0)
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                await self._client.revoke(lease)
            except EtcdUnavailable as error:
                _log.info("leaving_unheard", reason=str(error))

    async def close(self) -> None:
        """Leave, and end all connections. No call follows."""
        await self.leave()
        await self._client.close()

    async def _stay_registered(self) -> None:
        num_failures = 0
        while True:
            sent_s = time.monotonic()
            try:
                await self._renew()
            except (EtcdUnavailable, _Taken) as error:
                num_failures += 1
                self._note(str(error))
                pause_s = backoff_s(num_failures, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)
            else:
                num_failures, self._renewed_s = 0, sent_s
                self._note(None)
                pause_s = self._config.lease_s / RENEWALS_PER_LEASE
            # Jittered, so that the nodes do not all come at once.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _renew(self) -> None:
        """Renew the lease, or register under a new one.

        Raises:
            EtcdUnavailable: etcd does not answer.
            _Taken: another node has the id.
        """
        if self._lease is not None and await self._client.renew(self._lease):
            return
        self._lease = None
        lease = await self._client.grant(self._config.lease_s)
        try:
            await self._claim(lease)
        except _Taken:
            await self._client.revoke(lease)
            raise
        self._lease = lease

    async def _claim(self, lease: str) -> None:
        found = await self._client.get(self._key)
        if found is not None:
            try:
                other = _decoder.decode(found.value)
            except msgspec.DecodeError as error:
                raise _Taken(f"{self._key} holds something else: {error}") from error
            # One at the same address is this node before it was started anew.
            if other.url != self._registration.url:
                raise _Taken(
                    f"a node {other.endpoint_id!r} is registered at {other.url}; give this one "
                    "another endpoint_id, or stop the other one"
                )
        value = msgspec.json.encode(self._registration)
        revision = 0 if found is None else found.mod_revision
        if not await self._client.put_if_unchanged(self._key, value, lease, revision):
            raise _Taken(f"{self._key} was written by somebody else at the same time")

    def _note(self, failure: str | None) -> None:
        """Say what has become of a try, but not again and again that it is so."""
        self._metrics.registered("etcd").set(failure is None)
        if self._failure == failure:
            return
        self._failure = failure
        if failure is None:
            _log.info("registered", key=self._key)
        else:
            _log.warning("not_registered", key=self._key, reason=failure)


def node_key(config: RegistryConfig, endpoint_id: str) -> str:
    """Return the key of a node."""
    return f"{config.prefix}/nodes/{endpoint_id}"
