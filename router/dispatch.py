"""Sends a sequence to a node, and to another one if the first fails before its first token."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from orchestrator.core.errors import EngineStepError, NodeUnavailable
from orchestrator.core.ports import Clock
from orchestrator.core.request import FinishReason
from orchestrator.wire import GenerateRequest, TokenEvent
from router.endpoints import EndpointPool
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.policy import RoutingPolicy, RoutingRequest


class Dispatcher:
    """Routes sequences to the nodes of a pool."""

    def __init__(
        self,
        pool: EndpointPool,
        client: NodeClient,
        policy: RoutingPolicy,
        clock: Clock,
        metrics: RouterMetrics,
        *,
        max_attempts: int,
    ) -> None:
        self._pool = pool
        self._client = client
        self._policy = policy
        self._clock = clock
        self._metrics = metrics
        self._max_attempts = max_attempts

    async def generate(
        self, routing: RoutingRequest, request: GenerateRequest, used_endpoints: list[str]
    ) -> AsyncGenerator[Sequence[TokenEvent]]:
        """Yield the events of one sequence as they come; the last one's finish reason is stop or
        length.

        Appends each node that is tried to `used_endpoints`; no node is tried twice.

        Raises:
            NodeUnavailable: no node could take the sequence, or its node was lost after a token.
            RequestRejected: the node finds the request invalid.
            EngineStepError: the node's engine failed on the sequence.
        """
        tried: list[str] = []
        while True:
            endpoint_id = self._pick(routing, tried)
            tried.append(endpoint_id)
            used_endpoints.append(endpoint_id)
            dispatch = self._pool.begin_dispatch(
                endpoint_id, num_prompt_tokens=routing.num_prompt_tokens
            )
            elapsed_s = self._clock.now_s() - routing.arrival_s
            batches = self._client.generate(
                self._pool.url_of(endpoint_id),
                msgspec.structs.replace(request, elapsed_s=elapsed_s),
            )
            try:
                async with aclosing(batches):
                    async for events in batches:
                        failure = _failure(events[-1], request.request_id, endpoint_id)
                        good = events if failure is None else events[:-1]
                        if good:
                            dispatch.has_first_token = True
                            yield good
                        if failure is not None:
                            raise failure
                return
            except NodeUnavailable as error:
                self._metrics.upstream_errors(endpoint_id).inc()
                self._pool.mark_failed(endpoint_id, str(error))
                if dispatch.has_first_token or len(tried) == self._max_attempts:
                    raise
            finally:
                self._pool.end_dispatch(endpoint_id, dispatch)

    def _pick(self, routing: RoutingRequest, tried: list[str]) -> str:
        now_s = self._clock.now_s()
        usable = [
            view
            for view in self._pool.views(now_s, exclude=tried)
            if view.max_sequence_tokens >= routing.max_size
        ]
        decision = self._policy.pick(routing, usable, now_s)
        if decision.endpoint_id is None:
            raise NodeUnavailable(self._pool.explain_obstacles())
        return decision.endpoint_id


def _failure(
    event: TokenEvent, request_id: str, endpoint_id: str
) -> EngineStepError | NodeUnavailable | None:
    match event.finish_reason:
        case FinishReason.ERROR:
            message = f"the engine of node {endpoint_id} failed: {event.error}"
            return EngineStepError(message, request_ids=[request_id])
        case FinishReason.ABORT | FinishReason.LOST as reason:
            # No client of ours aborts by event, so both say that the node will not go on.
            message = f"node {endpoint_id} gave the request up: {event.error or reason.value}"
            return NodeUnavailable(message)
        case None | FinishReason.STOP | FinishReason.LENGTH:
            return None
