"""How routers and nodes find and trust each other: addresses, and a secret that both know."""

from __future__ import annotations

import hmac
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from orchestrator.core.errors import ConfigError

MIN_SECRET_CHARACTERS = 16
"""Guessing a shorter one over a network begins to be thinkable."""

MAX_URL_CHARACTERS = 512

_SECRET = re.compile(rf"[\x21-\x7e]{{{MIN_SECRET_CHARACTERS},512}}")


def _check_service_url(url: str) -> str:
    parts = urlsplit(url)
    form = "write it as http://HOST:PORT"
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url!r} is not the address of a service, {form}")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url!r} has more than scheme, host and port; {form}")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError(f"{url!r} has an impossible port; {form}") from None
    return url.rstrip("/")


ServiceUrl = Annotated[
    str, Field(max_length=MAX_URL_CHARACTERS), AfterValidator(_check_service_url)
]
"""Where a router or a node listens."""


class Secret:
    """What nodes and routers know and nobody else. Shows nothing of itself."""

    __slots__ = ("_digest", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._digest = sha256(text.encode()).digest()

    def __repr__(self) -> str:
        return "Secret(...)"

    def authorization(self) -> str:
        """Return the value of the `Authorization` header that proves to know it."""
        return f"Bearer {self._text}"

    def is_proved_by(self, authorization: str) -> bool:
        """Return whether a header proves to know it, after a time that does not depend on it."""
        scheme, _, text = authorization.partition(" ")
        digest = sha256(text.strip().encode()).digest()
        return scheme.lower() == "bearer" and hmac.compare_digest(digest, self._digest)


class SecretConfig(BaseModel):
    """Where the shared secret is; it is never in a configuration file itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    secret_file: Path | None = None
    """File with the secret of routers and nodes: 16 to 512 visible ASCII characters. White space
    around it does not count."""

    secret_env: Annotated[str, Field(min_length=1)] | None = None
    """Environment variable with the secret, in place of `secret_file`."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.secret_file is None) == (self.secret_env is None):
            raise ValueError("set either secret_file or secret_env, which say where the secret is")
        return self

    def read_secret(self) -> Secret:
        """Return the secret.

        Raises:
            ConfigError: it is not there, or none.
        """
        if self.secret_file is not None:
            source = f"secret_file {self.secret_file}"
            try:
                text = self.secret_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError(f"{source}: cannot be read: {error.strerror}") from error
            except UnicodeDecodeError:
                text = ""
        else:
            source = f"secret_env {self.secret_env}"
            text = os.environ.get(self.secret_env or "", "").strip()
        if not _SECRET.fullmatch(text):
            raise ConfigError(
                f"{source} has {len(text):,} characters, the secret must be "
                f"{MIN_SECRET_CHARACTERS} to 512 visible ASCII characters; make one with: "
                "openssl rand -hex 32"
            )
        return Secret(text)
