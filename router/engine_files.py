"""What a router reads in an engine directory beside the tokenizer itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.core.errors import EngineDirectoryError

MANIFEST_FILE = "manifest.json"
MODEL_CONFIG_FILE = "config.json"


def stored_eos_token_ids(engine_dir: Path) -> tuple[int, ...] | None:
    """Return the tokens with which the model ends an answer; None if no file lists them.

    The manifest goes before the model's own config, which may have one id or several.

    Raises:
        EngineDirectoryError: a file cannot be read, or lists something else than token ids.
    """
    for name, key in ((MANIFEST_FILE, "eos_token_ids"), (MODEL_CONFIG_FILE, "eos_token_id")):
        path = engine_dir / name
        found = read_object(path).get(key) if path.exists() else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        # JSON's true is an int to Python.
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise EngineDirectoryError(
                f"{path}: {key} is {json.dumps(found)[:80]}, it must be token ids, at least one; "
                "rebuild the directory with `proserve build`"
            )
        return tuple(dict.fromkeys(ids))
    return None


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        EngineDirectoryError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineDirectoryError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        EngineDirectoryError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EngineDirectoryError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EngineDirectoryError(f"{path} must be a JSON object")
    return found
