"""Answers one client request: runs its sequences on nodes and keeps count."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from orchestrator.core.ports import Clock
from orchestrator.core.slo import GainWeights, Slo, token_deadline_s
from orchestrator.wire import GenerateRequest
from router.access import RequestRecord
from router.admission import Lease
from router.dispatch import Dispatcher
from router.metrics import ClassMetrics, ClientMetrics, RouterMetrics
from router.open_requests import OpenRequests
from router.output import Assembler, OutputAssembler, OutputDelta, ToolCallAssembler
from router.responses import ServingSummary, Usage
from router.tokenizer import Tokenizer
from router.translation import GenerationPlan, SequencePlan

T = TypeVar("T")

_GAIN_WEIGHTS = GainWeights()


@dataclass(frozen=True, slots=True)
class GenerationTools:
    """What every generation of a router shares."""

    dispatcher: Dispatcher
    tokenizer: Tokenizer
    metrics: RouterMetrics
    clock: Clock
    open_requests: OpenRequests


class Generation:
    """One accepted request."""

    def __init__(
        self,
        completion_id: str,
        plan: GenerationPlan,
        tools: GenerationTools,
        record: RequestRecord,
        lease: Lease,
    ) -> None:
        self._completion_id = completion_id
        self._plan = plan
        self._tools = tools
        self._record = record
        self._lease = lease
        self._class_metrics = tools.metrics.of_class(plan.priority_class.name)
        self._class_metrics.prompt_tokens.inc(plan.num_prompt_tokens)
        self._client_metrics = record.client_metrics
        self._meters: dict[int, SequenceMeter] = {}
        self._used_nodes: list[list[str]] = [[] for _ in plan.sequences]
        if self._client_metrics is not None:
            self._client_metrics.prompt_tokens.inc(plan.num_prompt_tokens)
        record.accept(completion_id, plan, lease)

    def usage(self, num_completion_tokens: int) -> Usage:
        """Return the counts when this many tokens have been answered."""
        num_prompt_tokens = self._plan.num_prompt_tokens
        return Usage(
            num_prompt_tokens, num_completion_tokens, num_prompt_tokens + num_completion_tokens
        )

    def final_usage(self, num_completion_tokens: int) -> Usage:
        """Return `usage` at the end of all `deltas`, with the summary if it was asked for."""
        usage = self.usage(num_completion_tokens)
        if not self._plan.has_serving_summary:
            return usage
        summary = tuple(
            meter.summary(index, self._used_nodes[index])
            for index, meter in sorted(self._meters.items())
        )
        return msgspec.structs.replace(usage, serving_summary=summary)

    def until_shutdown(self) -> AbstractContextManager[None]:
        """Return what to read `deltas` in: `OpenRequests.until_shutdown`."""
        return self._tools.open_requests.until_shutdown()

    def deltas(self) -> AsyncGenerator[tuple[int, Sequence[OutputDelta]]]:
        """Yield (choice, what it gains) as it comes; close it to abort everything.

        Raises:
            NodeUnavailable, RequestRejected, EngineStepError: as `Dispatcher.generate`.
        """
        return merged([self._run(index) for index in range(len(self._plan.sequences))])

    async def _run(self, index: int) -> AsyncGenerator[tuple[int, Sequence[OutputDelta]]]:
        plan, sequence = self._plan, self._plan.sequences[index]
        request = self._node_request(index)
        routing = plan.routing_request(index, request_id=request.request_id)
        assembler = self._assembler(sequence)
        meter = self._meters[index] = SequenceMeter(
            self._class_metrics,
            plan.slo,
            weight=plan.priority_class.weight,
            arrival_s=plan.arrival_s,
            client=self._client_metrics,
        )
        place = self._lease.places[index]
        batches = self._tools.dispatcher.generate(
            routing,
            request,
            self._used_nodes[index],
            max_wait_s=plan.max_wait_s,
            span=self._record.span,
            book=self._record.book,
        )
        try:
            async with aclosing(batches):
                async for events in batches:
                    now_s = self._tools.clock.now_s()
                    deltas = assembler.add_all(events)
                    num_new_tokens = deltas[0].num_new_tokens
                    if len(deltas) > 1:
                        num_new_tokens = sum([delta.num_new_tokens for delta in deltas])
                    finish_reason = deltas[-1].finish_reason
                    if num_new_tokens:
                        place.leave()
                    meter.receive(num_new_tokens, now_s)
                    self._record.receive(num_new_tokens, now_s, finish_reason)
                    yield index, deltas
                    if finish_reason is not None and events[-1].finish_reason is None:
                        # A stop string or a last call: closing the events aborts the node's work.
                        return
        finally:
            place.leave()
            meter.close()
            self._record.endpoint_ids += self._used_nodes[index]
            self._record.gain_captured += meter.gain_captured
            self._record.gain_possible += meter.gain_possible

    def _assembler(self, sequence: SequencePlan) -> Assembler:
        assembler = OutputAssembler(
            self._tools.tokenizer,
            stop=self._plan.stop,
            stop_token_ids=sequence.sampling.stop_token_ids,
        )
        if self._plan.tools is None:
            return assembler
        return ToolCallAssembler(assembler, self._plan.tools.parser())

    def _node_request(self, index: int) -> GenerateRequest:
        plan, sequence, slo = self._plan, self._plan.sequences[index], self._plan.node_slo
        return GenerateRequest(
            request_id=f"{self._completion_id}-{index}",
            prompt_token_ids=sequence.prompt.token_ids,
            sampling=sequence.sampling,
            priority_class=plan.node_class.name,
            weight=plan.node_class.weight,
            client_id=plan.client_id,
            cache_salt=plan.cache_salt,
            ttft_s=slo.ttft_s if math.isfinite(slo.ttft_s) else None,
            tpot_s=slo.tpot_s if math.isfinite(slo.tpot_s) else None,
        )


class SequenceMeter:
    """Counts one sequence's latencies and gain, as they are when its tokens reach the router."""

    def __init__(
        self,
        metrics: ClassMetrics,
        slo: Slo,
        *,
        weight: float,
        arrival_s: float,
        client: ClientMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self._client = client
        self._slo = slo
        self._weight = weight
        self._arrival_s = arrival_s
        self._num_tokens = 0
        self._num_on_time = 0
        self._first_token_s = 0.0
        self._last_token_s = 0.0
        self.gain_captured = 0.0
        self.gain_possible = 0.0

    def receive(self, num_new_tokens: int, now_s: float) -> None:
        """Count tokens that came together."""
        if num_new_tokens == 0:
            return
        if self._num_tokens == 0:
            self._first_token_s = now_s
            self._metrics.ttft.observe(now_s - self._arrival_s)
        else:
            self._metrics.inter_token.observe(now_s - self._last_token_s)
        if num_new_tokens > 1:
            self._metrics.inter_token.observe(0.0, num_new_tokens - 1)
        for index in range(self._num_tokens, self._num_tokens + num_new_tokens):
            gain = self._weight * _GAIN_WEIGHTS.of_token(index)
            self.gain_possible += gain
            if now_s < token_deadline_s(self._slo, index, arrival_s=self._arrival_s):
                self._num_on_time += 1
                self.gain_captured += gain
        self._num_tokens += num_new_tokens
        self._last_token_s = now_s

    def close(self) -> None:
        """The sequence has ended; one without any token has missed its first one's gain."""
        if self._num_tokens == 0:
            self.gain_possible = self._weight * _GAIN_WEIGHTS.first_token
        self._metrics.sequences[self._are_objectives_met()].inc()
        for metrics in (self._metrics, self._client):
            if metrics is not None:
                metrics.completion_tokens.inc(self._num_tokens)
                metrics.gain_captured.inc(self.gain_captured)
                metrics.gain_possible.inc(self.gain_possible)

    def summary(self, index: int, nodes: Sequence[str]) -> ServingSummary:
        """Return what a client may know of the sequence, its choice `index`, which has ended after
        it was sent to `nodes`."""
        ttft_s, tpot_s = self._latencies_s()
        return ServingSummary(
            index=index,
            tokens=self._num_tokens,
            tokens_on_time=self._num_on_time,
            ttft_ms=_milliseconds(ttft_s),
            mean_tpot_ms=_milliseconds(tpot_s),
            objectives_met=self._are_objectives_met(),
            service_gain=self.gain_captured,
            possible_service_gain=self.gain_possible,
            node=nodes[-1],
            retries=len(nodes) - 1,
        )

    def _latencies_s(self) -> tuple[float | None, float | None]:
        """Return the time to the first token and the mean time of later ones, if there are any."""
        ttft_s = self._first_token_s - self._arrival_s if self._num_tokens > 0 else None
        later_s, num_later = self._last_token_s - self._first_token_s, self._num_tokens - 1
        return ttft_s, later_s / num_later if num_later > 0 else None

    def _are_objectives_met(self) -> bool:
        ttft_s, tpot_s = self._latencies_s()
        is_first_on_time = ttft_s is not None and ttft_s < self._slo.ttft_s
        return is_first_on_time and (tpot_s is None or tpot_s < self._slo.tpot_s)


def _milliseconds(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s * 1000, 3)


def merged(generators: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Yield the values of all generators as they come; close it to close them all.

    Raises what the first failing generator raises, after closing the others.
    """
    # The common case needs no tasks.
    return generators[0] if len(generators) == 1 else _merged(generators)


async def _merged(generators: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    queue: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
    # So a client that reads slowly slows its nodes down, and fills nothing here.
    room = asyncio.Semaphore(len(generators))

    async def pump(generator: AsyncGenerator[T]) -> None:
        async with aclosing(generator) as values:
            async for value in values:
                await room.acquire()
                queue.put_nowait(value)

    tasks = [asyncio.create_task(pump(generator)) for generator in generators]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                num_open -= 1
            else:
                room.release()
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
