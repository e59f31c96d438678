"""Which device blocks each request owns. Accounting only: no tensor is touched here."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.errors import KVIntegrityError


class KVCacheManager:
    """Hands out paged KV blocks and takes them back.

    Every block is either free or owned by exactly one request; `check_integrity` proves it.
    """

    def __init__(self, *, num_device_blocks: int, block_size_tokens: int) -> None:
        if num_device_blocks < 1 or block_size_tokens < 1:
            raise ValueError(
                f"{num_device_blocks} blocks of {block_size_tokens} tokens: both must be at least 1"
            )
        self.num_device_blocks = num_device_blocks
        self.block_size_tokens = block_size_tokens
        # A stack; block 0 comes out first, so that tests and dumps are easy to read.
        self._free_block_ids = list(range(num_device_blocks - 1, -1, -1))
        self._block_ids: dict[str, list[int]] = {}

    @property
    def num_free_device_blocks(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free_block_ids)

    def num_missing_blocks(self, request_id: str, num_tokens: int) -> int:
        """Return how many more blocks the request needs to hold `num_tokens` tokens in all."""
        owned = self._block_ids.get(request_id)
        num_needed = -(-num_tokens // self.block_size_tokens)
        return max(0, num_needed - (len(owned) if owned else 0))

    def num_owned_blocks(self, request_id: str) -> int:
        """Return how many blocks the request owns; 0 if it is unknown."""
        return len(self._block_ids.get(request_id, ()))

    def block_ids(self, request_id: str) -> Sequence[int]:
        """Return the blocks of a request in token order; a live view, as from `allocate`.

        Raises:
            KeyError: the request owns none.
        """
        return self._block_ids[request_id]

    def allocate(self, request_id: str, num_tokens: int) -> Sequence[int] | None:
        """Make the request own enough blocks for `num_tokens` tokens in all, and return them.

        Blocks come in token order. The sequence is a live view that only grows until `free`.
        None, with nothing changed, if there are not enough free blocks now.
        """
        num_missing = self.num_missing_blocks(request_id, num_tokens)
        if num_missing > len(self._free_block_ids):
            return None
        owned = self._block_ids.setdefault(request_id, [])
        for _ in range(num_missing):
            owned.append(self._free_block_ids.pop())
        return owned

    def free(self, request_id: str) -> int:
        """Take back all blocks of a request and return how many it had."""
        owned = self._block_ids.pop(request_id, None)
        if owned is None:
            return 0
        # Tail first into the stack, so the first block is the next one handed out.
        self._free_block_ids.extend(reversed(owned))
        return len(owned)

    def check_integrity(self) -> None:
        """Prove that each block is free or owned exactly once.

        Raises:
            KVIntegrityError: lists every block that is lost, shared or unknown.
        """
        holders: dict[int, list[str]] = {}
        for block_id in self._free_block_ids:
            holders.setdefault(block_id, []).append("the free list")
        for request_id, owned in self._block_ids.items():
            for block_id in owned:
                holders.setdefault(block_id, []).append(f"request {request_id}")
        problems = [
            f"block {block_id} is held by {' and '.join(names)}"
            for block_id, names in sorted(holders.items())
            if len(names) > 1
        ]
        problems += [
            f"block {block_id} is unknown"
            for block_id in sorted(holders)
            if not 0 <= block_id < self.num_device_blocks
        ]
        problems += [
            f"block {block_id} is lost"
            for block_id in range(self.num_device_blocks)
            if block_id not in holders
        ]
        if problems:
            raise KVIntegrityError("; ".join(problems))
