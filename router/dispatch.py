"""Sends a sequence to a node, and on to others until one has finished it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from orchestrator.core.errors import EngineStepError, NodeUnavailable
from orchestrator.core.ports import Clock
from orchestrator.core.request import FinishReason
from orchestrator.wire import GenerateRequest, TokenEvent
from router.endpoints import Dispatch, EndpointPool
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.policy import RoutingPolicy, RoutingRequest
from router.retries import RetryRules, SequenceProgress

Failure = NodeUnavailable | EngineStepError


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
        rules: RetryRules,
    ) -> None:
        self._pool = pool
        self._client = client
        self._policy = policy
        self._clock = clock
        self._metrics = metrics
        self._rules = rules

    async def generate(
        self,
        routing: RoutingRequest,
        request: GenerateRequest,
        used_endpoints: list[str],
        *,
        max_wait_s: float | None = None,
    ) -> AsyncGenerator[Sequence[TokenEvent]]:
        """Yield the events of one sequence as they come; the last one's finish reason is stop or
        length. However many nodes they come from, they are those of one undisturbed run.

        Appends each node that it is sent to to `used_endpoints`. `max_wait_s` as in
        `SequenceProgress`.

        Raises:
            NodeUnavailable: no node could take the sequence, or go on with it.
            RequestRejected: a node finds the request invalid.
            EngineStepError: the engine of the last node failed on the sequence.
        """
        progress = SequenceProgress(routing, self._rules, max_wait_s=max_wait_s)
        failure: Failure | None = None
        while True:
            endpoint_id = await self._next_endpoint(progress, failure)
            used_endpoints.append(endpoint_id)
            dispatch = self._begin(endpoint_id, progress)
            batches = self._client.generate(
                self._pool.url_of(endpoint_id), self._node_request(request, routing, progress)
            )
            try:
                async with aclosing(batches):
                    async for events in batches:
                        progress.accept()
                        if not events:
                            continue
                        failure = _failure(events[-1], request.request_id, endpoint_id)
                        good = events if failure is None else events[:-1]
                        if good:
                            self._note_tokens(endpoint_id, dispatch, progress, good)
                            yield good
                        if failure is not None:
                            raise failure
                self._pool.note_success(endpoint_id)
                return
            except (NodeUnavailable, EngineStepError) as error:
                failure = error
                self._lose(endpoint_id, dispatch, progress, error)
            finally:
                self._pool.end_dispatch(endpoint_id, dispatch)

    async def _next_endpoint(self, progress: SequenceProgress, failure: Failure | None) -> str:
        """Return the node to try next, as soon as there is one; `failure` is the last node's."""
        num_looks = progress.num_failures
        while True:
            if num_looks > 0:
                await asyncio.sleep(self._rules.delay_s(num_looks, random.random()))
            now_s = self._clock.now_s()
            reason = None if failure is None else progress.why_no_retry(now_s)
            if reason is None:
                endpoint_id = self._pick(progress, now_s)
                if endpoint_id is not None:
                    return endpoint_id
                reason = progress.why_no_wait(now_s)
            if reason is not None:
                raise self._given_up(failure, reason)
            num_looks += 1

    def _pick(self, progress: SequenceProgress, now_s: float) -> str | None:
        routing = progress.routing
        usable = [
            view
            for view in self._pool.views(now_s, exclude=progress.failed_instances)
            if view.max_sequence_tokens >= routing.max_size
        ]
        return self._policy.pick(routing, usable, now_s).endpoint_id

    def _begin(self, endpoint_id: str, progress: SequenceProgress) -> Dispatch:
        if progress.num_attempts > 0:
            self._metrics.failover.retries[progress.resume_point is not None].inc()
        progress.num_attempts += 1
        return self._pool.begin_dispatch(
            endpoint_id, num_prompt_tokens=progress.routing.num_prompt_tokens
        )

    def _node_request(
        self, request: GenerateRequest, routing: RoutingRequest, progress: SequenceProgress
    ) -> GenerateRequest:
        return msgspec.structs.replace(
            request,
            elapsed_s=self._clock.now_s() - routing.arrival_s,
            resume_from=progress.resume_point,
        )

    def _note_tokens(
        self,
        endpoint_id: str,
        dispatch: Dispatch,
        progress: SequenceProgress,
        events: Sequence[TokenEvent],
    ) -> None:
        if not dispatch.has_first_token:
            self._pool.note_token(endpoint_id, dispatch)
        now_s = self._clock.now_s()
        for event in events:
            progress.receive(event.new_token_ids, now_s)

    def _lose(
        self, endpoint_id: str, dispatch: Dispatch, progress: SequenceProgress, failure: Failure
    ) -> None:
        self._metrics.upstream_errors(endpoint_id).inc()
        # A step that failed may be the request's own fault, which must not cost others the node;
        # and a node whose engine always fails says so itself.
        is_engine_error = isinstance(failure, EngineStepError)
        if not is_engine_error:
            self._pool.lose_node(endpoint_id, dispatch, str(failure))
        progress.lose_node(
            dispatch.instance_id, self._clock.now_s(), is_engine_error=is_engine_error
        )

    def _given_up(self, failure: Failure | None, reason: str) -> Failure:
        self._metrics.failover.sequences_given_up.inc()
        match failure:
            case None:
                return NodeUnavailable(self._pool.explain_obstacles())
            case EngineStepError():
                return EngineStepError(f"{failure}; {reason}", request_ids=failure.request_ids)
            case NodeUnavailable():
                return NodeUnavailable(f"{failure}; the request is given up: {reason}")


def _failure(event: TokenEvent, request_id: str, endpoint_id: str) -> Failure | None:
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
