"""Finds the client of a request by its key, and follows the clients file while the router runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import structlog
from starlette.datastructures import Headers

from orchestrator.core.errors import ConfigError
from orchestrator.core.ports import Clock
from router.clients import ClientsConfig, KeyConfig, parse_clients
from router.config import ServiceClassConfig
from router.errors import Unauthenticated
from router.followed_file import FollowedFile
from router.keys import id_in, is_same
from router.metrics import RouterMetrics
from router.rate_limits import ClientLimiter, Limits
from router.terms import ServiceTerms
from router.usage import OwnUsage, UsageStore

_log = structlog.get_logger("router")


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody who sends requests, as far as the router needs to know."""

    name: str | None
    """None: everybody, where there is no clients file."""

    terms: ServiceTerms
    limiter: ClientLimiter

    @classmethod
    def everybody(cls, terms: ServiceTerms) -> Client:
        """Return who sends requests where there is no clients file; nothing limits them."""
        return cls(None, terms, ClientLimiter("", Limits()))

    def id_on_nodes(self, user: str | None) -> str:
        """Return whom fair schedulers count a request for: this client, whatever user it names."""
        return (user or "") if self.name is None else self.name

    def cache_salt(self, user: str | None) -> str:
        """Return what a request may share KV under: its client and the user it names, together.

        No name has a line break, so neither a user nor a request without a key can pass for
        another client.
        """
        return f"{self.name or ''}\n{user or ''}"


class ClientDirectory:
    """The clients of a file. Belongs to one event loop."""

    def __init__(
        self,
        path: Path,
        classes: Sequence[ServiceClassConfig],
        clock: Clock,
        metrics: RouterMetrics,
        *,
        poll_interval_s: float,
        store: UsageStore | None = None,
    ) -> None:
        """Read the file at `path`; `store` counts what its clients use, None for this directory
        alone.

        Raises:
            ConfigError: it cannot be read or has mistakes.
        """
        self._file = FollowedFile(path, partial(parse_clients, path=path, classes=classes))
        self._classes = classes
        self._clock = clock
        self._metrics = metrics
        self._poll_interval_s = poll_interval_s
        self._store = OwnUsage() if store is None else store
        self._task: asyncio.Task[None] | None = None
        self._clients: dict[str, Client] = {}
        self._keys: dict[str, tuple[KeyConfig, Client]] = {}
        self._apply(self._file.read())

    async def start(self) -> None:
        """Follow the file until `stop`."""
        self._task = asyncio.create_task(self._keep_looking(), name="follow the clients file")

    async def stop(self) -> None:
        """End that."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Look at the file once; if it has changed and has no mistakes, it counts from now on.

        Keys and terms of requests under way stay as they were; limits count on.
        """
        news = await asyncio.to_thread(self._file.news)
        if news is None:
            return
        try:
            if isinstance(news, ConfigError):
                raise news
            self._apply(news)
        except ConfigError as error:
            self._metrics.clients_reloads("invalid").inc()
            self._metrics.clients_file_is_stale.set(1)
            _log.error("clients_file_invalid", reason=str(error), in_force="the one before")
        else:
            self._metrics.clients_reloads("applied").inc()
            self._metrics.clients_file_is_stale.set(0)
            _log.info("clients_file_applied", num_clients=len(self._clients))

    def identify(self, headers: Headers, now: datetime) -> tuple[Client, str]:
        """Return whose key a request brings, and the key's id.

        Raises:
            Unauthenticated: it brings none, or none that is valid now.
        """
        token = _bearer_token(headers)
        key_id = id_in(token)
        key, client = self._keys.get(key_id or "", (None, None))
        if key is None or client is None or not is_same(token, key.sha256):
            raise Unauthenticated("the API key is not valid here; ask the operator for one")
        if key.has_expired(now):
            raise Unauthenticated(
                f"API key {key.key_id} expired at {key.expires_at}; ask the operator for another"
            )
        return client, key.key_id

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            await self.refresh()

    def _apply(self, config: ClientsConfig) -> None:
        """Let a file count from now on.

        Raises:
            ConfigError: as `UsageStore.of_client`; nothing has changed.
        """
        for described in config.clients:
            self._store.of_client(described.name)
        clients: dict[str, Client] = {}
        keys: dict[str, tuple[KeyConfig, Client]] = {}
        for described in config.clients:
            limits = described.limits.to_limits()
            known = self._clients.get(described.name)
            if known is None:
                limiter = ClientLimiter(described.name, limits, self._store)
            else:
                limiter = known.limiter
                limiter.set_limits(limits, self._clock.now_s())
            terms = ServiceTerms.of_client(described, self._classes)
            client = clients[described.name] = Client(described.name, terms, limiter)
            keys |= {key.key_id: (key, client) for key in described.keys}
        self._clients, self._keys = clients, keys


def _bearer_token(headers: Headers) -> str:
    values = headers.getlist("authorization")
    if len(values) != 1:
        found = "no API key" if not values else "more than one Authorization header"
        raise Unauthenticated(f"{found}; send one header `Authorization: Bearer KEY`")
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the Authorization header must be `Bearer KEY`")
    return token.strip()
