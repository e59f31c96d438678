"""Which KV blocks each request owns on the device, what the host holds, and what moves between.

Accounting only: no tensor is touched here. The life of a block's content:

    being filled -> full, on the device -> copied out -> on both -> on the host only
                                                    host only -> copied in -> on both

Full blocks are never written again, so copies and sharing need no locks: several requests may own
the same full block, and the next token of each goes into a block of its own. Whatever nobody uses
stays where it is, and can be found by its key, until its block is needed; what is gone from both
memories is computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from orchestrator.core.block_keys import BlockKeys
from orchestrator.core.block_pool import BlockPool
from orchestrator.core.errors import KVIntegrityError
from orchestrator.core.kv_state import KVBlockCounts, Restorable
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.request import Request


@dataclass(frozen=True, slots=True)
class _Copy:
    """A transfer on its way, and what it carries."""

    transfer: KVTransfer
    keys: tuple[Hashable, ...]


class KVCacheManager:
    """Hands out paged KV blocks, takes them back, and keeps account of copies.

    Transfers have two phases: `offload` and `adopt` begin one, which pins its blocks at both
    ends; `complete` or `fail` ends it.
    """

    def __init__(
        self,
        *,
        num_device_blocks: int,
        block_size_tokens: int,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = False,
    ) -> None:
        """Without host blocks and prefix reuse, what a request gives up is gone at once."""
        if num_device_blocks < 1 or block_size_tokens < 1 or num_host_blocks < 0:
            raise ValueError(
                f"{num_device_blocks} device and {num_host_blocks} host blocks of "
                f"{block_size_tokens} tokens: at least 1 device block of 1 token is needed"
            )
        self.num_device_blocks = num_device_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size_tokens = block_size_tokens
        self.has_keys = num_host_blocks > 0 or enable_prefix_caching
        """Whether anything can ever be found again."""

        self._device = BlockPool(num_device_blocks)
        self._host = BlockPool(num_host_blocks)
        self._keys = BlockKeys(
            block_size_tokens=block_size_tokens, are_shared=enable_prefix_caching
        )
        self._owned: dict[str, list[int]] = {}
        self._num_named: dict[str, int] = {}
        """Leading full blocks of a request whose content can be found."""

        self._num_offloaded: dict[str, int] = {}
        """Leading full blocks of a request that are on the host or on their way."""

        self._copies: dict[int, _Copy] = {}
        self._keys_leaving: set[Hashable] = set()
        self._keys_arriving: set[Hashable] = set()
        self._next_transfer_id = 0

    @property
    def num_free_device_blocks(self) -> int:
        """Blocks that can be had at once."""
        return self._device.num_available

    @property
    def num_transfers(self) -> int:
        """Copies on their way."""
        return len(self._copies)

    @property
    def num_leaving_blocks(self) -> int:
        """Device blocks on their way to the host."""
        return len(self._keys_leaving)

    def num_blocks_about_to_free(self) -> int:
        """Return how many device blocks only wait for a copy of them to end."""
        return sum(
            self._device.num_users(block_id) == 1
            for copy in self._copies.values()
            if copy.transfer.direction is TransferDirection.OFFLOAD
            for block_id in copy.transfer.device_block_ids
        )

    def counts(self) -> KVBlockCounts:
        """Return how many blocks are doing what."""
        moving: Counter[TransferDirection] = Counter()
        for copy in self._copies.values():
            moving[copy.transfer.direction] += len(copy.keys)
        return KVBlockCounts(
            device_free=self._device.num_available - self._device.num_idle,
            device_cached=self._device.num_idle,
            device_used=self._device.num_used,
            host_free=self._host.num_available - self._host.num_idle,
            host_cached=self._host.num_idle,
            copying_out=moving[TransferDirection.OFFLOAD],
            copying_in=moving[TransferDirection.ONBOARD],
        )

    def num_missing_blocks(self, request_id: str, num_tokens: int) -> int:
        """Return how many more blocks the request needs to hold `num_tokens` tokens in all."""
        owned = self._owned.get(request_id)
        num_needed = -(-num_tokens // self.block_size_tokens)
        return max(0, num_needed - (len(owned) if owned else 0))

    def num_owned_blocks(self, request_id: str) -> int:
        """Return how many blocks the request owns; 0 if it is unknown."""
        return len(self._owned.get(request_id, ()))

    def num_sole_blocks(self, request_id: str) -> int:
        """Return how many blocks of a request no other request owns."""
        owned = self._owned.get(request_id, ())
        if not self._keys.are_shared:
            return len(owned)
        copies = self._num_copies_of_blocks()
        return sum(self._device.num_users(b) - copies[b] == 1 for b in owned)

    def block_ids(self, request_id: str) -> Sequence[int]:
        """Return the blocks of a request in token order; a live view, as from `allocate`.

        Raises:
            KeyError: the request owns none.
        """
        return self._owned[request_id]

    def allocate(self, request_id: str, num_tokens: int) -> Sequence[int] | None:
        """Make the request own enough blocks for `num_tokens` tokens in all, and return them.

        Blocks come in token order. The sequence is a live view that only grows until `free`.
        None, with nothing changed, if there are not enough free blocks now.
        """
        num_missing = self.num_missing_blocks(request_id, num_tokens)
        if num_missing > self._device.num_available:
            return None
        owned = self._owned.setdefault(request_id, [])
        owned.extend(self._take_device() for _ in range(num_missing))
        return owned

    def name_full_blocks(self, request: Request) -> None:
        """Let the full blocks of a request's computed tokens be found."""
        request_id = request.spec.request_id
        num_full = request.num_computed_tokens // self.block_size_tokens
        num_named = self._num_named.get(request_id, 0)
        if num_full <= num_named or not self.has_keys:
            return
        keys, owned = self._keys.of(request, num_full), self._owned[request_id]
        for index in range(num_named, num_full):
            self._device.publish(owned[index], keys[index])
        self._num_named[request_id] = num_full

    def restorable(self, request: Request) -> Restorable:
        """Return what follows a request's computed tokens on the device or the host.

        The block of its last token is never among it: something must be computed to go on.
        """
        first = request.num_computed_tokens // self.block_size_tokens
        last = (request.num_tokens - 1) // self.block_size_tokens
        if not self.has_keys or request.num_computed_tokens % self.block_size_tokens:
            return Restorable(())
        on_device, on_host = self._device.contents, self._host.contents
        is_on_host = []
        for key in self._keys.of(request, last)[first:last]:
            is_on_device = key in on_device
            # What another request is bringing back can be shared once it is there.
            if not is_on_device and (key not in on_host or key in self._keys_arriving):
                break
            is_on_host.append(not is_on_device)
        return Restorable(tuple(is_on_host))

    def num_blocks_taken_by(self, request: Request, restored: Restorable) -> int:
        """Return how many blocks fewer would be available after `adopt`."""
        first = request.num_computed_tokens // self.block_size_tokens
        keys = self._keys.of(request, first + restored.num_blocks)[first:]
        num_taken = restored.num_host_blocks
        for key, is_on_host in zip(keys, restored.is_on_host, strict=False):
            block_id = self._device.find(key)
            num_taken += (
                not is_on_host and block_id is not None and not self._device.num_users(block_id)
            )
        return num_taken

    def adopt(self, request: Request, restored: Restorable) -> KVTransfer | None:
        """Make the request own these blocks after those of its computed tokens, and return the
        copy that brings those from the host; None if there are none.

        `restored` is what `restorable` has just said, or a beginning of it, and there are blocks
        for it.
        """
        request_id = request.spec.request_id
        owned = self._owned.setdefault(request_id, [])
        first = request.num_computed_tokens // self.block_size_tokens
        assert len(owned) == first, "a request is restored before it gets blocks for new tokens"
        keys = self._keys.of(request, first + restored.num_blocks)[first:]
        places: list[int | None] = []
        # What is there is kept first, so that taking blocks for the rest does not overwrite it.
        for key, is_on_host in zip(keys, restored.is_on_host, strict=False):
            block_id = None if is_on_host else self._device.find(key)
            if block_id is not None:
                self._device.retain(block_id)
            places.append(block_id)
        device_ids: list[int] = []
        host_ids: list[int] = []
        moved: list[Hashable] = []
        for key, place in zip(keys, places, strict=False):
            if place is not None:
                owned.append(place)
                continue
            host_id = self._host.find(key)
            assert host_id is not None, "the host has dropped a block while it was restored"
            self._host.retain(host_id)
            device_id = self._take_device()
            self._device.retain(device_id)
            owned.append(device_id)
            device_ids.append(device_id)
            host_ids.append(host_id)
            moved.append(key)
        if not moved:
            return None
        self._keys_arriving.update(moved)
        return self._begin(request_id, TransferDirection.ONBOARD, device_ids, host_ids, moved)

    def num_offloaded_blocks(self, request: Request) -> int:
        """Return how many first blocks of a request, of those that can be found, need not be
        copied to the host: they are there, on their way, or more than it has."""
        num_named = self._num_named.get(request.request_id, 0)
        return num_named - self.num_offloadable_blocks(request)

    def num_offloadable_blocks(self, request: Request) -> int:
        """Return how many full blocks of a request are neither on the host nor on their way."""
        num_full = min(self._num_named.get(request.request_id, 0), self.num_host_blocks)
        return max(0, num_full - self._num_offloaded.get(request.request_id, 0))

    def offload(self, request: Request, max_blocks: int) -> KVTransfer | None:
        """Begin to copy a request's first full blocks that are not on the host; None if there
        is nothing to copy or no host block to be had.

        The request keeps its blocks. Of a request with more blocks than the host, only the
        first are copied.
        """
        request_id = request.spec.request_id
        num_full = min(self._num_named.get(request_id, 0), self.num_host_blocks)
        owned, keys = self._owned.get(request_id, []), self._keys.of(request, num_full)
        device_ids: list[int] = []
        host_ids: list[int] = []
        moved: list[Hashable] = []
        index = self._num_offloaded.get(request_id, 0)
        while index < num_full and len(moved) < max_blocks:
            key, block_id = keys[index], owned[index]
            # Somebody else's block may carry the name; then that one is copied, or not at all.
            is_found_here = self._device.find(key) == block_id
            if is_found_here and self._host.find(key) is None and key not in self._keys_leaving:
                host_id = self._host.take()
                if host_id is None:
                    break
                self._device.retain(block_id)
                device_ids.append(block_id)
                host_ids.append(host_id)
                moved.append(key)
            index += 1
        self._num_offloaded[request_id] = index
        if not moved:
            return None
        self._keys_leaving.update(moved)
        return self._begin(request_id, TransferDirection.OFFLOAD, device_ids, host_ids, moved)

    def spill(self, request: Request, max_blocks: int) -> KVTransfer | None:
        """Begin to copy what of a request is not on the host any more, before it is freed."""
        self._num_offloaded.pop(request.request_id, None)
        return self.offload(request, max_blocks)

    def complete(self, transfer_id: int) -> None:
        """End a transfer that succeeded: its content is now at both ends.

        Raises:
            KVIntegrityError: no such transfer is on its way.
        """
        copy = self._end(transfer_id)
        transfer = copy.transfer
        is_offload = transfer.direction is TransferDirection.OFFLOAD
        target = self._host if is_offload else self._device
        # Nobody else could ever look for what only one request could find, once it has ended.
        if self._keys.are_shared or self._keys.knows(transfer.request_id):
            blocks = transfer.host_block_ids if is_offload else transfer.device_block_ids
            for block_id, key in zip(blocks, copy.keys, strict=True):
                target.publish(block_id, key)
        self._release_both(copy)

    def fail(self, transfer_id: int) -> KVTransfer:
        """End a transfer that failed, and return it: its target holds nothing.

        After an offload the content is still on the device, if its request still is. After an
        onboard the host's copy is not trusted any more either, and the request must be freed.

        Raises:
            KVIntegrityError: no such transfer is on its way.
        """
        copy = self._end(transfer_id)
        if copy.transfer.direction is TransferDirection.OFFLOAD:
            self._num_offloaded.pop(copy.transfer.request_id, None)
        self._release_both(copy)
        if copy.transfer.direction is TransferDirection.ONBOARD:
            for key in copy.keys:
                self._host.withdraw(key)
        return copy.transfer

    def free(self, request_id: str) -> int:
        """Take back all blocks of a request and return how many it had.

        Full ones can still be found, until they are needed.
        """
        owned = self._owned.pop(request_id, None)
        self._num_named.pop(request_id, None)
        self._num_offloaded.pop(request_id, None)
        if owned is None:
            return 0
        # Tail first, so that a request's beginning is found longest, and the first block of a
        # freed request is the next one handed out.
        for block_id in reversed(owned):
            self._device.release(block_id)
        return len(owned)

    def forget(self, request_id: str) -> None:
        """Free a request that has ended, and drop what nobody else could find."""
        self.free(request_id)
        keys = self._keys.forget(request_id)
        if not self._keys.are_shared:
            for key in keys:
                self._device.withdraw(key)
                self._host.withdraw(key)

    def check_integrity(self) -> None:
        """Prove that each block is free, idle, or used by exactly those who say so.

        Raises:
            KVIntegrityError: lists every contradiction.
        """
        device_users: Counter[int] = Counter()
        host_users: Counter[int] = Counter()
        for request_id, owned in self._owned.items():
            if len(set(owned)) != len(owned):
                raise KVIntegrityError(f"request {request_id} owns a block twice: {owned}")
            device_users.update(owned)
        moving: dict[TransferDirection, set[Hashable]] = {d: set() for d in TransferDirection}
        for copy in self._copies.values():
            device_users.update(copy.transfer.device_block_ids)
            host_users.update(copy.transfer.host_block_ids)
            moving[copy.transfer.direction].update(copy.keys)
        self._device.check_integrity(device_users, name="device")
        self._host.check_integrity(host_users, name="host")
        said = {
            TransferDirection.OFFLOAD: self._keys_leaving,
            TransferDirection.ONBOARD: self._keys_arriving,
        }
        if moving != said:
            raise KVIntegrityError(f"{said} are on their way, truly {moving}")

    def _take_device(self) -> int:
        block_id = self._device.take()
        assert block_id is not None, "room was made before"
        return block_id

    def _num_copies_of_blocks(self) -> Counter[int]:
        """Return in how many copies each device block is."""
        return Counter(b for copy in self._copies.values() for b in copy.transfer.device_block_ids)

    def _begin(
        self,
        request_id: str,
        direction: TransferDirection,
        device_ids: Sequence[int],
        host_ids: Sequence[int],
        keys: Sequence[Hashable],
    ) -> KVTransfer:
        transfer = KVTransfer(
            self._next_transfer_id, request_id, direction, tuple(device_ids), tuple(host_ids)
        )
        self._next_transfer_id += 1
        self._copies[transfer.transfer_id] = _Copy(transfer, tuple(keys))
        return transfer

    def _end(self, transfer_id: int) -> _Copy:
        copy = self._copies.pop(transfer_id, None)
        if copy is None:
            raise KVIntegrityError(f"transfer {transfer_id} ended, but is not on its way")
        is_offload = copy.transfer.direction is TransferDirection.OFFLOAD
        moving = self._keys_leaving if is_offload else self._keys_arriving
        moving.difference_update(copy.keys)
        return copy

    def _release_both(self, copy: _Copy) -> None:
        for block_id in reversed(copy.transfer.device_block_ids):
            self._device.release(block_id)
        for block_id in reversed(copy.transfer.host_block_ids):
            self._host.release(block_id)
