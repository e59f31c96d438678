from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engines.trtllm.engine_config import (
    TrtLlmEngineConfig,
    check_limits,
    read_engine_config,
)
from orchestrator.core.errors import ConfigError, EngineDirectoryError
from tests.trtllm.engine_config_json import engine_config_json, write_engine_dir

FP8_WEIGHTS = {"quant_algo": "FP8", "kv_cache_quant_algo": None}
FP8_KV = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
FP8_BOTH = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}


def plugins(**changes: object) -> dict[str, Any]:
    return {"plugin_config": changes}


def read(tmp_path: Path, **sections: dict[str, Any]) -> TrtLlmEngineConfig:
    write_engine_dir(tmp_path, engine_config_json(**sections))
    return read_engine_config(tmp_path)


def refusal(engine_dir: Path) -> str:
    with pytest.raises(EngineDirectoryError) as error:
        read_engine_config(engine_dir)
    return str(error.value)


def test_a_good_directory_is_read(tmp_path: Path) -> None:
    config = read(tmp_path)

    assert config == TrtLlmEngineConfig(
        version="1.2.1",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        logits_dtype="float32",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        num_kv_heads=8,
        head_size=128,
        kv_cache_dtype="bfloat16",
        tokens_per_block=32,
        max_batch_size=256,
        max_num_tokens=8192,
        max_seq_len=8192,
        tp_size=1,
        pp_size=1,
    )
    assert config.max_blocks_per_seq == 256
    assert config.vocab_size_padded == 128256
    assert config.num_kv_heads_per_rank() == 8


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": FP8_WEIGHTS}},
        {"model": {"quantization": FP8_BOTH}, "build": plugins(use_fp8_context_fmha=True)},
        {"model": {"runtime_defaults": {"max_attention_window": [8192], "sink_token_length": 0}}},
        {"build": plugins(gpt_attention_plugin="bfloat16", multiple_profiles=None)},
        {"build": {"speculative_decoding_mode": "NONE"}},
    ],
    ids=["fp8 weights", "fp8 weights and KV", "window of full length", "dtype named", "mode named"],
)
def test_other_good_directories_are_read(tmp_path: Path, sections: dict[str, Any]) -> None:
    read(tmp_path, **sections)


def test_a_local_suffix_of_the_version_is_kept(tmp_path: Path) -> None:
    write_engine_dir(tmp_path, engine_config_json() | {"version": "1.2.1+reference"})

    assert read_engine_config(tmp_path).version == "1.2.1+reference"


def test_sizes_over_several_ranks(tmp_path: Path) -> None:
    """8 KV heads on 16 ranks: one each, copied. 128,251 tokens in 16 columns of 8,016."""
    config = read(
        tmp_path,
        model={"mapping": {"tp_size": 16, "world_size": 16}, "vocab_size": 128251},
        build={"max_seq_len": 1000},
    )

    assert config.num_kv_heads_per_rank() == 1
    assert config.vocab_size_padded == 128256
    assert config.max_blocks_per_seq == 32


@pytest.mark.parametrize(("kv_quantisation", "dtype"), [("FP8", "fp8"), ("INT8", "int8")])
def test_a_quantised_kv_cache_is_named(tmp_path: Path, kv_quantisation: str, dtype: str) -> None:
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": kv_quantisation}
    config = read(
        tmp_path,
        model={"quantization": quantization},
        build=plugins(use_fp8_context_fmha=True),
    )

    assert config.kv_cache_dtype == dtype


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no attention plugin": (
        {"build": plugins(gpt_attention_plugin=None)},
        "build_config.plugin_config.gpt_attention_plugin is off, but only that plugin reads paged "
        "KV blocks; rebuild with `plugins: {gpt_attention_plugin: auto}`",
    ),
    "no paged KV cache": (
        {"build": {"kv_cache_type": "CONTINUOUS"}},
        'build_config.kv_cache_type is "CONTINUOUS", but the scheduler gives out and takes back '
        "attention memory in blocks; rebuild with `plugins: {kv_cache_type: paged}`",
    ),
    "KV cache type not written": (
        {"build": {"kv_cache_type": None}},
        "build_config.kv_cache_type is missing, but the scheduler gives out and takes back "
        "attention memory in blocks; rebuild with `plugins: {kv_cache_type: paged}`",
    ),
    "padded input": (
        {"build": plugins(remove_input_padding=False)},
        "build_config.plugin_config.remove_input_padding is false, but requests of different "
        "lengths share a step; rebuild with `plugins: {remove_input_padding: enable}`",
    ),
    "no fused context attention": (
        {"build": plugins(context_fmha=False)},
        "build_config.plugin_config.context_fmha is false, but chunked prefill runs on fused "
        "attention; rebuild with `plugins: {context_fmha: enable}`",
    ),
    "no paged context attention": (
        {"build": plugins(use_paged_context_fmha=False)},
        "build_config.plugin_config.use_paged_context_fmha is false, but chunked prefill needs "
        "it; rebuild with `plugins: {use_paged_context_fmha: enable}`",
    ),
    "fp8 trap": (
        {
            "model": {"quantization": FP8_KV},
            "build": plugins(use_paged_context_fmha=False),
        },
        "the KV cache is FP8 and the weights are not quantised: trtllm-build then turns "
        "use_paged_context_fmha off, which chunked prefill needs; rebuild with `checkpoint: "
        "{quantization: fp8, kv_cache_dtype: fp8}`, or without kv_cache_dtype",
    ),
    "fp8 trap with other weights": (
        {
            "model": {"quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8"}},
            "build": plugins(use_paged_context_fmha=False),
        },
        "the KV cache is FP8 and the weights are W4A16_AWQ: trtllm-build then turns "
        "use_paged_context_fmha off, which chunked prefill needs; rebuild with `checkpoint: "
        "{quantization: fp8, kv_cache_dtype: fp8}`, or without kv_cache_dtype",
    ),
    "fp8 on an old GPU": (
        {
            "model": {"quantization": FP8_BOTH},
            "build": plugins(use_paged_context_fmha=False, use_fp8_context_fmha=False),
        },
        "build_config.plugin_config.use_fp8_context_fmha is off, but attention over an FP8 KV "
        "cache needs it, and a GPU of compute capability 8.9 or later; build on such a GPU with "
        "`plugins: {use_fp8_context_fmha: enable}`, or without quantization and kv_cache_dtype",
    ),
    "int8 KV cache": (
        {
            "model": {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "INT8"}},
            "build": plugins(use_paged_context_fmha=False),
        },
        "build_config.plugin_config.use_paged_context_fmha is false, but chunked prefill needs "
        "it, and trtllm-build turns it off for an INT8 KV cache; rebuild without INT8, or with "
        "`checkpoint: {quantization: fp8, kv_cache_dtype: fp8}`",
    ),
    "several profiles": (
        {"build": plugins(multiple_profiles=True)},
        "build_config.plugin_config.multiple_profiles is true, but serving uses one optimization "
        "profile, which then covers small steps only; rebuild with `plugins: {multiple_profiles: "
        "disable}`",
    ),
    "streamingllm": (
        {"build": plugins(streamingllm=True)},
        "build_config.plugin_config.streamingllm is true, but it drops the middle of long "
        "contexts and turns paged context attention off; rebuild with `plugins: {streamingllm: "
        "disable}`",
    ),
    "beams": (
        {"build": {"max_beam_width": 4}},
        "build_config.max_beam_width is 4, but beams share KV blocks, which serving does not do; "
        "rebuild with no --max_beam_width over 1: no recipe passes it",
    ),
    "context logits": (
        {"build": {"gather_context_logits": True}},
        "build_config.gather_context_logits is true, but it removes the input that picks each "
        "request's last token; rebuild with no --gather_context_logits: no recipe passes it",
    ),
    "LoRA": (
        {"build": plugins(lora_plugin="bfloat16")},
        'build_config.plugin_config.lora_plugin is "bfloat16", but LoRA adapters are not '
        "supported; rebuild with no --lora_plugin: no recipe passes it",
    ),
    "speculative decoding": (
        {"build": {"speculative_decoding_mode": 2}},
        "build_config.speculative_decoding_mode is 2, but speculative decoding is not supported; "
        "rebuild with no --speculative_decoding_mode: no recipe passes it",
    ),
    "draft tokens": (
        {"build": {"max_draft_len": 5}},
        "build_config.max_draft_len is 5, but speculative decoding is not supported; rebuild "
        "with no --max_draft_len: no recipe passes it",
    ),
    "prompt table": (
        {"build": {"max_prompt_embedding_table_size": 1024}},
        "build_config.max_prompt_embedding_table_size is 1024, but prompt tuning and multimodal "
        "input are not supported; rebuild with no --max_prompt_embedding_table_size: no recipe "
        "passes it",
    ),
    "mrope": (
        {"build": {"use_mrope": True}},
        "build_config.use_mrope is true, but multimodal position embeddings are not supported; "
        "rebuild with no multimodal model: no recipe passes it",
    ),
    "weights left out": (
        {"build": {"use_strip_plan": True}},
        "build_config.use_strip_plan is true, but an engine without its weights cannot run; "
        "rebuild with no --strip_plan: no recipe passes it",
    ),
    "weights streamed": (
        {"build": {"weight_streaming": True}},
        "build_config.weight_streaming is true, but weights that stay in host memory would take "
        "the link from KV copies; rebuild with no --weight_streaming: no recipe passes it",
    ),
    "all-reduce inputs": (
        {"build": plugins(gemm_allreduce_plugin="bfloat16")},
        'build_config.plugin_config.gemm_allreduce_plugin is "bfloat16", but it adds engine '
        "inputs that serving does not fill; rebuild with no --gemm_allreduce_plugin: no recipe "
        "passes it",
    ),
    "user buffers": (
        {"build": plugins(user_buffer=True)},
        "build_config.plugin_config.user_buffer is true, but serving registers no user buffers; "
        "rebuild with no --user_buffer: no recipe passes it",
    ),
    "pipeline parallel": (
        {"model": {"mapping": {"pp_size": 2, "world_size": 2}}},
        "pretrained_config.mapping.pp_size is 2, pipeline parallelism is not supported; rebuild "
        "with `checkpoint: {pp_size: 1, tp_size: ...}`",
    ),
    "context parallel": (
        {"model": {"mapping": {"cp_size": 2, "world_size": 2}}},
        "pretrained_config.mapping.cp_size is 2, but context parallelism is not supported; "
        "rebuild with `checkpoint: {tp_size: ...}` alone",
    ),
    "KV heads cannot be divided": (
        {"model": {"num_key_value_heads": 6, "mapping": {"tp_size": 4, "world_size": 4}}},
        "6 KV heads can neither be divided over tp_size 4 nor copied evenly; rebuild with a "
        "`checkpoint: {tp_size: ...}` that is a divisor or a multiple of them",
    ),
    "heads cannot be divided": (
        {"model": {"num_attention_heads": 30, "mapping": {"tp_size": 4, "world_size": 4}}},
        "30 attention heads cannot be divided over tp_size 4; rebuild with a `checkpoint: "
        "{tp_size: ...}` that divides them",
    ),
    "odd blocks": (
        {"build": plugins(tokens_per_block=48)},
        "build_config.plugin_config.tokens_per_block is 48, it must be a power of two; rebuild "
        "with `plugins: {tokens_per_block: 32}`",
    ),
    "tables too large": (
        {"build": {"max_batch_size": 2**20, "max_seq_len": 2**20}},
        "the block tables of max_batch_size 1,048,576 requests with 32,768 blocks each are too "
        "large to be indexed by 32 bits; rebuild with a smaller `limits: {max_batch_size: ...}` "
        "or larger `plugins: {tokens_per_block: ...}`",
    ),
    "short windows": (
        {"model": {"runtime_defaults": {"max_attention_window": [4096, 8192]}}},
        "pretrained_config.runtime_defaults.max_attention_window has 4096, max_seq_len is 8192, "
        "but layers that forget are not supported; rebuild with `limits: {max_seq_len: 4096}`",
    ),
    "malformed windows": (
        {"model": {"runtime_defaults": {"max_attention_window": 4096}}},
        "pretrained_config.runtime_defaults.max_attention_window is 4096, it must be a list of "
        "integers",
    ),
    "attention sinks": (
        {"model": {"runtime_defaults": {"sink_token_length": 4}}},
        "pretrained_config.runtime_defaults.sink_token_length is 4, but attention sinks are not "
        "supported; rebuild with a model that has none",
    ),
    "a number for a flag": (
        {"build": plugins(remove_input_padding=1)},
        "build_config.plugin_config.remove_input_padding is 1, but requests of different lengths "
        "share a step; rebuild with `plugins: {remove_input_padding: enable}`",
    ),
    "no dtype": (
        {"model": {"dtype": None}},
        "pretrained_config.dtype is missing, it must be float16 or bfloat16 or float32; rebuild "
        "the directory with `proserve build`",
    ),
    "unknown KV cache": (
        {"model": {"quantization": {"kv_cache_quant_algo": "NVFP4"}}},
        'pretrained_config.quantization.kv_cache_quant_algo is "NVFP4", it must be FP8 or INT8; '
        "rebuild the directory with `proserve build`",
    ),
    "no limit": (
        {"build": {"max_num_tokens": 0}},
        "build_config.max_num_tokens is 0, it must be a positive integer; rebuild the directory "
        "with `proserve build`",
    ),
    "a limit in words": (
        {"build": {"max_seq_len": "8192"}},
        'build_config.max_seq_len is "8192", it must be a positive integer; rebuild the '
        "directory with `proserve build`",
    ),
}


@pytest.mark.parametrize(("sections", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_wrong_engine_is_refused_with_the_one_exact_reason(
    tmp_path: Path, sections: dict[str, Any], reason: str
) -> None:
    write_engine_dir(tmp_path, engine_config_json(**sections))

    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: {reason}"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """A rebuild takes an hour, so one look must be enough."""
    config = engine_config_json(
        model={"mapping": {"pp_size": 2}},
        build={"max_beam_width": 2} | plugins(streamingllm=True),
    )
    write_engine_dir(tmp_path, config)

    lines = refusal(tmp_path).splitlines()
    assert len(lines) == 4
    words = (
        "pp_size is 2",
        "streamingllm is true",
        "max_beam_width is 2",
        "rank1.engine: is missing",
    )
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize("version", ["0.17.0.post1", "1.2.0", "1.3.0rc20", "1.2.10", None])
def test_another_version_is_refused(tmp_path: Path, version: str | None) -> None:
    write_engine_dir(tmp_path, engine_config_json() | {"version": version})

    assert refusal(tmp_path) == (
        f"{tmp_path / 'config.json'}: the engine was built by TensorRT-LLM {version}, serving "
        "needs 1.2.1: an engine runs only under the release that built it, and 1.2.1 is the last "
        "stable one that runs prebuilt engines; install tensorrt-llm==1.2.1 and rebuild with "
        "`proserve build`"
    )


@pytest.mark.parametrize(
    ("damage", "found"), [(Path.unlink, "is missing"), (lambda p: p.write_bytes(b""), "is empty")]
)
def test_an_incomplete_set_of_ranks_is_refused(tmp_path: Path, damage: Any, found: str) -> None:
    config = engine_config_json(model={"mapping": {"tp_size": 2, "world_size": 2}})
    write_engine_dir(tmp_path, config)
    damage(tmp_path / "rank1.engine")

    assert refusal(tmp_path) == (
        f"{tmp_path / 'rank1.engine'}: {found}, the engine has 2 (`checkpoint: {{tp_size: 2}}`); "
        "the build did not finish, run `proserve build` again"
    )


def test_weights_outside_the_engine_are_refused(tmp_path: Path) -> None:
    write_engine_dir(tmp_path, engine_config_json())
    (tmp_path / "rank0_managed_weights.safetensors").touch()

    assert "rebuild without `--fast_build`" in refusal(tmp_path)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == (
        f"{tmp_path / 'nowhere'}: no such engine directory; build one with `proserve build`"
    )


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json: is missing; the build did not finish" in refusal(tmp_path)


def test_a_truncated_config_is_refused(tmp_path: Path) -> None:
    write_engine_dir(tmp_path, engine_config_json())
    path = tmp_path / "config.json"
    path.write_bytes(path.read_bytes()[:200])

    assert re.search(
        r"config\.json: cannot be read: .* line \d+ column \d+ .*; rebuild", refusal(tmp_path)
    )


@pytest.mark.parametrize("text", ["[]", '{"architectures": ["LlamaForCausalLM"]}', "1"])
def test_the_config_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    assert "has no section 'pretrained_config'" in refusal(tmp_path)


def test_limits_within_the_engines_are_accepted(tmp_path: Path) -> None:
    check_limits(read(tmp_path), max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=8192)


def test_limits_over_the_engines_are_refused_with_both_numbers(tmp_path: Path) -> None:
    config = read(tmp_path)

    with pytest.raises(ConfigError) as error:
        check_limits(config, max_num_batched_tokens=8193, max_num_seqs=512, max_model_len=9000)

    assert str(error.value).splitlines() == [
        "max_num_batched_tokens is 8,193, the engine was built with max_num_tokens 8,192; lower "
        "max_num_batched_tokens in the node's YAML, or rebuild with `limits: {max_num_tokens: "
        "8193}` in the recipe",
        "max_num_seqs is 512, the engine was built with max_batch_size 256; lower max_num_seqs "
        "in the node's YAML, or rebuild with `limits: {max_batch_size: 512}` in the recipe",
        "max_model_len is 9,000, the engine was built with max_seq_len 8,192; lower "
        "max_model_len in the node's YAML, or rebuild with `limits: {max_seq_len: 9000}` in the "
        "recipe",
    ]
