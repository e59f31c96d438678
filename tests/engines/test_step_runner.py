"""What a step leaves behind that fails in a way which nobody foresaw."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engines.kv_copies import KVCopies
from engines.kv_pool import KVLayout, KVPool
from engines.step_runner import StepLogits, StepRunner
from orchestrator.core.errors import EngineStepError
from orchestrator.core.ports import EngineCapabilities, ScheduledRequest
from orchestrator.sampling import Sampler
from tests.engines.copies import onboard
from tests.engines.step_driver import make_plan
from tests.factories import make_request

NUM_BLOCKS = 4
LAYOUT = KVLayout(num_layers=5, num_kv_heads=1, block_size_tokens=4, head_dim=2)
LIMITS = EngineCapabilities(
    block_size_tokens=LAYOUT.block_size_tokens,
    num_device_blocks=NUM_BLOCKS,
    num_host_blocks=NUM_BLOCKS,
    max_num_batched_tokens=16,
    max_num_seqs=4,
    max_model_len=16,
    num_layer_groups=LAYOUT.num_layers,
)


class KernelError(Exception):
    """As Triton's errors are: neither a RuntimeError nor a ValueError."""


def test_onboards_of_a_step_that_failed_unforeseen_are_whole_when_they_are_reported() -> None:
    """Their later layer groups were not on the lane yet. A request that shares the blocks would
    read what was there before."""
    pool = KVPool(
        LAYOUT,
        NUM_BLOCKS,
        num_host_blocks=NUM_BLOCKS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.blocks.zero_()
    pool.host_blocks.fill_(1)
    copies = KVCopies(pool, num_layer_groups=LIMITS.num_layer_groups)

    def compute(_: Sequence[ScheduledRequest]) -> StepLogits:
        raise KernelError("out of shared memory")

    runner = StepRunner(LIMITS, copies, Sampler(97), compute=compute)
    part = ScheduledRequest(make_request("r", prompt_token_ids=[1] * 6), 4, 2, [0, 1])

    with pytest.raises(EngineStepError, match="out of shared memory"):
        runner.run(make_plan(part, transfers=[onboard(1, [0], [3])]))
    output = runner.run(make_plan(step_id=2))

    assert output.completed_transfers == (1,)
    assert bool((pool.blocks[0] == 1).all())
    copies.close()
