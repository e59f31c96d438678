"""What the embedded engine does on CUDA alone: graphs of decodes, real tile sizes, no waiting."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engines.torch_engine import TorchEngine
from orchestrator.core.request import SamplingParams
from orchestrator.device_sampling import most_likely_on_device
from tests.engines.step_driver import StepDriver, random_requests
from tests.engines.tiny_llama import tiny_config, tiny_engine
from tests.factories import make_request

pytestmark = pytest.mark.gpu


def both_outputs(
    *prompt_lengths: int, chunk_tokens: int, **options: Any
) -> list[dict[str, list[int]]]:
    """Return the tokens of the CPU and of CUDA, both in float32."""
    config = tiny_config(max_position_embeddings=8192)
    outputs = []
    for device in ("cpu", "cuda"):
        engine = tiny_engine(config, device=device, **options)
        driver = StepDriver(engine, *random_requests(*prompt_lengths, max_tokens=10))
        outputs.append(driver.run(chunk_tokens=chunk_tokens))
        engine.close()
    return outputs


@pytest.mark.parametrize("batch_size", [1, 3, 11, 16])
def test_batches_of_all_sizes_give_the_tokens_of_the_cpu(batch_size: int) -> None:
    """3 is padded to 4 and 11 to 16; requests are prefilled in chunks beside others' decodes."""
    lengths = [3 + 7 * index for index in range(batch_size)]

    on_cpu, on_cuda = both_outputs(
        *lengths,
        chunk_tokens=32,
        max_num_seqs=16,
        num_device_blocks=600,
        max_num_batched_tokens=600,
    )

    assert on_cuda == on_cpu


def test_contexts_of_many_splits_give_the_tokens_of_the_cpu() -> None:
    """Contexts of 64 splits and of one side by side."""
    on_cpu, on_cuda = both_outputs(
        6000,
        5,
        700,
        chunk_tokens=1500,
        max_model_len=8192,
        max_num_seqs=4,
        num_device_blocks=1800,
        max_num_batched_tokens=4500,
    )

    assert on_cuda == on_cpu


def test_a_batch_larger_than_all_graphs_gives_the_tokens_of_the_cpu() -> None:
    """300 decodes at once; graphs end at 256."""
    lengths = range(1, 301)

    on_cpu, on_cuda = both_outputs(
        *lengths,
        chunk_tokens=300,
        max_model_len=512,
        max_num_seqs=300,
        num_device_blocks=13_000,
        max_num_batched_tokens=50_000,
    )

    assert on_cuda == on_cpu


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=8, seed=1, temperature=0.0),
        SamplingParams(max_tokens=8, seed=1, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    ],
    ids=["greedy", "drawn"],
)
def test_a_step_waits_for_nothing_but_its_tokens(sampling: SamplingParams) -> None:
    """PyTorch raises where it would wait by itself; the engine waits for events of its own.

    The first steps compile kernels; then come a prefill piece beside a decode, and decodes alone.
    """
    engine = tiny_engine(device="cuda")
    driver = StepDriver(
        engine,
        *(make_request(name, num_prompt_tokens=20, sampling=sampling) for name in ("a", "b", "c")),
    )
    for chunk_tokens in (20, 1):
        driver.step({"a": chunk_tokens, "b": chunk_tokens})
    driver.step({"a": 1, "c": 10})

    torch.cuda.set_sync_debug_mode("error")
    driver.step({"a": 1, "c": 10})
    for _ in range(3):
        driver.step({"a": 1, "b": 1, "c": 1})
    torch.cuda.set_sync_debug_mode("default")

    assert len(driver.outputs()["a"]) == 7
    engine.close()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_7b_shape_is_close_to_float64(block_size: int, dtype: torch.dtype) -> None:
    """With the tiles and splits of a real model: 32 query heads, 8 KV heads of 128.

    float32 sums stay far below 1e-5; bfloat16 rounds to 8 bits.
    """
    from engines.torch_engine.triton_attention import BlockTables, attend_decodes, count_splits
    from tests.engines.test_triton_kernels import attend, int_tensor, paged_contexts, random_tensor

    context_lens = (1, 64, 1000, 3001)
    paged = paged_contexts(
        *context_lens, num_kv_heads=8, head_dim=128, block_size=block_size, dtype=dtype
    )
    qkv = random_tensor(4, 48, 128, dtype=dtype, seed=9)
    output = torch.full((4, 32, 128), float("nan"), dtype=dtype, device="cuda")
    tables = BlockTables(paged.entries, paged.starts, int_tensor(context_lens))

    num_splits = count_splits(4, 8, num_multiprocessors=132)
    attend_decodes(qkv, paged.layer_blocks, tables, output, num_splits=num_splits)

    reference = torch.cat(
        [
            attend(qkv[row : row + 1, :32], context, length - 1)
            for row, (context, length) in enumerate(
                zip(paged.keys_and_values, context_lens, strict=True)
            )
        ]
    )
    error = (output.double() - reference).norm() / reference.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_of_a_7b_shape_is_close_to_float64(block_size: int, dtype: torch.dtype) -> None:
    """300 new tokens behind 1,000 cached ones, in tiles of the largest size."""
    from engines.torch_engine.triton_attention import QueryTiles, attend_prefills, tile_queries
    from tests.engines.test_triton_kernels import attend, int_tensor, paged_contexts, random_tensor

    paged = paged_contexts(1300, num_kv_heads=8, head_dim=128, block_size=block_size, dtype=dtype)
    qkv = random_tensor(300, 48, 128, dtype=dtype, seed=9)
    output = torch.full((300, 32, 128), float("nan"), dtype=dtype, device="cuda")
    size = tile_queries(300, dtype)
    firsts = list(range(0, 300, size))
    tiles = QueryTiles(
        size,
        int_tensor(firsts),
        int_tensor([min(size, 300 - first) for first in firsts]),
        int_tensor([1000 + first for first in firsts]),
        int_tensor([0] * len(firsts)),
    )

    attend_prefills(qkv, paged.layer_blocks, paged.entries, tiles, output)

    reference = attend(qkv[:, :32], paged.keys_and_values[0], 1000)
    error = (output.double() - reference).norm() / reference.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def test_closing_an_engine_gives_its_memory_back() -> None:
    """Weights, pool and the graphs' own memory."""
    tiny_engine(device="cuda").close()  # libraries keep what they take once
    before = torch.cuda.memory_allocated()

    engine: TorchEngine = tiny_engine(device="cuda", num_device_blocks=5000)
    assert torch.cuda.memory_allocated() > before
    engine.close()
    del engine

    assert torch.cuda.memory_allocated() == before


def test_no_garbage_is_collected_while_graphs_are_captured() -> None:
    """An engine among it would unpin memory, which CUDA forbids then. The collector runs whenever
    it may."""
    was_capturing: list[bool] = []

    def note(_phase: str, _info: dict[str, int]) -> None:
        was_capturing.append(torch.cuda.is_current_stream_capturing())

    threshold = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        engine = tiny_engine(device="cuda")
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note)

    assert was_capturing
    assert not any(was_capturing)
    engine.close()


def test_tokens_do_not_wait_for_copies_to_the_host() -> None:
    """A gigabyte is on its way; at 50 GB/s that takes 20 ms, the token well under one."""
    scores = torch.tensor([[0.0, 2.0, 1.0]], device="cuda")
    assert most_likely_on_device(scores).wait() == [1]  # compiles
    blocks = torch.zeros(1 << 28, dtype=torch.int8, device="cuda")
    host = torch.empty(1 << 28, dtype=torch.int8, pin_memory=True)
    lane, copied = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(lane):
        for _ in range(4):
            host.copy_(blocks, non_blocking=True)
        copied.record()

    assert most_likely_on_device(scores).wait() == [1]
    assert not copied.query()
    copied.synchronize()
