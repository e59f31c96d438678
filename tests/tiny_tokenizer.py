"""A small byte-level tokenizer in Hugging Face's files, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKEN = "<tool_call>"
"""Added but not special: decoding shows it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a request is catching up its computed tokens with its tokens",
    "naïve café über größer señor 東京 東京都 日本語 привет мир 🙂🙃",
    "system user assistant im_start im_end <| |> END stop STOP",
)


def write_tiny_tokenizer(engine_dir: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json`, and return `engine_dir`.

    Ids 0 to 2 are special; the characters of other scripts are more than one token each.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES * 3,
        trainers.BpeTrainer(
            vocab_size=420,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(TOOL_TOKEN, normalized=False)])
    engine_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(engine_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }
    (engine_dir / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return engine_dir
