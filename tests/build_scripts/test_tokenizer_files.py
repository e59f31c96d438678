"""The built tokenizer against transformers' own reading of the same GGUF file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from build_scripts.packaged_file import find_checkpoint
from build_scripts.recipe import EngineRecipe
from orchestrator.yaml_config import load_yaml_model
from tests.engine_dirs import SMOLLM2_RECIPE

TEXTS = (
    "",
    " ",
    "\n",
    "Hello, world!",
    "  two leading and trailing  ",
    "tabs\tand\nnewlines\r\n\r\n  and\u00a0hard\u2003spaces",
    "It's, we'll, you've, I'm, they'd, DON'T",
    "1234567890 3.14159 1,000,000 2024-12-31 0x7f 1e-9",
    "x1y22z333 v2.0.1 100% $5.00 №7 x½ m² (٣) 五 (Ⅳ)",
    "a 1 b 2",
    "naïve café Ünïcödé ﬁ ß Ω ∑ → “quotes” – — …",
    "Привет, мир! Γειά σου Κόσμε",
    "日本語のテキスト 中文文本 한국어 텍스트",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "😀👍🏽👨‍👩‍👧‍👦🇫🇷 ❤️",
    "e\u0301 vs é, \u200bzero\u200dwidth, \ufeffBOM",
    "def f(x):\n    if x > 0:\n        return x**2  # square\n    return -x\n",
    "<html>\n\t<body class='a-b_c'>&nbsp;</body>\n</html>",
    "https://example.com/a/b?c=d&e=%20f#g user@example.com",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|><|endoftext|>b <|im_end|> c",
    "<|im_start |> <|im_en <repo_name> < repo_name >",
    "\x00\x01\x7f\x80",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)

MESSAGES = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?\n\n  "},
    ],
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def from_gguf() -> Any:
    """transformers' tokenizer, read from the GGUF file."""
    from transformers import AutoTokenizer

    path = find_checkpoint(load_yaml_model(SMOLLM2_RECIPE, EngineRecipe).source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats it will stop to read one day
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def from_directory(smollm2_dir: Path) -> Any:
    """transformers' tokenizer, read from the engine directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_those_of_transformers_reading_the_gguf_file(
    tokenizer: Tokenizer, from_gguf: Any, text: str
) -> None:
    assert tokenizer.encode(text).ids == from_gguf(text)["input_ids"]


@pytest.mark.parametrize("text", [*TEXTS, "a   1", "1 ½ ² ٣ Ⅳ"])
def test_token_ids_are_those_of_transformers_reading_the_directory(
    tokenizer: Tokenizer, from_directory: Any, text: str
) -> None:
    assert tokenizer.encode(text).ids == from_directory(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("text", "tokens", "tokens_of_transformers"),
    [
        ("a   1", ["a", "ĠĠĠ", "1"], ["a", "ĠĠ", "Ġ", "1"]),
        ("a ²", ["a", "Ġ", "Â²"], ["a", "ĠÂ", "²"]),
    ],
)
def test_digits_are_split_first_as_the_model_was_trained(
    tokenizer: Tokenizer,
    from_gguf: Any,
    text: str,
    tokens: list[str],
    tokens_of_transformers: list[str],
) -> None:
    """The file asks for `smollm` splitting, so a blank never joins the digit behind it;
    transformers reads GGUF files without that line and splits as GPT-2 does."""
    assert tokenizer.encode(text).tokens == tokens
    assert from_gguf.tokenize(text) == tokens_of_transformers


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("is_open", [False, True])
def test_the_chat_template_renders_as_in_transformers(
    smollm2_dir: Path, from_gguf: Any, messages: list[dict[str, str]], *, is_open: bool
) -> None:
    config = json.loads((smollm2_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template"])

    rendered = template.render(messages=messages, add_generation_prompt=is_open)

    assert rendered == from_gguf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_open
    )


def test_special_tokens_are_named(smollm2_dir: Path, from_directory: Any) -> None:
    config = json.loads((smollm2_dir / "tokenizer_config.json").read_text(encoding="utf-8"))

    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert from_directory.eos_token_id == 2
