"""What an engine must have been built with, so that it can be stepped with mixed batches over our
KV pool.

Source: the attention plugin's own checks and `tensorrt_llm/builder.py`, as recorded in
docs/tensorrt-llm.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_VERSION = "1.2.1"
"""Of TensorRT-LLM: the last stable release with the engine backend."""

_QUANTIZATION = "pretrained_config.quantization"
_PLUGINS = "build_config.plugin_config"
_FP8_FMHA_WEIGHTS = ("FP8", "W4A8_AWQ", "NVFP4")
"""Weights with which `trtllm-build` keeps FP8 context attention on."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One value of `config.json` that serving depends on."""

    key: str
    """Dotted, from the top of the file."""

    allowed: tuple[object, ...]
    """None among them: the key may be absent or null."""

    why: str
    fix: str
    """Line of the recipe, or option of `trtllm-build`, that gives an allowed value."""

    def problem(self, values: Mapping[str, Any]) -> str | None:
        """Return what is wrong in the file, or None."""
        value = value_at(values, self.key)
        # True equals 1 in Python; a flag must not pass for a number.
        if any(value == allowed and type(value) is type(allowed) for allowed in self.allowed):
            return None
        found = "missing" if value is None else json.dumps(value)
        return f"{self.key} is {found}, but {self.why}; rebuild with {self.fix}"


def _plugin_on(name: str, why: str) -> Rule:
    return Rule(f"{_PLUGINS}.{name}", (True,), why, f"`plugins: {{{name}: enable}}`")


def _never_passed(key: str, allowed: tuple[object, ...], why: str, flag: str) -> Rule:
    return Rule(key, allowed, why, f"no {flag}: no recipe passes it")


_RULES = (
    Rule(
        "build_config.kv_cache_type",
        ("PAGED",),
        "the scheduler gives out and takes back attention memory in blocks",
        "`plugins: {kv_cache_type: paged}`",
    ),
    _plugin_on("remove_input_padding", "requests of different lengths share a step"),
    _plugin_on("context_fmha", "chunked prefill runs on fused attention"),
    Rule(
        f"{_PLUGINS}.multiple_profiles",
        (False, None),
        "serving uses one optimization profile, which then covers small steps only",
        "`plugins: {multiple_profiles: disable}`",
    ),
    Rule(
        f"{_PLUGINS}.streamingllm",
        (False, None),
        "it drops the middle of long contexts and turns paged context attention off",
        "`plugins: {streamingllm: disable}`",
    ),
    _never_passed(
        "build_config.max_beam_width",
        (1,),
        "beams share KV blocks, which serving does not do",
        "--max_beam_width over 1",
    ),
    _never_passed(
        f"{_PLUGINS}.user_buffer",
        (False, None),
        "serving registers no user buffers",
        "--user_buffer",
    ),
    _never_passed(
        f"{_PLUGINS}.gemm_allreduce_plugin",
        (None,),
        "it adds engine inputs that serving does not fill",
        "--gemm_allreduce_plugin",
    ),
    _never_passed(
        "build_config.gather_context_logits",
        (False, None),
        "it removes the input that picks each request's last token",
        "--gather_context_logits",
    ),
    _never_passed(
        f"{_PLUGINS}.lora_plugin", (None,), "LoRA adapters are not supported", "--lora_plugin"
    ),
    # SpeculativeDecodingMode.NONE is written as the number of the flag.
    _never_passed(
        "build_config.speculative_decoding_mode",
        (1, "NONE", None),
        "speculative decoding is not supported",
        "--speculative_decoding_mode",
    ),
    _never_passed(
        "build_config.max_draft_len",
        (0, None),
        "speculative decoding is not supported",
        "--max_draft_len",
    ),
    _never_passed(
        "build_config.max_prompt_embedding_table_size",
        (0, None),
        "prompt tuning and multimodal input are not supported",
        "--max_prompt_embedding_table_size",
    ),
    _never_passed(
        "build_config.use_mrope",
        (False, None),
        "multimodal position embeddings are not supported",
        "multimodal model",
    ),
    _never_passed(
        "build_config.use_strip_plan",
        (False, None),
        "an engine without its weights cannot run",
        "--strip_plan",
    ),
    _never_passed(
        "build_config.weight_streaming",
        (False, None),
        "weights that stay in host memory would take the link from KV copies",
        "--weight_streaming",
    ),
    Rule(
        "pretrained_config.runtime_defaults.sink_token_length",
        (0, None),
        "attention sinks are not supported",
        "a model that has none",
    ),
    Rule(
        "pretrained_config.mapping.cp_size",
        (1, None),
        "context parallelism is not supported",
        "`checkpoint: {tp_size: ...}` alone",
    ),
)


def is_supported_version(version: object) -> bool:
    """Return whether a TensorRT-LLM version is the pinned one, whatever its local suffix."""
    return isinstance(version, str) and version.partition("+")[0] == SUPPORTED_VERSION


def value_at(values: object, key: str) -> Any:
    """Return the value at a dotted key; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def rule_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a `config.json` keeps the engine from being served, and the way out."""
    plugin = value_at(values, f"{_PLUGINS}.gpt_attention_plugin")
    if plugin is None or plugin == "disable":
        yield (
            f"{_PLUGINS}.gpt_attention_plugin is off, but only that plugin reads paged KV blocks; "
            "rebuild with `plugins: {gpt_attention_plugin: auto}`"
        )
    for rule in _RULES:
        problem = rule.problem(values)
        if problem:
            yield problem
    yield from _chunked_prefill_problems(values)
    yield from _window_problems(values)


def _chunked_prefill_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a later chunk of a prompt could not see the earlier ones.

    `trtllm-build` turns paged context attention off for the precisions named here.
    """
    weights = value_at(values, f"{_QUANTIZATION}.quant_algo")
    kv_cache = value_at(values, f"{_QUANTIZATION}.kv_cache_quant_algo")
    flag = f"{_PLUGINS}.use_paged_context_fmha"
    value = value_at(values, flag)
    is_on = value is True
    found = f"{flag} is {json.dumps(value)}, but chunked prefill needs it"
    if kv_cache == "FP8" and weights not in _FP8_FMHA_WEIGHTS:
        yield (
            f"the KV cache is FP8 and the weights are {weights or 'not quantised'}: trtllm-build "
            "then turns use_paged_context_fmha off, which chunked prefill needs; rebuild with "
            "`checkpoint: {quantization: fp8, kv_cache_dtype: fp8}`, or without kv_cache_dtype"
        )
    elif kv_cache == "FP8" and value_at(values, f"{_PLUGINS}.use_fp8_context_fmha") is not True:
        yield (
            f"{_PLUGINS}.use_fp8_context_fmha is off, but attention over an FP8 KV cache needs "
            "it, and a GPU of compute capability 8.9 or later; build on such a GPU with "
            "`plugins: {use_fp8_context_fmha: enable}`, or without quantization and kv_cache_dtype"
        )
    elif kv_cache == "INT8" and not is_on:
        yield (
            f"{found}, and trtllm-build turns it off for an INT8 KV cache; rebuild without "
            "INT8, or with `checkpoint: {quantization: fp8, kv_cache_dtype: fp8}`"
        )
    elif not is_on:
        yield f"{found}; rebuild with `plugins: {{use_paged_context_fmha: enable}}`"


def _window_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield which attention windows are shorter than a request may get."""
    max_seq_len = value_at(values, "build_config.max_seq_len")
    key = "pretrained_config.runtime_defaults.max_attention_window"
    windows = value_at(values, key)
    if windows is None:
        return
    if not isinstance(windows, list) or not all(type(window) is int for window in windows):
        yield f"{key} is {json.dumps(windows)}, it must be a list of integers"
    elif windows and min(windows) < max_seq_len:
        yield (
            f"{key} has {min(windows)}, max_seq_len is {max_seq_len}, but layers that forget are "
            f"not supported; rebuild with `limits: {{max_seq_len: {min(windows)}}}`"
        )
