"""The Llama decoder on CUDA: Triton kernels over the paged pool, decodes replayed as CUDA graphs.

Computes what `engines.torch_engine.model.LlamaDecoder`, the readable specification, computes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from engines.kv_pool import KVPool
from engines.step_runner import Feed, StepLogits
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.model import rope_tables
from engines.torch_engine.packed_step import (
    HostBlockTables,
    StepUpload,
    decode_buckets,
    pack_decodes,
    pack_step,
    sampled_of,
)
from engines.torch_engine.triton_attention import (
    BlockTables,
    QueryTiles,
    attend_decodes,
    attend_prefills,
    count_splits,
    tile_queries,
)
from engines.torch_engine.triton_layers import (
    add_and_rms_norm,
    rms_norm,
    rotate_and_store,
    silu_and_multiply,
)
from engines.torch_engine.weights import DecoderWeights
from orchestrator.core.ports import ScheduledRequest

# The decode kernel of a CPU, where Triton interprets it, has nobody to share work with.
_CPU_MULTIPROCESSORS = 1


@dataclass(frozen=True, slots=True)
class _Batch:
    """One step on the device."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: BlockTables
    tiles: QueryTiles | None
    """None without prefill pieces."""

    sampled_rows: torch.Tensor | None
    """None samples every row."""


class TritonDecoder:
    """Weights, the computation and its graphs; of requests, it keeps their block tables.

    On the CPU, Triton's interpreter can run it, for tests.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: DecoderWeights,
        pool: KVPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        """Prepare for steps within these limits; on CUDA, capture the graphs."""
        self._config, self._weights = config, weights
        device = weights.embedding.device
        self._rope = rope_tables(config, max_model_len, dtype=torch.float32, device=device)
        self._layers = [pool.blocks[:, index] for index in range(config.num_hidden_layers)]
        self._tables = HostBlockTables(max_num_seqs, max_model_len, pool.layout.block_size_tokens)
        max_blocks = -(-max_model_len // pool.layout.block_size_tokens)
        # Per token: id, position, slot, and at worst a tile of its own. Per request: the rest.
        max_entries = 7 * (max_num_batched_tokens + max_num_seqs) + max_num_seqs * (max_blocks + 4)
        self._upload = StepUpload(max_entries, device)
        self._num_multiprocessors = _CPU_MULTIPROCESSORS
        self._buckets = decode_buckets(max_num_seqs)
        self._decodes: dict[int, Callable[[], torch.Tensor]] = {}
        self._graph_pool = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._num_multiprocessors = properties.multi_processor_count
            self._graph_pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(), _no_garbage():
            self._capture(device)

    def compute(
        self,
        parts: Sequence[ScheduledRequest],
        *,
        before_layer: Callable[[int], None] | None = None,
    ) -> StepLogits:
        """Begin to compute a checked, non-empty plan; the logits are overwritten by the next.

        `before_layer` is called with each layer's index before the layer touches the pool.
        """
        pieces = [part for part in parts if part.num_new_tokens > 1]
        if before_layer is None and not pieces and len(parts) <= self._buckets[-1]:
            return self._compute_decodes(parts, None)
        decodes = [part for part in parts if part.num_new_tokens == 1]
        sampled, rows = sampled_of([*decodes, *pieces])
        longest = max((piece.num_new_tokens for piece in pieces), default=1)
        max_queries = tile_queries(longest, self._weights.embedding.dtype)
        step = pack_step(decodes, pieces, self._tables, sampled_rows=rows, tile_queries=max_queries)
        batch = _batch(self._upload.upload(step), max_queries, is_decoding=False)
        return StepLogits(sampled, self._forward(batch, before_layer))

    def compute_ahead(self, parts: Sequence[ScheduledRequest], feed: Feed) -> StepLogits | None:
        """Begin to compute decodes, some of whose tokens are the step's before and not known to
        the host; None if there is no graph for so many. See `engines.step_runner.ComputeAhead`."""
        if len(parts) > self._buckets[-1]:
            return None
        return self._compute_decodes(parts, feed)

    def _compute_decodes(self, parts: Sequence[ScheduledRequest], feed: Feed | None) -> StepLogits:
        bucket = next(size for size in self._buckets if size >= len(parts))
        fed_rows = None if feed is None else feed.rows
        step = pack_decodes(parts, self._tables, bucket=bucket, fed_rows=fed_rows)
        arrays = self._upload.upload(step)
        if feed is not None:
            rows, token_ids = arrays["fed_rows"], arrays["token_ids"]
            # Where there is none, any token will do: nobody waits for what comes of it.
            fed = feed.token_ids[rows.clamp(min=0)].clamp_(min=0).to(token_ids.dtype)
            token_ids.copy_(torch.where(rows >= 0, fed, token_ids))
        return StepLogits(parts, self._decodes[bucket]()[: len(parts)])

    def close(self) -> None:
        """Release the graphs and their memory. No call follows."""
        self._decodes.clear()

    def _capture(self, device: torch.device) -> None:
        """Make a function per bucket that computes the decodes that were uploaded last."""
        for bucket in reversed(self._buckets):
            # Padding alone, until it is replayed.
            padding = pack_decodes((), self._tables, bucket=bucket)
            batch = _batch(self._upload.upload(padding), 1, is_decoding=True)
            forward = partial(self._forward, batch, None)
            self._decodes[bucket] = forward
            if device.type == "cuda":
                self._decodes[bucket] = self._graph(forward)

    def _graph(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        # Compiles kernels and lets libraries allocate, which a capture must not.
        forward()
        graph = torch.cuda.CUDAGraph()
        # From the largest on, so that the smaller ones find their memory in its pool.
        # Other threads may run engines of their own meanwhile.
        with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    def _forward(self, batch: _Batch, before_layer: Callable[[int], None] | None) -> torch.Tensor:
        """Store the batch's K and V in the pool; return logits, (num_sampled, vocab_size)."""
        config, eps, layers = self._config, self._config.rms_norm_eps, self._weights.layers
        hidden = F.embedding(batch.token_ids, self._weights.embedding)
        normed = rms_norm(hidden, layers[0].input_norm, eps)
        attention = hidden.new_empty(len(hidden), config.num_attention_heads, config.head_dim)
        branch = hidden
        for index, layer in enumerate(layers):
            if index > 0:
                normed = add_and_rms_norm(branch, hidden, layer.input_norm, eps)
            qkv = F.linear(normed, layer.qkv)
            if before_layer is not None:
                before_layer(index)
            blocks = self._layers[index]
            rotate_and_store(qkv, self._rope, batch.positions, batch.slots, blocks, config=config)
            self._attend(qkv, blocks, batch, attention)
            branch = F.linear(attention.flatten(1), layer.attention_output)
            normed = add_and_rms_norm(branch, hidden, layer.mlp_norm, eps)
            branch = F.linear(silu_and_multiply(F.linear(normed, layer.gate_up)), layer.down)
        if batch.sampled_rows is not None:
            branch, hidden = branch[batch.sampled_rows], hidden[batch.sampled_rows]
        normed = add_and_rms_norm(branch, hidden, self._weights.final_norm, eps)
        return F.linear(normed, self._weights.lm_head)

    def _attend(
        self, qkv: torch.Tensor, blocks: torch.Tensor, batch: _Batch, output: torch.Tensor
    ) -> None:
        """Write attention to `output`, (num_tokens, num_heads, head_dim)."""
        if num_decodes := len(batch.tables.context_lens):
            num_splits = count_splits(
                num_decodes,
                self._config.num_key_value_heads,
                num_multiprocessors=self._num_multiprocessors,
            )
            attend_decodes(qkv, blocks, batch.tables, output, num_splits=num_splits)
        if batch.tiles is not None:
            attend_prefills(qkv, blocks, batch.tables.entries, batch.tiles, output)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage before this, not within: an engine among it unpins memory and ends graphs,
    calls that CUDA forbids to a thread that captures one."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _batch(arrays: dict[str, torch.Tensor], max_queries: int, *, is_decoding: bool) -> _Batch:
    """Return views of uploaded arrays, under the names that kernels have for them."""
    tiles = QueryTiles(
        max_queries=max_queries,
        rows=arrays["tile_rows"],
        counts=arrays["tile_counts"],
        positions=arrays["tile_positions"],
        table_starts=arrays["tile_table_starts"],
    )
    return _Batch(
        token_ids=arrays["token_ids"],
        positions=arrays["positions"],
        slots=arrays["slots"],
        tables=BlockTables(arrays["tables"], arrays["table_starts"], arrays["context_lens"]),
        tiles=tiles if len(tiles.rows) else None,
        sampled_rows=None if is_decoding else arrays["sampled_rows"],
    )
