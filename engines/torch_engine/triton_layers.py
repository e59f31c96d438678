"""Triton kernels for what stands between a decoder's matrix products, fused so that each number
passes through device memory once.

They compute in float32 and round where `engines.torch_engine.model`, the readable specification,
stores a number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engines.torch_engine.config import LlamaConfig

# Half-heads of 64 numbers times 16 heads are 1,024 pairs: 4 warps with 8 pairs a thread.
_HEADS_PER_PROGRAM = 16
_SILU_BLOCK = 1024


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `hidden`, (num_tokens, hidden_size), each row scaled to unit mean square."""
    normed = torch.empty_like(hidden)
    size = hidden.shape[1]
    _rms_norm_kernel[(len(hidden),)](
        hidden, hidden, weight, normed, eps, SIZE=size, BLOCK=_power_of_2(size), IS_SUM=False
    )
    return normed


def add_and_rms_norm(
    branch: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `branch` to `hidden` in place, and return the norm of the sum."""
    normed = torch.empty_like(hidden)
    size = hidden.shape[1]
    _rms_norm_kernel[(len(hidden),)](
        branch, hidden, weight, normed, eps, SIZE=size, BLOCK=_power_of_2(size), IS_SUM=True
    )
    return normed


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of rows that hold gate, then up."""
    num_tokens, double_size = gate_up.shape
    output = gate_up.new_empty(num_tokens, double_size // 2)
    grid = (num_tokens, triton.cdiv(double_size // 2, _SILU_BLOCK))
    _silu_kernel[grid](gate_up, output, SIZE=double_size // 2, BLOCK=_SILU_BLOCK)
    return output


def rotate_and_store(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    layer_blocks: torch.Tensor,
    *,
    config: LlamaConfig,
) -> None:
    """Rotate q in place, and put rotated k, and v, into the KV pool.

    `rope` is (cos, sin), each (max_model_len, head_dim / 2) in float32. `slots` says where each
    token's K and V go: block * block_size_tokens + place in it; a negative one stores nothing.
    `layer_blocks` is one layer of the pool, (num_blocks, 2, num_kv_heads, block_size_tokens,
    head_dim), contiguous within a block.
    """
    num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
    half_dim = config.head_dim // 2
    grid = (len(qkv), triton.cdiv(num_heads, _HEADS_PER_PROGRAM))
    _rotate_kernel[grid](
        qkv,
        *rope,
        positions,
        slots,
        layer_blocks,
        layer_blocks.stride(0),
        NUM_QUERY_HEADS=config.num_attention_heads,
        NUM_KV_HEADS=config.num_key_value_heads,
        HALF_DIM=half_dim,
        BLOCK_SIZE=layer_blocks.shape[3],
        HEADS=_HEADS_PER_PROGRAM,
        BLOCK=_power_of_2(half_dim),
    )


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


@triton.jit
def _rms_norm_kernel(
    branch,
    hidden,
    weight,
    normed,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SUM: tl.constexpr,
):
    """One program per row."""
    columns = tl.arange(0, BLOCK)
    is_inside = columns < SIZE
    first = tl.program_id(0).to(tl.int64) * SIZE
    values = tl.load(hidden + first + columns, mask=is_inside, other=0.0).to(tl.float32)
    if IS_SUM:
        values += tl.load(branch + first + columns, mask=is_inside, other=0.0).to(tl.float32)
        # The norm is that of the sum as it is stored.
        values = values.to(hidden.dtype.element_ty).to(tl.float32)
        tl.store(hidden + first + columns, values, mask=is_inside)
    scale = tl.rsqrt(tl.sum(values * values) / SIZE + eps)
    weights = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(normed + first + columns, values * scale * weights, mask=is_inside)


@triton.jit
def _silu_kernel(
    gate_up,
    output,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and stretch of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=is_inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=is_inside).to(tl.float32)
    tl.store(output + row * SIZE + columns, gate * tl.sigmoid(gate) * up, mask=is_inside)


@triton.jit
def _rotate_kernel(
    qkv,
    cos_table,
    sin_table,
    positions,
    slots,
    layer_blocks,
    block_stride,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and stretch of heads. Dimension i turns with i + HALF_DIM."""
    token = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    num_heads: tl.constexpr = NUM_QUERY_HEADS + 2 * NUM_KV_HEADS
    is_inside = (heads < num_heads)[:, None] & (pairs < HALF_DIM)[None, :]

    row = qkv + token.to(tl.int64) * (num_heads * 2 * HALF_DIM)
    places = heads[:, None] * (2 * HALF_DIM) + pairs[None, :]
    first = tl.load(row + places, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(row + places + HALF_DIM, mask=is_inside, other=0.0).to(tl.float32)

    angle = tl.load(positions + token) * HALF_DIM + pairs
    cos = tl.load(cos_table + angle, mask=pairs < HALF_DIM, other=0.0)[None, :]
    sin = tl.load(sin_table + angle, mask=pairs < HALF_DIM, other=0.0)[None, :]
    is_rotated = (heads < NUM_QUERY_HEADS + NUM_KV_HEADS)[:, None]
    turned_first = tl.where(is_rotated, first * cos - second * sin, first)
    turned_second = tl.where(is_rotated, second * cos + first * sin, second)

    is_query = is_inside & (heads < NUM_QUERY_HEADS)[:, None]
    tl.store(row + places, turned_first, mask=is_query)
    tl.store(row + places + HALF_DIM, turned_second, mask=is_query)

    slot = tl.load(slots + token)
    if slot >= 0:
        # K's heads, then V's: the order of qkv is that of a block.
        kv_rows = (heads - NUM_QUERY_HEADS)[:, None] * BLOCK_SIZE + slot % BLOCK_SIZE
        block = layer_blocks + (slot // BLOCK_SIZE).to(tl.int64) * block_stride
        targets = block + kv_rows * (2 * HALF_DIM) + pairs[None, :]
        is_stored = is_inside & (heads >= NUM_QUERY_HEADS)[:, None]
        tl.store(targets, turned_first, mask=is_stored)
        tl.store(targets + HALF_DIM, turned_second, mask=is_stored)
