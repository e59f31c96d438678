"""A step's plan as the arrays that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engines.kv_pool import KVLayout
from orchestrator.core.ports import ScheduledRequest

# A decode joins a group whose longest context has at most this many times its blocks: padding
# then at most doubles what is read, while contexts up to 8,192 tokens make at most 10 groups.
_MAX_PADDING_FACTOR = 2
# Tables this short are not worth a group of their own: a group costs two kernel launches a layer.
_MIN_GROUP_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Requests with one new token each and contexts of similar length."""

    tokens: slice
    """Their place among the step's tokens, one each."""

    head_rows: torch.Tensor
    """`KVLayout.head_rows` of their blocks, padded to the longest table."""

    mask: torch.Tensor
    """(num_requests, 1, 1, padded tokens): 0 on the context, -inf on the padding."""


@dataclass(frozen=True, slots=True)
class PrefillPiece:
    """Several new tokens of one request."""

    tokens: slice
    """Their place among the step's tokens."""

    head_rows: torch.Tensor | None
    """`KVLayout.head_rows` of its blocks; None if there is nothing cached before the piece."""

    mask: torch.Tensor | None
    """(new tokens, context tokens), causal; None if there is nothing cached."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tokens, decodes first, then prefill pieces, without padding between them."""

    token_ids: torch.Tensor  # (num_tokens,)
    positions: torch.Tensor  # (num_tokens,)
    token_rows: torch.Tensor  # (num_tokens * 2 * num_kv_heads,), where their K and V go
    decode_groups: tuple[DecodeGroup, ...]
    prefill_pieces: tuple[PrefillPiece, ...]
    sampled: tuple[ScheduledRequest, ...]
    sampled_rows: torch.Tensor  # (num_sampled,), the last token of each of `sampled`


def build_batch(
    parts: Sequence[ScheduledRequest], layout: KVLayout, *, dtype: torch.dtype, device: torch.device
) -> StepBatch:
    """Return the arrays of a checked, non-empty plan."""
    decodes = sorted(
        (part for part in parts if part.num_new_tokens == 1),
        key=lambda part: part.num_computed_tokens,
        reverse=True,
    )
    ordered = [*decodes, *(part for part in parts if part.num_new_tokens > 1)]
    num_new = np.array([part.num_new_tokens for part in ordered])
    ends = np.cumsum(num_new)
    token_ids = np.fromiter((t for part in ordered for t in part.token_ids), np.int64, ends[-1])
    starts = np.array([part.num_computed_tokens for part in ordered])
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - num_new), num_new)
    tables = [_block_table(part, layout.block_size_tokens) for part in ordered]
    own_blocks = [
        table[positions[end - count : end] // layout.block_size_tokens]
        for table, end, count in zip(tables, ends, num_new, strict=True)
    ]
    token_rows = layout.token_rows(np.concatenate(own_blocks), positions % layout.block_size_tokens)
    sampled = [(part, end - 1) for part, end in zip(ordered, ends, strict=True) if part.is_sampled]
    arrays = _Arrays(layout, dtype, device)
    first_piece = len(decodes)
    return StepBatch(
        token_ids=arrays.tensor(token_ids),
        positions=arrays.tensor(positions),
        token_rows=arrays.tensor(token_rows.reshape(-1)),
        decode_groups=tuple(
            arrays.decode_group(group, tables[group], starts[group] + 1)
            for group in _group_slices([len(table) for table in tables[:first_piece]])
        ),
        prefill_pieces=tuple(
            arrays.prefill_piece(slice(end - count, end), start, table)
            for start, count, end, table in zip(
                starts[first_piece:].tolist(),
                num_new[first_piece:].tolist(),
                ends[first_piece:].tolist(),
                tables[first_piece:],
                strict=True,
            )
        ),
        sampled=tuple(part for part, _ in sampled),
        sampled_rows=arrays.tensor(np.array([row for _, row in sampled], dtype=np.int64)),
    )


def _block_table(part: ScheduledRequest, block_size_tokens: int) -> NDArray[np.int64]:
    """Return the blocks that hold the request's context after this step."""
    num_blocks = -(-(part.num_computed_tokens + part.num_new_tokens) // block_size_tokens)
    return np.array(part.block_ids[:num_blocks], dtype=np.int64)


def _group_slices(table_lengths: Sequence[int]) -> list[slice]:
    """Split decodes, longest table first, so that one long context does not pad all others."""
    slices: list[slice] = []
    first = 0
    for index, length in enumerate(table_lengths):
        if table_lengths[first] > max(_MAX_PADDING_FACTOR * length, _MIN_GROUP_BLOCKS):
            slices.append(slice(first, index))
            first = index
    if table_lengths:
        slices.append(slice(first, len(table_lengths)))
    return slices


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Makes the device tensors of one step."""

    layout: KVLayout
    dtype: torch.dtype
    device: torch.device

    def tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def decode_group(
        self, tokens: slice, tables: Sequence[NDArray[np.int64]], contexts: NDArray[np.int64]
    ) -> DecodeGroup:
        padded = np.zeros((len(tables), len(tables[0])), dtype=np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        num_tokens = padded.shape[1] * self.layout.block_size_tokens
        is_padding = torch.from_numpy(np.arange(num_tokens) >= contexts[:, None])
        return DecodeGroup(
            tokens=tokens,
            head_rows=self.tensor(self.layout.head_rows(padded)),
            mask=self._mask(is_padding)[:, None, None, :],
        )

    def prefill_piece(
        self, tokens: slice, num_cached_tokens: int, table: NDArray[np.int64]
    ) -> PrefillPiece:
        if num_cached_tokens == 0:
            return PrefillPiece(tokens=tokens, head_rows=None, mask=None)
        num_new_tokens = tokens.stop - tokens.start
        num_context_tokens = num_cached_tokens + num_new_tokens
        is_future = torch.ones(num_new_tokens, num_context_tokens, dtype=torch.bool).triu(
            num_cached_tokens + 1
        )
        return PrefillPiece(
            tokens=tokens,
            head_rows=self.tensor(self.layout.head_rows(table[None])),
            mask=self._mask(is_future),
        )

    def _mask(self, is_hidden: torch.Tensor) -> torch.Tensor:
        """Return what attention adds to its scores. Floats, made once per step: given
        booleans, PyTorch converts them again in every layer."""
        mask = torch.zeros(is_hidden.shape, dtype=self.dtype)
        return mask.masked_fill_(is_hidden, float("-inf")).to(self.device)
