"""The nodes a router may use: their last snapshot, its age, and what was sent there since."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.core.errors import NodeUnavailable
from orchestrator.core.ports import Clock, EngineCapabilities
from orchestrator.wire import NodeDescription, NodeSnapshot
from router.config import EndpointConfig, RouterSettings
from router.health import CircuitBreaker, SlowStart
from router.node_client import NodeClient
from router.policy import EndpointView


@dataclass(slots=True, eq=False)
class Dispatch:
    """A sequence that this router sent to a node and that has not ended."""

    instance_id: str
    """The process it was sent to."""

    num_prompt_tokens: int
    sent_at_s: float
    has_first_token: bool = False


@dataclass(slots=True, eq=False)
class Endpoint:
    """Everything known of one node. Changed by its pool only."""

    endpoint_id: str
    url: str
    breaker: CircuitBreaker
    slow_start: SlowStart
    description: NodeDescription | None = None
    snapshot: NodeSnapshot | None = None
    asked_at_s: float = 0.0
    """When the last snapshot was asked for."""

    failure: str | None = "not heard of yet"
    """Why the node cannot be used, until a poll succeeds."""

    last_description: NodeDescription | None = None
    """The newest that was heard; stays while the node cannot be used."""

    is_unreachable: bool = False
    """The last poll failed."""

    dispatches: set[Dispatch] = field(default_factory=set)


class EndpointPool:
    """Polls the configured nodes and says which can be used now."""

    def __init__(
        self,
        endpoints: Sequence[EndpointConfig],
        client: NodeClient,
        clock: Clock,
        *,
        model: str,
        settings: RouterSettings,
    ) -> None:
        self._settings = settings
        self._endpoints = {
            e.endpoint_id: Endpoint(
                e.endpoint_id, e.url, self._new_breaker(), SlowStart(settings.health.slow_start_s)
            )
            for e in endpoints
        }
        self._client = client
        self._clock = clock
        self._model = model
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Poll every node once, then keep polling until `stop`."""
        await asyncio.gather(*(self._poll(e) for e in self._endpoints.values()))
        self._tasks = [
            asyncio.create_task(self._keep_polling(e), name=f"poll {e.endpoint_id}")
            for e in self._endpoints.values()
        ]

    async def stop(self) -> None:
        """End the polling."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def views(self, now_s: float, *, exclude: Collection[str] = ()) -> list[EndpointView]:
        """Return the nodes that can be used now, without the processes (`instance_id`) in
        `exclude`.

        Those that have come back lately and are given enough already are only there if there is
        no other.
        """
        usable = [
            (_view(endpoint, description, snapshot), _has_room(endpoint, description, now_s))
            for endpoint in self._endpoints.values()
            if self._obstacle(endpoint, now_s) is None
            and (description := endpoint.description) is not None
            and (snapshot := endpoint.snapshot) is not None
            and description.instance_id not in exclude
        ]
        return [view for view, has_room in usable if has_room] or [view for view, _ in usable]

    def obstacles(self, now_s: float) -> dict[str, str | None]:
        """Return, for each node, why it cannot be used now; None if it can."""
        return {e.endpoint_id: self._obstacle(e, now_s) for e in self._endpoints.values()}

    def url_of(self, endpoint_id: str) -> str:
        """Return the address of a node."""
        return self._endpoints[endpoint_id].url

    def description_of(self, endpoint_id: str) -> NodeDescription:
        """Return what a node that `views` has just offered serves."""
        description = self._endpoints[endpoint_id].description
        assert description is not None, "only nodes that were described are offered"
        return description

    def max_sequence_tokens(self) -> int:
        """Return the longest sequence, prompt and output, that any node takes that was ever there.

        Raises:
            NodeUnavailable: no node was.
        """
        known = [d for e in self._endpoints.values() if (d := e.last_description) is not None]
        if not known:
            raise NodeUnavailable(self.explain_obstacles())
        return max(_max_sequence_tokens(description.capabilities) for description in known)

    def explain_obstacles(self) -> str:
        """Return why there is no node for a request, in words for its client."""
        reasons = "; ".join(
            f"{endpoint_id}: {obstacle or 'tried without success, or too small for the request'}"
            for endpoint_id, obstacle in self.obstacles(self._clock.now_s()).items()
        )
        return f"no node can take the request now, try again later ({reasons})"

    def begin_dispatch(self, endpoint_id: str, *, num_prompt_tokens: int) -> Dispatch:
        """Count a sequence on a node until `end_dispatch`; its snapshots may not show it yet."""
        endpoint, now_s = self._endpoints[endpoint_id], self._clock.now_s()
        assert endpoint.description is not None, "the node was on offer"
        dispatch = Dispatch(endpoint.description.instance_id, num_prompt_tokens, now_s)
        endpoint.dispatches.add(dispatch)
        endpoint.breaker.begin(dispatch, now_s)
        return dispatch

    def end_dispatch(self, endpoint_id: str, dispatch: Dispatch) -> None:
        """The sequence has ended, however."""
        endpoint = self._endpoints[endpoint_id]
        endpoint.dispatches.discard(dispatch)
        endpoint.breaker.end(dispatch)

    def note_token(self, endpoint_id: str, dispatch: Dispatch) -> None:
        """A sequence has got its first token from a node."""
        dispatch.has_first_token = True
        endpoint = self._endpoints[endpoint_id]
        if endpoint.breaker.answer(dispatch):
            endpoint.slow_start.begin(self._clock.now_s())

    def note_success(self, endpoint_id: str) -> None:
        """A sequence has got its last token from a node."""
        self._endpoints[endpoint_id].breaker.succeed()

    def lose_node(self, endpoint_id: str, dispatch: Dispatch, reason: str) -> None:
        """A node has lost a sequence: do not use it until it answers a poll again, and not even
        then if that happens too often."""
        endpoint = self._endpoints[endpoint_id]
        last = endpoint.last_description
        if last is None or last.instance_id != dispatch.instance_id:
            return  # Another process has taken its place.
        endpoint.breaker.fail(dispatch, self._clock.now_s())
        if endpoint.description is not None:
            self.mark_failed(endpoint_id, reason)

    def mark_failed(self, endpoint_id: str, reason: str) -> None:
        """Do not use a node until it answers a poll again."""
        endpoint = self._endpoints[endpoint_id]
        endpoint.failure = reason
        # It may come back as another process.
        endpoint.description = endpoint.snapshot = None

    def _obstacle(self, endpoint: Endpoint, now_s: float) -> str | None:
        if endpoint.failure is not None:
            return endpoint.failure
        assert endpoint.snapshot is not None, "a poll that succeeds sets it"
        age_s = now_s - endpoint.asked_at_s
        if age_s > self._settings.max_snapshot_age_s:
            return f"not heard of for {age_s:.1f} s"
        if endpoint.snapshot.is_draining:
            return "draining"
        return endpoint.breaker.obstacle(now_s)

    async def _keep_polling(self, endpoint: Endpoint) -> None:
        while True:
            await asyncio.sleep(self._settings.snapshot_poll_interval_s)
            await self._poll(endpoint)

    async def _poll(self, endpoint: Endpoint) -> None:
        timeout_s = self._settings.max_snapshot_age_s
        try:
            description = endpoint.description or await self._describe(endpoint, timeout_s)
            asked_at_s = self._clock.now_s()
            snapshot = await self._client.snapshot(endpoint.url, timeout_s=timeout_s)
            if snapshot.instance_id != description.instance_id:
                # Another process, to be asked who it is.
                raise NodeUnavailable(f"node {endpoint.endpoint_id} has just restarted")
        except NodeUnavailable as error:
            endpoint.is_unreachable = True
            self.mark_failed(endpoint.endpoint_id, str(error))
        else:
            self._welcome(endpoint, description)
            endpoint.description, endpoint.snapshot = description, snapshot
            endpoint.asked_at_s, endpoint.failure = asked_at_s, None

    def _welcome(self, endpoint: Endpoint, description: NodeDescription) -> None:
        """Take note of who answers; a node that was away begins slowly."""
        last = endpoint.last_description
        is_new = last is None or last.instance_id != description.instance_id
        if last is not None and (is_new or endpoint.is_unreachable):
            endpoint.slow_start.begin(self._clock.now_s())
        if is_new:
            endpoint.breaker = self._new_breaker()
        endpoint.last_description, endpoint.is_unreachable = description, False

    def _new_breaker(self) -> CircuitBreaker:
        return CircuitBreaker(self._settings.health.breaker_rules())

    async def _describe(self, endpoint: Endpoint, timeout_s: float) -> NodeDescription:
        description = await self._client.describe(endpoint.url, timeout_s=timeout_s)
        if description.endpoint_id != endpoint.endpoint_id:
            raise NodeUnavailable(
                f"{endpoint.url} is node {description.endpoint_id!r}, "
                f"the router's configuration calls it {endpoint.endpoint_id!r}"
            )
        if description.model != self._model:
            raise NodeUnavailable(
                f"node {endpoint.endpoint_id} serves {description.model!r}, "
                f"the router serves {self._model!r}"
            )
        return description


def _max_sequence_tokens(capabilities: EngineCapabilities) -> int:
    # The last token is delivered but never computed, so it needs no KV.
    num_kv_tokens = capabilities.num_device_blocks * capabilities.block_size_tokens + 1
    return min(capabilities.max_model_len, num_kv_tokens)


def _has_room(endpoint: Endpoint, description: NodeDescription, now_s: float) -> bool:
    capacity = description.capabilities.max_num_seqs
    limit = endpoint.slow_start.max_requests(now_s, capacity=capacity)
    return limit is None or len(endpoint.dispatches) < limit


def _view(endpoint: Endpoint, description: NodeDescription, snapshot: NodeSnapshot) -> EndpointView:
    unseen = [d for d in endpoint.dispatches if d.sent_at_s >= endpoint.asked_at_s]
    return EndpointView(
        endpoint_id=endpoint.endpoint_id,
        num_queued_prompt_tokens=snapshot.load.num_queued_prompt_tokens
        + sum(d.num_prompt_tokens for d in unseen if not d.has_first_token),
        num_decoding=snapshot.load.num_decoding + sum(d.has_first_token for d in unseen),
        max_sequence_tokens=_max_sequence_tokens(description.capabilities),
    )
