from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from orchestrator.core.errors import KVIntegrityError
from orchestrator.core.kv_cache import KVCacheManager


def test_blocks_cover_the_tokens_and_grow_in_place() -> None:
    """Blocks of 16: 17 tokens need two, 32 still two, 33 three."""
    kv = KVCacheManager(num_device_blocks=4, block_size_tokens=16)

    first = kv.allocate("a", 17)
    same = kv.allocate("a", 32)
    grown = kv.allocate("a", 33)

    assert first is same is grown
    assert grown is not None
    assert len(grown) == 3
    assert kv.num_free_device_blocks == 1


def test_a_request_that_does_not_fit_changes_nothing() -> None:
    kv = KVCacheManager(num_device_blocks=2, block_size_tokens=16)
    kv.allocate("a", 16)

    assert kv.allocate("b", 17) is None
    assert kv.num_owned_blocks("b") == 0
    assert kv.num_free_device_blocks == 1


def test_freed_blocks_serve_the_next_request() -> None:
    kv = KVCacheManager(num_device_blocks=2, block_size_tokens=16)
    kv.allocate("a", 32)

    assert kv.free("a") == 2
    assert kv.allocate("b", 32) is not None


def test_freeing_an_unknown_request_is_harmless() -> None:
    assert KVCacheManager(num_device_blocks=1, block_size_tokens=16).free("nobody") == 0


def test_integrity_check_names_what_is_wrong() -> None:
    """The live view must not be written to; if it is, the check tells."""
    kv = KVCacheManager(num_device_blocks=3, block_size_tokens=16)
    blocks = kv.allocate("a", 32)
    assert isinstance(blocks, list)
    blocks[1] = 2

    with pytest.raises(KVIntegrityError) as caught:
        kv.check_integrity()

    assert "device block 2 counts 0 users, has 1" in str(caught.value)
    assert "device block 1 counts 1 users, has 0" in str(caught.value)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="0 device"):
        KVCacheManager(num_device_blocks=0, block_size_tokens=16)


class KVCacheMachine(RuleBasedStateMachine):
    """Invariant 2: free and owned blocks always add up, whatever the order of calls."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(num_device_blocks=12, block_size_tokens=4)
        self.num_blocks: dict[str, int] = {}

    @rule(target=requests, request_id=st.sampled_from("abcdef"))
    def name(self, request_id: str) -> str:
        return request_id

    @rule(request_id=requests, num_tokens=st.integers(0, 60))
    def allocate(self, request_id: str, num_tokens: int) -> None:
        owned = self.num_blocks.get(request_id, 0)
        needed = max(owned, -(-num_tokens // 4))
        num_free = 12 - sum(self.num_blocks.values())

        blocks = self.kv.allocate(request_id, num_tokens)

        if needed - owned > num_free:
            assert blocks is None
        else:
            assert blocks is not None
            assert len(blocks) == needed
            self.num_blocks[request_id] = needed

    @rule(request_id=requests)
    def free(self, request_id: str) -> None:
        assert self.kv.free(request_id) == self.num_blocks.pop(request_id, 0)

    @invariant()
    def blocks_add_up(self) -> None:
        self.kv.check_integrity()
        assert self.kv.num_free_device_blocks == 12 - sum(self.num_blocks.values())


TestKVCacheMachine = KVCacheMachine.TestCase
