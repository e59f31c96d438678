"""Lines between rank 0 and the other ranks: sockets that tell when a peer has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import TypeVar

from engines.trtllm.launch import RankPlace
from engines.trtllm.rank_messages import RankAnswer, RankCommand, RankFailed
from orchestrator.core.errors import EngineError, EngineLost

MEETING_TIMEOUT_S = 60.0
"""Rank 0 is at the meeting point within this time: all ranks are started at once."""

_RETRY_S = 0.05
_CHECK_S = 0.5

A = TypeVar("A", bound=RankAnswer)


class FollowerLines:
    """Rank 0's lines to all others; a process that is alone has none."""

    def __init__(self, place: RankPlace) -> None:
        """Wait until every other rank has called. A launcher that could not start them all, or
        that sees one end, ends this process too."""
        self._lines: dict[Connection, int] = {}  # -> rank
        if place.meeting_point is None:
            return
        with Listener(str(place.meeting_point), family="AF_UNIX") as listener:
            for _ in range(place.num_ranks - 1):
                line = listener.accept()
                self._lines[line] = line.recv()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks at the other ends."""
        return tuple(self._lines.values())

    def send(self, command: RankCommand) -> None:
        """Tell every rank.

        Raises:
            EngineLost: one of them has ended.
        """
        for line, rank in self._lines.items():
            try:
                line.send(command)
            except OSError as error:
                raise EngineLost(_ended(rank)) from error

    def receive(self, kind: type[A], *, check: Callable[[], None] | None = None) -> dict[int, A]:
        """Return each rank's answer to the last command, by rank.

        `check` is called now and then while they are silent; what it raises ends the wait.

        Raises:
            EngineLost: one of them has ended, or cannot go on.
        """
        answers: dict[int, A] = {}
        silent = set(self._lines)
        while silent:
            # Whoever speaks or ends first: a rank whose peer has ended may wait for it forever.
            heard = wait(silent, timeout=_CHECK_S)
            if not heard and check is not None:
                check()
            for line in heard:
                assert isinstance(line, Connection)
                answers[self._lines[line]] = self._receive(line, kind)
                silent.discard(line)
        return answers

    def close(self) -> None:
        """Hang up; the other ranks end."""
        for line in self._lines:
            line.close()

    def _receive(self, line: Connection, kind: type[A]) -> A:
        rank = self._lines[line]
        try:
            answer = line.recv()
        except (EOFError, OSError) as error:
            raise EngineLost(_ended(rank)) from error
        if isinstance(answer, RankFailed):
            raise EngineLost(f"rank {rank} of the engine failed: {answer.message}")
        assert isinstance(answer, kind)
        return answer


class LeaderLine:
    """The line of another rank to rank 0."""

    def __init__(self, place: RankPlace) -> None:
        """Call rank 0.

        Raises:
            EngineError: it is not there.
        """
        assert place.meeting_point is not None
        deadline_s = time.monotonic() + MEETING_TIMEOUT_S
        while True:
            try:
                self._line = Client(str(place.meeting_point), family="AF_UNIX")
                break
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise EngineError(
                        f"rank {place.rank} has found no rank 0 at {place.meeting_point} in "
                        f"{MEETING_TIMEOUT_S:.0f} s; start all ranks together, on one machine"
                    ) from error
                time.sleep(_RETRY_S)
        self._line.send(place.rank)

    def receive(self) -> RankCommand | None:
        """Return what rank 0 wants next; None once it has ended."""
        try:
            command: RankCommand = self._line.recv()
        except (EOFError, OSError):
            return None
        return command

    def send(self, answer: RankAnswer) -> None:
        """Answer the last command; nothing happens if rank 0 has ended."""
        try:
            self._line.send(answer)
        except OSError:
            return

    def wait_for_end(self, timeout_s: float) -> None:
        """Return when rank 0 has ended, or hung up, or after this time."""
        deadline_s = time.monotonic() + timeout_s
        while self._line.poll(max(deadline_s - time.monotonic(), 0.0)):
            if self.receive() is None:
                return

    def close(self) -> None:
        """Hang up; rank 0 takes it for the end of this rank."""
        self._line.close()


def _ended(rank: int) -> str:
    return f"rank {rank} of the engine has ended; its log says why, and all ranks must start again"
