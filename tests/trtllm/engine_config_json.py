"""The `config.json` that `trtllm-build` writes, for a Llama of any size.

Keys and their order follow files that builds of 0.17 and later wrote; the values are Llama-3.1-8B's
unless asked otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def engine_config_json(
    *, model: dict[str, Any] | None = None, build: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of a configuration that can be served.

    `model` and `build` replace values of the two sections, one level below their own objects too:
    `model={"mapping": {"tp_size": 2}}` leaves the rest of the mapping as it is.
    """
    return {
        "version": "1.2.1",
        "pretrained_config": _replaced(_pretrained_config(), model or {}),
        "build_config": _replaced(_build_config(), build or {}),
    }


def write_engine_dir(engine_dir: Path, config: dict[str, Any]) -> None:
    """Write an engine directory with a file per rank; what is in those is no engine."""
    engine_dir.mkdir(parents=True, exist_ok=True)
    (engine_dir / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    for rank in range(config["pretrained_config"]["mapping"]["world_size"]):
        (engine_dir / f"rank{rank}.engine").write_bytes(b"not an engine")


def _replaced(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        old = values.get(key)
        merged[key] = old | change if isinstance(old, dict) and isinstance(change, dict) else change
    return merged


def _pretrained_config() -> dict[str, Any]:
    return {
        "mlp_bias": False,
        "attn_bias": False,
        "rotary_base": 500000.0,
        "rotary_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1},
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "logits_dtype": "float32",
        "norm_epsilon": 1e-05,
        "runtime_defaults": None,
        "position_embedding_type": "rope_gpt_neox",
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mapping": {
            "world_size": 1,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": 1,
            "pp_size": 1,
            "moe_tp_size": 1,
            "moe_ep_size": 1,
        },
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "clamp_val": None,
            "exclude_modules": None,
        },
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "head_size": 128,
        "qk_layernorm": False,
    }


def _build_config() -> dict[str, Any]:
    return {
        "max_input_len": 1024,
        "max_seq_len": 8192,
        "opt_batch_size": 8,
        "max_batch_size": 256,
        "max_beam_width": 1,
        "max_num_tokens": 8192,
        "opt_num_tokens": 256,
        "max_prompt_embedding_table_size": 0,
        "kv_cache_type": "PAGED",
        "gather_context_logits": False,
        "gather_generation_logits": False,
        "strongly_typed": True,
        "force_num_profiles": None,
        "profiling_verbosity": "layer_names_only",
        "enable_debug_output": False,
        "max_draft_len": 0,
        "speculative_decoding_mode": 1,
        "use_refit": False,
        "input_timing_cache": None,
        "output_timing_cache": "model.cache",
        "lora_config": {
            "lora_dir": [],
            "lora_ckpt_source": "hf",
            "max_lora_rank": 64,
            "lora_target_modules": [],
            "trtllm_modules_to_hf_modules": {},
        },
        "weight_sparsity": False,
        "weight_streaming": False,
        "plugin_config": {
            "dtype": "bfloat16",
            "bert_attention_plugin": "auto",
            "gpt_attention_plugin": "auto",
            "gemm_plugin": "bfloat16",
            "gemm_swiglu_plugin": None,
            "fp8_rowwise_gemm_plugin": None,
            "nccl_plugin": None,
            "lora_plugin": None,
            "moe_plugin": "auto",
            "low_latency_gemm_plugin": None,
            "gemm_allreduce_plugin": None,
            "context_fmha": True,
            "paged_kv_cache": True,
            "remove_input_padding": True,
            "norm_quant_fusion": False,
            "reduce_fusion": False,
            "user_buffer": False,
            "tokens_per_block": 32,
            "use_paged_context_fmha": True,
            "use_fp8_context_fmha": False,
            "fuse_fp4_quant": False,
            "multiple_profiles": False,
            "paged_state": True,
            "streamingllm": False,
            "use_fused_mlp": True,
            "pp_reduce_scatter": False,
        },
        "use_strip_plan": False,
        "max_encoder_input_len": 1024,
        "monitor_memory": False,
        "use_mrope": False,
    }
