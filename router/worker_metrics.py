"""The metrics of a router's workers as one: what each has counted, also before it was started anew.

Works on the text that is scraped, line by line; nobody else's text comes here. Scrapers take a
counter that falls for one that has begun again, and all of it for new. So what a worker has said
once is kept in a file: for the others while it does not answer, and for its successor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from router.workers import Fellows, WorkerSeat

LARGEST = frozenset(
    {
        "proserve_router_waiting_sequences",
        "proserve_router_registered_nodes",
        "proserve_router_registrations_total",
        "proserve_router_clients_file_is_stale",
        "proserve_router_clients_file_reloads_total",
    }
)
"""What all workers say of the same thing, so that a sum would count it as often as they are."""

SMALLEST = frozenset({"proserve_router_endpoint_usable", "proserve_router_registry_is_followed"})
"""What counts if it is so for all workers."""

_CREATED = "_created"
"""Ends the names of the moments since when something is counted."""


@dataclass(slots=True)
class _Family:
    """A metric."""

    head: list[str]
    """Its comments."""

    kind: str
    samples: dict[str, float]
    """By name and labels as they are written."""


def merged(texts: Iterable[str]) -> str:
    """Return metrics of several workers as those of one."""
    families: dict[str, _Family] = {}
    for text in texts:
        for name, found in _families(text):
            family = families.setdefault(name, found)
            if family is found:
                continue
            combine = _combination(name)
            for sample, value in found.samples.items():
                known = family.samples.get(sample)
                family.samples[sample] = value if known is None else combine((known, value))
    return "".join(_lines(families.values()))


def lasting(text: str) -> str:
    """Return what stays true of a worker that has ended: what was counted, not what was there."""
    return "".join(
        _lines(
            family
            for name, family in _families(text)
            if family.kind != "gauge" or name.endswith(_CREATED)
        )
    )


def _combination(name: str) -> Callable[[Sequence[float]], float]:
    if name in LARGEST:
        return max
    return min if name in SMALLEST or name.endswith(_CREATED) else sum


def _families(text: str) -> Iterator[tuple[str, _Family]]:
    head: list[str] = []
    name, family = "", _Family([], "", {})
    for line in text.splitlines():
        match line.split(" ", 3):
            case ["#", "HELP", *_]:
                head = [line]
            case ["#", "TYPE", found, kind]:
                if name:
                    yield name, family
                name, family = found, _Family([*head, line], kind, {})
            case _:
                sample, _, value = line.rpartition(" ")
                family.samples[sample] = float(value)
    if name:
        yield name, family


def _lines(families: Iterable[_Family]) -> Iterator[str]:
    for family in families:
        yield from (f"{line}\n" for line in family.head)
        yield from (f"{sample} {value!r}\n" for sample, value in family.samples.items())


class WorkerMetrics:
    """What one worker says of itself, and of all. Belongs to one event loop."""

    def __init__(self, seat: WorkerSeat, render: Callable[[], Awaitable[str]]) -> None:
        """`render` returns what this process has counted."""
        self.seat = seat
        self.fellows = Fellows(seat)
        self._render = render
        self._path = seat.metrics_path(seat.index)
        self._before = lasting(self._path.read_text()) if self._path.exists() else ""
        """What the processes have counted that had this seat before."""

        self._turn = asyncio.Lock()

    async def own(self) -> str:
        """Return what this worker and those before it have counted, and keep it."""
        async with self._turn:  # so that what is kept is never older than what was said
            return await asyncio.to_thread(self._kept, await self._render())

    async def of_all(self) -> str:
        """Return what all workers have counted."""
        own, *others = await asyncio.gather(self.own(), *map(self._of, self.seat.others()))
        return await asyncio.to_thread(merged, [own, *others])

    async def _of(self, worker: int) -> str:
        text = await self.fellows.metrics(worker)
        if text is not None:
            return text
        path = self.seat.metrics_path(worker)
        return lasting(path.read_text()) if path.exists() else ""

    def _kept(self, text: str) -> str:
        total = merged([text, self._before])
        draft = self._path.with_suffix(".draft")
        draft.write_text(total)
        draft.replace(self._path)
        return total
