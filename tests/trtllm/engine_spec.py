"""What a stand-in engine is, and the bytes of its `rankN.engine`.

16 bytes    magic
8 bytes     length of the JSON, little endian
JSON        `EngineSpec`
safetensors the weights, of a `llama` only
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

MAGIC = b"PROSERVE-STANDIN"
VERSION = "1.2.1+reference"
"""Of the stand-in packages."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.int8,  # the pool's element is one byte; TensorRT-LLM has int8 stand in for it too
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Sizes of one rank's engine; names as in TensorRT-LLM's `config.json`."""

    kind: Literal["fake", "llama"]
    num_layers: int
    num_kv_heads_per_rank: int
    head_size: int
    vocab_size: int
    tokens_per_block: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    dtype: str = "float32"
    logits_dtype: str = "float32"
    kv_cache_dtype: str = "float32"
    tp_size: int = 1
    rank: int = 0
    use_paged_context_fmha: bool = True
    has_position_ids: bool = True
    """Whether the engine takes `position_ids`; not every model's does."""

    model: Mapping[str, Any] | None = None
    """Of a `llama`: the model, as Hugging Face's `config.json` says it."""

    @property
    def max_blocks_per_seq(self) -> int:
        """Length of a block table."""
        return -(-self.max_seq_len // self.tokens_per_block)

    @property
    def vocab_size_padded(self) -> int:
        """Columns of the logits."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size

    @property
    def row_bytes(self) -> int:
        """One token's K or V of one layer and head."""
        return self.head_size * TORCH_DTYPES[self.kv_cache_dtype].itemsize

    @property
    def bytes_per_block(self) -> int:
        """K or V of one layer in one block, as in `engine_io.kv_pool`."""
        return self.tokens_per_block * self.num_kv_heads_per_rank * self.row_bytes


def engine_bytes(spec: EngineSpec, tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """Return the engine file; `tensors` are a llama's weights by their Hugging Face names."""
    from safetensors.torch import save

    header = json.dumps(asdict(spec)).encode()
    weights = save(dict(tensors)) if tensors is not None else b""
    return MAGIC + len(header).to_bytes(8, "little") + header + weights


def is_engine(content: bytes) -> bool:
    """Return whether these are `engine_bytes`."""
    return content.startswith(MAGIC)


def parse_engine(content: bytes) -> tuple[EngineSpec, dict[str, torch.Tensor]]:
    """Return what `engine_bytes` was given to make this."""
    from safetensors.torch import load

    start = len(MAGIC) + 8
    end = start + int.from_bytes(content[len(MAGIC) : start], "little")
    spec = EngineSpec(**json.loads(content[start:end]))
    weights = content[end:]
    return spec, load(weights) if weights else {}
