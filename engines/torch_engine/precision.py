"""What the embedded engine can compute in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from engines.torch_engine import cpu_library
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.cpu_weights import GROUP_INPUTS

Dtype = Literal["float32", "bfloat16", "int8"]

KV_DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.bfloat16,
}
"""What the KV cache holds."""


def resolve_dtype(
    dtype: Dtype | Literal["auto"], *, device: Literal["cpu", "cuda"], config: LlamaConfig
) -> Dtype:
    """Return what `auto` stands for on this machine: bfloat16 on CUDA; on the CPU int8 if it can
    be computed, else float32."""
    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bfloat16"
    return "float32" if int8_obstacle(config) else "int8"


def int8_obstacle(config: LlamaConfig) -> str | None:
    """Return why this machine cannot compute a model in int8; None if it can."""
    for name, size, factor in (
        ("hidden_size", config.hidden_size, GROUP_INPUTS),
        ("intermediate_size", config.intermediate_size, GROUP_INPUTS),
        ("the size of all query heads", config.query_size, GROUP_INPUTS),
        ("head_dim", config.head_dim, cpu_library.NUM_LANES),
    ):
        if size % factor:
            return f"the model's {name} is {size}, not a multiple of {factor}"
    return cpu_library.obstacle()
