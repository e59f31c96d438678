"""The Llama decoder over a paged KV cache: one forward for a mixed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from engines.torch_engine.batch import DecodeGroup, PrefillPiece, StepBatch
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.weights import DecoderWeights, LayerWeights


class KVStore(Protocol):
    """Where K and V of all tokens lie; `engines.kv_pool.KVPool` is one."""

    def write(self, layer: int, token_rows: torch.Tensor, key_value: torch.Tensor) -> None:
        """Store new K and V, (num_tokens, 2, num_kv_heads, head_dim), at `layer`.

        `token_rows` is `StepBatch.token_rows`.
        """
        ...

    def read(self, layer: int, head_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V at `layer`, each (num_requests, num_kv_heads, tokens, head_dim).

        `head_rows` is that of a `DecodeGroup` or a `PrefillPiece`.
        """
        ...


class LlamaDecoder:
    """Weights and the computation; holds no request state."""

    def __init__(self, config: LlamaConfig, weights: DecoderWeights, *, max_model_len: int) -> None:
        self.config = config
        self.weights = weights
        self._cos, self._sin = rope_tables(
            config, max_model_len, dtype=weights.embedding.dtype, device=weights.embedding.device
        )

    def forward(
        self,
        batch: StepBatch,
        pool: KVStore,
        *,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Store the batch's K and V in `pool`; return logits, (num_sampled, vocab_size).

        `before_layer` is called with each layer's index before the layer touches the pool. Only
        sampled tokens go through the last norm and the vocabulary matrix.
        """
        eps = self.config.rms_norm_eps
        hidden = F.embedding(batch.token_ids, self.weights.embedding)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        for index, layer in enumerate(self.weights.layers):
            normed = _rms_norm(hidden, layer.input_norm, eps)
            qkv = _rotate(F.linear(normed, layer.qkv), cos, sin, self.config)
            if before_layer is not None:
                before_layer(index)
            attention = self._attend(index, qkv, batch, pool)
            hidden = hidden + F.linear(attention, layer.attention_output)
            hidden = hidden + _mlp(_rms_norm(hidden, layer.mlp_norm, eps), layer)
        sampled = hidden[batch.sampled_rows]
        return F.linear(_rms_norm(sampled, self.weights.final_norm, eps), self.weights.lm_head)

    def _attend(
        self, layer: int, qkv: torch.Tensor, batch: StepBatch, pool: KVStore
    ) -> torch.Tensor:
        """Return the attention output, (num_tokens, query_size), of rotated `qkv`."""
        config = self.config
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        query, key_value = qkv.split([num_heads, 2 * num_kv_heads], dim=1)
        key_value = key_value.unflatten(1, (2, num_kv_heads))
        pool.write(layer, batch.token_rows, key_value)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in batch.decode_groups:
            output[group.tokens] = _attend_decodes(query[group.tokens], layer, group, pool)
        for piece in batch.prefill_pieces:
            tokens = piece.tokens
            output[tokens] = _attend_prefill(query[tokens], key_value[tokens], layer, piece, pool)
        return output.flatten(1)


def _attend_decodes(
    query: torch.Tensor, layer: int, group: DecodeGroup, pool: KVStore
) -> torch.Tensor:
    key, value = pool.read(layer, group.head_rows)
    # The query heads that share a KV head become its query rows: grouped-query attention
    # without repeating K and V.
    grouped = query.unflatten(1, (key.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=group.mask).flatten(1, 2)


def _attend_prefill(
    query: torch.Tensor, key_value: torch.Tensor, layer: int, piece: PrefillPiece, pool: KVStore
) -> torch.Tensor:
    """Return (new tokens, heads, head_dim). Without cached tokens, what was just computed is
    the whole context; else it is read back from the pool after the cached part."""
    if piece.head_rows is None or piece.mask is None:
        key, value = key_value.permute(1, 2, 0, 3)[:, None]
    else:
        num_context_tokens = piece.mask.shape[1]
        key, value = (kv[:, :, :num_context_tokens] for kv in pool.read(layer, piece.head_rows))
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key,
        value,
        attn_mask=piece.mask,
        is_causal=piece.mask is None,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


def _mlp(hidden: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
    gate, up = F.linear(hidden, layer.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down)


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rms_norm(hidden, weight.shape, weight, eps)


def rope_tables(
    config: LlamaConfig, max_model_len: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, each (max_model_len, 1, head_dim / 2); computed in fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    cos, sin = (table[:, None].to(device, dtype) for table in (angles.cos(), angles.sin()))
    return cos, sin


def _rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, config: LlamaConfig
) -> torch.Tensor:
    """Rotate q and k in place and return `qkv` as (num_tokens, heads of q, k and v, head_dim).

    Half-rotation: dimension i turns with dimension i + head_dim / 2, as in Hugging Face.
    """
    heads = qkv.view(len(qkv), -1, config.head_dim)
    rotated = heads[:, : config.num_attention_heads + config.num_key_value_heads]
    first, second = rotated.chunk(2, dim=-1)
    rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    return heads
