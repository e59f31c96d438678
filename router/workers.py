"""The worker processes of one router: where they meet, and who keeps which answers.

Clients reach any worker through the one port. Workers reach each other through a Unix socket each,
which nobody else is meant to use.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from starlette.types import Scope

from router.shared_usage import SharedUsage

FELLOW_TIMEOUT_S = 1.0
"""To connect to another worker, and for its metrics; it may be starting, or hang."""

HOP_HEADERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"expect"})
"""Of one connection, not of what goes over it."""


@dataclass(frozen=True, slots=True)
class WorkerSeat:
    """Which of a router's workers this process is, and where it finds the others."""

    index: int
    """From 0."""

    num_workers: int
    directory: Path
    """Of this router alone, for as long as it runs."""

    def usage(self) -> SharedUsage:
        """Return what all workers count together."""
        return SharedUsage(
            self.directory / "usage", num_workers=self.num_workers, worker=self.index
        )

    def socket_path(self, worker: int) -> Path:
        """Return where a worker listens for the others."""
        return self.directory / f"worker-{worker}.socket"

    def metrics_path(self, worker: int) -> Path:
        """Return where a worker keeps what it last said of its metrics."""
        return self.directory / f"worker-{worker}.metrics"

    def others(self) -> Iterable[int]:
        """Return all workers but this one."""
        return (worker for worker in range(self.num_workers) if worker != self.index)

    def keeper_of(self, key: str) -> int:
        """Return the worker that makes and keeps the answers to requests with this key."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest) % self.num_workers


class Fellows:
    """The other workers, as one of them reaches them. Belongs to one event loop."""

    def __init__(self, seat: WorkerSeat) -> None:
        # Connections are not kept: making one is cheap here, and losing a race against the other
        # side's closing it is not.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._transports = {
            worker: httpx.AsyncHTTPTransport(uds=str(seat.socket_path(worker)), limits=limits)
            for worker in seat.others()
        }

    async def close(self) -> None:
        """End all connections."""
        for transport in self._transports.values():
            await transport.aclose()

    async def metrics(self, worker: int) -> str | None:
        """Return the metrics of another worker; None if it does not answer."""
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), FELLOW_TIMEOUT_S)
        request = httpx.Request("GET", "http://worker/metrics", extensions={"timeout": timeout})
        try:
            response = await self._transports[worker].handle_async_request(request)
            return (await response.aread()).decode()
        except httpx.TransportError:
            return None

    @asynccontextmanager
    async def exchange(
        self, worker: int, scope: Scope, body: AsyncIterator[bytes]
    ) -> AsyncIterator[httpx.Response]:
        """Return the answer of another worker to a request, which has not been read.

        Raises:
            httpx.LocalProtocolError: the request cannot be sent, because of its headers or because
                its body is not as long as they say.
            httpx.TransportError: it does not answer.
        """
        request = httpx.Request(
            scope["method"],
            f"http://worker{scope['path']}",  # A query means nothing here.
            headers=without(scope["headers"], HOP_HEADERS),
            content=body,
            # Answers take as long as they take, here as there.
            extensions={"timeout": {"connect": FELLOW_TIMEOUT_S}},
        )
        response = await self._transports[worker].handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()


def without(
    headers: Sequence[tuple[bytes, bytes]], names: frozenset[bytes]
) -> list[tuple[bytes, bytes]]:
    """Return the headers but for those of these names, in lower case."""
    return [(name, value) for name, value in headers if name.lower() not in names]
