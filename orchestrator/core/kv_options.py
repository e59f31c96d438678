"""What happens to KV blocks that requests lose: the choices of a node."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class KVOffload(StrEnum):
    """What becomes of the KV of a preempted request."""

    NEVER = "never"
    """It is computed again."""

    SYNCHRONOUS = "synchronous"
    """It is copied to the host when the request is preempted, and the step waits for copies."""

    ASYNCHRONOUS = "asynchronous"
    """It is copied ahead of need, beside the computation, and comes back the same way."""


@dataclass(frozen=True, slots=True)
class KVCacheOptions:
    """Prefix reuse, offload and reload. Offload needs a host pool."""

    prefix_caching: bool = True
    """Requests of the same client share the KV of equal beginnings."""

    offload: KVOffload = KVOffload.ASYNCHRONOUS
    """What becomes of the KV of a preempted request."""

    copy_budget: bool = True
    """Reload no more blocks in a step than its computation hides, and reckon with the wait for the
    first of them; the rest is computed again or comes later. Without, whatever a scheduled request
    has on the host is reloaded at once, as if copies took no time."""

    offload_threshold_blocks: int = 2
    """Full blocks of the least valuable request that wait for each other before they are copied
    ahead of need; more valuable ones wait in proportion (n_0 of equation 26)."""

    max_offload_threshold_blocks: int = 16
    """Such blocks of any request (n_max of equation 26)."""

    max_offload_backlog_s: float = 0.5
    """Copies to the host that may be waiting, in seconds of copying; what a preempted request
    loses beyond is computed again, so that others get its blocks at once."""

    parked_rank_fraction: float = 0.1
    """A decode whose KV can come back only in part waits for the rest, unless it is among this
    share of the queue's first; those compute the rest again (OC-19)."""

    def __post_init__(self) -> None:
        rules = {
            "offload_threshold_blocks": (self.offload_threshold_blocks >= 1, "at least 1"),
            "max_offload_threshold_blocks": (
                self.max_offload_threshold_blocks >= self.offload_threshold_blocks,
                f"at least offload_threshold_blocks ({self.offload_threshold_blocks})",
            ),
            "max_offload_backlog_s": (self.max_offload_backlog_s >= 0, "at least 0"),
            "parked_rank_fraction": (0 <= self.parked_rank_fraction <= 1, "between 0 and 1"),
        }
        for name, (is_valid, rule) in rules.items():
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {rule}")


RECOMPUTE = KVCacheOptions(prefix_caching=False, offload=KVOffload.NEVER)
"""Nothing is kept: what a request loses is computed again."""
