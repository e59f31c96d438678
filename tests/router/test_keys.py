from __future__ import annotations

import hashlib

import pytest

from router.keys import id_in, is_same, make_key, redacted, sha256_of


def test_a_key_is_found_by_its_id_and_known_by_its_hash() -> None:
    key = make_key()

    assert id_in(key.token) == key.key_id
    assert is_same(key.token, key.sha256)
    assert key.sha256 == hashlib.sha256(key.token.encode()).hexdigest()


def test_a_key_has_256_random_bits() -> None:
    """43 characters of 6 bits each hold 258, of which token_urlsafe uses 256."""
    secrets = {make_key().token.split("_", 2)[2] for _ in range(100)}

    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {43}


def test_another_key_is_not_the_same() -> None:
    key, other = make_key(), make_key()
    forged = f"psk_{key.key_id}_{other.token.split('_', 2)[2]}"

    assert not is_same(other.token, key.sha256)
    assert not is_same(forged, key.sha256)
    assert not is_same(key.token[:-1], key.sha256)
    assert not is_same("", key.sha256)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "sk-1234567890",
        "psk_",
        "psk_abcdefgh_",
        "psk_abcdefgh_" + "x" * 42,
        "psk_abcdefgh_" + "x" * 44,
        "psk_abcdefgH_" + "x" * 43,
        "psk_abcdefgh_" + "x" * 42 + "\n",
        "psk_abcdefgh_" + "x" * 42 + "\u00e9",
        " psk_abcdefgh_" + "x" * 43,
    ],
)
def test_what_is_no_key_has_no_id(token: str) -> None:
    assert id_in(token) is None


def test_a_key_hides_its_secret_when_it_is_printed() -> None:
    key = make_key()

    assert key.token not in repr(key)
    assert key.token.split("_", 2)[2] not in str(key)


def test_keys_in_a_text_lose_their_secrets() -> None:
    key = make_key()

    assert (
        redacted(f"got {key.token!r}, and psk_Foreign-1")
        == f"got 'psk_{key.key_id}_...', and psk_..."
    )
    assert redacted(f"sha256 {sha256_of('x')}") == f"sha256 {sha256_of('x')}"
