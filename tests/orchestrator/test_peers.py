from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.core.errors import ConfigError
from orchestrator.peers import Secret, SecretConfig

SECRET = "sesame-sesame-sesame"


def test_the_secret_is_read_from_a_file_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    path.write_text(f" {SECRET}\n")
    monkeypatch.setenv("NODES_SECRET", SECRET)

    for config in (SecretConfig(secret_file=path), SecretConfig(secret_env="NODES_SECRET")):
        assert config.read_secret().authorization() == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has 0 characters, the secret must be 16 to 512 visible ASCII characters"),
        (b"too short", "has 9 characters"),
        (b"two words and some more", "must be 16 to 512 visible"),
        (b"\xff" * 20, "must be 16 to 512 visible"),
    ],
)
def test_what_is_no_secret_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=reason):
        SecretConfig(secret_file=path).read_secret()


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="secret_env NO_SUCH_VARIABLE has 0 characters"):
        SecretConfig(secret_env="NO_SUCH_VARIABLE").read_secret()


@pytest.mark.parametrize("settings", [{}, {"secret_file": Path("a"), "secret_env": "B"}])
def test_the_secret_has_one_source(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="set either secret_file or secret_env"):
        SecretConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("authorization", "is_proof"),
    [
        (f"Bearer {SECRET}", True),
        (f"bearer  {SECRET} ", True),
        (f"Basic {SECRET}", False),
        (SECRET, False),
        ("Bearer", False),
        (f"Bearer {SECRET}x", False),
        ("Bearer schön", False),
    ],
)
def test_only_who_knows_the_secret_proves_it(authorization: str, *, is_proof: bool) -> None:
    assert Secret(SECRET).is_proved_by(authorization) is is_proof


def test_a_secret_does_not_show_itself() -> None:
    assert SECRET not in f"{Secret(SECRET)} {Secret(SECRET)!r}"
