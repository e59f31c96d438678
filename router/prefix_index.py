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
from itertools import count

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
    """The index of one router. What a node was sent is forgotten when it leaves the fleet."""

    def __init__(self, options: PrefixIndexOptions = PrefixIndexOptions()) -> None:
        self._options = options
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        """Piece -> bit b is set if the node with that bit was sent it; the one seen last comes
        last."""

        self._bit_of: dict[str, int] = {}
        self._endpoint_ids: tuple[str, ...] = ()
        self._bit_of_row: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        """Bits of the nodes in `_endpoint_ids`."""

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

    def num_cached(
        self, keys: Sequence[bytes], endpoint_ids: tuple[str, ...]
    ) -> NDArray[np.float64]:
        """Return how many of a prompt's first tokens each node of a fleet was sent."""
        self._follow(endpoint_ids)
        num_bits = max(self._bit_of.values(), default=-1) + 1
        counts = np.zeros(num_bits)
        before = (1 << num_bits) - 1
        for index, key in enumerate(keys):
            holders = before & self._holders.get(key, 0)
            if holders != before:
                counts[_flags(before & ~holders, num_bits)] = index * self._options.chunk_tokens
                before = holders
            if not holders:
                break
        if before:
            counts[_flags(before, num_bits)] = len(keys) * self._options.chunk_tokens
        return counts[self._bit_of_row]

    def note(self, keys: Sequence[bytes], endpoint_id: str) -> None:
        """Remember that a node, one of those that `num_cached` was last asked for, was sent a
        prompt."""
        bit = 1 << self._bit_of[endpoint_id]
        # The beginning last, so that it is forgotten after what follows it.
        for key in reversed(keys):
            self._holders[key] = self._holders.get(key, 0) | bit
            self._holders.move_to_end(key)
        while len(self._holders) > self._options.max_chunks:
            self._holders.popitem(last=False)

    def _follow(self, endpoint_ids: tuple[str, ...]) -> None:
        """Give new nodes bits and take them from those that are gone."""
        if endpoint_ids is self._endpoint_ids:
            return
        gone = self._bit_of.keys() - set(endpoint_ids)
        kept = ~sum(1 << self._bit_of.pop(endpoint_id) for endpoint_id in gone)
        if gone:
            for key in self._holders:
                self._holders[key] &= kept
        taken = set(self._bit_of.values())
        free = (bit for bit in count() if bit not in taken)
        for endpoint_id in endpoint_ids:
            if endpoint_id not in self._bit_of:
                self._bit_of[endpoint_id] = next(free)
        self._bit_of_row = np.array([self._bit_of[i] for i in endpoint_ids], dtype=np.intp)
        self._endpoint_ids = endpoint_ids


def _flags(bits: int, num_bits: int) -> NDArray[np.bool_]:
    """Return which of the bits are set."""
    octets = np.frombuffer(bits.to_bytes((num_bits + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(octets, count=num_bits, bitorder="little").astype(np.bool_)
