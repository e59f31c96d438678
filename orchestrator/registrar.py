"""A node's registration at routers, renewed for as long as the node is to be used."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

import httpx
import msgspec
import structlog

from orchestrator.core.backoff import backoff_s
from orchestrator.core.errors import ProServeError
from orchestrator.metrics import NodeMetrics
from orchestrator.peers import Secret
from orchestrator.wire import NodeLease, NodeRegistration

RENEWALS_PER_LEASE = 3
"""Two may be lost."""

CALL_TIMEOUT_S = 2.0

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 5.0
"""Between tries at a router that does not answer or refuses: so long does one that comes back have
to wait for its nodes at most."""

MAX_SHOWN_CHARACTERS = 300
"""Of a router's answer, in a log line."""

_lease_decoder = msgspec.json.Decoder(NodeLease)
_encoder = msgspec.json.Encoder()
_log = structlog.get_logger(__name__)


class _NotRegistered(ProServeError):
    """A router could not be reached or refused; the text says why."""


class Registrar:
    """Keeps one node registered at routers, each by itself."""

    def __init__(
        self,
        registration: NodeRegistration,
        router_urls: Sequence[str],
        secret: Secret,
        metrics: NodeMetrics,
        *,
        http: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._registration = registration
        self._router_urls = tuple(router_urls)
        self._metrics = metrics
        self._sleep = sleep
        # No proxies and credentials from the environment: routers are addressed as configured.
        self._http = http or httpx.AsyncClient(timeout=CALL_TIMEOUT_S, trust_env=False)
        self._headers = {
            "authorization": secret.authorization(),
            "content-type": "application/json",
        }
        self._tasks: list[asyncio.Task[None]] = []
        self._failures: dict[str, str | None] = {}
        """By router, why the last try has failed; None if it has not."""

    @property
    def has_lost_lease(self) -> bool:
        """Return False: these routers ask the node itself."""
        return False

    def start(self) -> None:
        """Register and stay registered until `leave`."""
        for url in self._router_urls:
            self._metrics.registered(url).set(0)
            task = asyncio.create_task(self._stay_registered(url), name=f"register at {url}")
            self._tasks.append(task)

    async def leave(self) -> None:
        """Tell the routers not to use the node any more. Those that do not hear it will notice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tasks:
            await asyncio.gather(*map(self._leave, self._router_urls))

    async def close(self) -> None:
        """Leave, and end all connections. No call follows."""
        await self.leave()
        await self._http.aclose()

    async def _stay_registered(self, url: str) -> None:
        num_failures = 0
        while True:
            try:
                lease = await self._register(url)
            except _NotRegistered as error:
                num_failures += 1
                self._note(url, str(error))
                pause_s = backoff_s(num_failures, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)
            else:
                num_failures = 0
                self._note(url, None)
                pause_s = max(lease.lease_s / RENEWALS_PER_LEASE, FIRST_PAUSE_S)
            # Jittered, so that the nodes of a router that comes back do not all come at once.
            await self._sleep(pause_s * random.uniform(0.5, 1.0))

    async def _register(self, url: str) -> NodeLease:
        try:
            answer = await self._http.post(
                f"{url}/internal/v1/nodes",
                content=_encoder.encode(self._registration),
                headers=self._headers,
            )
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise _NotRegistered(f"it does not answer: {reason}") from error
        if answer.status_code != HTTPStatus.OK:
            text = answer.text[:MAX_SHOWN_CHARACTERS]
            raise _NotRegistered(f"it answers {answer.status_code}: {text}")
        try:
            return _lease_decoder.decode(answer.content)
        except msgspec.MsgspecError as error:
            raise _NotRegistered(f"it gives a foreign answer: {error}") from error

    async def _leave(self, url: str) -> None:
        self._metrics.registered(url).set(0)
        registration = self._registration
        try:
            await self._http.delete(
                f"{url}/internal/v1/nodes/{registration.endpoint_id}",
                params={"instance_id": registration.instance_id},
                headers=self._headers,
            )
        except httpx.HTTPError as error:
            _log.info("leaving_unheard", router=url, reason=str(error) or type(error).__name__)

    def _note(self, url: str, failure: str | None) -> None:
        """Say what has become of a try, but not again and again that it is so."""
        self._metrics.registered(url).set(failure is None)
        if url in self._failures and self._failures[url] == failure:
            return
        self._failures[url] = failure
        if failure is None:
            _log.info("registered", router=url)
        else:
            _log.warning("not_registered", router=url, reason=failure)
