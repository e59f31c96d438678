"""Copies of KV blocks between device and host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Self


class TransferDirection(StrEnum):
    """Which way the blocks go (TensorRT-LLM's words)."""

    OFFLOAD = "offload"
    """Device to host."""

    ONBOARD = "onboard"
    """Host to device."""


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """One copy of whole blocks. From its beginning to its completion neither end may be
    freed or reused."""

    transfer_id: int
    request_id: str
    direction: TransferDirection
    device_block_ids: tuple[int, ...]
    host_block_ids: tuple[int, ...]
    """As many as `device_block_ids`, at least one; block i of one is copied to or from block i
    of the other."""


@dataclass(frozen=True, slots=True)
class CopyProfile:
    """How long copies of blocks take, in seconds; measured once per engine and machine.

    A copy of m blocks takes `start_s + m * block_s` (equation 15).
    """

    onboard_block_s: float
    """Host to device, nothing else on the link."""

    offload_block_s: float
    """Device to host, nothing else on the link."""

    contended_onboard_block_s: float
    """Host to device while blocks go the other way too."""

    contended_offload_block_s: float
    """Device to host while blocks go the other way too."""

    start_s: float
    """Of each copy, however many blocks it has."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"copy profile: {f.name} is {value}, it must be finite and at least 0; "
                    "profile the engine again"
                )
        if self.onboard_block_s == 0:
            raise ValueError(
                "copy profile: onboard_block_s is 0, so reloading would cost nothing; "
                "profile the engine again"
            )

    def to_dict(self) -> dict[str, float]:
        """Return the constants by name, as stored in a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Self:
        """Return the profile stored by `to_dict`.

        Raises:
            ValueError: a constant is missing, unknown, or out of range.
        """
        names = {f.name for f in fields(cls)}
        if values.keys() != names:
            wrong = ", ".join(sorted(values.keys() ^ names))
            raise ValueError(f"copy profile: missing or unknown constants: {wrong}")
        return cls(**{name: float(values[name]) for name in names})
