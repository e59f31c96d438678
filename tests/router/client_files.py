"""Clients files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from router.keys import NewKey, make_key


def client(
    name: str = "acme", key: NewKey | None = None, *, priority_class: str = "high", **fields: Any
) -> dict[str, Any]:
    """Return one entry of a clients file; without `key` it has one that nobody knows."""
    key = key or make_key()
    keys = [{"key_id": key.key_id, "sha256": key.sha256}]
    return {"name": name, "priority_class": priority_class, "keys": keys, **fields}


def write_clients(path: Path, *clients: dict[str, Any]) -> Path:
    """Write a clients file in one piece; return its path."""
    draft = path.with_suffix(".draft")
    draft.write_text(yaml.safe_dump({"clients": list(clients)}))
    return draft.replace(path)


def bearer(key: NewKey) -> dict[str, str]:
    """Return the header that brings a key."""
    return {"authorization": f"Bearer {key.token}"}
