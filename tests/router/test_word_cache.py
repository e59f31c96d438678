"""Looking words up gives the tokens that encoding the whole text gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import Regex as Pattern

from router.word_cache import MAX_LEARNED_PER_TEXT, WordCache, can_split
from tests.tiny_tokenizer import SENTENCES

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen": split_by(QWEN),
    "llama": split_by(LLAMA),
}


def make_tokenizer(pre_tokenizer: Any, *, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES * 3, "a  b   c \n d\n\n e 12 345 . , it's"], trainer)
    return tokenizer


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


@pytest.fixture(scope="module", params=list(PRE_TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    normalizer = normalizers.NFC() if request.param == "qwen" else None
    return make_tokenizer(PRE_TOKENIZERS[request.param], normalizer=normalizer)


@pytest.fixture(scope="module")
def cache(tokenizer: Tokenizer) -> WordCache:
    """One for all texts, so that most find words of earlier ones."""
    assert can_split(described(tokenizer))
    return WordCache(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


texts = st.lists(
    st.sampled_from(
        [*" \n\t\r\u00a0\u2003\u0301'.,1é京🙂", "  ", "the", "fox", "it's", "12", "<|end|>", "\r\n"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=30,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_a_text_has_the_tokens_of_the_tokenizer(
    tokenizer: Tokenizer, cache: WordCache, text: str
) -> None:
    expected = tokenizer.encode(text, add_special_tokens=False).ids

    assert cache.encode(text) == expected
    assert cache.encode(text) == expected, "and again, when its words are known"


def test_known_words_are_not_encoded_again() -> None:
    tokenizer = make_tokenizer(PRE_TOKENIZERS["gpt-2"])
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return tokenizer.encode(text, add_special_tokens=False).ids

    cache = WordCache(encode)
    cache.encode("the quick fox")
    cache.encode("the fox the brown quick")

    assert encoded == ["the", " quick", " fox", " the", " brown"]


def test_of_many_new_words_only_some_are_encoded_alone() -> None:
    """A text of new words costs little more than it would without a cache."""
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [len(text)]

    WordCache(encode).encode(" ".join(f"w{i}" for i in range(10 * MAX_LEARNED_PER_TEXT)))

    assert len(encoded) == 1 + MAX_LEARNED_PER_TEXT + 1


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(
            make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
            id="whole texts are one word",
        ),
        pytest.param(make_tokenizer(pre_tokenizers.ByteLevel()), id="a space is put first"),
        pytest.param(make_tokenizer(split_by(r"\w+ \w+")), id="an unknown pattern"),
        pytest.param(
            make_tokenizer(PRE_TOKENIZERS["gpt-2"], normalizer=normalizers.Strip()),
            id="a normalizer that looks around",
        ),
    ],
)
def test_tokenizers_of_which_it_is_not_known_are_left_alone(tokenizer: Tokenizer) -> None:
    assert not can_split(described(tokenizer))


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("two words"),
        AddedToken("<x>", lstrip=True),
        AddedToken("<x>", rstrip=True),
        AddedToken("<x>", single_word=True),
    ],
)
def test_added_tokens_that_reach_across_spaces_are_left_alone(token: AddedToken) -> None:
    tokenizer = make_tokenizer(PRE_TOKENIZERS["gpt-2"])
    tokenizer.add_tokens([token])

    assert not can_split(described(tokenizer))
