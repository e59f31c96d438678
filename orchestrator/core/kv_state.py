"""What a KV cache says of itself: its blocks by what they are doing, and what can be restored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVBlockCounts:
    """Blocks by what they are doing."""

    device_free: int = 0
    device_cached: int = 0
    """Owned by nobody, but their content can still be found."""

    device_used: int = 0
    """Owned by requests, or held by a copy."""

    host_free: int = 0
    host_cached: int = 0
    copying_out: int = 0
    """From the device to the host, now."""

    copying_in: int = 0
    """From the host to the device, now."""


@dataclass(frozen=True, slots=True)
class Restorable:
    """What of a request's KV, beyond its computed tokens, need not be computed."""

    is_on_host: tuple[bool, ...]
    """For each further block in token order: whether it must come from the host."""

    @property
    def num_blocks(self) -> int:
        """Blocks on the device and on the host."""
        return len(self.is_on_host)

    @property
    def num_host_blocks(self) -> int:
        """Blocks that must come from the host."""
        return sum(self.is_on_host)

    def up_to(self, max_host_blocks: int) -> Restorable:
        """Return the longest beginning with at most so many blocks from the host."""
        num_host_blocks = 0
        for index, is_on_host in enumerate(self.is_on_host):
            num_host_blocks += is_on_host
            if num_host_blocks > max_host_blocks:
                return Restorable(self.is_on_host[:index])
        return self
