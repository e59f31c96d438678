"""The architecture of a Llama-family decoder, as written in a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engines.kv_pool import KVLayout
from orchestrator.core.errors import EngineDirectoryError

# What the decoder computes whatever the file says; another value would give other tokens.
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes and constants of the decoder; names as in the file."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise EngineDirectoryError(
                f"config.json: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads evenly"
            )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all K heads together, and of all V heads."""
        return self.num_key_value_heads * self.head_dim

    def kv_layout(self, block_size_tokens: int) -> KVLayout:
        """Return the shape of this model's KV blocks."""
        return KVLayout(
            num_layers=self.num_hidden_layers,
            num_kv_heads=self.num_key_value_heads,
            block_size_tokens=block_size_tokens,
            head_dim=self.head_dim,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds; Hugging Face's `LlamaConfig` reads it too."""
        return {
            "architectures": ["LlamaForCausalLM"],
            **_FIXED,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the architecture that a parsed `config.json` describes.

        Raises:
            EngineDirectoryError: a key is missing or of the wrong type, or the file describes
                a model that this decoder would compute wrongly.
        """
        for name, supported in _FIXED.items():
            value = values.get(name, supported)
            if value != supported:
                raise EngineDirectoryError(
                    f"config.json: {name} is {value!r}; this engine runs {supported!r} only"
                )
        try:
            return cls(
                vocab_size=int(values["vocab_size"]),
                hidden_size=int(values["hidden_size"]),
                intermediate_size=int(values["intermediate_size"]),
                num_hidden_layers=int(values["num_hidden_layers"]),
                num_attention_heads=int(values["num_attention_heads"]),
                num_key_value_heads=int(values["num_key_value_heads"]),
                head_dim=int(values["head_dim"]),
                max_position_embeddings=int(values["max_position_embeddings"]),
                rms_norm_eps=float(values["rms_norm_eps"]),
                rope_theta=float(values["rope_theta"]),
                tie_word_embeddings=bool(values["tie_word_embeddings"]),
            )
        except KeyError as error:
            raise EngineDirectoryError(f"config.json: {error.args[0]} is missing") from error
        except (TypeError, ValueError) as error:
            raise EngineDirectoryError(f"config.json: {error}") from error
