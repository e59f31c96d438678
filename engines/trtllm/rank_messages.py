"""What rank 0 and the other ranks of an engine say to each other.

Each step is one command to each rank and one answer from it. All ranks are processes of one user
on one machine; their messages are pickled and go through a socket in a private directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.kv_copies import CopyReport
from engines.trtllm.packing import NarrowArrays
from orchestrator.core.kv_transfer import KVTransfer


@dataclass(frozen=True, slots=True)
class RankFailed:
    """Answer of a rank that cannot go on."""

    message: str


@dataclass(frozen=True, slots=True)
class RankLoaded:
    """Answer of a rank whose engine is loaded."""

    num_device_blocks: int
    """As many KV blocks fit on its device."""


@dataclass(frozen=True, slots=True)
class TakePool:
    """Take the memory of the KV pool; answered by `RankReady`."""

    num_device_blocks: int


@dataclass(frozen=True, slots=True)
class RankReady:
    """Answer of a rank that waits for steps."""


@dataclass(frozen=True, slots=True)
class RankStep:
    """Do one step; answered by `RankReport`."""

    transfers: Sequence[KVTransfer]
    waits_for_transfers: bool
    """As in `SchedulerOutput`."""

    waits_for_one: bool
    """Wait until a copy has ended, if any is on its way."""

    arrays: NarrowArrays | None
    """None if there is nothing to compute."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """Answer of a rank that has done its step."""

    copies: CopyReport


RankCommand = TakePool | RankStep
RankAnswer = RankLoaded | RankReady | RankReport | RankFailed
