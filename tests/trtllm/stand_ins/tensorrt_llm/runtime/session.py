"""An engine with one execution context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorrt as trt
import torch

from tests.trtllm.rules import Rule, RuleBroken


@dataclass(slots=True)
class TensorInfo:
    """Name, type and shape of an engine's tensor."""

    name: str
    dtype: trt.DataType
    shape: tuple[int, ...]


class Session:
    """Runs an engine. Nothing waits here; `run` returns when the step is computed."""

    __slots__ = ("_context", "_engine", "_runtime")

    _runtime: trt.Runtime
    _engine: trt.ICudaEngine
    _context: trt.IExecutionContext

    def __init__(self, **kwargs: object) -> None:
        """Make an empty session, as upstream does: take one of the static methods."""

    @staticmethod
    def from_serialized_engine(engine: bytes) -> Session:
        """Return a session over the content of an engine file.

        Raises:
            AttributeError: it holds something else; upstream stumbles over TensorRT's None.
        """
        loaded = trt.Runtime(trt.Logger()).deserialize_cuda_engine(engine)
        if loaded is None:
            raise AttributeError("None has no create_execution_context")
        return _start(loaded)

    @staticmethod
    def from_engine(engine: trt.ICudaEngine) -> Session:
        """Return another session over an engine."""
        return _start(engine)

    @property
    def runtime(self) -> trt.Runtime:
        return self._runtime

    @property
    def engine(self) -> trt.ICudaEngine:
        return self._engine

    @property
    def context(self) -> trt.IExecutionContext:
        """The default context, with optimization profile 0."""
        return self._context

    def infer_shapes(
        self, inputs: Sequence[TensorInfo], context: trt.IExecutionContext | None = None
    ) -> list[TensorInfo]:
        """Set the shapes of these inputs; return the outputs that follow.

        Raises:
            ValueError: a tensor is no input, or of another dtype.
            RuntimeError: the optimization profile does not have a shape.
        """
        context = self._context if context is None else context
        for tensor in inputs:
            if self._mode(tensor.name) is not trt.TensorIOMode.INPUT:
                raise ValueError(f"{tensor.name} is not an input of this engine")
            if self._engine.get_tensor_dtype(tensor.name) is not tensor.dtype:
                raise ValueError(
                    f"{tensor.name} is {tensor.dtype}, "
                    f"the engine has {self._engine.get_tensor_dtype(tensor.name)}"
                )
            if not context.set_input_shape(tensor.name, tensor.shape):
                raise RuntimeError(self._refusal(tensor.name, tensor.shape))
        return [
            TensorInfo(name, self._engine.get_tensor_dtype(name), context.get_tensor_shape(name))
            for name in self._names()
            if self._mode(name) is trt.TensorIOMode.OUTPUT
        ]

    def set_shapes(
        self,
        tensor_dict: Mapping[str, torch.Tensor],
        context: trt.IExecutionContext | None = None,
    ) -> None:
        """Set the shapes of all inputs; `tensor_dict` may hold more.

        Raises:
            KeyError: an input is missing.
            ValueError: the optimization profile does not have a shape.
        """
        context = self._context if context is None else context
        for name in self._names():
            if self._mode(name) is trt.TensorIOMode.INPUT:
                shape = tuple(tensor_dict[name].shape)
                if not context.set_input_shape(name, shape):
                    raise ValueError(self._refusal(name, shape))

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: int,
        context: trt.IExecutionContext | None = None,
    ) -> bool:
        """Compute one step. Upstream takes raw addresses too, of which nothing could be checked.

        Raises:
            RuleBroken: TensorRT-LLM would refuse it, or compute garbage.
        """
        context = self._context if context is None else context
        if type(stream) is not int:
            raise RuleBroken(Rule.STREAM, f"{type(stream).__name__}")
        for tensors, mode in ((inputs, trt.TensorIOMode.INPUT), (outputs, trt.TensorIOMode.OUTPUT)):
            if wrong := [name for name in tensors if self._mode(name) is not mode]:
                raise RuleBroken(Rule.UNKNOWN_TENSOR, f"{', '.join(wrong)} among {mode.name}s")
        tensors = {**inputs, **outputs}
        context._loaded.check_tensors(
            tensors, {name: context.get_tensor_shape(name) for name in self._names()}
        )
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        return context.execute_async_v3(stream)

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def _mode(self, name: str) -> trt.TensorIOMode | None:
        """Return a tensor's direction, None if the engine does not have it."""
        return self._engine.get_tensor_mode(name) if name in self._names() else None

    def _refusal(self, name: str, shape: Sequence[int]) -> str:
        ranges = self._engine.get_tensor_profile_shape(name, 0)
        return f"{name} cannot have shape {shape}: the engine takes {ranges[0]} to {ranges[-1]}"


def _start(engine: trt.ICudaEngine) -> Session:
    session = Session()
    session._runtime = trt.Runtime(trt.Logger())
    session._engine = engine
    session._context = engine.create_execution_context()
    session._context.set_optimization_profile_async(0, 0)
    return session
