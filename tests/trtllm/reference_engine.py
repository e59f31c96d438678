"""Makes engine directories as `trtllm-build` and `proserve build` leave them, whose `rankN.engine`
the stand-ins run.

    python -m tests.trtllm.reference_engine OUT

writes one of the real small model. The stand-ins are on the path of a process with

    PYTHONPATH=.:tests/trtllm/stand_ins
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from build_scripts.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from engines.manifest import EngineManifest, hash_files, read_manifest, write_manifest
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.weights import read_config, read_tensors
from tests.engine_dirs import smollm2_engine_dir
from tests.engines.tiny_llama import make_manifest
from tests.tiny_tokenizer import write_tiny_tokenizer
from tests.trtllm.engine_config_json import engine_config_json
from tests.trtllm.engine_spec import VERSION, EngineSpec, engine_bytes

MAX_BATCH_SIZE = 64
MAX_NUM_TOKENS = 2048


def llama_spec(
    config: LlamaConfig,
    *,
    tokens_per_block: int,
    max_batch_size: int = MAX_BATCH_SIZE,
    max_num_tokens: int = MAX_NUM_TOKENS,
    max_seq_len: int | None = None,
) -> EngineSpec:
    """Return an engine of a whole Llama in float32; `max_seq_len` is the model's if not given."""
    return EngineSpec(
        kind="llama",
        num_layers=config.num_hidden_layers,
        num_kv_heads_per_rank=config.num_key_value_heads,
        head_size=config.head_dim,
        vocab_size=config.vocab_size,
        tokens_per_block=tokens_per_block,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len or config.max_position_embeddings,
        model=config.to_dict(),
    )


def fake_spec(
    *,
    num_layers: int = 3,
    num_kv_heads_per_rank: int = 2,
    head_size: int = 8,
    vocab_size: int = 512,
    tokens_per_block: int = 4,
    max_batch_size: int = 16,
    max_num_tokens: int = 256,
    max_seq_len: int = 256,
    dtype: str = "float32",
    tp_size: int = 1,
) -> EngineSpec:
    """Return a small engine without a model; `dataclasses.replace` changes the rest of it."""
    return EngineSpec(
        kind="fake",
        num_layers=num_layers,
        num_kv_heads_per_rank=num_kv_heads_per_rank,
        head_size=head_size,
        vocab_size=vocab_size,
        tokens_per_block=tokens_per_block,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        dtype=dtype,
        kv_cache_dtype=dtype,
        tp_size=tp_size,
    )


def write_llama_engine(
    engine_dir: Path,
    source_dir: Path,
    *,
    tokens_per_block: int | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    max_num_tokens: int = MAX_NUM_TOKENS,
) -> Path:
    """Write the model of an engine directory of the embedded engine, and return `engine_dir`.

    `tokens_per_block` is the source's block size if not given.
    """
    source = read_manifest(source_dir)
    config = read_config(source_dir)
    spec = llama_spec(
        config,
        tokens_per_block=tokens_per_block or source.block_size_tokens,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=source.max_model_len,
    )
    engine_dir.mkdir(parents=True)
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        shutil.copyfile(source_dir / name, engine_dir / name)
    write_engine(engine_dir, [spec], source, read_tensors(source_dir))
    return engine_dir


def write_fake_engine(engine_dir: Path, spec: EngineSpec) -> Path:
    """Write an engine without a model, one file per rank, and return `engine_dir`.

    The tokenizer is tiny, and every request runs to its `max_tokens`: nothing ends a text.
    """
    write_tiny_tokenizer(engine_dir)
    specs = [replace(spec, rank=rank) for rank in range(spec.tp_size)]
    manifest = make_manifest(vocab_size=spec.vocab_size, eos_token_ids=())
    write_engine(engine_dir, specs, manifest)
    return engine_dir


def write_engine(
    engine_dir: Path,
    specs: Sequence[EngineSpec],
    manifest: EngineManifest,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the engine of every rank into a folder, TensorRT-LLM's configuration, and a manifest
    that tells the engine's sizes and all files that are there, and is like `manifest` otherwise."""
    config = json.dumps(_config_json(specs[0]), indent=4)
    (engine_dir / "config.json").write_text(config, encoding="utf-8")
    for spec in specs:
        (engine_dir / f"rank{spec.rank}.engine").write_bytes(engine_bytes(spec, tensors))
    write_manifest(
        engine_dir,
        replace(
            manifest,
            block_size_tokens=specs[0].tokens_per_block,
            max_model_len=specs[0].max_seq_len,
            created_with={"tensorrt_llm": VERSION, "torch": torch.__version__},
            files=hash_files(engine_dir, sorted(path.name for path in engine_dir.iterdir())),
        ),
    )


def _config_json(spec: EngineSpec) -> dict[str, object]:
    """Return what `trtllm-build` would write of such an engine."""
    model = spec.model or {}
    num_kv_heads = spec.num_kv_heads_per_rank * spec.tp_size
    num_heads = model.get("num_attention_heads", num_kv_heads)
    kv_algorithm = {"fp8": "FP8", "int8": "INT8"}.get(spec.kv_cache_dtype)
    is_fp8 = kv_algorithm == "FP8"
    return engine_config_json(
        model={
            "dtype": spec.dtype,
            "logits_dtype": spec.logits_dtype,
            "vocab_size": spec.vocab_size,
            "hidden_size": model.get("hidden_size", num_heads * spec.head_size),
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_size": spec.head_size,
            "max_position_embeddings": spec.max_seq_len,
            "rotary_base": model.get("rope_theta", 10_000.0),
            "rotary_scaling": None,
            "intermediate_size": model.get("intermediate_size", 4 * num_heads * spec.head_size),
            "mapping": {"world_size": spec.tp_size, "tp_size": spec.tp_size},
            "quantization": {
                # Attention over an FP8 KV cache needs FP8 weights.
                "quant_algo": "FP8" if is_fp8 else None,
                "kv_cache_quant_algo": kv_algorithm,
            },
        },
        build={
            "max_seq_len": spec.max_seq_len,
            "max_batch_size": spec.max_batch_size,
            "max_num_tokens": spec.max_num_tokens,
            "plugin_config": {
                "dtype": spec.dtype,
                "gemm_plugin": spec.dtype,
                "tokens_per_block": spec.tokens_per_block,
                "use_paged_context_fmha": spec.use_paged_context_fmha,
                "use_fp8_context_fmha": is_fp8,
            },
        },
    )


def main() -> None:
    """Write the real small model as a reference engine directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="engine directory to write; must not exist")
    write_llama_engine(parser.parse_args().out, smollm2_engine_dir())


if __name__ == "__main__":
    main()
