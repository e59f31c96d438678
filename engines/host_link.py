"""The link between device and host memory in virtual time: one queue for each direction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.core.kv_transfer import CopyProfile, KVTransfer, TransferDirection


@dataclass(frozen=True, slots=True)
class _Copy:
    transfer: KVTransfer
    start_s: float
    end_s: float


class HostLink:
    """When copies end. Those of one direction follow each other; a copy that starts while the
    other direction is busy runs at the contended rate."""

    def __init__(self, profile: CopyProfile) -> None:
        self._profile = profile
        self._free_at_s = dict.fromkeys(TransferDirection, 0.0)
        self._copies: dict[int, _Copy] = {}

    @property
    def has_copies(self) -> bool:
        """True while a copy is on its way."""
        return bool(self._copies)

    @property
    def next_end_s(self) -> float:
        """When the next copy ends; there is one."""
        return min(copy.end_s for copy in self._copies.values())

    def start(self, transfers: Iterable[KVTransfer], now_s: float) -> None:
        """Queue copies, in this order."""
        for transfer in transfers:
            direction = transfer.direction
            start_s = max(now_s, self._free_at_s[direction])
            others = [s for d, s in self._free_at_s.items() if d is not direction]
            block_s = self._block_s(direction, is_contended=max(others) > start_s)
            num_blocks = len(transfer.device_block_ids)
            end_s = start_s + self._profile.start_s + num_blocks * block_s
            self._free_at_s[direction] = end_s
            self._copies[transfer.transfer_id] = _Copy(transfer, start_s, end_s)

    def compute_end_s(
        self, onboards: Iterable[KVTransfer], now_s: float, compute_s: float, *, num_groups: int
    ) -> float:
        """Return when a step that began at `now_s` ends if each of its layer groups waits for
        its part of these copies, all groups being equally long."""
        copies = [self._copies[transfer.transfer_id] for transfer in onboards]
        end_s, group_s = now_s, compute_s / num_groups
        for group in range(1, num_groups + 1):
            arrivals = (c.start_s + (c.end_s - c.start_s) * group / num_groups for c in copies)
            end_s = max(end_s, *arrivals, now_s) + group_s
        return end_s

    def end_s(self, transfers: Iterable[KVTransfer]) -> float:
        """Return when the last of these copies ends; 0 if there are none."""
        return max((self._copies[t.transfer_id].end_s for t in transfers), default=0.0)

    def pop_ended(self, now_s: float) -> tuple[list[KVTransfer], float]:
        """Return the copies that have ended by now, first started first and each one once, and
        how long they took in sum, without their wait in the queue."""
        ended = [copy for copy in self._copies.values() if copy.end_s <= now_s]
        for copy in ended:
            del self._copies[copy.transfer.transfer_id]
        return [c.transfer for c in ended], sum(c.end_s - c.start_s for c in ended)

    def _block_s(self, direction: TransferDirection, *, is_contended: bool) -> float:
        profile = self._profile
        if direction is TransferDirection.ONBOARD:
            return profile.contended_onboard_block_s if is_contended else profile.onboard_block_s
        return profile.contended_offload_block_s if is_contended else profile.offload_block_s
