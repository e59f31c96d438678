"""Sends a sequence to a node, and on to others until one has finished it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from orchestrator.core.errors import EngineStepError, NodeUnavailable, ProServeError
from orchestrator.core.ports import Clock
from orchestrator.core.request import FinishReason
from orchestrator.journal import StoryBook
from orchestrator.tracing import Span
from orchestrator.wire import GenerateRequest, TokenEvent
from router.endpoints import EndpointPool
from router.fleet import Dispatch
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
        span: Span | None = None,
        book: StoryBook | None = None,
    ) -> AsyncGenerator[Sequence[TokenEvent]]:
        """Yield the events of one sequence as they come; the last one's finish reason is stop or
        length. However many nodes they come from, they are those of one undisturbed run.

        Appends each node that it is sent to to `used_endpoints`. `max_wait_s` as in
        `SequenceProgress`. Each node's part is a span below `span`, and told in `book`.

        Raises:
            NodeUnavailable: no node could take the sequence, or go on with it.
            RequestRejected: a node finds the request invalid.
            EngineStepError: the engine of the last node failed on the sequence.
        """
        progress = SequenceProgress(routing, self._rules, max_wait_s=max_wait_s)
        failure: Failure | None = None
        while True:
            dispatch = await self._begin_next(progress, failure)
            used_endpoints.append(dispatch.endpoint_id)
            failure = None
            error_type: str | None = None
            if book is not None:
                _tell_of_attempt(book, request.request_id, progress)
            attempt = None if span is None else _attempt(span, request.request_id, progress)
            batches = self._client.generate(
                self._pool.url_of(dispatch),
                self._node_request(request, routing, progress),
                span=attempt,
            )
            try:
                async with aclosing(batches):
                    async for events in batches:
                        progress.accept()
                        if not events:
                            continue
                        failure = _failure(events[-1], request.request_id, dispatch.endpoint_id)
                        good = events if failure is None else events[:-1]
                        if good:
                            self._note_tokens(dispatch, progress, good)
                            yield good
                        if failure is not None:
                            raise failure
                self._pool.note_success(dispatch)
                return
            except ProServeError as error:
                error_type = type(error).__name__
                if not isinstance(error, NodeUnavailable | EngineStepError):
                    raise
                failure = error
                if book is not None:
                    book.note("node_lost", node=dispatch.endpoint_id, error=str(error))
                self._lose(dispatch, progress, error)
            finally:
                self._pool.end_dispatch(dispatch)
                if attempt is not None:
                    attempt.end(error_type)

    async def _begin_next(self, progress: SequenceProgress, failure: Failure | None) -> Dispatch:
        """Count the sequence on the node to try next, as soon as there is one; `failure` is the
        last node's."""
        num_looks = progress.num_failures
        while True:
            if num_looks > 0:
                await asyncio.sleep(self._rules.delay_s(num_looks, random.random()))
            now_s = self._clock.now_s()
            reason = None if failure is None else progress.why_no_retry(now_s)
            if reason is None:
                dispatch = self._begin(progress, now_s)
                if dispatch is not None:
                    return dispatch
                reason = progress.why_no_wait(now_s)
            if reason is not None:
                raise self._given_up(failure, reason)
            num_looks += 1

    def _begin(self, progress: SequenceProgress, now_s: float) -> Dispatch | None:
        """Count the sequence on the node that the policy picks; None if it picks none."""
        routing = progress.routing
        offered = self._pool.offer(
            now_s,
            routing.max_size,
            progress.failed_instances,
            needs_grammar=routing.needs_grammar,
        )
        decision = self._policy.pick(routing, self._pool.fleet, offered, now_s)
        if decision.endpoint_id is None:
            return None
        if progress.num_attempts > 0:
            self._metrics.failover.retries[progress.resume_point is not None].inc()
        progress.num_attempts += 1
        progress.decision = decision
        return self._pool.begin_dispatch(routing, decision, now_s)

    def _node_request(
        self, request: GenerateRequest, routing: RoutingRequest, progress: SequenceProgress
    ) -> GenerateRequest:
        return msgspec.structs.replace(
            request,
            elapsed_s=self._clock.now_s() - routing.arrival_s,
            resume_from=progress.resume_point,
        )

    def _note_tokens(
        self, dispatch: Dispatch, progress: SequenceProgress, events: Sequence[TokenEvent]
    ) -> None:
        self._pool.note_first_token(dispatch)
        now_s = self._clock.now_s()
        for event in events:
            progress.receive(event.new_token_ids, now_s)

    def _lose(self, dispatch: Dispatch, progress: SequenceProgress, failure: Failure) -> None:
        self._metrics.upstream_errors(dispatch.endpoint_id).inc()
        # A step that failed may be the request's own fault, which must not cost others the node;
        # and a node whose engine always fails says so itself.
        is_engine_error = isinstance(failure, EngineStepError)
        if not is_engine_error:
            self._pool.lose_node(dispatch, str(failure))
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


def _tell_of_attempt(book: StoryBook, sequence_id: str, progress: SequenceProgress) -> None:
    decision, resume_point = progress.decision, progress.resume_point
    num_delivered = None if resume_point is None else len(resume_point.output_token_ids)
    book.note(
        "sent",
        node=decision.endpoint_id,
        sequence_id=sequence_id,
        attempt=progress.num_attempts,
        reason=decision.reason,
        expected_gain=decision.expected_gain,
        num_delivered_tokens=num_delivered,
    )


def _attempt(span: Span, sequence_id: str, progress: SequenceProgress) -> Span:
    """Return the span of what one node does for a sequence."""
    decision, resume_point = progress.decision, progress.resume_point
    num_delivered = None if resume_point is None else len(resume_point.output_token_ids)
    return span.child(
        f"dispatch {decision.endpoint_id}",
        {
            "proserve.endpoint_id": decision.endpoint_id,
            "proserve.sequence_id": sequence_id,
            "proserve.attempt": progress.num_attempts,
            "proserve.routing.expected_gain": decision.expected_gain,
            "proserve.routing.reason": decision.reason,
            "proserve.routing.is_satisfiable": decision.is_satisfiable,
            "proserve.num_delivered_tokens": num_delivered,
        },
    )


def _failure(event: TokenEvent, request_id: str, endpoint_id: str) -> Failure | None:
    if event.finish_reason is None:
        return None
    match event.finish_reason:
        case FinishReason.ERROR:
            message = f"the engine of node {endpoint_id} failed: {event.error}"
            return EngineStepError(message, request_ids=[request_id])
        case FinishReason.ABORT | FinishReason.LOST as reason:
            # No client of ours aborts by event, so both say that the node will not go on.
            message = f"node {endpoint_id} gave the request up: {event.error or reason.value}"
            return NodeUnavailable(message)
        case FinishReason.STOP | FinishReason.LENGTH:
            return None
