"""Weights of the decoder: Hugging Face names in, fused matrices out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.torch_engine.config import LlamaConfig
from orchestrator.core.errors import EngineDirectoryError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are (outputs, inputs), as `F.linear` takes them."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """Rows of q, then k, then v: one matrix product in place of three."""

    attention_output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    """Rows of gate, then up."""

    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model, on its device and in its dtype."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor
    """The embedding itself where the model ties them."""


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this model holds."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (config.query_size, hidden),
            f"{prefix}self_attn.k_proj.weight": (config.key_value_size, hidden),
            f"{prefix}self_attn.v_proj.weight": (config.key_value_size, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, config.query_size),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def fuse_weights(
    config: LlamaConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderWeights:
    """Return the model's weights; nothing of `tensors` is kept.

    Raises:
        EngineDirectoryError: a tensor is missing, unknown, or of another shape.
    """
    shapes = tensor_shapes(config)
    if tensors.keys() != shapes.keys():
        wrong = ", ".join(sorted(tensors.keys() ^ shapes.keys())[:5])
        raise EngineDirectoryError(
            f"{WEIGHTS_FILE}: tensors missing or not part of the model of {CONFIG_FILE}: {wrong}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise EngineDirectoryError(
                f"{WEIGHTS_FILE}: {name} has shape {tuple(tensors[name].shape)}, "
                f"{CONFIG_FILE} asks for {shape}"
            )

    def take(*names: str) -> torch.Tensor:
        parts = [tensors[name].to(device=device, dtype=dtype) for name in names]
        # `cat` copies, so that no weight stays a view of the file.
        return torch.cat(parts)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return LayerWeights(
            input_norm=take(f"{prefix}input_layernorm.weight"),
            qkv=take(*(f"{attention}{name}_proj.weight" for name in "qkv")),
            attention_output=take(f"{attention}o_proj.weight"),
            mlp_norm=take(f"{prefix}post_attention_layernorm.weight"),
            gate_up=take(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
            down=take(f"{mlp}down_proj.weight"),
        )

    embedding = take("model.embed_tokens.weight")
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        final_norm=take("model.norm.weight"),
        lm_head=embedding if config.tie_word_embeddings else take("lm_head.weight"),
    )


def read_config(engine_dir: Path) -> LlamaConfig:
    """Return the architecture in an engine directory.

    Raises:
        EngineDirectoryError: the file is missing, not JSON, or not a model we run.
    """
    path = engine_dir / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineDirectoryError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise EngineDirectoryError(f"{path}: holds {type(values).__name__}, not an object")
    return LlamaConfig.from_dict(values)


def read_tensors(engine_dir: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in an engine directory, backed by the file until copied.

    Raises:
        EngineDirectoryError: the file is missing or not in safetensors format.
    """
    # Imported here because a machine that runs synthetic weights does not have it.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = engine_dir / WEIGHTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EngineDirectoryError(f"{path}: cannot be read: {error}") from error
