"""The loop of an engine that schedules by itself: hand over requests, pass on their news.

It takes what `ExecutorLoop` takes and tells what that tells, so that nothing outside the executor
process knows which of the two runs. What it cannot do is decide: who computes when, how much and
at whose cost is up to the engine, which knows weights as far as it has priorities and deadlines
not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.core.admission import check_request
from orchestrator.core.errors import EngineError, NodeUnavailable, RequestRejected
from orchestrator.core.kv_state import KVBlockCounts
from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import (
    Clock,
    EngineIteration,
    QueueSummary,
    RequestEngine,
    RequestEvent,
    SchedulerLoad,
)
from orchestrator.core.queue_summary import summarise_unplanned
from orchestrator.core.request import FinishReason, Request, RequestSpec, ResumePoint
from orchestrator.executor import MAX_CONSECUTIVE_FAILURES

logger = logging.getLogger(__name__)

COLLECT_TIMEOUT_S = 0.002
"""How long news is waited for at most. A request that arrives meanwhile is handed over after it,
so it must be short beside a step, which takes some ten times as long on a GPU."""


@dataclass(slots=True)
class _OpenRequest:
    """A request that has not ended."""

    request: Request
    has_output: bool = False
    """Of this engine; what another one has delivered is prompt here."""


class RequestLoop:
    """Feeds one engine with requests until they end."""

    def __init__(
        self,
        engine: RequestEngine,
        *,
        latency_profile: LatencyProfile,
        clock: Clock,
        emit: Callable[[Sequence[RequestEvent]], None],
        report: Callable[[EngineIteration, SchedulerLoad], None],
    ) -> None:
        """`latency_profile` prices what waits, for routers; `emit` receives the news of requests,
        in order; `report` each step of the engine and the load after it."""
        self._engine = engine
        self._latency_profile = latency_profile
        self._clock = clock
        self._emit = emit
        self._report = report
        self._open: dict[str, _OpenRequest] = {}
        self._last_iteration: EngineIteration | None = None
        self._num_failures = 0
        self.is_draining = False

    @property
    def has_requests(self) -> bool:
        """True while any accepted request has not ended."""
        return bool(self._open)

    def add(
        self, spec: RequestSpec, arrival_s: float, resume_from: ResumePoint | None = None
    ) -> None:
        """Accept a request that arrived at `arrival_s` on the loop's clock, for which the engine
        does not ask.

        With `resume_from`, the tokens that another node has delivered become part of the prompt.
        Greedy output is the same by that; drawn tokens follow the same distribution, but the
        engine's random generator begins anew.

        Raises:
            RequestRejected: the request can never run here.
            NodeUnavailable: the loop is draining.
            EngineError: the engine cannot go on.
        """
        if self.is_draining:
            raise NodeUnavailable("the node is draining and takes no new requests")
        request = Request.received(spec, resume_from, arrival_s=arrival_s)
        if resume_from is not None:
            spec = _remainder(spec, resume_from.output_token_ids)
        check_request(spec, self._engine.capabilities)
        if spec.request_id in self._open:
            raise RequestRejected(
                f"request id {spec.request_id!r} is already in use on this node",
                field="request_id",
            )
        self._engine.start(spec)
        self._open[spec.request_id] = _OpenRequest(request)

    def abort(self, request_id: str) -> None:
        """End a request, if it has not ended."""
        if self._open.pop(request_id, None) is None:
            return
        self._engine.cancel(request_id)
        self._emit([RequestEvent(request_id, finish_reason=FinishReason.ABORT)])

    def load(self) -> SchedulerLoad:
        """Return what is queued and running now, as far as the engine tells."""
        self._pass_on_iterations()
        return self._current_load()

    def queue_summary(self, now_s: float) -> QueueSummary:
        """Return what one more request would meet now, as far as the engine tells."""
        prefills = [r.request for r in self._open.values() if not r.has_output]
        decodes = [r.request for r in self._open.values() if r.has_output]
        return summarise_unplanned(prefills, decodes, self._latency_profile, now_s)

    def slack_s(self) -> float:
        """Return how long `run_step` may still be put off for the sake of news from outside."""
        return 0.0

    def close(self) -> None:
        """Do nothing: what the engine still runs, it ends itself."""

    def run_step(self) -> None:
        """Wait shortly for news of the engine and pass them on.

        Raises:
            EngineError: the engine cannot go on, or failed too often in a row.
        """
        events = [e for e in self._engine.collect(COLLECT_TIMEOUT_S) if self._note(e)]
        if events:
            self._emit(events)
        self._pass_on_iterations()
        self._count_failures(events)

    def _note(self, event: RequestEvent) -> bool:
        """Keep account of an event; return whether it is news of a request that is open."""
        held = self._open.get(event.request_id)
        if held is None:
            return False
        held.has_output |= bool(event.new_token_ids)
        for token_id in event.new_token_ids:
            held.request.append_output_token(token_id, self._clock.now_s())
        if event.finish_reason is not None:
            del self._open[event.request_id]
        return True

    def _count_failures(self, events: Sequence[RequestEvent]) -> None:
        """Give the engine up if nothing but failures comes from it: a GPU whose context is broken
        fails whatever it is given, and would swallow all requests that a router sends here."""
        failed = [e for e in events if e.finish_reason is FinishReason.ERROR]
        if len(failed) < len(events):
            self._num_failures = 0
            return
        if not failed:
            return
        self._num_failures += 1
        logger.error("%d requests failed: %s", len(failed), failed[-1].error)
        if self._num_failures >= MAX_CONSECUTIVE_FAILURES:
            raise EngineError(
                f"requests failed {self._num_failures} times in a row and none got on, the last "
                f"one with: {failed[-1].error}"
            )

    def _pass_on_iterations(self) -> None:
        for iteration in self._engine.take_iterations():
            self._last_iteration = iteration
            self._report(iteration, self._current_load())

    def _current_load(self) -> SchedulerLoad:
        num_blocks = self._engine.capabilities.num_device_blocks
        last = self._last_iteration
        num_running, num_free_blocks = 0, num_blocks
        # An engine that has nothing to do makes no steps, so the last one's figures are stale.
        if self._open and last is not None:
            num_running = min(last.num_running, len(self._open))
            num_free_blocks = last.num_free_device_blocks
        prefills = [r for r in self._open.values() if not r.has_output]
        return SchedulerLoad(
            num_waiting=len(self._open) - num_running,
            num_running=num_running,
            num_decoding=len(self._open) - len(prefills),
            # How far the engine is with a prompt is not told; until its first token it counts.
            num_queued_prompt_tokens=sum(r.request.num_tokens for r in prefills),
            num_free_device_blocks=num_free_blocks,
            num_device_blocks=num_blocks,
            kv_blocks=KVBlockCounts(
                device_free=num_free_blocks, device_used=num_blocks - num_free_blocks
            ),
        )


def _remainder(spec: RequestSpec, delivered_token_ids: tuple[int, ...]) -> RequestSpec:
    """Return what is left to do of a request after these tokens."""
    num_left = spec.sampling.max_tokens - len(delivered_token_ids)
    return replace(
        spec,
        prompt_token_ids=(*spec.prompt_token_ids, *delivered_token_ids),
        sampling=replace(spec.sampling, max_tokens=num_left),
    )
