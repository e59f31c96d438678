"""Names for the content of full KV blocks.

The KV of a block depends on its tokens and on all before them. With prefix reuse its name is
therefore a hash chained over the blocks, and equal beginnings of two prompts have equal names.
Without, a block is named after its request, and only that request finds it again.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from hashlib import blake2b

from orchestrator.core.request import Request

_DIGEST_BYTES = 16
"""Two different contents meet with probability 2^-64 after 2^32 blocks."""


class BlockKeys:
    """The names of the full blocks of live requests, each made once."""

    def __init__(self, *, block_size_tokens: int, are_shared: bool) -> None:
        """`are_shared`: equal content has equal names."""
        self._block_size_tokens = block_size_tokens
        self._are_shared = are_shared
        self._keys: dict[str, list[Hashable]] = {}
        self._serial_of: dict[str, int] = {}
        self._next_serial = 0

    @property
    def are_shared(self) -> bool:
        """True if other requests may find a content."""
        return self._are_shared

    def of(self, request: Request, num_blocks: int) -> Sequence[Hashable]:
        """Return at least the names of the first `num_blocks` blocks, which are full.

        A request's salt is part of every name, so that the time to the first token tells
        nobody what those with another salt have asked.
        """
        keys = self._keys.setdefault(request.spec.request_id, [])
        if len(keys) >= num_blocks:
            return keys
        if not self._are_shared:
            # An id may come back after its request has ended; a serial number does not.
            serial = self._serial_of.setdefault(request.spec.request_id, self._next_serial)
            self._next_serial += serial == self._next_serial
            keys.extend((serial, index) for index in range(len(keys), num_blocks))
            return keys
        size, token_ids = self._block_size_tokens, request.all_token_ids
        parent = keys[-1] if keys else request.spec.cache_salt.encode()
        for index in range(len(keys), num_blocks):
            assert isinstance(parent, bytes)
            # The parent's length goes first: no salt can pass for a hash.
            digest = blake2b(len(parent).to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
            digest.update(parent)
            digest.update(array("q", token_ids[index * size : (index + 1) * size]).tobytes())
            parent = digest.digest()
            keys.append(parent)
        return keys

    def knows(self, request_id: str) -> bool:
        """Return whether a request has names and has not been forgotten."""
        return request_id in self._keys

    def forget(self, request_id: str) -> Sequence[Hashable]:
        """Drop the names of a request that has ended and return them."""
        self._serial_of.pop(request_id, None)
        return self._keys.pop(request_id, ())
