"""The blocks of one memory: who uses them, and what the unused ones still hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

from orchestrator.core.errors import KVIntegrityError


class BlockPool:
    """Blocks 0 to `num_blocks` - 1, each free, in use, or idle.

    A block in use has as many users as `retain` and `take` were called for it. One that nobody
    uses any more is idle while a key names its content: it can be found and used again, or is
    taken, longest idle first, once no block is free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # A stack; block 0 comes out first, so that tests and dumps are easy to read.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_users = [0] * num_blocks
        self._key_of: list[Hashable | None] = [None] * num_blocks
        self._block_of: dict[Hashable, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Longest idle first."""

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Blocks that nobody uses and that still hold something."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks with users."""
        return self.num_blocks - self.num_available

    def num_users(self, block_id: int) -> int:
        """Return how often a block is in use."""
        return self._num_users[block_id]

    @property
    def contents(self) -> Mapping[Hashable, int]:
        """What can be found, by key, and where; a live view."""
        return self._block_of

    def find(self, key: Hashable) -> int | None:
        """Return the block with this content; None if there is none."""
        return self._block_of.get(key)

    def take(self) -> int | None:
        """Return a block for new content, in use once; None if all are in use.

        What an idle block held is gone.
        """
        if self._free:
            block_id = self._free.pop()
        elif self._idle:
            block_id, _ = self._idle.popitem(last=False)
            self._forget(block_id)
        else:
            return None
        self._num_users[block_id] = 1
        return block_id

    def retain(self, block_id: int) -> None:
        """Use a block that is in use or idle once more."""
        if self._num_users[block_id] == 0:
            del self._idle[block_id]
        self._num_users[block_id] += 1

    def release(self, block_id: int) -> None:
        """Use a block once less."""
        self._num_users[block_id] -= 1
        if self._num_users[block_id] == 0:
            if self._key_of[block_id] is None:
                self._free.append(block_id)
            else:
                self._idle[block_id] = None

    def publish(self, block_id: int, key: Hashable) -> bool:
        """Name the content of a block in use; False, with nothing changed, if another block
        holds the same."""
        if key in self._block_of:
            return self._block_of[key] == block_id
        self._block_of[key] = block_id
        self._key_of[block_id] = key
        return True

    def withdraw(self, key: Hashable) -> None:
        """Forget a content, if some block holds it; an idle block becomes free."""
        block_id = self._block_of.get(key)
        if block_id is None:
            return
        self._forget(block_id)
        if self._num_users[block_id] == 0:
            del self._idle[block_id]
            self._free.append(block_id)

    def check_integrity(self, num_expected_users: dict[int, int], *, name: str) -> None:
        """Prove that each block is free, idle or in use exactly as often as expected.

        Raises:
            KVIntegrityError: lists every block that is not.
        """
        problems = []
        free, idle = set(self._free), set(self._idle)
        if len(free) != len(self._free):
            problems.append(f"{name}: the free list names a block twice")
        for block_id in range(self.num_blocks):
            num_users, key = self._num_users[block_id], self._key_of[block_id]
            expected = num_expected_users.get(block_id, 0)
            if num_users != expected:
                problems.append(f"{name} block {block_id} counts {num_users} users, has {expected}")
            places = [block_id in free, block_id in idle, num_users > 0]
            if sum(places) != 1:
                problems.append(f"{name} block {block_id} is in {sum(places)} places")
            if block_id in free and key is not None:
                problems.append(f"free {name} block {block_id} holds {key!r}")
            if block_id in idle and key is None:
                problems.append(f"idle {name} block {block_id} holds nothing")
            if key is not None and self._block_of.get(key) != block_id:
                problems.append(f"{name} block {block_id} holds {key!r}, which is found elsewhere")
        problems += [
            f"{name}: {key!r} is found in block {block_id}, which does not hold it"
            for key, block_id in self._block_of.items()
            if self._key_of[block_id] != key
        ]
        problems += [
            f"{name} block {block_id} is unknown"
            for block_id in num_expected_users
            if not 0 <= block_id < self.num_blocks
        ]
        if problems:
            raise KVIntegrityError("; ".join(problems))

    def _forget(self, block_id: int) -> None:
        key = self._key_of[block_id]
        if key is not None:
            del self._block_of[key]
            self._key_of[block_id] = None
