"""Triton kernels for attention over the paged KV cache. They read K and V where they lie.

Decodes: one program per request, KV head and split of the context; the query heads that share the
KV head are the rows of its tile, so that K and V are read once. A second kernel joins the splits.
Prefill pieces: one program per query head and tile of queries, over cached and new tokens alike,
which are in the pool by then.

Source: FlashAttention (arXiv 2205.14135) for the running softmax, Flash-Decoding (Dao et al.,
2023) for the splits, PagedAttention (arXiv 2309.06180) for the table of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# tl.dot has no smaller tiles.
_MIN_DOT_SIZE = 16
# A split below this many tokens costs more to start and join than it saves.
MIN_SPLIT_TOKENS = 64
_MAX_SPLITS = 64
# Programs that a multiprocessor holds at once: by their shared memory, 2 of them and more.
_PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How a kernel is cut to the device."""

    num_context_tokens: int
    """Of the context, taken at once."""

    num_warps: int
    num_stages: int
    """Tiles of K and V that are loaded ahead."""


# bfloat16 tiles of 64 tokens x 128 numbers are 16 KiB each for K and V. Five stages are two tiles
# of both on their way, since the load of a tile's block takes part in them; three programs fit on
# a multiprocessor. float32 is for comparisons: half the tokens.
DECODE_TILES = {
    torch.bfloat16: TileSizes(num_context_tokens=64, num_warps=4, num_stages=5),
    torch.float32: TileSizes(num_context_tokens=32, num_warps=4, num_stages=2),
}
PREFILL_TILES = {
    torch.bfloat16: TileSizes(num_context_tokens=64, num_warps=8, num_stages=2),
    torch.float32: TileSizes(num_context_tokens=32, num_warps=4, num_stages=1),
}
_MAX_TILE_QUERIES = {torch.bfloat16: 128, torch.float32: 32}


@dataclass(frozen=True, slots=True)
class BlockTables:
    """Which blocks hold whose context, on the device."""

    entries: torch.Tensor  # int32, block ids
    starts: torch.Tensor  # (num_requests,) int32, each request's first entry
    context_lens: torch.Tensor  # (num_requests,) int32, tokens; 0 for padding


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Stretches of prefill pieces, each int32 (num_tiles,), on the device."""

    max_queries: int
    """Of any tile; a power of two."""

    rows: torch.Tensor
    """First token of the tile among the step's tokens."""

    counts: torch.Tensor
    positions: torch.Tensor
    """Of the first token, in its request."""

    table_starts: torch.Tensor


def count_splits(num_requests: int, num_kv_heads: int, *, num_multiprocessors: int) -> int:
    """Return into how many parts each context is split, so that a batch of any size fills the
    device: a power of two, since each number is a kernel of its own. Depends on the batch's size
    alone, which a CUDA graph fixes."""
    wanted = num_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR // (num_requests * num_kv_heads)
    return min(_MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1))


def tile_queries(max_new_tokens: int, dtype: torch.dtype) -> int:
    """Return how many queries go into a tile when the longest piece has so many."""
    size = 1 << (max_new_tokens - 1).bit_length()
    return min(max(size, _MIN_DOT_SIZE), _MAX_TILE_QUERIES[dtype])


def attend_decodes(
    qkv: torch.Tensor,
    layer_blocks: torch.Tensor,
    tables: BlockTables,
    output: torch.Tensor,
    *,
    num_splits: int,
    tiles: TileSizes | None = None,
) -> None:
    """Write the attention of one query per request to `output`.

    `qkv` is (num_requests, heads of q, k and v, head_dim) and `output` the same with q's heads
    alone; of both, rows after the requests are not looked at. `layer_blocks` is one layer of the
    pool, (num_blocks, 2, num_kv_heads, block_size_tokens, head_dim). Padding gets zeros.
    """
    tiles = tiles or DECODE_TILES[output.dtype]
    num_requests, (num_heads, head_dim) = len(tables.context_lens), output.shape[1:]
    num_kv_heads, block_size_tokens = layer_blocks.shape[2:4]
    partial_shape = (num_requests, num_heads, num_splits) if num_splits > 1 else (0, 1, 1)
    partials = qkv.new_empty(*partial_shape, head_dim, dtype=torch.float32)
    log_sums = qkv.new_empty(partial_shape, dtype=torch.float32)
    _decode_kernel[(num_requests, num_kv_heads, num_splits)](
        qkv,
        layer_blocks,
        layer_blocks.stride(0),
        tables.entries,
        tables.starts,
        tables.context_lens,
        output,
        partials,
        log_sums,
        head_dim**-0.5,
        QUERY_ROW=qkv.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size_tokens,
        NUM_SPLITS=num_splits,
        MIN_SPLIT_TOKENS=max(MIN_SPLIT_TOKENS, tiles.num_context_tokens),
        ROWS=_dot_size(num_heads // num_kv_heads),
        DIMS=_dot_size(head_dim),
        TOKENS=tiles.num_context_tokens,
        PRECISION=_precision(output.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits > 1:
        _join_kernel[(num_requests, num_heads)](
            partials,
            log_sums,
            output,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_SPLITS=num_splits,
            SPLITS=1 << (num_splits - 1).bit_length(),
            DIMS=_dot_size(head_dim),
        )


def attend_prefills(
    qkv: torch.Tensor,
    layer_blocks: torch.Tensor,
    table_entries: torch.Tensor,
    queries: QueryTiles,
    output: torch.Tensor,
) -> None:
    """Write the causal attention of prefill pieces to their rows of `output`.

    Shapes as for `attend_decodes`, but for rows being tokens.
    """
    tiles = PREFILL_TILES[output.dtype]
    num_heads, head_dim = output.shape[1:]
    num_kv_heads, block_size_tokens = layer_blocks.shape[2:4]
    _prefill_kernel[(num_heads, len(queries.rows))](
        qkv,
        layer_blocks,
        layer_blocks.stride(0),
        table_entries,
        queries.rows,
        queries.counts,
        queries.positions,
        queries.table_starts,
        output,
        head_dim**-0.5,
        QUERY_ROW=qkv.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size_tokens,
        ROWS=queries.max_queries,
        DIMS=_dot_size(head_dim),
        TOKENS=tiles.num_context_tokens,
        PRECISION=_precision(output.dtype),
        num_warps=tiles.num_warps if queries.max_queries > 32 else 4,
        num_stages=tiles.num_stages,
    )


def _dot_size(size: int) -> int:
    return max(_MIN_DOT_SIZE, 1 << (size - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    """Without TF32, so that float32 on the device gives the tokens that it gives on the CPU."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def _attend_tile(
    query,
    keys,
    values,
    scale,
    is_seen,
    maximum,
    total,
    mixed,
    PRECISION: tl.constexpr,
):
    """Take one tile of K and V into a running softmax to base 2; return its new state."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
    scores = tl.where(is_seen, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2(maximum - new_maximum)
    weights = tl.exp2(scores - new_maximum[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision=PRECISION)
    return new_maximum, total, mixed


@triton.jit
def _token_offsets(
    table,
    first,
    end,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return where in the pool tokens [first, first + TOKENS) of a context lie, in head 0's K."""
    tokens = first + tl.arange(0, TOKENS)
    if BLOCK_SIZE % TOKENS == 0:
        # The tile is inside one block, since every `first` is a multiple of TOKENS.
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        offsets = block * block_stride + (first % BLOCK_SIZE + tl.arange(0, TOKENS)) * HEAD_DIM
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0).to(tl.int64)
        offsets = blocks * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
    return offsets


@triton.jit
def _decode_kernel(
    qkv,
    layer_blocks,
    block_stride,
    table_entries,
    table_starts,
    context_lens,
    output,
    partials,
    log_sums,
    scale,
    QUERY_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per request, KV head and split."""
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_shared: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    context_len = tl.load(context_lens + request)
    split_len = tl.cdiv(tl.cdiv(context_len, NUM_SPLITS), TOKENS) * TOKENS
    split_len = tl.maximum(split_len, MIN_SPLIT_TOKENS)
    begin = split * split_len
    end = tl.minimum(begin + split_len, context_len)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    heads = kv_head * num_shared + rows
    is_query = (rows < num_shared)[:, None] & (dims < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(qkv + request.to(tl.int64) * QUERY_ROW + places, mask=is_query, other=0.0)

    table = table_entries + tl.load(table_starts + request)
    keys_of_head = layer_blocks + kv_head * (BLOCK_SIZE * HEAD_DIM)
    values_of_head = keys_of_head + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    for first in range(begin, end, TOKENS):
        offsets = _token_offsets(table, first, end, block_stride, BLOCK_SIZE, HEAD_DIM, TOKENS)
        is_seen = first + tl.arange(0, TOKENS) < end
        is_loaded = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(keys_of_head + offsets[:, None] + dims[None, :], mask=is_loaded, other=0.0)
        values = tl.load(
            values_of_head + offsets[:, None] + dims[None, :], mask=is_loaded, other=0.0
        )
        maximum, total, mixed = _attend_tile(
            query, keys, values, scale, is_seen[None, :], maximum, total, mixed, PRECISION
        )

    if NUM_SPLITS == 1:
        # Padding has no context: its total is 0, and so is its output.
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        first_place = request.to(tl.int64) * (NUM_HEADS * HEAD_DIM)
        tl.store(output + first_place + places, mixed, mask=is_query)
    else:
        parts = (request.to(tl.int64) * NUM_HEADS + heads) * NUM_SPLITS + split
        is_head = rows < num_shared
        # An empty split has -inf, its maximum: its weight among the splits is 0.
        log_sum = maximum + tl.log2(tl.where(total > 0, total, 1.0))
        tl.store(log_sums + parts, log_sum, mask=is_head)
        if end > begin:
            targets = partials + parts[:, None] * HEAD_DIM + dims[None, :]
            tl.store(targets, mixed / total[:, None], mask=is_query)


@triton.jit
def _join_kernel(
    partials,
    log_sums,
    output,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Weigh the splits of one request and query head by their sums."""
    place = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    first = place * NUM_SPLITS
    sums = tl.load(log_sums + first + splits, mask=splits < NUM_SPLITS, other=float("-inf"))
    # Padding has empty splits alone, and weights of 0.
    largest = tl.maximum(tl.max(sums, 0), -1e30)
    weights = tl.exp2(sums - largest)
    is_inside = (weights > 0)[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(
        partials + (first + splits)[:, None] * HEAD_DIM + dims[None, :], mask=is_inside, other=0.0
    )
    total = tl.sum(weights, 0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + place * HEAD_DIM + dims, mixed, mask=dims < HEAD_DIM)


@triton.jit
def _prefill_kernel(
    qkv,
    layer_blocks,
    block_stride,
    table_entries,
    tile_rows,
    tile_counts,
    tile_positions,
    tile_table_starts,
    output,
    scale,
    QUERY_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per query head and tile of queries; heads side by side share K and V in L2."""
    head, tile = tl.program_id(0), tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    count = tl.load(tile_counts + tile)
    position = tl.load(tile_positions + tile)
    row = tl.load(tile_rows + tile).to(tl.int64)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    is_query = (rows < count)[:, None] & (dims < HEAD_DIM)[None, :]
    places = (row + rows)[:, None] * QUERY_ROW + head * HEAD_DIM + dims[None, :]
    query = tl.load(qkv + places, mask=is_query, other=0.0)

    table = table_entries + tl.load(tile_table_starts + tile)
    keys_of_head = layer_blocks + kv_head * (BLOCK_SIZE * HEAD_DIM)
    values_of_head = keys_of_head + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    end = position + count
    for first in range(0, end, TOKENS):
        offsets = _token_offsets(table, first, end, block_stride, BLOCK_SIZE, HEAD_DIM, TOKENS)
        tokens = first + tl.arange(0, TOKENS)
        is_loaded = (tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(keys_of_head + offsets[:, None] + dims[None, :], mask=is_loaded, other=0.0)
        values = tl.load(
            values_of_head + offsets[:, None] + dims[None, :], mask=is_loaded, other=0.0
        )
        # Every query sees token 0, so that no row's maximum stays infinite.
        is_seen = (tokens[None, :] <= (position + rows)[:, None]) & (tokens < end)[None, :]
        maximum, total, mixed = _attend_tile(
            query, keys, values, scale, is_seen, maximum, total, mixed, PRECISION
        )

    mixed = mixed / total[:, None]
    places = (row + rows)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(output + places, mixed, mask=is_query)
