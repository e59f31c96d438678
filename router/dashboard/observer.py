"""Scrapes router and nodes once a second while somebody looks, and tells all who do."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Protocol

import httpx
import msgspec

from orchestrator.journal import Story
from router.access import RequestRecord
from router.dashboard.figures import (
    Observation,
    Picture,
    RequestRow,
    class_figures,
    client_figures,
    node_figures,
)
from router.dashboard.samples import Samples

INTERVAL_S = 1.0
WINDOW = 5
"""What is called recent is the difference of so many intervals."""

NODE_TIMEOUT_S = 1.0
MAX_REQUESTS = 200
"""Latest requests that are remembered; `MAX_ROWS` of them are shown."""

MAX_ROWS = 40

MIN_PREFIX = 12
"""Characters that stand for a whole id: `cmpl-` and 7 random ones."""


class Fleet(Protocol):
    """The nodes of a router."""

    def obstacles(self, now_s: float) -> dict[str, str | None]:
        """Return, for each node, why it cannot be used now; None if it can."""
        ...

    def urls(self) -> dict[str, str]:
        """Return the address of each node."""
        ...


class RecentRequests:
    """The router's latest generations, oldest first."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=MAX_REQUESTS)

    def add(self, record: RequestRecord) -> None:
        """A request was accepted."""
        self._records.append(record)

    def find(self, request_id: str) -> RequestRecord | None:
        """Return the newest request with this id: that of its answer, or how that begins, or that
        of its HTTP header."""
        for record in reversed(self._records):
            if request_id in (record.completion_id, record.request_id):
                return record
        if len(request_id) < MIN_PREFIX:
            return None
        starting = (r for r in reversed(self._records) if _id_of(r).startswith(request_id))
        return next(starting, None)

    def rows(self, now_s: float) -> list[RequestRow]:
        """Return the newest ones, the newest first."""
        newest = list(self._records)[-MAX_ROWS:]
        return [_row(record, now_s) for record in reversed(newest)]


class Observer:
    """What the dashboard shows. Belongs to one event loop."""

    def __init__(
        self,
        fleet: Fleet,
        requests: RecentRequests,
        *,
        own_metrics: Callable[[], Awaitable[str]],
        class_weights: Mapping[str, float],
        now_s: Callable[[], float],
    ) -> None:
        """`own_metrics` returns the router's Prometheus text, `now_s` its clock."""
        self._fleet, self._requests = fleet, requests
        self._own_metrics, self._class_weights, self._now_s = own_metrics, class_weights, now_s
        self._client = httpx.AsyncClient(timeout=NODE_TIMEOUT_S, trust_env=False)
        self._observations: deque[Observation] = deque(maxlen=WINDOW + 1)
        self._watchers: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def pictures(self) -> AsyncGenerator[bytes]:
        """Yield a `Picture` as JSON now and every second."""
        # One place: whoever reads too slowly misses pictures, and sees the newest.
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._watchers.add(queue)
        if self._task is None or self._task.done():
            self._observations.clear()
            self._task = asyncio.create_task(self._observe())
        try:
            while (picture := await queue.get()) is not None:
                yield picture
        finally:
            self._watchers.discard(queue)
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def stories(self, record: RequestRecord) -> list[tuple[str, Story]]:
        """Return what the router, then each node that it was sent to, knows of a request, with who
        tells it."""
        assert record.completion_id is not None
        told = [("router", record.book.story(record.completion_id))]
        sent = {
            (str(event.attributes["node"]), str(event.attributes["sequence_id"])): None
            for event in told[0][1].events
            if event.name == "sent"
        }
        found = await asyncio.gather(*(self._node_story(*which) for which in sent))
        return told + [pair for pair in found if pair is not None]

    def end_all(self) -> None:
        """End what `pictures` yields to everybody."""
        self._tell(None)

    async def close(self) -> None:
        """End everything."""
        if self._task is not None:
            self._task.cancel()
        await self._client.aclose()

    async def picture(self) -> Picture:
        """Scrape everything; return what it says, compared with a few seconds before."""
        urls = self._fleet.urls()
        nodes = await asyncio.gather(*(self._node_metrics(url) for url in urls.values()))
        own = Samples(await self._own_metrics())
        now = Observation(time.time(), own, dict(zip(urls, nodes, strict=True)))
        before = self._observations[0] if self._observations else now
        self._observations.append(now)
        now_s = self._now_s()
        return Picture(
            at_unix_s=now.at_unix_s,
            window_s=now.at_unix_s - before.at_unix_s,
            waiting_sequences=now.router.value("proserve_router_waiting_sequences"),
            classes=class_figures(now, before, self._class_weights),
            clients=client_figures(now, before),
            nodes=node_figures(now, before, self._fleet.obstacles(now_s)),
            requests=self._requests.rows(now_s),
        )

    async def _observe(self) -> None:
        try:
            while True:
                self._tell(msgspec.json.encode(await self.picture()))
                await asyncio.sleep(INTERVAL_S)
        finally:
            # Whatever went wrong: nobody waits for a picture that will not come.
            self.end_all()

    def _tell(self, line: bytes | None) -> None:
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(line)

    async def _node_metrics(self, url: str) -> Samples | None:
        try:
            answer = await self._client.get(f"{url}/metrics")
            return Samples(answer.text) if answer.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError):  # no answer, or none that is Prometheus text
            return None

    async def _node_story(self, endpoint_id: str, sequence_id: str) -> tuple[str, Story] | None:
        url = self._fleet.urls().get(endpoint_id)
        if url is None:
            return None
        try:
            answer = await self._client.get(f"{url}/v1/requests/{sequence_id}")
        except httpx.HTTPError:
            return None
        if answer.status_code != httpx.codes.OK:
            return None
        try:
            return endpoint_id, msgspec.json.decode(answer.content, type=Story)
        except msgspec.DecodeError:
            return None


def _id_of(record: RequestRecord) -> str:
    return record.completion_id or ""


def _row(record: RequestRecord, now_s: float) -> RequestRow:
    sent = record.book.last("sent")
    state = "waiting" if record.ttft_s is None else "decoding"
    if record.duration_s is not None:
        reasons: Iterable[str] = dict.fromkeys(record.finish_reasons)
        state = record.error or ", ".join(reasons) or "left"
        if record.has_client_left:
            state = "left"
    return RequestRow(
        completion_id=_id_of(record),
        client=record.client.name or None if record.client else None,
        priority_class=record.priority_class,
        state=state,
        node=None if sent is None else str(sent.attributes["node"]),
        num_nodes=0 if sent is None else int(sent.attributes["attempt"] or 0),
        num_prompt_tokens=record.num_prompt_tokens,
        num_completion_tokens=record.num_completion_tokens,
        age_s=record.duration_s if record.duration_s is not None else now_s - record.arrival_s,
        ttft_ms=None if record.ttft_s is None else 1e3 * record.ttft_s,
    )
