"""The executor loop in a process of its own, behind a ZeroMQ socket.

The node's HTTP process never shares an interpreter with the engine, so that a busy server does
not delay a batch. Both ends of the socket are on one machine and share its monotonic clock.
"""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import msgspec
import zmq

from orchestrator.core.errors import NodeUnavailable, ProServeError, RequestRejected
from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import (
    AheadScheduler,
    CopyFigures,
    Engine,
    EngineIteration,
    QueueSummary,
    RequestEngine,
    RequestEvent,
    SchedulerLoad,
)
from orchestrator.core.request import FinishReason
from orchestrator.executor import ExecutorLoop, MonotonicClock, StepFigures
from orchestrator.overlapped_loop import OverlappedLoop
from orchestrator.request_loop import RequestLoop
from orchestrator.request_marks import RequestMarks
from orchestrator.wire import (
    AbortRequest,
    AddRequest,
    Command,
    Drain,
    EngineFailed,
    EngineReady,
    Events,
    ExecutorMessage,
    LoadReport,
    Shutdown,
    StepReport,
)

logger = logging.getLogger(__name__)

QUEUE_REPORT_S = 0.1
"""A busy executor says this often, at the end of a step, what its queue holds: routers judge by
it, and saying it costs more than counting."""

IDLE_REPORT_S = 0.25
"""An idle executor sends its load this often, so that silence always means trouble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What an executor process says of the model it serves."""

    model: str
    latency_profile: LatencyProfile
    manifest_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine(ServedModel):
    """An engine that is stepped, and the scheduler that plans its steps."""

    engine: Engine
    scheduler: AheadScheduler
    plans_ahead: bool = False
    """A step is planned while the one before runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRequestEngine(ServedModel):
    """An engine that schedules by itself."""

    engine: RequestEngine


class ExecutorServer:
    """Feeds a loop over an engine from a socket and sends its news back."""

    def __init__(
        self, socket: zmq.Socket[bytes], loaded: LoadedEngine | LoadedRequestEngine
    ) -> None:
        self._socket = socket
        self._clock = MonotonicClock()
        self._step_ends = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._step_ends, zmq.POLLIN)
        self._loop = self._make_loop(loaded)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._seq_no = 0
        self._num_added = 0
        self._last_queue_report_s = -math.inf
        self._marks = RequestMarks()
        self._is_stopping = False
        self._parent_pid = os.getppid()
        # First, so that a node that calls itself ready can say what it holds.
        self._send(self._load_report(self._loop.load()))
        self._send(
            EngineReady(
                model=loaded.model,
                capabilities=loaded.engine.capabilities,
                latency_profile=loaded.latency_profile,
                manifest_sha256=loaded.manifest_sha256,
            )
        )

    def run(self) -> None:
        """Serve until told to shut down, or until the parent process is gone.

        Raises:
            EngineError: the engine failed for good.
        """
        try:
            while not self._is_stopping and os.getppid() == self._parent_pid:
                is_idle = not self._loop.has_requests
                if is_idle and not self._socket.poll(int(IDLE_REPORT_S * 1000)):
                    self._send(self._load_report(self._loop.load()))
                    continue
                self._take_commands()
                if self._loop.has_requests:
                    self._loop.run_step()
        finally:
            self._loop.close()
            os.close(self._step_ends)

    def _make_loop(self, loaded: LoadedEngine | LoadedRequestEngine) -> ExecutorLoop | RequestLoop:
        match loaded:
            case LoadedEngine(plans_ahead=True):
                return OverlappedLoop(
                    loaded.scheduler,
                    loaded.engine,
                    clock=self._clock,
                    emit=self._emit,
                    report=self._report,
                    on_step_end=lambda: os.eventfd_write(self._step_ends, 1),
                )
            case LoadedEngine(scheduler=scheduler, engine=engine):
                return ExecutorLoop(
                    scheduler,
                    engine,
                    clock=self._clock,
                    emit=self._emit,
                    report=self._report,
                )
            case LoadedRequestEngine(engine=request_engine):
                return RequestLoop(
                    request_engine,
                    latency_profile=loaded.latency_profile,
                    clock=self._clock,
                    emit=self._emit,
                    report=self._report_iteration,
                )

    def _take_commands(self) -> None:
        """Handle what has come, and what comes until the loop has to go on."""
        while ready := dict(self._poller.poll(int(self._loop.slack_s() * 1000))):
            if self._socket in ready:
                self._handle(self._decoder.decode(self._socket.recv()))
            else:
                os.eventfd_read(self._step_ends)

    def _handle(self, command: Command) -> None:
        match command:
            case AddRequest(spec, arrival_s, resume_from):
                self._num_added += 1
                self._marks.follow(spec.request_id)
                try:
                    self._loop.add(spec, arrival_s, resume_from)
                # The HTTP process checks first; this is for what changed in between.
                except RequestRejected as error:
                    self._refuse(spec.request_id, FinishReason.ERROR, error)
                except NodeUnavailable as error:
                    self._refuse(spec.request_id, FinishReason.LOST, error)
            case AbortRequest(request_id):
                self._loop.abort(request_id)
                self._marks.forget(request_id)
            case Drain():
                self._loop.is_draining = True
            case Shutdown():
                self._is_stopping = True
            case _:
                assert_never(command)

    def _refuse(self, request_id: str, reason: FinishReason, error: ProServeError) -> None:
        self._emit([RequestEvent(request_id, finish_reason=reason, error=str(error))])

    def _emit(self, events: Sequence[RequestEvent]) -> None:
        self._send(Events(tuple(events)))
        for event in events:
            if event.finish_reason is not None:
                self._marks.forget(event.request_id)

    def _report(self, figures: StepFigures) -> None:
        plan, output = figures.plan, figures.output
        num_decode_tokens = sum(
            part.num_new_tokens
            for part in plan.scheduled
            if part.num_computed_tokens >= part.request.num_prompt_tokens
        )
        self._send(
            StepReport(
                step_id=plan.step_id,
                step_s=output.step_s,
                predicted_step_s=plan.predicted_step_s,
                schedule_s=figures.schedule_s,
                exposed_s=figures.exposed_s,
                num_scheduled=len(plan.scheduled),
                num_prefill_tokens=plan.num_new_tokens - num_decode_tokens,
                num_decode_tokens=num_decode_tokens,
                num_preempted=len(plan.preempted_ids),
                num_skipped=len(plan.reasons.skipped),
                num_urgent=plan.reasons.num_urgent,
                num_normal=plan.reasons.num_normal,
                num_prefix_tokens=plan.reasons.num_prefix_tokens,
                num_kept_tokens=plan.reasons.num_kept_tokens,
                num_recomputed_tokens=plan.reasons.num_recomputed_tokens,
                copies=output.copies,
                model_s=output.model_s,
                errors=figures.errors,
                load=self._load_report(figures.load),
                marks=self._marks.of_step(plan, figures.began_s),
            )
        )

    def _report_iteration(self, iteration: EngineIteration, load: SchedulerLoad) -> None:
        self._send(
            StepReport(
                step_id=iteration.step_id,
                step_s=iteration.step_s,
                predicted_step_s=None,
                schedule_s=None,
                exposed_s=None,
                num_scheduled=iteration.num_scheduled,
                num_prefill_tokens=iteration.num_prefill_tokens,
                num_decode_tokens=iteration.num_decode_tokens,
                num_preempted=iteration.num_preempted,
                num_skipped=0,
                num_urgent=0,
                num_normal=0,
                num_prefix_tokens=0,
                num_kept_tokens=0,
                num_recomputed_tokens=0,
                copies=CopyFigures(),
                model_s=None,
                errors=(),
                load=self._load_report(load),
            )
        )

    def _load_report(self, load: SchedulerLoad) -> LoadReport:
        self._seq_no += 1
        now_s = self._clock.now_s()
        queue: QueueSummary | None = None
        if not self._loop.has_requests or now_s >= self._last_queue_report_s + QUEUE_REPORT_S:
            queue = self._loop.queue_summary(now_s)
            self._last_queue_report_s = now_s
        return LoadReport(self._seq_no, load, now_s, self._num_added, queue)

    def _send(self, message: ExecutorMessage) -> None:
        self._socket.send(self._encoder.encode(message))


def run_executor(address: str, load: Callable[[], LoadedEngine | LoadedRequestEngine]) -> int:
    """Connect to the node's HTTP process, load the engine and serve it; return an exit status.

    Why an engine cannot be loaded, or cannot go on, is reported to the HTTP process before
    this process ends.
    """
    # Ctrl-C reaches the whole process group; the HTTP process decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    try:
        loaded = load()
        try:
            ExecutorServer(socket, loaded).run()
        finally:
            loaded.engine.close()
    except (ProServeError, ValueError) as error:
        logger.error("executor stopped: %s", error)
        socket.send(msgspec.msgpack.encode(EngineFailed(str(error))))
        return 1
    finally:
        context.destroy(linger=1000)
    return 0
