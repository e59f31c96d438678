"""Reads and checks the `config.json` of a TensorRT-LLM engine directory, before anything loads.

`trtllm-build` turns flags off where a combination does not work, and only logs a warning. The
file says what was built, the command does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.trtllm.engine_rules import (
    SUPPORTED_VERSION,
    is_supported_version,
    rule_problems,
    value_at,
)
from orchestrator.core.errors import ConfigError, EngineDirectoryError

CONFIG_FILE = "config.json"

_DTYPES = ("float16", "bfloat16", "float32")
_KV_CACHE_DTYPES = {"FP8": "fp8", "INT8": "int8"}
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TrtLlmEngineConfig:
    """What the `config.json` of an engine that can be served says. Counts are of the whole model,
    over all ranks."""

    version: str
    """Of the TensorRT-LLM that built the engine."""

    architecture: str
    dtype: str
    """Of activations, by torch's name."""

    logits_dtype: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_size: int
    kv_cache_dtype: str
    """Torch's name of the KV pool's element: the model's dtype, or "fp8" or "int8", a byte each."""

    tokens_per_block: int
    max_batch_size: int
    """Requests in one step."""

    max_num_tokens: int
    """New tokens in one step, over all requests."""

    max_seq_len: int
    """Prompt and output tokens of one request."""

    tp_size: int
    pp_size: int

    @property
    def max_blocks_per_seq(self) -> int:
        """KV blocks of the longest request: the width of a block table."""
        return -(-self.max_seq_len // self.tokens_per_block)

    @property
    def vocab_size_padded(self) -> int:
        """Columns of the logits: the vocabulary, filled up to a multiple of `tp_size`."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size

    def num_kv_heads_per_rank(self) -> int:
        """Return the KV heads that one rank holds; with more ranks than heads, they are copied."""
        return max(1, self.num_kv_heads // self.tp_size)


def read_engine_config(engine_dir: Path) -> TrtLlmEngineConfig:
    """Return the configuration of an engine directory that can be served.

    Raises:
        EngineDirectoryError: the directory, its configuration or an engine file is missing or
            unreadable, another version built it, or it was built with options that in-flight
            batching with chunked prefill cannot use. Has one line per problem: what was found
            and which line of the recipe puts it right.
    """
    values = read_config_json(engine_dir)
    path = engine_dir / CONFIG_FILE
    version = value_at(values, "version")
    if not is_supported_version(version):
        raise EngineDirectoryError(
            f"{path}: the engine was built by TensorRT-LLM {version}, serving needs "
            f"{SUPPORTED_VERSION}: an engine runs only under the release that built it, and "
            f"{SUPPORTED_VERSION} is the last stable one that runs prebuilt engines; install "
            f"tensorrt-llm=={SUPPORTED_VERSION} and rebuild with `proserve build`"
        )
    config = _parse(values, path)
    problems = [*_shape_problems(config), *rule_problems(values)]
    problems = [f"{path}: {problem}" for problem in problems]
    problems += _file_problems(engine_dir, config)
    if problems:
        raise EngineDirectoryError("\n".join(problems))
    return config


def read_config_json(engine_dir: Path) -> Mapping[str, Any]:
    """Return the content of `config.json`, unchecked but for being TensorRT-LLM's.

    Raises:
        EngineDirectoryError: directory or file are missing or unreadable, or the file describes
            something else than a TensorRT-LLM engine.
    """
    if not engine_dir.is_dir():
        raise EngineDirectoryError(
            f"{engine_dir}: no such engine directory; build one with `proserve build`"
        )
    path = engine_dir / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EngineDirectoryError(
            f"{path}: is missing; the build did not finish, run `proserve build` again"
        ) from error
    except (OSError, ValueError) as error:
        raise EngineDirectoryError(
            f"{path}: cannot be read: {error}; rebuild the directory with `proserve build`"
        ) from error
    for key in ("pretrained_config", "build_config", "build_config.plugin_config"):
        if not isinstance(value_at(values, key), dict):
            raise EngineDirectoryError(
                f"{path}: has no section {key!r}, which TensorRT-LLM writes into every engine "
                "directory; is it a model's or a torch engine's (`engine: {kind: torch}`)?"
            )
    return values  # type: ignore[no-any-return]  # the loop above has shown that it is a mapping


def check_limits(
    config: TrtLlmEngineConfig,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
) -> None:
    """Raise ConfigError if a node is to run larger steps or requests than the engine takes.

    Has one line per problem, with both numbers and the way out.
    """
    limits = (
        ("max_num_batched_tokens", max_num_batched_tokens, "max_num_tokens", config.max_num_tokens),
        ("max_num_seqs", max_num_seqs, "max_batch_size", config.max_batch_size),
        ("max_model_len", max_model_len, "max_seq_len", config.max_seq_len),
    )
    problems = [
        f"{key} is {wanted:,}, the engine was built with {built_key} {built:,}; lower {key} in "
        f"the node's YAML, or rebuild with `limits: {{{built_key}: {wanted}}}` in the recipe"
        for key, wanted, built_key, built in limits
        if wanted > built
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _parse(values: Mapping[str, Any], path: Path) -> TrtLlmEngineConfig:
    read = _Reader(values, path)
    model, build = "pretrained_config", "build_config"
    dtype = read.text(f"{model}.dtype", _DTYPES)
    quantised_kv = value_at(values, f"{model}.quantization.kv_cache_quant_algo")
    if quantised_kv is not None:
        read.text(f"{model}.quantization.kv_cache_quant_algo", tuple(_KV_CACHE_DTYPES))
    return TrtLlmEngineConfig(
        version=read.text("version"),
        architecture=read.text(f"{model}.architecture"),
        dtype=dtype,
        logits_dtype=read.text(f"{model}.logits_dtype", _DTYPES),
        vocab_size=read.count(f"{model}.vocab_size"),
        hidden_size=read.count(f"{model}.hidden_size"),
        num_layers=read.count(f"{model}.num_hidden_layers"),
        num_attention_heads=read.count(f"{model}.num_attention_heads"),
        num_kv_heads=read.count(f"{model}.num_key_value_heads"),
        head_size=read.count(f"{model}.head_size"),
        kv_cache_dtype=_KV_CACHE_DTYPES.get(str(quantised_kv), dtype),
        tokens_per_block=read.count(f"{build}.plugin_config.tokens_per_block"),
        max_batch_size=read.count(f"{build}.max_batch_size"),
        max_num_tokens=read.count(f"{build}.max_num_tokens"),
        max_seq_len=read.count(f"{build}.max_seq_len"),
        tp_size=read.count(f"{model}.mapping.tp_size"),
        pp_size=read.count(f"{model}.mapping.pp_size"),
    )


class _Reader:
    """Takes values of the right kind out of the file."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._values = values
        self._path = path

    def count(self, key: str) -> int:
        """Return a positive integer."""
        value = value_at(self._values, key)
        if type(value) is not int or value < 1:
            raise self._malformed(key, value, "a positive integer")
        return value

    def text(self, key: str, choices: tuple[str, ...] = ()) -> str:
        """Return a text, one of `choices` if there are any."""
        value = value_at(self._values, key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self._malformed(key, value, " or ".join(choices) or "a text")
        return value

    def _malformed(self, key: str, value: object, expected: str) -> EngineDirectoryError:
        found = "is missing" if value is None else f"is {json.dumps(value)}"
        return EngineDirectoryError(
            f"{self._path}: {key} {found}, it must be {expected}; "
            "rebuild the directory with `proserve build`"
        )


def _shape_problems(config: TrtLlmEngineConfig) -> Iterator[str]:
    """Yield why tensors of these shapes cannot be addressed or divided over the ranks."""
    tp_size = config.tp_size
    if config.pp_size > 1:
        yield (
            f"pretrained_config.mapping.pp_size is {config.pp_size}, pipeline parallelism is not "
            "supported; rebuild with `checkpoint: {pp_size: 1, tp_size: ...}`"
        )
    if config.num_attention_heads % tp_size:
        yield (
            f"{config.num_attention_heads} attention heads cannot be divided over tp_size "
            f"{tp_size}; rebuild with a `checkpoint: {{tp_size: ...}}` that divides them"
        )
    if config.num_kv_heads % tp_size and tp_size % config.num_kv_heads:
        yield (
            f"{config.num_kv_heads} KV heads can neither be divided over tp_size {tp_size} nor "
            "copied evenly; rebuild with a `checkpoint: {tp_size: ...}` that is a divisor or a "
            "multiple of them"
        )
    if config.tokens_per_block & (config.tokens_per_block - 1):
        yield (
            f"build_config.plugin_config.tokens_per_block is {config.tokens_per_block}, it must "
            "be a power of two; rebuild with `plugins: {tokens_per_block: 32}`"
        )
    # The attention plugin indexes the block tables by 32-bit numbers.
    width = config.max_blocks_per_seq
    if (config.max_batch_size - 1) * width * 2 + width > _INT32_MAX:
        yield (
            f"the block tables of max_batch_size {config.max_batch_size:,} requests with "
            f"{width:,} blocks each are too large to be indexed by 32 bits; rebuild with a "
            "smaller `limits: {max_batch_size: ...}` or larger `plugins: {tokens_per_block: ...}`"
        )


def _file_problems(engine_dir: Path, config: TrtLlmEngineConfig) -> Iterator[str]:
    num_ranks = config.tp_size * config.pp_size
    for rank in range(num_ranks):
        path = engine_dir / f"rank{rank}.engine"
        if not path.is_file():
            found = "is missing"
        elif path.stat().st_size == 0:
            found = "is empty"
        else:
            found = None
        if found:
            yield (
                f"{path}: {found}, the engine has {num_ranks} "
                f"(`checkpoint: {{tp_size: {config.tp_size}}}`); the build did not finish, run "
                "`proserve build` again"
            )
        if (engine_dir / f"rank{rank}_managed_weights.safetensors").exists():
            yield (
                f"{engine_dir}: rank{rank}_managed_weights.safetensors holds weights outside the "
                "engine, which serving does not load; rebuild without `--fast_build`, which no "
                "recipe passes"
            )
