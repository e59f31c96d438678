"""The bytes that the tokens of a byte-level vocabulary stand for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Source: GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, the others for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + position): byte for position, byte in enumerate(others)
    }


_BYTE_ALPHABET = _byte_alphabet()


def bytes_of(token: str) -> bytes:
    """Return the bytes of a token; one with characters of no byte is plain text."""
    try:
        return bytes([_BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def whole_texts(
    token_bytes: Mapping[int, bytes], special_ids: Collection[int]
) -> Iterator[tuple[int, str]]:
    """Yield the text of each token that is no part of a character; none for special tokens."""
    for token_id, raw in token_bytes.items():
        if token_id in special_ids:
            yield token_id, ""
            continue
        with suppress(UnicodeDecodeError):
            yield token_id, raw.decode()
