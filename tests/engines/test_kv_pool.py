from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.kv_pool import KVLayout, KVPool
from orchestrator.core.errors import EngineError

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, block_size_tokens=4, head_dim=5)


def make_pool(num_blocks: int = 6) -> KVPool:
    return KVPool(LAYOUT, num_blocks, dtype=torch.float32, device=torch.device("cpu"))


def test_pool_has_the_block_layout_of_tensorrt_llm() -> None:
    """[blocks, layers, K and V, heads, tokens, head_dim]; a block is one piece of memory of
    3 layers x 2 x 2 heads x 4 tokens x 5 numbers = 240 numbers, 960 bytes in float32.
    """
    pool = make_pool()

    assert pool.blocks.shape == (6, 3, 2, 2, 4, 5)
    assert pool.blocks.is_contiguous()
    assert LAYOUT.block_bytes(torch.float32) == pool.blocks[0].nbytes == 960


def test_memory_that_is_not_there_is_named_with_the_way_out() -> None:
    with pytest.raises(EngineError, match=r"need 33,776,997,205,278,720 bytes .* lower device_kv"):
        make_pool(num_blocks=1 << 45)


def test_a_written_token_lies_at_its_block_layer_head_and_place() -> None:
    """Token 0 goes to block 5, place 3; token 1 to block 2, place 0; both at layer 1."""
    pool = make_pool()
    key_value = torch.randn(2, 2, 2, 5)  # (tokens, K and V, heads, head_dim)
    rows = LAYOUT.token_rows(np.array([5, 2]), np.array([3, 0]))

    pool.write(1, torch.from_numpy(rows.reshape(-1)), key_value)

    assert torch.equal(pool.blocks[5, 1, :, :, 3], key_value[0])
    assert torch.equal(pool.blocks[2, 1, :, :, 0], key_value[1])
    assert pool.blocks.count_nonzero() == key_value.numel()


def test_reading_a_table_of_blocks_returns_their_tokens_in_order() -> None:
    """Two requests with blocks (4, 1) and (0, 3): eight tokens each."""
    pool = make_pool()
    pool.blocks.copy_(torch.randn(pool.blocks.shape))
    rows = torch.from_numpy(LAYOUT.head_rows(np.array([[4, 1], [0, 3]])))

    key, value = pool.read(2, rows)

    assert key.shape == value.shape == (2, 2, 8, 5)
    assert torch.equal(key[0], torch.cat([pool.blocks[4, 2, 0], pool.blocks[1, 2, 0]], dim=1))
    assert torch.equal(value[1], torch.cat([pool.blocks[0, 2, 1], pool.blocks[3, 2, 1]], dim=1))
