"""Memory by its address: an engine is given addresses, and all it does goes through them."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.multiprocessing.reductions import StorageWeakRef

from tests.trtllm.engine_spec import TORCH_DTYPES, EngineSpec
from tests.trtllm.rules import Rule, RuleBroken


def read_array(address: int, dtype: str, shape: Sequence[int]) -> NDArray[np.int64]:
    """Return a copy of the integers at an address."""
    stored = np.dtype(dtype)
    count = int(np.prod(shape))
    buffer = memoryview(_buffer(address, count * stored.itemsize))
    values = np.frombuffer(buffer, dtype=stored).astype(np.int64)
    return values.reshape(shape)


def tensor_at(address: int, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor over the memory at an address."""
    element = TORCH_DTYPES[dtype]
    count = int(np.prod(shape))
    buffer = torch.frombuffer(_buffer(address, count * element.itemsize), dtype=element)
    return buffer.view(*shape)


def _buffer(address: int, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * num_bytes).from_address(address)


@dataclass(frozen=True, slots=True)
class KVMemory:
    """The KV pool behind a pool pointer."""

    spec: EngineSpec
    address: int
    num_blocks: int
    storage: StorageWeakRef
    """The memory that it lies in; expires with it."""

    @property
    def block_bytes(self) -> int:
        """One block, over all layers, K and V."""
        return self.spec.num_layers * 2 * self.spec.bytes_per_block

    @property
    def rows(self) -> torch.Tensor:
        """The pool as bytes, (num_rows, row_bytes): a row is one token's K or V of one head."""
        num_bytes = self.num_blocks * self.block_bytes
        buffer = torch.frombuffer(_buffer(self.address, num_bytes), dtype=torch.uint8)
        return buffer.view(-1, self.spec.row_bytes)

    def row_ids(self, offsets: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return layer 0's rows of tokens, one axis longer than the arguments: heads are last.

        Token i lies in the K or V block at `offsets[i]`, at place `slots[i]` in it: `address` of
        `engine_io.kv_pool`, in units of a row.
        """
        spec = self.spec
        heads = np.arange(spec.num_kv_heads_per_rank)
        block = offsets * (spec.bytes_per_block // spec.row_bytes)
        return block[..., None] + heads * spec.tokens_per_block + slots[..., None]

    def first_row(self, layer: int) -> int:
        """Return what a layer's rows have more than layer 0's."""
        return layer * 2 * self.spec.bytes_per_block // self.spec.row_bytes


def find_kv_memory(spec: EngineSpec, address: int) -> KVMemory:
    """Return the KV pool at an address, as large as the memory that begins there.

    TensorRT-LLM cannot know how large that is, and follows an offset wherever it leads. Here the
    memory is looked up among the tensors that Python holds, so that a wrong one is told of.

    Raises:
        RuleBroken: no tensor's memory begins there.
    """
    for candidate in gc.get_objects():
        # Not isinstance: it asks the object for its class, and some warn of that.
        if not issubclass(type(candidate), torch.Tensor) or not _has_memory(candidate):
            continue
        storage = candidate.untyped_storage()
        if storage.nbytes() and storage.data_ptr() == address:
            block_bytes = spec.num_layers * 2 * spec.bytes_per_block
            return KVMemory(
                spec=spec,
                address=address,
                num_blocks=storage.nbytes() // block_bytes,
                storage=StorageWeakRef(storage),
            )
    raise RuleBroken(Rule.POOL_POINTERS, f"no tensor's memory begins at {address:#x}")


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


class MemorySides:
    """Which memory stands for the device's and which for the host's.

    On the CPU nothing tells them apart, so the first use decides, for as long as the memory lives.
    A pair of tensors that is swapped from the first run on is not noticed: checks by
    `torch.device` need a test that packs for another device, such as `meta`.
    """

    def __init__(self) -> None:
        self._sides: dict[int, tuple[StorageWeakRef, str, str]] = {}

    def claim(self, storage: StorageWeakRef, side: str, name: str) -> None:
        """Note that the memory of tensor `name` is on this side.

        Raises:
            RuleBroken: it was on the other one.
        """
        known = self._sides.get(storage.cdata)
        if known is not None and not known[0].expired() and known[1] != side:
            raise RuleBroken(
                Rule.PLACEMENT,
                f"{name} is for the {side}, in memory that {known[2]} has on the {known[1]}",
            )
        self._sides[storage.cdata] = (storage, side, name)

    def forget_freed(self) -> None:
        """Drop memory that is gone."""
        self._sides = {key: known for key, known in self._sides.items() if not known[0].expired()}
