"""A model in Hugging Face's files, as a build reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from build_scripts.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.core.errors import ConfigError

CHAT_TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "config.json"
_GENERATION_CONFIG_FILE = "generation_config.json"
_INDEX_FILE = "model.safetensors.index.json"

# Upstream takes these factors of rotary embeddings to be part of max_position_embeddings.
_ROPE_TYPES_WITHIN_LENGTH = ("default", "llama3", "longrope", "su")


class ModelFiles:
    """The files of one model. Made by `read`, which has seen that they are all there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], weight_files: list[str]) -> None:
        self.folder = folder
        self._config = config
        self.weight_files = tuple(sorted([CONFIG_FILE, *weight_files]))
        """What decides the checkpoint: weights and architecture."""

        optional = [name for name in (CHAT_TEMPLATE_FILE,) if (folder / name).is_file()]
        self.tokenizer_files = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *optional)
        """What an engine directory takes over as it is."""

        self.eos_token_ids = _eos_token_ids(folder, config)
        """Tokens with which the model ends an answer."""

        self.bos_token_id = _bos_token_id(folder)
        """What the tokenizer puts before a text; None if it puts nothing there."""

    @classmethod
    def read(cls, folder: Path) -> ModelFiles:
        """Return the model in a folder.

        Raises:
            ConfigError: the folder or one of its files is missing or unreadable, or no file says
                which token ends an answer.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; correct `source.path` in the recipe")
        config = _read_object(folder / CONFIG_FILE)
        weight_files = _weight_files(folder)
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *weight_files):
            if not (folder / name).is_file():
                raise ConfigError(f"{folder / name}: is missing; download the model again")
        return cls(folder, config, weight_files)

    def check(self, recipe: TrtLlmRecipe) -> None:
        """Raise ConfigError if the recipe asks for what the model cannot be built to."""
        tp_size = recipe.checkpoint.tp_size
        num_heads = self._number("num_attention_heads")
        if num_heads % tp_size:
            raise ConfigError(
                f"checkpoint.tp_size is {tp_size}, the model has {num_heads} attention heads; "
                "choose a divisor of them"
            )
        longest = self._max_position_embeddings()
        if recipe.limits.max_seq_len > longest:
            raise ConfigError(
                f"limits.max_seq_len is {recipe.limits.max_seq_len}, the model was trained for "
                f"{longest} tokens at most; lower it"
            )

    def _max_position_embeddings(self) -> int:
        longest = self._number("max_position_embeddings")
        scaling = self._config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        factor = 1 if kind in _ROPE_TYPES_WITHIN_LENGTH else scaling.get("factor", 1)
        return int(longest * factor)

    def _number(self, key: str) -> int:
        value = self._config.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{self.folder / CONFIG_FILE}: {key} is {json.dumps(value)}, it must be a positive "
                "integer; is this a language model of a supported family?"
            )
        return value


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    path = folder / _GENERATION_CONFIG_FILE
    generation = _read_object(path) if path.is_file() else {}
    for values in (generation, config):
        found = values.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(token_id) is int for token_id in ids):
            return tuple(dict.fromkeys(ids))
    raise ConfigError(
        f"{folder}: neither {_GENERATION_CONFIG_FILE} nor {CONFIG_FILE} has an eos_token_id; "
        "write the token that ends an answer into one of them"
    )


def _bos_token_id(folder: Path) -> int | None:
    name = _read_object(folder / TOKENIZER_CONFIG_FILE).get("bos_token")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    token_id = tokenizer.token_to_id(name["content"] if isinstance(name, dict) else name or "")
    return token_id if tokenizer.encode("").ids[:1] == [token_id] else None


def _weight_files(folder: Path) -> list[str]:
    if (folder / _INDEX_FILE).is_file():
        index = _read_object(folder / _INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ConfigError(f"{folder / _INDEX_FILE}: names no weights; download the model again")
        return [_INDEX_FILE, *sorted(set(index.values()))]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        raise ConfigError(
            f"{folder}: has no *.safetensors, the only format of weights that is read; download "
            "the model in it"
        )
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: is missing; download the model again") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; download the model again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is not a JSON object; download the model again")
    return values
