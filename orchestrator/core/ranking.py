"""Who goes first in a step: what a scheduler decides, and the order that follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.request_table import Floats, Indices, RequestTable
from orchestrator.core.step_builder import StepRules

_CHUNK = 512
"""Rows sorted at once: more than fit into most steps; the rest of a long queue stays unsorted."""

Position = tuple[float, float, float, str]
"""Group, key, arrival, id: where a request stands in a step's order."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who goes first in one step, and what the step may hold. Arrays are by table row."""

    group: NDArray[Any]
    """Lower groups go first."""

    key: Floats
    """Lower goes first inside a group; ties by arrival, then id."""

    rules: StepRules
    load_s: float = 0.0
    num_urgent: int = 0
    starved_ids: frozenset[str] = field(default_factory=frozenset)


class RankOrder:
    """All rows of a table by (group, key, arrival, id): a total order, sorted as far as it is read.

    Lower goes first.
    """

    def __init__(self, table: RequestTable, group: NDArray[Any], key: Floats) -> None:
        self._table = table
        self._group = group
        self._key = key

    def __iter__(self) -> Iterator[int]:
        for rows in self.sorted_parts():
            yield from rows

    def sorted_parts(self) -> Iterator[list[int]]:
        """Yield the rows in order, some hundreds at once."""
        for group in np.unique(self._group):
            rows = np.flatnonzero(self._group == group)
            while len(rows):
                head, rows = self._split(rows)
                yield self.sort(head)

    def sort(self, rows: Indices) -> list[int]:
        """Return these rows in order."""
        key, arrival_s = self._key[rows], self._table.arrival_s[rows]
        group = self._group[rows]
        order = np.lexsort((arrival_s, key, group))
        rows, key, arrival_s, group = rows[order], key[order], arrival_s[order], group[order]
        is_tie = (key[1:] == key[:-1]) & (arrival_s[1:] == arrival_s[:-1])
        is_tie &= group[1:] == group[:-1]
        result: list[int] = rows.tolist()
        # Runs of equal keys: from where a tie begins to where it ends.
        edges = np.flatnonzero(np.diff(is_tie, prepend=False, append=False)).tolist()
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            run = result[first : last + 1]
            run.sort(key=lambda row: self._table.requests[row].request_id)
            result[first : last + 1] = run
        return result

    def position(self, row: int) -> Position:
        """Return where a row stands; compares as the order does."""
        table = self._table
        return (
            self._group[row],
            self._key[row],
            table.arrival_s[row],
            table.requests[row].request_id,
        )

    def _split(self, rows: Indices) -> tuple[Indices, Indices]:
        """Return the first rows by key, no tie torn apart, and the rest."""
        if len(rows) <= 2 * _CHUNK:
            return rows, rows[:0]
        key = self._key[rows]
        last = np.partition(key, _CHUNK)[_CHUNK]
        return rows[key <= last], rows[key > last]
