"""A TensorRT-LLM engine directory that a node accepts, but for the engine in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.manifest import EngineManifest, ProfileConditions, hash_files, write_manifest
from tests.factories import make_copy_profile, make_profile
from tests.trtllm.engine_config_json import engine_config_json, write_engine_dir

BLOCK_SIZE_TOKENS = 16
BLOCK_BYTES = 2048
"""2 layers, K and V, 16 tokens, 2 KV heads of 4 float32 channels: 2 * 2 * 16 * 2 * 4 * 4."""

MAX_SEQ_LEN = 4096


def write_served_engine_dir(engine_dir: Path, *, model: dict[str, Any] | None = None) -> Path:
    """Write the directory with its manifest and return it; `model` changes pretrained_config."""
    shape = {
        "dtype": "float32",
        "vocab_size": 1000,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 4,
    }
    build = {"max_seq_len": MAX_SEQ_LEN, "plugin_config": {"tokens_per_block": BLOCK_SIZE_TOKENS}}
    config = engine_config_json(model=shape | (model or {}), build=build)
    write_engine_dir(engine_dir, config)
    manifest = EngineManifest(
        model_name="fake",
        block_size_tokens=BLOCK_SIZE_TOKENS,
        max_model_len=MAX_SEQ_LEN,
        vocab_size=1000,
        bos_token_id=None,
        eos_token_ids=(),
        weight_precision="none",
        created_with={},
        build_hash="0" * 64,
        files=hash_files(engine_dir, sorted(path.name for path in engine_dir.iterdir())),
        latency_profile=make_profile(),
        copy_profile=make_copy_profile(),
        profile_conditions=ProfileConditions(
            device="cuda",
            dtype="float32",
            num_threads=1,
            hardware="none",
            torch_version="none",
            num_samples=1,
            mean_absolute_percentage_error=0.0,
            held_out_percentage_error=0.0,
        ),
    )
    write_manifest(engine_dir, manifest)
    return engine_dir
