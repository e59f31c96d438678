"""What became of recent requests, in memory, for whoever asks: `proserve trace`, the dashboard.

Bounded in every direction: the oldest request makes room for the newest, and of one request the
first events and the last ones stay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

MAX_REQUESTS = 1_000
MAX_EARLY_EVENTS = MAX_LATE_EVENTS = 50

Attribute = str | int | float | bool | None


class StoryEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened to a request."""

    name: str
    at_unix_s: float
    """On the clock of the machine that tells."""

    attributes: Mapping[str, Attribute] = {}


class Story(msgspec.Struct, frozen=True):
    """What one process knows of a request, in order."""

    request_id: str
    events: tuple[StoryEvent, ...]
    num_omitted: int = 0
    """Events between the early and the late ones."""


class StoryBook:
    """The events of one request, as they come."""

    __slots__ = ("_early", "_late", "_num_events")

    def __init__(self) -> None:
        self._early: list[StoryEvent] = []
        self._late: deque[StoryEvent] = deque(maxlen=MAX_LATE_EVENTS)
        self._num_events = 0

    def note(self, name: str, *, ago_s: float = 0.0, **attributes: Attribute) -> None:
        """Add an event that happened `ago_s` before now; attributes that are None are left out."""
        known = {key: value for key, value in attributes.items() if value is not None}
        event = StoryEvent(name, time.time() - ago_s, known)
        self._num_events += 1
        (self._early if self._num_events <= MAX_EARLY_EVENTS else self._late).append(event)

    def last(self, name: str) -> StoryEvent | None:
        """Return the newest event of this name."""
        events = (*reversed(self._late), *reversed(self._early))
        return next((event for event in events if event.name == name), None)

    def story(self, request_id: str) -> Story:
        """Return everything that is kept."""
        events: Sequence[StoryEvent] = (*self._early, *self._late)
        return Story(request_id, tuple(events), self._num_events - len(events))


class Journal:
    """The stories of recent requests by their ids."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._books: dict[str, StoryBook] = {}

    def begin(self, request_id: str) -> StoryBook:
        """Return the book of a request, which goes on if the request was here before."""
        book = self._books.pop(request_id, None) or StoryBook()
        self._books[request_id] = book
        if len(self._books) > self._max_requests:
            del self._books[next(iter(self._books))]
        return book

    def book(self, request_id: str) -> StoryBook | None:
        """Return the book of a request; None if it is unknown or long ago."""
        return self._books.get(request_id)
