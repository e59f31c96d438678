"""Where it is counted what clients use of their limits, and who waits: in the memory of one router
process. `router.shared_usage` counts for several."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias


class Count(Protocol):
    """How many of something there are now, over all processes that count it."""

    def total(self) -> int:
        """Return the number."""
        ...

    def add(self, change: int) -> None:
        """Change this process's part; no other process does, so this needs no lock."""
        ...


class OwnCount:
    """A count of this process alone."""

    __slots__ = ("_number",)

    def __init__(self) -> None:
        self._number = 0

    def total(self) -> int:
        """Return the number."""
        return self._number

    def add(self, change: int) -> None:
        """Change it."""
        self._number += change


BucketCells: TypeAlias = "list[float] | memoryview[float]"
"""The state of a `RateBucket`: when it will be full if nothing more is taken, and at which rate
that was reckoned, per second."""


def _full_bucket() -> BucketCells:
    return [-math.inf, 0.0]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one client uses."""

    requests: BucketCells = field(default_factory=_full_bucket)
    tokens: BucketCells = field(default_factory=_full_bucket)
    num_reserved_tokens: Count = field(default_factory=OwnCount)
    """Taken from `tokens` by requests that have not ended."""

    num_sequences: Count = field(default_factory=OwnCount)
    """Answers that are being made."""

    num_waiting: Count = field(default_factory=OwnCount)
    """Sequences without a token yet."""


class UsageStore(Protocol):
    """The usage of all clients of a router."""

    num_waiting: Count
    """Sequences without a token yet, of everybody."""

    def of_client(self, name: str) -> Usage:
        """Return what a client uses; at first it uses nothing.

        Raises:
            ConfigError: there were too many clients.
        """
        ...

    def exclusively(self) -> AbstractContextManager[object]:
        """Return what to look and take in, so that nobody takes in between; may be nested."""
        ...


class OwnUsage:
    """Usage that one process counts for itself."""

    def __init__(self) -> None:
        self.num_waiting: Count = OwnCount()
        self._clients: dict[str, Usage] = {}
        self._nothing = nullcontext()

    def of_client(self, name: str) -> Usage:
        """Return what a client uses."""
        usage = self._clients.get(name)
        if usage is None:
            usage = self._clients[name] = Usage()
        return usage

    def exclusively(self) -> AbstractContextManager[object]:
        """Return a context that does nothing: one event loop does one thing at a time."""
        return self._nothing
