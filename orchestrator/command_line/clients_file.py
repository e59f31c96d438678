"""Edits a clients file: adds and removes keys, and keeps everything else, comments included.

The file is replaced as a whole, so that a router never reads half of one. Only its owner may read
it: it holds no keys, but who is served, in which class.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from orchestrator.core.errors import ConfigError
from router.clients import ClientsConfig, parse_clients
from router.keys import NewKey, make_key

NEW_FILE = "# Who may use the router; docs/clients.md explains it.\nclients: []\n"


def read_clients(path: Path) -> ClientsConfig:
    """Return the clients file at `path`.

    Raises:
        ConfigError: it cannot be read or has mistakes. Which classes the router has is not known
            here, so any class name passes.
    """
    return parse_clients(_read(path), path=path)


def add_key(
    path: Path, client: str, *, priority_class: str | None, expires_at: datetime | None
) -> NewKey:
    """Return a new key of `client`, whose hash is now in the file at `path`.

    With `priority_class` the client is made if the file does not have it, and the file if there
    is none.

    Raises:
        ConfigError: the file has mistakes, does not have the client, or has it in another class.
    """
    path = path.resolve()
    with _locked(path.parent):
        if path.exists():
            content = _read(path)
        elif priority_class is not None:
            content = NEW_FILE.encode()
        else:
            raise ConfigError(f"{path} does not exist; to make it, say the --priority-class")
        config = parse_clients(content, path=path)
        known = {c.name: c for c in config.clients}.get(client)
        if known is None and priority_class is None:
            names = ", ".join(c.name for c in config.clients) or "none"
            raise ConfigError(
                f"{path} has no client {client!r}, it has: {names}; to make it, say its "
                "--priority-class"
            )
        if known is not None and priority_class not in (None, known.priority_class):
            raise ConfigError(
                f"client {client!r} is in class {known.priority_class!r}, not "
                f"{priority_class!r}; leave --priority-class out, or change it in {path}"
            )
        key = make_key(used_ids=[k.key_id for c in config.clients for k in c.keys])
        document = _load(content)
        if known is None:
            new = CommentedMap(name=client, priority_class=priority_class, keys=[])
            document["clients"].append(new)
        (entry,) = [c for c in document["clients"] if c["name"] == client]
        entry.setdefault("keys", []).append(_key_entry(key, expires_at))
        _replace(path, document)
    return key


def revoke_key(path: Path, key_id: str) -> str:
    """Return whose key it was, now that the file at `path` does not have it any more.

    Raises:
        ConfigError: the file has mistakes or no such key.
    """
    path = path.resolve()
    with _locked(path.parent):
        content = _read(path)
        parse_clients(content, path=path)
        document = _load(content)
        for client in document["clients"]:
            keys = client.get("keys", [])
            for index, key in enumerate(keys):
                if key["key_id"] == key_id:
                    del keys[index]
                    _replace(path, document)
                    return str(client["name"])
    raise ConfigError(f"{path} has no key {key_id!r}; `proserve keys list` shows all")


def _key_entry(key: NewKey, expires_at: datetime | None) -> CommentedMap:
    entry = CommentedMap(key_id=key.key_id, sha256=DoubleQuotedScalarString(key.sha256))
    if expires_at is not None:
        entry["expires_at"] = expires_at
    return entry


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Run the body while no other process runs it for the same directory.

    The lock is on the directory, for the file in it is replaced by another one.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)  # A key that was said to be revoked stays so, also after a crash.
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)  # as all our files are
    yaml.width = 1000  # lines stay as long as they are
    return yaml


def _load(content: bytes) -> Any:
    return _yaml().load(content)


def _replace(path: Path, document: Any) -> None:
    stream = io.BytesIO()
    _yaml().dump(document, stream)
    content = stream.getvalue()
    parse_clients(content, path=path)
    try:
        # Made in the same directory, readable and writable for its owner alone.
        with (
            tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file,
            _removed_on_failure(Path(file.name)),
        ):
            _keep_owner(path, file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _keep_owner(path: Path, descriptor: int) -> None:
    """Give an open file the owner of the one at `path`, so that its reader can go on reading."""
    with contextlib.suppress(FileNotFoundError):
        old = path.stat()
        new = os.fstat(descriptor)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink()
        raise
