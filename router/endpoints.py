"""The nodes a router may use: where they are, what they last said, and whether they may be used.

Nodes stream snapshots of what they hold; where a stream ends or there is none, they are polled.
What a routing policy needs to know of them is kept in a `Fleet`. Who they are says the
configuration, and whoever calls `EndpointPool.add` and `remove` as nodes come and go.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from orchestrator.core.errors import NodeUnavailable
from orchestrator.core.ports import Clock
from orchestrator.wire import NodeDescription, NodeSnapshot
from router.config import EndpointConfig, RouterConfig
from router.fleet import Dispatch, EndpointSnapshot, Flags, Fleet, max_sequence_tokens
from router.health import CircuitBreaker, SlowStart
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.policy import RoutingDecision, RoutingRequest

_log = structlog.get_logger("router")

_TIMELINESS = {True: "in_time", False: "late"}

IN_FLIGHT_S = 0.005
"""A request is taken to be missing from a streamed snapshot if it was sent later than this before
the snapshot came: it may have been on its way. Counted twice for a moment does less harm than not
at all."""

_NOT_HEARD_OF = "not heard of yet"


@dataclass(slots=True, eq=False)
class Endpoint:
    """Everything known of one node. Changed by its pool only."""

    endpoint_id: str
    url: str
    breaker: CircuitBreaker
    slow_start: SlowStart
    description: NodeDescription | None = None
    snapshot: NodeSnapshot | None = None
    heard_at_s: float = 0.0
    """When the last snapshot was new at the latest."""

    failure: str | None = _NOT_HEARD_OF
    """Why the node cannot be used, until a poll succeeds."""

    last_description: NodeDescription | None = None
    """The newest that was heard; stays while the node cannot be used."""

    is_unreachable: bool = False
    """The last poll failed."""

    num_dispatches: int = 0
    """Sequences that this router sent there and that have not ended."""

    task: asyncio.Task[None] | None = None
    """Follows the node; None while the pool is not started."""

    def has_room(self, now_s: float) -> bool:
        """Return whether the node may be given more while it begins slowly."""
        if self.description is None:
            return False
        capacity = self.description.capabilities.max_num_seqs
        limit = self.slow_start.max_requests(now_s, capacity=capacity)
        return limit is None or self.num_dispatches < limit

    def is_well(self, now_s: float) -> bool:
        """Return whether the node may be used without limits."""
        return not self.breaker.is_open and not self.slow_start.is_running(now_s)


class EndpointPool:
    """Listens to nodes and says which can be used now. Belongs to one event loop."""

    def __init__(
        self, config: RouterConfig, client: NodeClient, clock: Clock, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._endpoints = {e.endpoint_id: self._new_endpoint(e) for e in config.nodes}
        self._client = client
        self._clock = clock
        self._metrics = metrics
        self._watched: set[str] = set()
        """Nodes that have failed or come back, for whose sake breakers and slow starts are asked:
        all others are known to have none."""

        self._endpoint_of: dict[Dispatch, Endpoint] = {}
        """Of dispatches that have not ended; the endpoint may have been removed since."""

        self._longest_gone_tokens: int | None = None
        """The longest sequence that any removed node took; None if none was removed."""

        self._is_started = False
        self.fleet = Fleet(self._endpoints, config.estimates)
        """For routing policies, which only read it."""

    async def start(self) -> None:
        """Poll every node once, then follow them all until `stop`. None is removed meanwhile."""
        await asyncio.gather(*(self._poll(e) for e in self._endpoints.values()))
        self._is_started = True
        for endpoint in self._endpoints.values():
            self._begin_to_follow(endpoint)

    async def stop(self) -> None:
        """Stop following."""
        tasks = [e.task for e in self._endpoints.values() if e.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __contains__(self, endpoint_id: str) -> bool:
        return endpoint_id in self._endpoints

    def add(self, node: EndpointConfig) -> None:
        """Follow one more node, whose id no other has. It is used once it has answered a poll."""
        assert node.endpoint_id not in self._endpoints, "each node is added once"
        endpoint = self._endpoints[node.endpoint_id] = self._new_endpoint(node)
        self.fleet.add(node.endpoint_id)
        if self._is_started:
            self._begin_to_follow(endpoint)

    def remove(self, endpoint_id: str) -> None:
        """Send nothing more to a node and forget it. What it works on goes on until it ends."""
        endpoint = self._endpoints.pop(endpoint_id)
        if endpoint.task is not None:
            endpoint.task.cancel()
        if (last := endpoint.last_description) is not None:
            tokens = max_sequence_tokens(last.capabilities)
            self._longest_gone_tokens = max(tokens, self._longest_gone_tokens or 0)
        self._watched.discard(endpoint_id)
        self.fleet.remove(endpoint_id)

    def is_reachable(self, endpoint_id: str) -> bool:
        """Return whether a node answered when it was last asked or listened to."""
        return self._endpoints[endpoint_id].failure is None

    def offer(
        self,
        now_s: float,
        num_tokens: int,
        exclude: Collection[str] = (),
        *,
        needs_grammar: bool = False,
    ) -> Flags:
        """Return which nodes can be used now, as rows of the fleet; arguments as `Fleet.offer`.

        Those that have come back lately and are given enough already are only there if there is
        no other.
        """
        offered = self.fleet.offer(now_s, num_tokens, exclude, needs_grammar=needs_grammar)
        if not self._watched:
            return offered
        has_room = offered.copy()
        for endpoint_id in tuple(self._watched):
            endpoint, row = self._endpoints[endpoint_id], self.fleet.row_of(endpoint_id)
            if endpoint.breaker.obstacle(now_s) is not None:
                offered[row] = has_room[row] = False
            elif not endpoint.has_room(now_s):
                has_room[row] = False
            elif endpoint.is_well(now_s):
                self._watched.discard(endpoint_id)
        return has_room if has_room.any() else offered

    def obstacles(self, now_s: float) -> dict[str, str | None]:
        """Return, for each node, why it cannot be used now; None if it can."""
        return {e.endpoint_id: self._obstacle(e, now_s) for e in self._endpoints.values()}

    def urls(self) -> dict[str, str]:
        """Return the address of each node."""
        return {e.endpoint_id: e.url for e in self._endpoints.values()}

    def num_sequences(self) -> dict[str, int]:
        """Return how many sequences each node has been sent that have not ended."""
        return {e.endpoint_id: e.num_dispatches for e in self._endpoints.values()}

    def url_of(self, dispatch: Dispatch) -> str:
        """Return the address of the node of a dispatch that has not ended."""
        return self._endpoint_of[dispatch].url

    def max_sequence_tokens(self) -> int:
        """Return the longest sequence, prompt and output, that any node takes that was ever there.

        Raises:
            NodeUnavailable: no node was.
        """
        known = [
            max_sequence_tokens(description.capabilities)
            for endpoint in self._endpoints.values()
            if (description := endpoint.last_description) is not None
        ]
        if self._longest_gone_tokens is not None:
            known.append(self._longest_gone_tokens)
        if not known:
            raise NodeUnavailable(self.explain_obstacles())
        return max(known)

    def grammar_obstacle(self) -> str | None:
        """Return why no node will ever take a request with a grammar, in words for its client;
        None if one does, or may."""
        reasons = []
        for endpoint in self._endpoints.values():
            description = endpoint.last_description
            if description is None or description.capabilities.grammar_obstacle is None:
                return None
            reasons.append(f"{endpoint.endpoint_id}: {description.capabilities.grammar_obstacle}")
        return "; ".join(reasons) or None

    def explain_obstacles(self) -> str:
        """Return why there is no node for a request, in words for its client."""
        unsuited = "tried without success, too small for the request, or unable to follow its form"
        reasons = "; ".join(
            f"{endpoint_id}: {obstacle or unsuited}"
            for endpoint_id, obstacle in self.obstacles(self._clock.now_s()).items()
        )
        reasons = reasons or "no node is registered"
        return f"no node can take the request now, try again later ({reasons})"

    def begin_dispatch(
        self, request: RoutingRequest, decision: RoutingDecision, now_s: float
    ) -> Dispatch:
        """Count a sequence on the node of a decision until `end_dispatch`."""
        assert decision.endpoint_id is not None, "only what is sent somewhere is counted"
        dispatch = self.fleet.begin_dispatch(
            decision.endpoint_id, request, now_s, is_satisfiable=decision.is_satisfiable
        )
        endpoint = self._endpoint_of[dispatch] = self._endpoints[decision.endpoint_id]
        endpoint.num_dispatches += 1
        endpoint.breaker.begin(dispatch, now_s)
        return dispatch

    def note_first_token(self, dispatch: Dispatch) -> None:
        """A sequence has produced output; only the first call of each counts."""
        if dispatch.has_first_token:
            return
        now_s = self._clock.now_s()
        self.fleet.note_first_token(dispatch)
        self._compare(dispatch, is_in_time=now_s < dispatch.request.due_s)
        endpoint = self._endpoint_of[dispatch]
        if endpoint.breaker.answer(dispatch):
            endpoint.slow_start.begin(now_s)

    def end_dispatch(self, dispatch: Dispatch) -> None:
        """The sequence has ended, however."""
        self.fleet.end_dispatch(dispatch)
        endpoint = self._endpoint_of.pop(dispatch)
        endpoint.num_dispatches -= 1
        endpoint.breaker.end(dispatch)
        # Who gave up before the deadline leaves open whether it would have been met.
        if not dispatch.has_first_token and self._clock.now_s() >= dispatch.request.due_s:
            self._compare(dispatch, is_in_time=False)

    def note_success(self, dispatch: Dispatch) -> None:
        """A sequence has got its last token."""
        self._endpoint_of[dispatch].breaker.succeed()

    def lose_node(self, dispatch: Dispatch, reason: str) -> None:
        """A node has lost a sequence: do not use it until it answers a poll again, and not even
        then if that happens too often."""
        endpoint = self._endpoint_of[dispatch]
        last = endpoint.last_description
        if last is None or last.instance_id != dispatch.instance_id:
            return  # Another process has taken its place.
        if self._endpoints.get(dispatch.endpoint_id) is not endpoint:
            return  # It was removed.
        endpoint.breaker.fail(dispatch, self._clock.now_s())
        self._watched.add(dispatch.endpoint_id)
        if endpoint.description is not None:
            self.mark_failed(dispatch.endpoint_id, reason)

    def mark_failed(self, endpoint_id: str, reason: str) -> None:
        """Do not use a node until it answers a poll again."""
        endpoint = self._endpoints[endpoint_id]
        if endpoint.failure in {None, _NOT_HEARD_OF}:
            _log.warning(
                "node_unavailable", endpoint_id=endpoint_id, url=endpoint.url, reason=reason
            )
        endpoint.failure = reason
        # It may come back as another process.
        endpoint.description = endpoint.snapshot = None
        self.fleet.allow(endpoint_id, until_s=-math.inf)

    def _compare(self, dispatch: Dispatch, *, is_in_time: bool) -> None:
        """Count what was predicted of a first token against what came."""
        if dispatch.is_satisfiable is not None:
            self._metrics.first_tokens_predicted(
                _TIMELINESS[dispatch.is_satisfiable], _TIMELINESS[is_in_time]
            ).inc()

    def _obstacle(self, endpoint: Endpoint, now_s: float) -> str | None:
        if endpoint.failure is not None:
            return endpoint.failure
        assert endpoint.snapshot is not None, "a snapshot ends a failure"
        age_s = now_s - endpoint.heard_at_s
        if age_s > self._config.max_snapshot_age_s:
            return f"not heard of for {age_s:.1f} s"
        if endpoint.snapshot.is_draining:
            return "draining"
        return endpoint.breaker.obstacle(now_s)

    def _begin_to_follow(self, endpoint: Endpoint) -> None:
        name = f"follow {endpoint.endpoint_id}"
        endpoint.task = asyncio.create_task(self._follow(endpoint), name=name)

    async def _follow(self, endpoint: Endpoint) -> None:
        if endpoint.last_description is None and not endpoint.is_unreachable:
            await self._poll(endpoint)  # for the first time
        while True:
            if endpoint.failure is None:
                await self._listen(endpoint)
            await asyncio.sleep(self._config.snapshot_poll_interval_s)
            await self._poll(endpoint)

    async def _listen(self, endpoint: Endpoint) -> None:
        """Take in a node's stream of snapshots until it ends; the next poll says why."""
        timeout_s = self._config.max_snapshot_age_s
        try:
            async with aclosing(self._client.snapshots(endpoint.url, timeout_s=timeout_s)) as lines:
                async for snapshot in lines:
                    if endpoint.description is None:
                        return  # marked as failed meanwhile: to be asked anew who it is
                    heard_at_s = self._clock.now_s() - IN_FLIGHT_S
                    self._take(endpoint, endpoint.description, snapshot, heard_at_s)
        except NodeUnavailable:
            return

    async def _poll(self, endpoint: Endpoint) -> None:
        timeout_s = self._config.max_snapshot_age_s
        try:
            description = endpoint.description or await self._describe(endpoint, timeout_s)
            asked_at_s = self._clock.now_s()
            snapshot = await self._client.snapshot(endpoint.url, timeout_s=timeout_s)
            self._take(endpoint, description, snapshot, asked_at_s)
        except NodeUnavailable as error:
            endpoint.is_unreachable = True
            self.mark_failed(endpoint.endpoint_id, str(error))
        else:
            self._welcome(endpoint, description)

    def _take(
        self,
        endpoint: Endpoint,
        description: NodeDescription,
        snapshot: NodeSnapshot,
        heard_at_s: float,
    ) -> None:
        """Take in a snapshot, which has in it what was sent to the node before `heard_at_s`.

        Raises:
            NodeUnavailable: another process has taken the node's place.
        """
        if snapshot.instance_id != description.instance_id:
            # To be asked who it is.
            raise NodeUnavailable(f"node {endpoint.endpoint_id} has just restarted")
        if endpoint.failure is not None:
            _log.info("node_available", endpoint_id=endpoint.endpoint_id, url=endpoint.url)
        endpoint.description, endpoint.snapshot = description, snapshot
        endpoint.heard_at_s, endpoint.failure = heard_at_s, None
        self.fleet.see(
            endpoint.endpoint_id,
            EndpointSnapshot(
                instance_id=snapshot.instance_id,
                capabilities=description.capabilities,
                load=snapshot.load,
                queue=snapshot.queue,
                taken_at_s=heard_at_s - snapshot.age_s,
                complete_until_s=heard_at_s,
            ),
        )
        until_s = heard_at_s + self._config.max_snapshot_age_s
        self.fleet.allow(endpoint.endpoint_id, -math.inf if snapshot.is_draining else until_s)

    def _welcome(self, endpoint: Endpoint, description: NodeDescription) -> None:
        """Take note of who answers; a node that was away begins slowly."""
        last = endpoint.last_description
        is_new = last is None or last.instance_id != description.instance_id
        if last is not None and (is_new or endpoint.is_unreachable):
            endpoint.slow_start.begin(self._clock.now_s())
            self._watched.add(endpoint.endpoint_id)
        if is_new:
            endpoint.breaker = self._new_breaker()
        endpoint.last_description, endpoint.is_unreachable = description, False

    def _new_endpoint(self, node: EndpointConfig) -> Endpoint:
        slow_start = SlowStart(self._config.health.slow_start_s)
        return Endpoint(node.endpoint_id, node.url, self._new_breaker(), slow_start)

    def _new_breaker(self) -> CircuitBreaker:
        return CircuitBreaker(self._config.health.breaker_rules())

    async def _describe(self, endpoint: Endpoint, timeout_s: float) -> NodeDescription:
        description = await self._client.describe(endpoint.url, timeout_s=timeout_s)
        if description.endpoint_id != endpoint.endpoint_id:
            raise NodeUnavailable(
                f"{endpoint.url} is node {description.endpoint_id!r}, "
                f"the router knows it as {endpoint.endpoint_id!r}"
            )
        if description.model != self._config.model:
            raise NodeUnavailable(
                f"node {endpoint.endpoint_id} serves {description.model!r}, "
                f"the router serves {self._config.model!r}"
            )
        return description
