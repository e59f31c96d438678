from __future__ import annotations

import random

import pytest
import torch

from benchmarks.shared.decode_period import CountingEngine
from engines.block_copies import CopyBlocks
from engines.kv_pool import KVLayout, KVPool
from engines.torch_engine import TorchEngine
from orchestrator.core.ports import Engine
from orchestrator.executor import ExecutorLoop
from orchestrator.logit_adjustment import changes_logits
from orchestrator.overlapped_loop import OverlappedLoop
from tests.engines.copies import slow_copies
from tests.engines.step_driver import StepDriver
from tests.engines.test_loops import sampling_params, told_by
from tests.engines.tiny_llama import tiny_config, tiny_engine
from tests.factories import make_request

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("chunk_tokens", [7, 256])
def test_tokens_on_cuda_are_those_of_the_cpu(chunk_tokens: int) -> None:
    """Both in float32; PyTorch leaves TF32 off unless told otherwise."""
    generator = random.Random(0)
    prompts = {
        str(length): [generator.randrange(97) for _ in range(length)]
        for length in (1, 5, 16, 60, 120)
    }

    outputs = {}
    for device in ("cpu", "cuda"):
        requests = [
            make_request(name, prompt_token_ids=prompt, max_tokens=16)
            for name, prompt in prompts.items()
        ]
        engine = tiny_engine(device=device)
        outputs[device] = StepDriver(engine, *requests).run(chunk_tokens=chunk_tokens)
        engine.close()

    assert outputs["cuda"] == outputs["cpu"]


def test_bfloat16_runs_on_cuda() -> None:
    engine = tiny_engine(device="cuda", dtype="bfloat16")

    outputs = StepDriver(engine, make_request(num_prompt_tokens=20)).run(chunk_tokens=8)

    assert len(outputs["r"]) == 8


@pytest.mark.parametrize("waits_for_transfers", [False, True])
@pytest.mark.parametrize("num_layer_groups", [1, 4])
@pytest.mark.parametrize("copy_blocks", [slow_copies, None], ids=["late", "its own"])
def test_blocks_that_were_offloaded_come_back_in_the_step_that_reads_them(
    copy_blocks: CopyBlocks | None, num_layer_groups: int, *, waits_for_transfers: bool
) -> None:
    """As on the CPU, with copies that are late and with the engine's own; the pool was overwritten
    in between."""
    config = tiny_config(num_hidden_layers=5)
    generator = random.Random(0)
    prompts = {
        str(length): [generator.randrange(97) for _ in range(length)]
        for length in (17, 24, 35, 150)
    }

    def make_driver(engine: TorchEngine) -> StepDriver:
        return StepDriver(
            engine,
            *(
                make_request(name, prompt_token_ids=prompt, max_tokens=12)
                for name, prompt in prompts.items()
            ),
        )

    expected = make_driver(tiny_engine(config, device="cuda")).run(chunk_tokens=256)
    engine = tiny_engine(
        config,
        device="cuda",
        num_device_blocks=70,
        num_host_blocks=40,
        num_layer_groups=num_layer_groups,
        copy_blocks=copy_blocks,
    )
    driver = make_driver(engine)
    moved = ("17", "24", "35")
    for _ in range(4):
        driver.step(dict.fromkeys(moved, 35))
    for name in moved:
        transfer = driver.offload(name)
        output = driver.step({}, transfers=[transfer])
        while transfer.transfer_id not in output.completed_transfers:
            output = driver.step({})
        driver.preempt(name)
    driver.step({"150": 150})
    driver.preempt("150")
    driver.step(
        dict.fromkeys(moved, 4),
        transfers=[driver.onboard(name) for name in moved],
        waits_for_transfers=waits_for_transfers,
    )

    assert driver.run(chunk_tokens=256) == expected
    engine.close()


def test_the_host_pool_is_pinned() -> None:
    """Else a copy that should not wait does."""
    layout = KVLayout(num_layers=2, num_kv_heads=1, block_size_tokens=4, head_dim=8)
    pool = KVPool(layout, 2, num_host_blocks=3, dtype=torch.float32, device=torch.device("cuda"))

    assert pool.host_blocks.is_pinned()
    pool.close()
    assert not pool.host_blocks.is_pinned()


def test_an_engine_takes_the_device_memory_that_is_free() -> None:
    """A thousandth of it holds many tiny blocks of 1 KiB."""
    engine = tiny_engine(device="cuda", num_device_blocks=None, device_memory_fraction=0.001)

    assert engine.capabilities.num_device_blocks > 1000
    engine.close()


def test_steps_launched_ahead_choose_the_same_tokens_on_cuda() -> None:
    """While they are launched, the host really does not know the tokens of the step before."""
    engines: list[CountingEngine] = []

    def make_engine() -> Engine:
        engine = tiny_engine(
            device="cuda", max_num_seqs=8, max_num_batched_tokens=24, num_device_blocks=60
        )
        engines.append(CountingEngine(engine))
        return engines[-1]

    params = [p for p in sampling_params(1) if not changes_logits(p)] * 3
    plain = told_by(ExecutorLoop, make_engine, params)

    assert told_by(OverlappedLoop, make_engine, params) == plain
    assert engines[1].num_launched > 0
