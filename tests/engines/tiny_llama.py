"""A Llama of two layers with random weights, for tests that need no language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.block_copies import CopyBlocks
from engines.manifest import EngineManifest, ProfileConditions, hash_files, write_manifest
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.weights import tensor_shapes
from orchestrator.grammars import GrammarCompiler
from tests.factories import make_copy_profile, make_profile

BLOCK_SIZE_TOKENS = 4


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**sizes | changes)


def int8_config(**changes: Any) -> LlamaConfig:
    """The tiny model in sizes that the CPU kernels take: whole groups of 32 inputs, and heads of
    16 numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    return tiny_config(**sizes | changes)


def tiny_tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Wide enough that the most likely token leads by far more than rounding errors."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 1.0)
        for name, shape in tensor_shapes(config).items()
    }


def tiny_options(**changes: Any) -> TorchEngineOptions:
    limits: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "num_device_blocks": 128,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
        "max_model_len": 256,
        # Two threads on a model this small would mostly wait for each other.
        "num_threads": 1,
    }
    return TorchEngineOptions(**limits | changes)


def tiny_engine(
    config: LlamaConfig | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    grammars: GrammarCompiler | None = None,
    copy_blocks: CopyBlocks | None = None,
    **options: Any,
) -> TorchEngine:
    config = config or tiny_config()
    return TorchEngine(
        config,
        tiny_tensors(config) if tensors is None else tensors,
        tiny_options(**options),
        block_size_tokens=BLOCK_SIZE_TOKENS,
        grammars=grammars,
        copy_blocks=copy_blocks,
    )


def write_tiny_engine_dir(engine_dir: Path, config: LlamaConfig | None = None) -> EngineManifest:
    """Write a whole engine directory, but for the tokenizer, and return its manifest."""
    engine_dir.mkdir()
    config = config or tiny_config()
    (engine_dir / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tiny_tensors(config), engine_dir / "model.safetensors")
    manifest = make_manifest(
        files=hash_files(engine_dir, ["config.json", "model.safetensors"]),
    )
    write_manifest(engine_dir, manifest)
    return manifest


def make_manifest(**changes: Any) -> EngineManifest:
    values: dict[str, Any] = {
        "model_name": "tiny",
        "block_size_tokens": BLOCK_SIZE_TOKENS,
        "max_model_len": 128,
        "vocab_size": 97,
        "bos_token_id": None,
        "eos_token_ids": (2,),
        "weight_precision": "float32",
        "created_with": {"torch": torch.__version__},
        "build_hash": "0" * 64,
        "files": {},
        "latency_profile": make_profile(),
        "copy_profile": make_copy_profile(),
        "profile_conditions": ProfileConditions(
            device="cpu",
            dtype="float32",
            num_threads=1,
            hardware="none",
            torch_version=torch.__version__,
            num_samples=0,
            mean_absolute_percentage_error=0.0,
            held_out_percentage_error=0.0,
        ),
    }
    return EngineManifest(**values | changes)


def hugging_face_tokens(
    config: LlamaConfig,
    tensors: dict[str, torch.Tensor],
    prompt: list[int],
    num_tokens: int,
) -> list[int]:
    """Return what Hugging Face's Llama generates greedily, computing all anew for each token."""
    from transformers import LlamaConfig as HuggingFaceConfig
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(HuggingFaceConfig(**config.to_dict()))
    model.train(mode=False)
    if config.tie_word_embeddings:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors)
    token_ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(torch.tensor([token_ids])).logits[0, -1]
            token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt) :]
