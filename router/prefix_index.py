"""Which node was sent which beginnings of prompts, as far as one router remembers.

The index is the router's own: what nodes really keep would be megabytes of block names per
snapshot. It therefore knows nothing of other routers' requests nor of what a node has evicted;
it forgets the beginnings that were not seen for longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from router.policy import RoutingRequest

_DIGEST_BYTES = 16
"""As of the block names in a node's KV cache."""


@dataclass(frozen=True, slots=True)
class PrefixIndexOptions:
    """How finely beginnings are told apart, and how many are remembered."""

    chunk_tokens: int = 128
    """Beginnings are compared in pieces of so many tokens."""

    max_chunks: int = 100_000
    """Pieces remembered, over all nodes; one takes some 200 bytes."""

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "max_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")


class PrefixIndex:
    """The index of one router. Nodes are rows of its fleet."""

    def __init__(self, options: PrefixIndexOptions = PrefixIndexOptions()) -> None:
        self._options = options
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        """Piece -> bit r is set if row r was sent it; the one seen last comes last."""

    def keys_of(self, request: RoutingRequest) -> list[bytes]:
        """Return the names of a prompt's whole pieces before its last token, which is computed in
        any case. Each depends on all pieces before it and on the salt."""
        size, token_ids = self._options.chunk_tokens, request.prompt_token_ids
        name = request.cache_salt.encode()
        keys = []
        for start in range(0, len(token_ids) - size, size):
            # The length goes first: no salt can pass for a digest.
            digest = blake2b(len(name).to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
            digest.update(name)
            digest.update(array("q", token_ids[start : start + size]).tobytes())
            name = digest.digest()
            keys.append(name)
        return keys

    def num_cached(self, keys: Sequence[bytes], num_rows: int) -> NDArray[np.float64]:
        """Return how many of a prompt's first tokens each node was sent, (num_rows,)."""
        counts = np.zeros(num_rows)
        before = (1 << num_rows) - 1
        for index, key in enumerate(keys):
            holders = before & self._holders.get(key, 0)
            if holders != before:
                counts[_rows(before & ~holders, num_rows)] = index * self._options.chunk_tokens
                before = holders
            if not holders:
                break
        if before:
            counts[_rows(before, num_rows)] = len(keys) * self._options.chunk_tokens
        return counts

    def note(self, keys: Sequence[bytes], row: int) -> None:
        """Remember that a node was sent a prompt."""
        # The beginning last, so that it is forgotten after what follows it.
        for key in reversed(keys):
            self._holders[key] = self._holders.get(key, 0) | (1 << row)
            self._holders.move_to_end(key)
        while len(self._holders) > self._options.max_chunks:
            self._holders.popitem(last=False)


def _rows(bits: int, num_rows: int) -> NDArray[np.bool_]:
    """Return which of the rows are set in `bits`."""
    octets = np.frombuffer(bits.to_bytes((num_rows + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(octets, count=num_rows, bitorder="little").astype(np.bool_)
