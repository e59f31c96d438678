"""API keys: how they look, what is kept of them, and how one is recognised.

    psk_<id>_<secret>      8 letters, 43 characters

The id finds the key's entry and may be shown anywhere; the secret is 256 random bits. Of a key
only its SHA-256 is kept. A slow hash, as passwords need it, would add nothing: it makes each guess
dear, and nobody guesses 256 random bits, while every single request would pay for it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass, field

ID_PATTERN = r"[a-z]{8}"
SHA256_PATTERN = r"[0-9a-f]{64}"

_KEY = re.compile(rf"psk_({ID_PATTERN})_[A-Za-z0-9_-]{{43}}")
_KEY_IN_TEXT = re.compile(rf"psk_({ID_PATTERN}_)?[A-Za-z0-9_-]+")
_ID_LENGTH = 8
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; nobody can compute `token` again."""

    token: str = field(repr=False)
    """What the client sends."""

    key_id: str
    sha256: str
    """What is kept."""


def make_key(*, used_ids: Collection[str] = ()) -> NewKey:
    """Return a new key with an id that is not among `used_ids`."""
    key_id = _random_id()
    while key_id in used_ids:
        key_id = _random_id()
    token = f"psk_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return NewKey(token, key_id, sha256_of(token))


def id_in(token: str) -> str | None:
    """Return the id of a key; None if `token` is no key of ours."""
    found = _KEY.fullmatch(token)
    return found.group(1) if found else None


def sha256_of(token: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_same(token: str, sha256: str) -> bool:
    """Return whether `sha256` is that of `token`, after a time that does not depend on it."""
    return hmac.compare_digest(sha256_of(token), sha256)


def redacted(text: str) -> str:
    """Return `text` with the secrets of all keys in it left out."""
    return _KEY_IN_TEXT.sub(r"psk_\1...", text)


def _random_id() -> str:
    # Letters alone: YAML takes nothing of eight letters for a number, a date or a truth value.
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(_ID_LENGTH))
