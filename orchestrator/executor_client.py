"""The HTTP process's side of the executor process: starts it, talks to it, watches it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog
import zmq
import zmq.asyncio

from orchestrator.core.errors import NodeUnavailable, RequestRejected
from orchestrator.core.ports import QueueSummary, RequestEvent, SchedulerLoad
from orchestrator.core.queue_summary import with_received
from orchestrator.core.request import FinishReason, Request, RequestSpec, ResumePoint
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

logger = structlog.get_logger(__name__)

SHUTDOWN_GRACE_S = 10.0
"""Time for the executor process to end by itself before it is killed."""

WATCH_PAUSE_S = 0.1
"""Pause before a silent process is looked at again."""


@dataclass(frozen=True, slots=True)
class HeldRequests:
    """What a node held when its executor last said so, and what it has accepted since."""

    seq_no: int
    """Of the executor's report."""

    age_s: float
    """Since that report; deadlines in `queue` are counted from it."""

    load: SchedulerLoad
    queue: QueueSummary


class ExecutorClient:
    """One executor process and the streams of its requests.

    Every stream gets exactly one event with a finish reason, whatever happens to the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        on_step: Callable[[StepReport], None],
        stall_timeout_s: float,
    ) -> None:
        """`command` starts the process; the socket's address is added as its last argument.

        `on_step` receives the figures of each step. When the process has said nothing for
        `stall_timeout_s`, its streams end as lost and it counts as unhealthy until it speaks.
        """
        self._command = tuple(command)
        self._on_step = on_step
        self._stall_timeout_s = stall_timeout_s
        self._streams: dict[str, asyncio.Queue[RequestEvent]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ExecutorMessage)
        self._ready: EngineReady | None = None
        self._load: LoadReport | None = None
        self._queue_report: LoadReport | None = None
        self._num_sent = 0
        self._on_its_way: dict[str, tuple[int, Request]] = {}
        """request_id -> how many were sent before it, and what was sent: requests that have not
        ended and that the last queue report does not know of."""

        self._next_news = asyncio.Event()
        self._failure: str | None = None
        self._last_heard_s = time.monotonic()
        self._first_word = asyncio.Event()
        self._exit_stack = contextlib.AsyncExitStack()
        self._is_draining = False

    @property
    def ready(self) -> EngineReady | None:
        """What the engine said when it was loaded; None before that."""
        return self._ready

    @property
    def last_load(self) -> LoadReport | None:
        """The newest load report; None before the first."""
        return self._load

    def held(self) -> HeldRequests | None:
        """Return what this node holds; None before the first report."""
        report = self._queue_report
        if report is None or report.queue is None:
            return None
        load, queue = with_received(
            report.load,
            report.queue,
            [request for _, request in self._on_its_way.values()],
            report.taken_at_s,
        )
        age_s = time.monotonic() - report.taken_at_s
        return HeldRequests(report.seq_no, age_s, load, queue)

    @property
    def next_news(self) -> asyncio.Event:
        """Set as soon as `held`, `is_draining` or `trouble` may say something else than now."""
        return self._next_news

    @property
    def is_draining(self) -> bool:
        """True once `drain` was called."""
        return self._is_draining

    @property
    def pid(self) -> int:
        """Process id of the executor."""
        return self._process.pid

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def trouble(self) -> str | None:
        """Why the engine cannot serve now; None if it can."""
        if self._failure is not None:
            return self._failure
        if self._ready is None:
            return "the engine is loading"
        if self._silent_s > self._stall_timeout_s:
            return f"the engine has said nothing for {self._silent_s:.1f} s"
        return None

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._last_heard_s

    @property
    def has_failed(self) -> bool:
        """True if the engine will never serve again."""
        return self._failure is not None

    async def __aenter__(self) -> Self:
        directory = self._exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="proserve-"))
        address = f"ipc://{Path(directory) / 'executor.sock'}"
        context = zmq.asyncio.Context()
        self._exit_stack.callback(context.destroy, linger=0)
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(*self._command, address)
        self._exit_stack.push_async_callback(self._end_process)
        for watcher in (self._receive(), self._watch_process(), self._watch_silence()):
            task = asyncio.create_task(watcher)
            self._exit_stack.push_async_callback(_cancel, task)
        logger.info("executor started", pid=self._process.pid)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_streams("the node is shutting down")
        await self._exit_stack.aclose()

    async def wait_until_loaded(self) -> None:
        """Return when the engine is loaded or has failed; `trouble` says which."""
        await self._first_word.wait()

    async def generate(
        self,
        spec: RequestSpec,
        arrival_s: float,
        resume_from: ResumePoint | None = None,
    ) -> AsyncGenerator[RequestEvent]:
        """Run a request and yield its events, the last one with a finish reason.

        With `resume_from`, they begin behind what another node has delivered. Leaving the iterator
        early aborts the request.

        Raises:
            NodeUnavailable: the engine is not serving.
            RequestRejected: the id is already in use.
        """
        trouble = self.trouble or ("the node is draining" if self._is_draining else None)
        if trouble is not None:
            raise NodeUnavailable(trouble)
        if spec.request_id in self._streams:
            raise RequestRejected(
                f"request id {spec.request_id!r} is already in use on this node",
                field="request_id",
            )
        queue: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._streams[spec.request_id] = queue
        has_ended = False
        try:
            await self._send(AddRequest(spec, arrival_s, resume_from))
            request = Request.received(spec, resume_from, arrival_s=arrival_s)
            self._on_its_way[spec.request_id] = (self._num_sent, request)
            self._num_sent += 1
            self._tell_news()
            while not has_ended:
                event = await queue.get()
                has_ended = event.finish_reason is not None
                yield event
        finally:
            if self._streams.get(spec.request_id) is queue:
                del self._streams[spec.request_id]
                self._on_its_way.pop(spec.request_id, None)
            if not has_ended and self._failure is None:
                await self._send(AbortRequest(spec.request_id))

    async def drain(self) -> None:
        """Refuse new requests; the running ones finish."""
        self._is_draining = True
        self._tell_news()
        if self._failure is None:
            await self._send(Drain())

    async def _send(self, command: Command) -> None:
        """Send a command to the process; without one at the other end it is dropped.

        Waiting for one would never end, and `_watch_process` tells the streams what happened.
        """
        with contextlib.suppress(zmq.Again):
            await self._socket.send(self._encoder.encode(command), zmq.NOBLOCK)

    async def _receive(self) -> None:
        while True:
            self._handle(self._decoder.decode(await self._socket.recv()))

    def _handle(self, message: ExecutorMessage) -> None:
        self._last_heard_s = time.monotonic()
        match message:
            case Events(events):
                for event in events:
                    queue = self._streams.get(event.request_id)
                    if queue is not None:  # else its client has left; the abort is on its way
                        queue.put_nowait(event)
            case StepReport():
                self._take_load(message.load)
                self._on_step(message)
            case LoadReport():
                self._take_load(message)
            case EngineReady():
                self._ready = message
                self._first_word.set()
            case EngineFailed(reason):
                self._fail(reason)

    def _take_load(self, report: LoadReport) -> None:
        self._load = report
        if report.queue is not None:
            self._queue_report = report
            self._on_its_way = {
                request_id: (number, request)
                for request_id, (number, request) in self._on_its_way.items()
                if number >= report.num_added
            }
            self._tell_news()

    def _tell_news(self) -> None:
        self._next_news.set()
        self._next_news = asyncio.Event()

    async def _watch_process(self) -> None:
        status = await self._process.wait()
        # What it said before it died has the better reason; let that be read first.
        await asyncio.sleep(0.1)
        self._fail(f"the engine process ended with status {status}")

    async def _watch_silence(self) -> None:
        """End the open streams of a process that says nothing for too long.

        It may go on later, but nobody should have to wait for that: another node can.
        """
        while True:
            await asyncio.sleep(max(self._stall_timeout_s - self._silent_s, 0.0))
            # If this process was stopped too, news may be waiting to be read.
            await asyncio.sleep(WATCH_PAUSE_S)
            reason = self.trouble
            if self._ready is None or self._failure is not None or reason is None:
                continue
            request_ids = list(self._streams)
            self._lose_streams(reason)
            for request_id in request_ids:
                await self._send(AbortRequest(request_id))

    def _fail(self, reason: str) -> None:
        """Turn unhealthy for good and end every open stream with an error."""
        if self._failure is None:
            logger.error("engine lost", reason=reason, num_open_requests=len(self._streams))
            self.end_streams(reason)

    def end_streams(self, reason: str) -> None:
        """End every open stream as lost and refuse new ones for good."""
        self._failure = reason
        self._first_word.set()
        self._tell_news()
        self._lose_streams(reason)

    def _lose_streams(self, reason: str) -> None:
        for request_id, queue in self._streams.items():
            queue.put_nowait(
                RequestEvent(request_id, finish_reason=FinishReason.LOST, error=reason)
            )
        self._streams.clear()
        self._on_its_way.clear()

    async def _end_process(self) -> None:
        if self._process.returncode is not None:
            return
        if self._ready is None:
            self._process.kill()  # it may not listen yet, and has nothing to finish
        else:
            await self._send(Shutdown())
        try:
            async with asyncio.timeout(SHUTDOWN_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
