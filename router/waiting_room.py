"""Counts the sequences that wait for their first token, and says who may join them.

Pure. The more valuable classes find places when the others do not (trunk reservation), and no
client takes so many that others of its class find none (dynamic thresholds, A. Choudhury and
E. Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from router.usage import OwnUsage, UsageStore


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why there is no place for a request."""

    code: str
    message: str
    num_too_many: int
    """So many of those that wait would have to be gone."""


class WaitingRoom:
    """The places for waiting sequences."""

    def __init__(
        self,
        num_places: int,
        class_names: Sequence[str],
        *,
        reserved_fraction: float,
        client_share: float,
        store: UsageStore | None = None,
    ) -> None:
        """`class_names` go from the most to the least valuable; `store` counts for all processes
        that fill the room, None for this one."""
        self._num_open_to = {
            name: max(1, math.floor(num_places * (1 - reserved_fraction) ** rank))
            for rank, name in enumerate(class_names)
        }
        self._client_share = client_share
        self._store = OwnUsage() if store is None else store

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return self._store.num_waiting.total()

    def obstacle(self, class_name: str, client: str | None, num_sequences: int) -> Obstacle | None:
        """Return why a request may not join now; None if it may.

        A request finds an empty room large enough whatever its size. Without a client there is
        nobody to be fair to.
        """
        num_open, num_waiting = self._num_open_to[class_name], self.num_waiting
        num_too_many = num_waiting + num_sequences - num_open
        if num_waiting and num_too_many > 0:
            return Obstacle(
                "queue_full",
                f"{num_waiting:,} sequences wait for their first token, and class "
                f"{class_name!r} may wait while there are no more than {num_open:,}",
                min(num_too_many, num_waiting),
            )
        num_own = 0 if client is None else self._store.of_client(client).num_waiting.total()
        num_allowed = self._client_share * (num_open - num_waiting)
        if num_own and num_own >= num_allowed:
            return Obstacle(
                "client_share_full",
                f"client {client!r} has {num_own:,} of the {num_waiting:,} sequences that "
                f"wait for their first token, its share of the {num_open:,} places",
                math.ceil(num_own - num_allowed) or 1,
            )
        return None

    def enter(self, client: str | None, num_sequences: int) -> tuple[Place, ...]:
        """Return a place for each sequence of a request that has no obstacle."""
        self._count(client, num_sequences)
        return tuple(Place(self, client) for _ in range(num_sequences))

    def free(self, client: str | None) -> None:
        """Count one less; called by its `Place` alone."""
        self._count(client, -1)

    def _count(self, client: str | None, change: int) -> None:
        self._store.num_waiting.add(change)
        if client is not None:
            self._store.of_client(client).num_waiting.add(change)


class Place:
    """Where one sequence waits."""

    __slots__ = ("_client", "_is_taken", "_room")

    def __init__(self, room: WaitingRoom, client: str | None) -> None:
        self._room = room
        self._client = client
        self._is_taken = True

    def leave(self) -> None:
        """Its first token has come, or none will; later calls do nothing."""
        if self._is_taken:
            self._is_taken = False
            self._room.free(self._client)
