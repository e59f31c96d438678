"""Reads a Llama-family checkpoint from a GGUF file, in Hugging Face's names and layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from engines.torch_engine.config import LlamaConfig
from orchestrator.core.errors import ConfigError

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokenizer as the file stores it."""

    tokens: tuple[str, ...]
    """By id, in the byte-level alphabet of GPT-2."""

    control_token_ids: tuple[int, ...]
    """Tokens that text never encodes to by accident."""

    merges: tuple[str, ...]
    """Pairs with a space between, most frequent first."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    unknown_token_id: int
    chat_template: str


class GgufCheckpoint:
    """A GGUF file of the Llama architecture."""

    def __init__(self, path: Path) -> None:
        """Read the file's header.

        Raises:
            ConfigError: it is not GGUF, or holds another architecture or kind of tokenizer.
        """
        self._path = path
        try:
            self._reader = GGUFReader(path)
        except ValueError as error:
            raise ConfigError(f"{path}: not a GGUF file that can be read: {error}") from error
        for key, supported in (
            ("general.architecture", "llama"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "smollm"),
            ("tokenizer.ggml.add_bos_token", False),
        ):
            value = self._value(key)
            if value != supported:
                raise ConfigError(
                    f"{path}: {key} is {value!r}; the build handles {supported!r} only"
                )

    @property
    def num_tensors(self) -> int:
        """Tensors in the file."""
        return len(self._reader.tensors)

    @property
    def precision(self) -> str:
        """The quantisations in the file, such as "Q4_1 and Q8_0"."""
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors}
        return " and ".join(sorted(kinds - {"F32"})) or "F32"

    def config(self) -> LlamaConfig:
        """Return the architecture."""
        num_heads = int(self._value("llama.attention.head_count"))
        hidden_size = int(self._value("llama.embedding_length"))
        # The file holds a float32: 9.99999974e-06 was written as 1e-05.
        rms_norm_eps = np.float32(self._value("llama.attention.layer_norm_rms_epsilon"))
        return LlamaConfig(
            vocab_size=int(self._value("llama.vocab_size")),
            hidden_size=hidden_size,
            intermediate_size=int(self._value("llama.feed_forward_length")),
            num_hidden_layers=int(self._value("llama.block_count")),
            num_attention_heads=num_heads,
            num_key_value_heads=int(self._value("llama.attention.head_count_kv")),
            head_dim=hidden_size // num_heads,
            max_position_embeddings=int(self._value("llama.context_length")),
            rms_norm_eps=float(str(rms_norm_eps)),
            rope_theta=float(self._value("llama.rope.freq_base")),
            tie_word_embeddings=all(t.name != "output.weight" for t in self._reader.tensors),
        )

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield each tensor's Hugging Face name and its values, dequantised to float32.

        Raises:
            ConfigError: the file holds a tensor that the architecture does not have.
        """
        config = self.config()
        for tensor in self._reader.tensors:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if tensor.name.endswith("attn_q.weight"):
                values = to_half_rotation(values, config.num_attention_heads)
            elif tensor.name.endswith("attn_k.weight"):
                values = to_half_rotation(values, config.num_key_value_heads)
            yield self._hugging_face_name(tensor), values

    def vocabulary(self) -> GgufVocabulary:
        """Return what the tokenizer is built from."""
        types = self._value("tokenizer.ggml.token_type")
        return GgufVocabulary(
            tokens=tuple(self._value("tokenizer.ggml.tokens")),
            # 3 is llama.cpp's LLAMA_TOKEN_TYPE_CONTROL.
            control_token_ids=tuple(index for index, kind in enumerate(types) if kind == 3),
            merges=tuple(self._value("tokenizer.ggml.merges")),
            bos_token_id=self._value("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._value("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._value("tokenizer.ggml.padding_token_id"),
            unknown_token_id=self._value("tokenizer.ggml.unknown_token_id"),
            chat_template=self._value("tokenizer.chat_template"),
        )

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise ConfigError(f"{self._path}: {key} is missing")
        return field.contents()

    def _hugging_face_name(self, tensor: ReaderTensor) -> str:
        prefix, _, rest = tensor.name.partition(".")
        layer, _, name = rest.partition(".")
        if tensor.name in _TOP_LEVEL_NAMES:
            return _TOP_LEVEL_NAMES[tensor.name]
        if prefix == "blk" and name in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[name]}"
        raise ConfigError(f"{self._path}: tensor {tensor.name} is not part of a Llama decoder")


def to_half_rotation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Return q or k rows in Hugging Face's order.

    llama.cpp stores each head's rows so that neighbours turn together; in Hugging Face's
    order (and ours) row i turns with row i + head_dim / 2.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)
