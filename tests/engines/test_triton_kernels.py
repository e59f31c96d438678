"""Each Triton kernel against the same computation in float64, for shapes that fill no tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.tiny_llama import tiny_config
from tests.engines.triton_device import DEVICE

pytest.importorskip("triton")

from engines.torch_engine import triton_attention as attention
from engines.torch_engine import triton_layers as layers
from orchestrator.triton_fetch import store_on_host

# ||error|| / ||reference||: of float32 sums, and of one rounding to bfloat16 of 8 bits.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Triton's interpreter takes the bits of bfloat16 numbers for integers when it multiplies them.
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(output: torch.Tensor, reference: torch.Tensor) -> None:
    error = (output.double().cpu() - reference.cpu()).norm() / reference.norm().cpu()
    assert error < MAX_ERROR[output.dtype]


@dataclass(frozen=True)
class Paged:
    """Contexts of some requests in scattered blocks of a pool of two layers."""

    layer_blocks: torch.Tensor
    entries: torch.Tensor
    starts: torch.Tensor
    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    """Of each request: (num_kv_heads, context, head_dim), float64."""


def paged_contexts(
    *context_lens: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> Paged:
    """Blocks that belong to nobody hold NaN, and so does what is behind a context."""
    num_blocks = [math.ceil(length / block_size) for length in context_lens]
    pool_blocks = sum(num_blocks) + 3
    blocks = torch.full(
        (pool_blocks, 2, 2, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype
    ).to(DEVICE)
    layer_blocks = blocks[:, 1]
    order = np.random.default_rng(0).permutation(pool_blocks)
    contexts, tables, first = [], [], 0
    for seed, (length, count) in enumerate(zip(context_lens, num_blocks, strict=True)):
        table = order[first : first + count]
        numbers = random_tensor(2, num_kv_heads, length, head_dim, dtype=dtype, seed=seed)
        for token in range(length):
            block, place = table[token // block_size], token % block_size
            layer_blocks[block, :, :, place] = numbers[:, :, token]
        contexts.append((numbers[0].double(), numbers[1].double()))
        tables.append(table)
        first += count
    starts = np.cumsum([0, *num_blocks[:-1]])
    return Paged(
        layer_blocks,
        int_tensor(np.concatenate(tables)),
        int_tensor(starts),
        contexts,
    )


def int_tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device=DEVICE)


def attend(
    query: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor], num_cached: int
) -> torch.Tensor:
    """Return causal attention in float64: (num_tokens, num_heads, head_dim)."""
    keys, values = (each.repeat_interleave(query.shape[1] // len(each), dim=0) for each in context)
    scores = torch.einsum("thd,hcd->htc", query.double(), keys) / math.sqrt(query.shape[2])
    positions = num_cached + torch.arange(len(query), device=DEVICE)
    is_future = torch.arange(keys.shape[1], device=DEVICE) > positions[:, None]
    weights = scores.masked_fill(is_future, -math.inf).softmax(-1)
    return torch.einsum("htc,hcd->thd", weights, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_splits"),
    [(6, 2, 8, 4, 1), (6, 2, 24, 64, 3), (4, 4, 16, 16, 2)],
)
def test_decode_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_splits: int,
    dtype: torch.dtype,
) -> None:
    """Contexts of one token, of a part of a split, and of more than all splits' least sizes; the
    last row is padding, and gets zeros."""
    context_lens = (1, 70, 210)
    paged = paged_contexts(
        *context_lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    qkv = random_tensor(4, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, seed=9)
    output = torch.full((4, num_heads, head_dim), math.nan, dtype=dtype, device=DEVICE)
    zero = int_tensor([0])
    tables = attention.BlockTables(
        paged.entries, torch.cat((paged.starts, zero)), int_tensor([*context_lens, 0])
    )

    attention.attend_decodes(qkv, paged.layer_blocks, tables, output, num_splits=num_splits)

    reference = [
        attend(qkv[row : row + 1, :num_heads], context, length - 1)
        for row, (context, length) in enumerate(
            zip(paged.keys_and_values, context_lens, strict=True)
        )
    ]
    assert_close(output[:3], torch.cat(reference))
    assert not output[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "max_queries"), [(4, 16), (64, 32)])
def test_prefill_attention(block_size: int, max_queries: int, dtype: torch.dtype) -> None:
    """A piece without cached tokens in two tiles, and one behind 67 cached tokens."""
    num_heads, num_kv_heads, head_dim = 4, 2, 8
    paged = paged_contexts(
        37, 72, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    # One decode stands before the pieces.
    qkv = random_tensor(1 + 37 + 5, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, seed=9)
    output = torch.full((43, num_heads, head_dim), math.nan, dtype=dtype, device=DEVICE)
    first_tiles = [
        (1 + start, min(max_queries, 37 - start), start) for start in range(0, 37, max_queries)
    ]
    rows, counts, positions = zip(*first_tiles, (38, 5, 67), strict=True)
    starts = [int(paged.starts[0])] * len(first_tiles) + [int(paged.starts[1])]
    queries = attention.QueryTiles(
        max_queries,
        int_tensor(rows),
        int_tensor(counts),
        int_tensor(positions),
        int_tensor(starts),
    )

    attention.attend_prefills(qkv, paged.layer_blocks, paged.entries, queries, output)

    query = qkv[:, :num_heads]
    first, second = paged.keys_and_values
    reference = torch.cat((attend(query[1:38], first, 0), attend(query[38:], second, 67)))
    assert_close(output[1:], reference)
    assert output[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_with_and_without_a_sum(dtype: torch.dtype) -> None:
    hidden, branch = (random_tensor(3, 48, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = random_tensor(48, dtype=dtype, seed=3)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(rows.double(), (48,), weight.double(), 1e-5)

    assert_close(layers.rms_norm(hidden, weight, 1e-5), norm(hidden))
    added = hidden.clone()
    normed = layers.add_and_rms_norm(branch, added, weight, 1e-5)
    assert torch.equal(added, hidden + branch)
    assert_close(normed, norm(hidden + branch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_units(dtype: torch.dtype) -> None:
    gate_up = random_tensor(3, 2 * 1100, dtype=dtype)

    output = layers.silu_and_multiply(gate_up)

    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(output, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_stores_keys_and_values_where_slots_say(dtype: torch.dtype) -> None:
    """Three tokens at positions 0, 5 and 9, the last without a slot."""
    config = tiny_config(num_attention_heads=12, num_key_value_heads=3, head_dim=24)
    qkv = random_tensor(3, 18, 24, dtype=dtype)
    expected = qkv.double()
    angles = random_tensor(16, 12, dtype=torch.float32, seed=1)
    rope = (angles.cos(), angles.sin())
    for token, position in enumerate((0, 5, 9)):
        cos, sin = angles[position].double().cos(), angles[position].double().sin()
        first, second = expected[token, :15, :12].clone(), expected[token, :15, 12:].clone()
        expected[token, :15, :12] = first * cos - second * sin
        expected[token, :15, 12:] = second * cos + first * sin
    blocks = torch.zeros(5, 2, 3, 4, 24, dtype=dtype, device=DEVICE)
    rotated = qkv.clone()

    layers.rotate_and_store(
        rotated.flatten(1),
        rope,
        int_tensor([0, 5, 9]),
        int_tensor([6, 17, -1]),
        blocks,
        config=config,
    )

    assert_close(rotated[:, :12], expected[:, :12])
    assert torch.equal(rotated[:, 12:], qkv[:, 12:])
    stored = torch.stack((blocks[1, :, :, 2], blocks[4, :, :, 1]))
    assert_close(stored, expected[:2, 12:].unflatten(1, (2, 3)))
    assert blocks.count_nonzero() == stored.count_nonzero()


def test_numbers_are_stored_on_the_host() -> None:
    """More than one program has, fewer than two."""
    numbers = torch.arange(300, device=DEVICE)
    host = torch.zeros(301, dtype=torch.int64, pin_memory=DEVICE.type == "cuda")

    store_on_host(numbers, host[:300])
    numbers.cpu()  # waits

    assert host.tolist() == [*range(300), 0]
