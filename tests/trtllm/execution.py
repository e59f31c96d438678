"""One run of a stand-in engine: check everything, compute, write the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.trtllm.all_reduce import check_workspace
from tests.trtllm.engine_io import IoTensor, engine_io
from tests.trtllm.engine_spec import TORCH_DTYPES, parse_engine
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.llama_model import LlamaModel
from tests.trtllm.memory import KVMemory, MemorySides, find_kv_memory, read_array, tensor_at
from tests.trtllm.rules import Rule, RuleBroken
from tests.trtllm.step_checks import EngineStep, Ints, read_step

_INT32_MAX = 2**31 - 1


class Model(Protocol):
    """Computes the logits of a step."""

    def logits(self, step: EngineStep, memory: KVMemory) -> torch.Tensor:
        """Write the new tokens' K and V; return logits, (S, padded vocabulary)."""
        ...


class LoadedEngine:
    """An engine file, ready to run."""

    def __init__(self, content: bytes) -> None:
        """Read `engine_bytes`.

        Raises:
            ValueError: they are of an engine that cannot be computed here.
        """
        self.spec, tensors = parse_engine(content)
        self.io = engine_io(self.spec)
        self._model: Model
        if self.spec.kind == "fake":
            self._model = FakeModel(self.spec)
        else:
            self._model = LlamaModel(self.spec, tensors)
        self._sides = MemorySides()
        self._memory: KVMemory | None = None

    def check_tensors(
        self, tensors: Mapping[str, object], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Check what a run is given, before anything is read from it. TensorRT would see the
        addresses alone.

        Raises:
            RuleBroken: something is missing, unknown, or not as the engine has it.
        """
        if unknown := tensors.keys() - self.io.tensors.keys():
            raise RuleBroken(Rule.UNKNOWN_TENSOR, ", ".join(sorted(unknown)))
        if missing := self.io.tensors.keys() - tensors.keys():
            raise RuleBroken(Rule.MISSING_TENSOR, ", ".join(sorted(missing)))
        self._sides.forget_freed()
        for name, io_tensor in self.io.tensors.items():
            tensor = tensors[name]
            if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu:
                raise RuleBroken(Rule.TENSOR, f"{name} is {type(tensor).__name__}, or elsewhere")
            if not tensor.is_contiguous():
                raise RuleBroken(Rule.TENSOR, f"{name} has strides {tensor.stride()}")
            _check_tensor(io_tensor, tensor, shapes[name])
            storage = StorageWeakRef(tensor.untyped_storage())
            self._sides.claim(storage, io_tensor.placement, name)

    def run(self, addresses: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
        """Compute one step. Everything comes from these addresses.

        Raises:
            RuleBroken: TensorRT-LLM would refuse it, or compute garbage.
        """
        if missing := self.io.tensors.keys() - addresses.keys():
            raise RuleBroken(Rule.MISSING_TENSOR, ", ".join(sorted(missing)))
        if missing := self.io.inputs.keys() - shapes.keys():
            raise RuleBroken(Rule.STALE_SHAPE, f"no shape was set for {', '.join(sorted(missing))}")
        sizes = self.io.bind(shapes)
        if (sizes["S"] - 1) * sizes["MB"] * 2 + sizes["MB"] > _INT32_MAX:
            raise RuleBroken(Rule.TABLE_SIZE, f"{sizes['S']} tables of {sizes['MB']} blocks")
        arrays = self._read(addresses, shapes)
        memory = self._kv_memory(arrays["host_kv_cache_pool_pointers"])
        if "all_reduce_workspace" in arrays:
            check_workspace(arrays["all_reduce_workspace"])
        step = read_step(self.spec, arrays, memory)
        shape = self.io.output_shape("logits", sizes)
        self._check_overlap(addresses, shapes, shape, memory)
        logits = self._model.logits(step, memory)
        for name, now in self._read(addresses, shapes).items():
            if not np.array_equal(arrays[name], now):
                raise RuleBroken(Rule.INPUT_CHANGED, f"{name} changed during the run")
        tensor_at(addresses["logits"], self.spec.logits_dtype, shape).copy_(logits)

    def _read(
        self, addresses: Mapping[str, int], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Ints]:
        return {
            name: read_array(addresses[name], tensor.dtype, shapes[name])
            for name, tensor in self.io.inputs.items()
        }

    def _kv_memory(self, pointers: Ints) -> KVMemory:
        """Return the pool behind host_kv_cache_pool_pointers."""
        if len(pointers) != 1 or pointers[0, 1] != 0:
            raise RuleBroken(
                Rule.POOL_POINTERS, f"{pointers.tolist()}; this engine's layers share one pool"
            )
        address = int(pointers[0, 0])
        memory = self._memory
        if memory is None or memory.address != address or memory.storage.expired():
            memory = self._memory = find_kv_memory(self.spec, address)
        self._sides.claim(memory.storage, "device", "the KV pool")
        return memory

    def _check_overlap(
        self,
        addresses: Mapping[str, int],
        shapes: Mapping[str, Sequence[int]],
        logits_shape: Sequence[int],
        memory: KVMemory,
    ) -> None:
        """Raise RuleBroken if the logits would be written over something else."""
        first = addresses["logits"]
        end = first + int(np.prod(logits_shape)) * TORCH_DTYPES[self.spec.logits_dtype].itemsize
        taken = {
            name: (addresses[name], int(np.prod(shapes[name])) * np.dtype(tensor.dtype).itemsize)
            for name, tensor in self.io.inputs.items()
        }
        taken["the KV pool"] = (memory.address, memory.num_blocks * memory.block_bytes)
        for name, (start, num_bytes) in taken.items():
            if first < start + num_bytes and start < end:
                raise RuleBroken(Rule.OUTPUT_OVERLAP, f"logits lie in {name}")


def _check_tensor(io_tensor: IoTensor, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tensor.dtype != getattr(torch, io_tensor.dtype):
        raise RuleBroken(
            Rule.DTYPE, f"{io_tensor.name} is {tensor.dtype}, the engine has {io_tensor.dtype}"
        )
    if io_tensor.is_input:
        if tuple(tensor.shape) != tuple(shape):
            raise RuleBroken(
                Rule.STALE_SHAPE,
                f"{io_tensor.name} is {tuple(tensor.shape)}, set was {tuple(shape)}",
            )
    elif tensor.numel() < np.prod(shape):
        raise RuleBroken(
            Rule.ROOM, f"{io_tensor.name} is {tuple(tensor.shape)}, written are {tuple(shape)}"
        )
