"""Usage that several processes of one router count together, in a file that all of them map.

Each process has a column for what it counts, and is the only one to write there, so that a count
needs no lock and what a process held can be given back when it has died. Buckets belong to all, and
whoever looks and takes locks the file. The kernel lifts a lock when its holder dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from orchestrator.core.errors import ConfigError
from router.rate_limits import give_back
from router.usage import Count, Usage

MAX_CLIENTS = 65_536
"""The file takes 0.1 to 1 kB of memory for each client that there ever was, and none for others."""

_WORD = 8
_NUM_HEADER_WORDS = 1
"""How many clients there are."""

_NUM_FIXED_WORDS = 6
"""Of a client: digest of its name, and state of its two buckets."""

_NUM_CLIENT_COUNTS = 3


class _Layout:
    """Where everything is, in words of 8 bytes."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.first_client = _NUM_HEADER_WORDS + num_workers
        self.num_client_words = _NUM_FIXED_WORDS + _NUM_CLIENT_COUNTS * num_workers

    def num_bytes(self, max_clients: int) -> int:
        return _WORD * self.client(max_clients)

    def max_clients(self, num_bytes: int) -> int:
        return (num_bytes // _WORD - self.first_client) // self.num_client_words

    def client(self, index: int) -> int:
        return self.first_client + index * self.num_client_words

    def counts(self, client: int) -> range:
        """Return where each count of the client that begins at a word begins."""
        first = client + _NUM_FIXED_WORDS
        return range(first, client + self.num_client_words, self.num_workers)


class _SharedCount:
    """A number in each process's column."""

    __slots__ = ("_parts", "_worker")

    def __init__(self, parts: memoryview[int], worker: int) -> None:
        self._parts = parts
        self._worker = worker

    def total(self) -> int:
        return sum(self._parts)

    def add(self, change: int) -> None:
        self._parts[self._worker] += change


class _FileLock:
    """Keeps other processes out while it is entered, however often."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._depth = 0

    def __enter__(self) -> None:
        if self._depth == 0:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)


class SharedUsage:
    """One process's sight of the usage of all clients. Belongs to one thread."""

    def __init__(self, path: Path, *, num_workers: int, worker: int) -> None:
        """Map the file at `path`; this process counts as `worker`, from 0."""
        self._layout = _Layout(num_workers)
        self._worker = worker
        # Opened here, not inherited: a lock belongs to what was opened.
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lock = _FileLock(self._file)
        self._mapped = mmap.mmap(self._file, 0)  # as long as the file is
        self._max_clients = self._layout.max_clients(len(self._mapped))
        self._integers = memoryview(self._mapped).cast("q")
        self._floats = memoryview(self._mapped).cast("d")
        self._places: dict[tuple[int, int], int] = {}
        """Where the client with a digest begins, of those that were looked at."""

        self._clients: dict[str, Usage] = {}
        self.num_waiting: Count = self._count(_NUM_HEADER_WORDS)

    @classmethod
    def create(cls, path: Path, *, num_workers: int, max_clients: int = MAX_CLIENTS) -> Self:
        """Make the file at `path`, in which nothing is used, and map it to give things back."""
        with path.open("xb") as file:
            file.truncate(_Layout(num_workers).num_bytes(max_clients))
        return cls(path, num_workers=num_workers, worker=0)

    def of_client(self, name: str) -> Usage:
        """Return what a client uses, over all processes.

        Raises:
            ConfigError: there were too many clients.
        """
        usage = self._clients.get(name)
        if usage is None:
            usage = self._clients[name] = self._usage_at(self._place_of(name))
        return usage

    def exclusively(self) -> AbstractContextManager[object]:
        """Return what to look and take in; others wait until then, which stops their event
        loops."""
        return self._lock

    def give_up(self, worker: int) -> None:
        """Give back what a process held, which has died."""
        with self._lock:
            self._integers[_NUM_HEADER_WORDS + worker] = 0
            for index in range(self._integers[0]):
                place = self._layout.client(index)
                reserved, *others = self._layout.counts(place)
                tokens = self._floats[place + 4 : place + 6]
                if num_tokens := self._integers[reserved + worker]:
                    give_back(tokens, num_tokens)
                for count in (reserved, *others):
                    self._integers[count + worker] = 0

    def _place_of(self, name: str) -> int:
        digest = struct.unpack("qq", hashlib.blake2b(name.encode(), digest_size=16).digest())
        with self._lock:
            num_clients = self._integers[0]
            for index in range(len(self._places), num_clients):
                place = self._layout.client(index)
                self._places[self._integers[place], self._integers[place + 1]] = place
            if digest in self._places:
                return self._places[digest]
            if num_clients == self._max_clients:
                raise ConfigError(
                    f"client {name!r} is one too many: the clients file has had "
                    f"{self._max_clients:,} since the router was started, as many as its workers "
                    "can count; restart it"
                )
            place = self._places[digest] = self._layout.client(num_clients)
            self._integers[place], self._integers[place + 1] = digest
            self._integers[0] = num_clients + 1
            return place

    def _usage_at(self, place: int) -> Usage:
        num_reserved_tokens, num_sequences, num_waiting = map(
            self._count, self._layout.counts(place)
        )
        return Usage(
            requests=self._floats[place + 2 : place + 4],
            tokens=self._floats[place + 4 : place + 6],
            num_reserved_tokens=num_reserved_tokens,
            num_sequences=num_sequences,
            num_waiting=num_waiting,
        )

    def _count(self, first: int) -> _SharedCount:
        return _SharedCount(self._integers[first : first + self._layout.num_workers], self._worker)
