"""The paged KV cache: one tensor in device memory and one in host memory, in TensorRT-LLM's
block layout.

    [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size_tokens, head_dim]

One logical block is contiguous over all layers and K and V, so moving a block is one copy.
Attention addresses it as rows, without strides:

    head row    block_size_tokens * head_dim numbers of one block, layer, K or V, and head
    token row   head_dim numbers of one token in one head row

Source: TensorRT-LLM's pool (`KVCacheManager`); rows of layer l are those of layer 0 plus a
constant, as in its block offsets.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.core.errors import EngineError


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one block."""

    num_layers: int
    num_kv_heads: int
    block_size_tokens: int
    head_dim: int

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block in a pool."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size_tokens, self.head_dim)

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Return the size of one block, over all layers, K and V."""
        numbers_per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return numbers_per_token * self.block_size_tokens * dtype.itemsize

    def head_rows(self, block_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return layer 0's head rows of a table of blocks.

        `block_ids` is (num_requests, num_blocks). The result is (2, num_requests,
        num_kv_heads, num_blocks): K and V outermost, and a head's blocks side by side, so that
        the rows read in this order are K and V of shape (num_requests, num_kv_heads, tokens,
        head_dim) without another copy.
        """
        key_value = np.arange(2)[:, None, None, None]
        heads = np.arange(self.num_kv_heads)[None, None, :, None]
        first = block_ids[None, :, None, :] * (self.num_layers * 2)
        return (first + key_value) * self.num_kv_heads + heads

    def token_rows(
        self, block_ids: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return layer 0's token rows, (num_tokens, 2, num_kv_heads).

        Token i lies in block `block_ids[i]`, at place `offsets[i]` in it.
        """
        rows = self.head_rows(block_ids[:, None])[..., 0].transpose(1, 0, 2)
        return rows * self.block_size_tokens + offsets[:, None, None]


class KVPool:
    """Memory of all KV blocks of one engine. Who owns which block is the scheduler's business;
    this class only reads and writes, and `engines.kv_copies` moves blocks between the two."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        num_host_blocks: int = 0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take the memory.

        Raises:
            EngineError: device or host have not enough memory, or CUDA cannot pin it.
        """
        self.layout = layout
        self.blocks = _device_blocks(layout, num_blocks, dtype, device)
        self.host_blocks = _host_blocks(layout, num_host_blocks, dtype)
        """As `blocks`, in host memory; pinned if the device is CUDA."""

        self._unpin = None
        if device.type == "cuda" and num_host_blocks > 0:
            _pin(self.host_blocks)
            self._unpin = weakref.finalize(self, _unpin, self.host_blocks)
        self._head_rows = self.blocks.view(-1, layout.block_size_tokens * layout.head_dim)
        self._token_rows = self.blocks.view(-1, layout.head_dim)

    def close(self) -> None:
        """Let go of pinned memory. No call follows, and no copy may be under way."""
        if self._unpin is not None:
            self._unpin()

    def write(self, layer: int, token_rows: torch.Tensor, key_value: torch.Tensor) -> None:
        """Store new K and V, (num_tokens, 2, num_kv_heads, head_dim), at `layer`.

        `token_rows` is `KVLayout.token_rows`, flattened.
        """
        layout = self.layout
        first = layer * 2 * layout.num_kv_heads * layout.block_size_tokens
        self._token_rows.index_copy_(0, token_rows + first, key_value.reshape(-1, layout.head_dim))

    def read(self, layer: int, head_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V at `layer`, each (num_requests, num_kv_heads, tokens,
        head_dim), with as many tokens as the table of blocks holds.

        `head_rows` is `KVLayout.head_rows`.
        """
        layout = self.layout
        _, num_requests, num_kv_heads, num_blocks = head_rows.shape
        first = layer * 2 * layout.num_kv_heads
        rows = self._head_rows.index_select(0, (head_rows + first).view(-1))
        num_tokens = num_blocks * layout.block_size_tokens
        key, value = rows.view(2, num_requests, num_kv_heads, num_tokens, layout.head_dim)
        return key, value


def _device_blocks(
    layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    try:
        # Zeros, not empty: padding reads blocks nobody wrote, and 0 * NaN would spread.
        return torch.zeros(num_blocks, *layout.block_shape, dtype=dtype, device=device)
    except RuntimeError as error:  # PyTorch's allocators, OutOfMemoryError among them
        num_bytes = num_blocks * layout.block_bytes(dtype)
        raise EngineError(
            f"{num_blocks} device blocks need {num_bytes:,} bytes of memory, which {device} does "
            f"not give; lower device_kv_bytes or device_memory_fraction ({error})"
        ) from error


def _host_blocks(layout: KVLayout, num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(num_blocks, *layout.block_shape, dtype=dtype)
    except RuntimeError as error:  # PyTorch's allocator
        num_bytes = num_blocks * layout.block_bytes(dtype)
        raise EngineError(
            f"{num_blocks} host blocks need {num_bytes:,} bytes of memory, which the machine does "
            f"not give; take fewer ({error})"
        ) from error


def _pin(blocks: torch.Tensor) -> None:
    """Lock the pages in place, so that CUDA copies from and to them without waiting.

    PyTorch's own pinned allocator rounds up to a power of two: 40 GiB would take 64.
    """
    try:
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0)
        )
    except RuntimeError as error:  # torch.cuda.CudaError
        raise EngineError(
            f"CUDA cannot pin {blocks.nbytes:,} bytes of host memory for KV blocks; take fewer "
            f"host blocks, or raise the limit of locked memory ({error})"
        ) from error


def _unpin(blocks: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(blocks.data_ptr())
