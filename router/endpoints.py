"""The nodes a router may use: their last snapshot, its age, and what was sent there since."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.core.errors import NodeUnavailable
from orchestrator.core.ports import Clock, EngineCapabilities
from orchestrator.wire import NodeDescription, NodeSnapshot
from router.config import EndpointConfig
from router.node_client import NodeClient
from router.policy import EndpointView


@dataclass(slots=True, eq=False)
class Dispatch:
    """A sequence that this router sent to a node and that has not ended."""

    num_prompt_tokens: int
    sent_at_s: float
    has_first_token: bool = False


@dataclass(slots=True, eq=False)
class Endpoint:
    """Everything known of one node. Changed by its pool only."""

    endpoint_id: str
    url: str
    description: NodeDescription | None = None
    snapshot: NodeSnapshot | None = None
    asked_at_s: float = 0.0
    """When the last snapshot was asked for."""

    failure: str | None = "not heard of yet"
    """Why the node cannot be used, until a poll succeeds."""

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
        poll_interval_s: float,
        max_snapshot_age_s: float,
    ) -> None:
        self._endpoints = {e.endpoint_id: Endpoint(e.endpoint_id, e.url) for e in endpoints}
        self._client = client
        self._clock = clock
        self._model = model
        self._poll_interval_s = poll_interval_s
        self._max_snapshot_age_s = max_snapshot_age_s
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
        """Return the nodes that can be used now, without those in `exclude`."""
        return [
            _view(endpoint, endpoint.description, endpoint.snapshot)
            for endpoint in self._endpoints.values()
            if endpoint.endpoint_id not in exclude
            and self._obstacle(endpoint, now_s) is None
            and endpoint.description is not None
            and endpoint.snapshot is not None
        ]

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
        """Return the longest sequence, prompt and output, that any known node takes.

        Raises:
            NodeUnavailable: no node is known.
        """
        known = [e.description for e in self._endpoints.values() if e.description is not None]
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
        dispatch = Dispatch(num_prompt_tokens, self._clock.now_s())
        self._endpoints[endpoint_id].dispatches.add(dispatch)
        return dispatch

    def end_dispatch(self, endpoint_id: str, dispatch: Dispatch) -> None:
        """The sequence has ended, however."""
        self._endpoints[endpoint_id].dispatches.discard(dispatch)

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
        if age_s > self._max_snapshot_age_s:
            return f"not heard of for {age_s:.1f} s"
        return "draining" if endpoint.snapshot.is_draining else None

    async def _keep_polling(self, endpoint: Endpoint) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            await self._poll(endpoint)

    async def _poll(self, endpoint: Endpoint) -> None:
        timeout_s = self._max_snapshot_age_s
        try:
            description = endpoint.description or await self._describe(endpoint, timeout_s)
            asked_at_s = self._clock.now_s()
            snapshot = await self._client.snapshot(endpoint.url, timeout_s=timeout_s)
            if endpoint.snapshot is not None and snapshot.seq_no < endpoint.snapshot.seq_no:
                # Counting began anew: another process, to be asked who it is.
                raise NodeUnavailable(f"node {endpoint.endpoint_id} has just restarted")
        except NodeUnavailable as error:
            self.mark_failed(endpoint.endpoint_id, str(error))
        else:
            endpoint.description, endpoint.snapshot = description, snapshot
            endpoint.asked_at_s, endpoint.failure = asked_at_s, None

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


def _view(endpoint: Endpoint, description: NodeDescription, snapshot: NodeSnapshot) -> EndpointView:
    unseen = [d for d in endpoint.dispatches if d.sent_at_s >= endpoint.asked_at_s]
    return EndpointView(
        endpoint_id=endpoint.endpoint_id,
        num_queued_prompt_tokens=snapshot.load.num_queued_prompt_tokens
        + sum(d.num_prompt_tokens for d in unseen if not d.has_first_token),
        num_decoding=snapshot.load.num_decoding + sum(d.has_first_token for d in unseen),
        max_sequence_tokens=_max_sequence_tokens(description.capabilities),
    )
