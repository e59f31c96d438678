"""The inputs and outputs of an engine, and the check that it has these and no others.

Source: tensorrt_llm/models/generation_mixin.py (what a network is built with) and
runtimeBuffers.cpp (what each input holds), of TensorRT-LLM 1.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engines.trtllm.engine_config import TrtLlmEngineConfig
from orchestrator.core.errors import EngineDirectoryError

if TYPE_CHECKING:
    import tensorrt

NUM_PERF_KNOBS = 16
"""Numbers in `host_runtime_perf_knobs`."""

_OPTIONAL_INPUTS = frozenset({"position_ids"})  # a model without positions in its embeddings

_LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output, as this driver binds it."""

    dtypes: tuple[torch.dtype, ...]
    """Of these, the engine may have any."""

    shape: tuple[int | None, ...]
    """None where the size changes with the step."""


def input_specs(config: TrtLlmEngineConfig) -> dict[str, TensorSpec]:
    """Return every input that an engine may have, by its name."""

    def int32(*shape: int | None) -> TensorSpec:
        return TensorSpec((torch.int32,), shape)

    def int64(*shape: int | None) -> TensorSpec:
        return TensorSpec((torch.int64,), shape)

    block_tables = int32(1, None, 2, config.max_blocks_per_seq)  # one pool, K and V
    specs = {
        "input_ids": int32(None),
        "position_ids": int32(None),
        "last_token_ids": int32(None),
        "context_lengths": int32(None),
        "host_context_lengths": int32(None),
        "sequence_length": int32(None),
        "host_past_key_value_lengths": int32(None),
        "host_request_types": int32(None),
        "kv_cache_block_offsets": block_tables,
        "host_kv_cache_block_offsets": block_tables,
        "host_kv_cache_pool_pointers": int64(1, 2),
        "host_kv_cache_pool_mapping": int32(config.num_layers, 2),
        "cache_indirection": int32(None, 1, config.max_seq_len),
        "host_max_attention_window_sizes": int32(config.num_layers),
        "host_sink_token_length": int32(1),
        "host_runtime_perf_knobs": int64(NUM_PERF_KNOBS),
        "host_context_progress": int64(1),
    }
    if config.tp_size > 1:
        specs["all_reduce_workspace"] = int64(7 * config.tp_size + 3)
    return specs


def output_specs(config: TrtLlmEngineConfig) -> dict[str, TensorSpec]:
    """Return every output of an engine by its name."""
    return {"logits": TensorSpec(_LOGITS_DTYPES, (None, config.vocab_size_padded))}


def check_tensors(engine: tensorrt.ICudaEngine, config: TrtLlmEngineConfig, where: str) -> None:
    """Raise EngineDirectoryError, with one line per tensor that is missing, unknown, or of another
    type or shape, unless the engine can be bound to what this driver has.

    `where` begins each line.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = input_names(engine)
    outputs = [name for name in names if name not in inputs]
    problems = [
        *_problems(engine, "input", inputs, input_specs(config)),
        *_problems(engine, "output", outputs, output_specs(config)),
    ]
    if problems:
        raise EngineDirectoryError("\n".join(f"{where}: {problem}" for problem in problems))


def input_names(engine: tensorrt.ICudaEngine) -> list[str]:
    """Return the names of an engine's inputs, in its order."""
    import tensorrt

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]


def torch_dtype(engine: tensorrt.ICudaEngine, name: str) -> torch.dtype | None:
    """Return the type of an input or output; None if it is none that is bound here."""
    import tensorrt

    return {
        tensorrt.DataType.FLOAT: torch.float32,
        tensorrt.DataType.HALF: torch.float16,
        tensorrt.DataType.BF16: torch.bfloat16,
        tensorrt.DataType.INT32: torch.int32,
        tensorrt.DataType.INT64: torch.int64,
    }.get(engine.get_tensor_dtype(name))


def _problems(
    engine: tensorrt.ICudaEngine, kind: str, names: list[str], specs: Mapping[str, TensorSpec]
) -> Iterator[str]:
    rebuild = "rebuild the directory with `proserve build`"
    for name in specs:
        if name not in names and name not in _OPTIONAL_INPUTS:
            yield f"the engine has no {kind} {name!r}; {rebuild}"
    for name in names:
        if name not in specs:
            yield f"the engine has an unknown {kind} {name!r}; {rebuild}"
            continue
        spec, shape = specs[name], tuple(engine.get_tensor_shape(name))
        if torch_dtype(engine, name) not in spec.dtypes:
            expected = " or ".join(str(dtype) for dtype in spec.dtypes)
            found = engine.get_tensor_dtype(name)
            yield f"{kind} {name!r} is of type {found}, expected {expected}; {rebuild}"
        if not _is_bindable(shape, spec.shape):
            wanted = tuple(-1 if size is None else size for size in spec.shape)
            yield f"{kind} {name!r} has shape {shape}, {wanted} is to be bound; {rebuild}"


def _is_bindable(engine_shape: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    """Return whether tensors of `shape` fit; -1 in the engine's takes any size."""
    return len(engine_shape) == len(shape) and all(
        built in (-1, size) for built, size in zip(engine_shape, shape, strict=True)
    )
