"""Writes the tokenizer of an engine directory, in Hugging Face's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from build_scripts.gguf_checkpoint import GgufVocabulary

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def build_tokenizer(vocabulary: GgufVocabulary) -> Tokenizer:
    """Return the byte-level BPE tokenizer that the vocabulary stands for.

    Digits are split one by one before GPT-2's own splitting, as `smollm` asks for (llama.cpp,
    LLAMA_VOCAB_PRE_TYPE_SMOLLM). That shows where blanks meet a digit: "a   1" keeps its three
    blanks together, while GPT-2's splitting would put the last one to the digit.
    """
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary.tokens)},
            merges=[(left, right) for left, right in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(vocabulary.tokens[index], special=True, normalized=False)
            for index in vocabulary.control_token_ids
        ]
    )
    return tokenizer


def write_tokenizer_files(
    engine_dir: Path, vocabulary: GgufVocabulary, *, max_model_len: int
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    build_tokenizer(vocabulary).save(str(engine_dir / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.tokens[vocabulary.bos_token_id],
        "eos_token": vocabulary.tokens[vocabulary.eos_token_id],
        "pad_token": vocabulary.tokens[vocabulary.pad_token_id],
        "unk_token": vocabulary.tokens[vocabulary.unknown_token_id],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_model_len,
        "chat_template": vocabulary.chat_template,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (engine_dir / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")
