"""Every way to copy KV blocks between pinned host memory and a CUDA device."""

from __future__ import annotations

import pytest
import torch

from engines.batch_copies import copy_in_batch
from engines.block_copies import copy_blocks
from engines.kv_copies import KVCopies
from engines.kv_pool import KVLayout, KVPool
from tests.engines.copies import offload, onboard

pytestmark = pytest.mark.gpu

NUM_BLOCKS = 40
LAYOUT = KVLayout(num_layers=6, num_kv_heads=8, block_size_tokens=16, head_dim=128)


WAYS = {"torch": copy_blocks, "batch": copy_in_batch}


@pytest.mark.parametrize("num_layer_groups", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_blocks_go_and_come_back_to_other_places(way: str, num_layer_groups: int) -> None:
    """39 of 40 blocks, scattered on both sides; the pool is overwritten in between."""
    pool = KVPool(
        LAYOUT,
        NUM_BLOCKS,
        num_host_blocks=NUM_BLOCKS,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    pool.blocks.normal_()
    before = pool.blocks.clone()
    copies = KVCopies(pool, num_layer_groups=num_layer_groups, copy_blocks=WAYS[way])
    left, host, back = (torch.randperm(NUM_BLOCKS)[1:].tolist() for _ in range(3))

    copies.start([offload(1, left, host)])
    copies.hold_compute()
    torch.cuda.synchronize()
    assert copies.finish_step().completed == (1,)
    pool.blocks.fill_(float("nan"))
    copies.start([onboard(2, back, host)])
    for layer in range(LAYOUT.num_layers):
        copies.before_layer(layer)
    after = pool.blocks.clone()
    report = copies.finish_step()

    assert report.completed == (2,)
    assert torch.equal(after[back], before[left])
    assert int(after.isnan().any(dim=-1).sum()) == before[0, ..., 0].numel()
    assert report.figures.copy_s > 0
    copies.close()
    pool.close()
