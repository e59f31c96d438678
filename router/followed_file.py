"""A file that may change while the router runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from orchestrator.core.errors import ConfigError

T = TypeVar("T")


class FollowedFile(Generic[T]):
    """Tells each content of a file once, valid or not."""

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        """`parse` raises ConfigError where a content has mistakes."""
        self._path = path
        self._parse = parse
        self._seen = b""
        """Digest of what the last look found."""

    def read(self) -> T:
        """Return the file as it is now.

        Raises:
            ConfigError: it cannot be read, or has mistakes.
        """
        self._seen = b""
        news = self.news()
        assert news is not None, "nothing was seen before"
        if isinstance(news, ConfigError):
            raise news
        return news

    def news(self) -> T | ConfigError | None:
        """Return the file as it is now, or what is wrong with it; None if it was like that at the
        last look."""
        try:
            content = self._path.read_bytes()
        except OSError as error:
            problem = f"{self._path}: cannot be read: {error.strerror}"
            return ConfigError(problem) if self._is_new(problem.encode()) else None
        if not self._is_new(content):
            return None
        try:
            return self._parse(content)
        except ConfigError as error:
            return error

    def _is_new(self, found: bytes) -> bool:
        seen, self._seen = self._seen, hashlib.sha256(found).digest()
        return self._seen != seen
