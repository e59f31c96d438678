"""The tokens of words that were seen before: text encoded by looking most of it up.

The library takes some 2 us a word, of which the tokens are the smaller part; a prompt of 1.5 kB
costs it more than everything else that a router does for a request. Looking a word up costs 0.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

MAX_WORDS = 65_536
"""Kept at most, some 20 MB; then all are forgotten and those in use come back."""

MAX_WORD_CHARACTERS = 64
MAX_LEARNED_PER_TEXT = 64
"""New words are encoded one by one, which costs more than together: no text pays for more."""

# A space beside which there is no other white space. What is split there begins with the space.
_BOUNDARY = re.compile(r" (?<!\s )(?!\s)")

# Each alternative of these matches white space at its beginning or in a run of white space alone,
# so a match ends before a boundary, and none looks back. GPT-2's is built into ByteLevel.
_KNOWN_PATTERNS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")  # Qwen 2 and 3; Llama 3
)


class WordCache:
    """Encodes like `encode`, which is a tokenizer that `can_split` says yes of.

    Any thread may use it: entries are only added, or all dropped together.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._words: dict[str, Sequence[int]] = {}
        """Tokens of a space and a word."""

        self._beginnings: dict[str, Sequence[int]] = {}
        """Tokens of what a text begins with, up to its first boundary."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        beginning, *words = _BOUNDARY.split(text)
        found = list(map(self._words.get, words))
        tokens = self._tokens_of_beginning(beginning)
        if None in found:
            return [*tokens, *self._learned(words, found)]
        return [*tokens, *chain.from_iterable(found)]  # type: ignore[arg-type] # none is None

    def _tokens_of_beginning(self, text: str) -> Sequence[int]:
        tokens = self._beginnings.get(text)
        if tokens is None:
            tokens = self._encode(text)
            self._beginnings = _with(self._beginnings, text, tokens)
        return tokens

    def _learned(self, words: Sequence[str], found: Sequence[Sequence[int] | None]) -> list[int]:
        """Return the tokens of words, not all of which were found."""
        ids: list[int] = []
        together: list[str] = []
        """Unknown words to be encoded at once."""

        num_learned = 0
        for word, known in zip(words, found, strict=True):
            is_long = len(word) > MAX_WORD_CHARACTERS
            if known is None and (is_long or num_learned == MAX_LEARNED_PER_TEXT):
                together.append(word)
                continue
            ids += self._encode_all(together)
            together.clear()
            if known is None:
                num_learned += 1
                known = self._encode(f" {word}")  # noqa: PLW2901 - the same thing, found late
                self._words = _with(self._words, word, known)
            ids += known
        return ids + self._encode_all(together)

    def _encode_all(self, words: Sequence[str]) -> list[int]:
        return self._encode(" ".join(["", *words])) if words else []


def _with(
    kept: dict[str, Sequence[int]], text: str, tokens: Sequence[int]
) -> dict[str, Sequence[int]]:
    """Return `kept` with an entry more, or a new one with this alone if it is full."""
    if len(text) > MAX_WORD_CHARACTERS:
        return kept
    if len(kept) >= MAX_WORDS:
        kept = {}
    kept[text] = tokens
    return kept


def can_split(described: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer, as in `tokenizer.json`, encodes the parts of a text between two
    boundaries by themselves; False if that is not known."""
    model, normalizer = described.get("model") or {}, described.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    # Canonical composition joins nothing with a space.
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    for token in described.get("added_tokens") or ():
        looks_around = token["lstrip"] or token["rstrip"] or token["single_word"]
        if looks_around or any(character.isspace() for character in token["content"]):
            return False
    pre_tokenizer = described.get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return all(map(_is_known, parts)) and any(map(_splits_at_spaces, parts))


def _is_known(pre_tokenizer: Mapping[str, Any]) -> bool:
    match pre_tokenizer.get("type"):
        case "ByteLevel":
            return not pre_tokenizer.get("add_prefix_space", True)
        case "Digits":
            return True
        case "Split":
            return _splits_at_spaces(pre_tokenizer)
        case _:
            return False


def _splits_at_spaces(pre_tokenizer: Mapping[str, Any]) -> bool:
    match pre_tokenizer.get("type"):
        case "ByteLevel":
            return bool(pre_tokenizer.get("use_regex", True))
        case "Split":
            return (
                pre_tokenizer["pattern"].get("Regex") in _KNOWN_PATTERNS
                and pre_tokenizer["behavior"] == "Isolated"
                and not pre_tokenizer["invert"]
            )
        case _:
            return False
