"""`TrtLlmEngine` over engine directories of the stand-ins' fake model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.block_copies import CopyBlocks, copy_blocks
from engines.engine_options import EngineOptions
from engines.manifest import hash_files, read_manifest, write_manifest
from engines.trtllm.engine import TrtLlmEngine
from engines.trtllm.engine_config import TrtLlmEngineConfig
from tests.trtllm.engine_spec import EngineSpec
from tests.trtllm.reference_engine import fake_spec, write_fake_engine


def make_options(**changes: Any) -> EngineOptions:
    limits: dict[str, Any] = {
        "device": "cpu",
        "num_device_blocks": 128,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
        "max_model_len": 256,
    }
    return EngineOptions(**limits | changes)


def make_config(**changes: Any) -> TrtLlmEngineConfig:
    """Return the configuration of `fake_spec`'s engine."""
    spec = fake_spec()
    values: dict[str, Any] = {
        "version": "1.2.1",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": 16,
        "num_layers": spec.num_layers,
        "num_attention_heads": 2,
        "num_kv_heads": 2,
        "head_size": spec.head_size,
        "kv_cache_dtype": "float32",
        "tokens_per_block": spec.tokens_per_block,
        "max_batch_size": spec.max_batch_size,
        "max_num_tokens": spec.max_num_tokens,
        "max_seq_len": spec.max_seq_len,
        "tp_size": 1,
        "pp_size": 1,
    }
    return TrtLlmEngineConfig(**values | changes)


def write_engine(directory: Path, spec: EngineSpec | None = None) -> Path:
    """Write an engine directory of the fake model into a new folder."""
    engine_dir = directory / "engine"
    engine_dir.mkdir()
    return write_fake_engine(engine_dir, spec or fake_spec())


def fake_engine(
    directory: Path,
    spec: EngineSpec | None = None,
    *,
    copy_blocks: CopyBlocks = copy_blocks,
    **options: Any,
) -> TrtLlmEngine:
    """Return an engine over a new directory; the stand-ins must be importable."""
    engine_dir = write_engine(directory, spec)
    return TrtLlmEngine(engine_dir, make_options(**options), copy_blocks=copy_blocks)


def sign(engine_dir: Path) -> None:
    """Write the checksums of what the directory holds now into its manifest."""
    manifest = read_manifest(engine_dir, verify_files=False)
    files = hash_files(engine_dir, manifest.files)
    write_manifest(engine_dir, replace(manifest, files=files))
