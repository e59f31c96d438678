"""Two ways to copy beside the computation: a worker thread (CPU) and a CUDA stream.

`engines.kv_copies` decides what is copied; nothing else knows which of the two it runs on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch


class CopyPart(Protocol):
    """A piece of work that was put on a lane."""

    def hold_compute(self) -> None:
        """Let everything that is computed from here on begin after the end of this part."""
        ...

    def wait(self) -> None:
        """Return when the part has ended, well or not."""
        ...

    @property
    def is_done(self) -> bool:
        """True once the part has ended, well or not."""
        ...

    @property
    def error(self) -> str | None:
        """Why the part failed, or None. Known once it is done."""
        ...

    @property
    def busy_s(self) -> float:
        """Time the work took, without waiting for its turn; 0 if it failed. Known once done."""
        ...

    @property
    def held_s(self) -> float:
        """Time for which the computation was held, by `hold_compute` and, if it had nothing else
        to do, by putting the part on its lane. Known once the computation behind has ended."""
        ...


class CopyLane(Protocol):
    """Does work in the order in which it is put there, beside the computation."""

    def submit(self, work: Callable[[], None], *, follows_compute: bool = True) -> CopyPart:
        """Begin `work` when what was put here before has ended and, if it `follows_compute`, all
        computation that has been started so far.

        `work` may raise RuntimeError: its part then fails, and the lane goes on with the next.
        """
        ...

    def close(self) -> None:
        """Return when nothing is copied any more; what has not begun may be left undone."""
        ...


def make_lane(name: str, device: torch.device) -> CopyLane:
    """Return a lane for copies from or to this device; `name` is for people."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane(name)


class ThreadLane:
    """A worker thread. Computation on the CPU is over when its call returns, so that whatever
    was started before `submit` has ended."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, work: Callable[[], None], *, follows_compute: bool = True) -> CopyPart:
        """Let the thread do the work when all before it is done."""
        return _ThreadPart(self._executor.submit(_run_timed, work))

    def close(self) -> None:
        """Join the thread after the work that it is at."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _run_timed(work: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


class _ThreadPart:
    def __init__(self, future: Future[float]) -> None:
        self._future = future
        self.held_s = 0.0

    def hold_compute(self) -> None:
        started_s = time.perf_counter()
        self.wait()
        self.held_s += time.perf_counter() - started_s

    def wait(self) -> None:
        wait([self._future])

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> str | None:
        error = self._future.exception()
        return None if error is None else str(error) or type(error).__name__

    @property
    def busy_s(self) -> float:
        return self._future.result() if self.error is None else 0.0


class StreamLane:
    """A CUDA stream. The host only queues: it waits in `CopyPart.wait` and `close` alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[[], None], *, follows_compute: bool = True) -> CopyPart:
        """Queue what `work` queues, behind the current stream's work of now."""
        compute = torch.cuda.current_stream(self._device)
        # Around the host's work: if the device has nothing else to do, it waits between the two.
        reached = _recorded(compute)
        if follows_compute:
            self._stream.wait_event(reached)
        error = None
        with torch.cuda.stream(self._stream):
            started = _recorded(self._stream)
            try:
                work()
            except RuntimeError as caught:
                error = str(caught) or type(caught).__name__
            # Also after a failure: what was queued before it still writes to the blocks.
            ended = _recorded(self._stream)
        return _StreamPart(self._device, (started, ended), (reached, _recorded(compute)), error)

    def close(self) -> None:
        """Wait for all that was queued."""
        self._stream.synchronize()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


_Span = tuple[torch.cuda.Event, torch.cuda.Event]


def _duration_s(span: _Span) -> float:
    """Return seconds between two events, when the second has come."""
    first, second = span
    second.synchronize()
    return float(first.elapsed_time(second)) / 1000


class _StreamPart:
    def __init__(self, device: torch.device, copy: _Span, queued: _Span, error: str | None) -> None:
        self._device, self._copy = device, copy
        self._held = [queued]
        self.error = error

    def hold_compute(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        reached = _recorded(stream)
        stream.wait_event(self._copy[1])
        self._held.append((reached, _recorded(stream)))

    def wait(self) -> None:
        self._copy[1].synchronize()

    @property
    def is_done(self) -> bool:
        return bool(self._copy[1].query())

    @property
    def busy_s(self) -> float:
        return 0.0 if self.error else _duration_s(self._copy)

    @property
    def held_s(self) -> float:
        return sum(_duration_s(span) for span in self._held)
