"""Workspaces that several ranks reduce through, as far as one rank can tell: pointers that stand
for nothing, and the buffers that must live as long as they are used."""

from __future__ import annotations

import itertools
import weakref

import numpy as np

from tests.trtllm.rules import Rule, RuleBroken
from tests.trtllm.step_checks import Ints

POINTERS_PER_RANK = 7
POINTERS_OF_COUNTER = 3


class IpcBuffer:
    """Memory that all ranks see; `pointers` end with its owner."""

    def __init__(self, num_pointers: int) -> None:
        self.pointers = tuple(itertools.islice(_POINTERS, num_pointers))
        _ALIVE[self.pointers] = self


_POINTERS = itertools.count(0x7F00_0000_0000, 0x1000)
_ALIVE: weakref.WeakValueDictionary[tuple[int, ...], IpcBuffer] = weakref.WeakValueDictionary()


def num_pointers(tp_size: int) -> int:
    """Return the length of a workspace tensor."""
    return POINTERS_PER_RANK * tp_size + POINTERS_OF_COUNTER


def check_workspace(pointers: Ints) -> None:
    """Raise RuleBroken unless these are the pointers of a buffer that lives."""
    if tuple(pointers.tolist()) not in _ALIVE:
        count = np.count_nonzero(pointers)
        raise RuleBroken(
            Rule.ALL_REDUCE, f"{count} pointers that are no living workspace: {pointers.tolist()}"
        )
