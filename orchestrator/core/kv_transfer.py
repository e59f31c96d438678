"""Copies of KV blocks between device and host memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    """As many as `device_block_ids`; block i of one is copied to or from block i of the other."""
