"""Hashes of large files, each read once as long as it does not change."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from engines.manifest import FileEntry


class FileHashes:
    """Knows the content of files by path, size and modification time.

    A model has a hundred gigabytes, which take minutes to hash; a file that has kept its size
    and its time is taken to have kept its content, as by make and git.
    """

    def __init__(self, memory: Path) -> None:
        """`memory` is the file that keeps what is known for the next process."""
        self._memory = memory
        self._known: dict[str, dict[str, int | str]] = {}
        # Without it, everything is read again, and that is all.
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._known = json.loads(memory.read_text(encoding="utf-8"))

    def entries(self, folder: Path, names: Iterable[str] | None = None) -> dict[str, FileEntry]:
        """Return what these files of a folder hold, by name; all files, at any depth, if no
        names are given."""
        if names is None:
            names = sorted(
                str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
            )
        entries = {name: self._entry(folder / name) for name in names}
        self._save()
        return entries

    def _entry(self, path: Path) -> FileEntry:
        # Links are followed: Hugging Face's cache names files by links to their content.
        path = path.resolve()
        stat = path.stat()
        known = self._known.get(str(path), {})
        if (known.get("size_bytes"), known.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
            known = asdict(FileEntry.of(path)) | {"mtime_ns": stat.st_mtime_ns}
            self._known[str(path)] = known
        return FileEntry(size_bytes=stat.st_size, sha256=str(known["sha256"]))

    def _save(self) -> None:
        text = json.dumps({path: v for path, v in self._known.items() if Path(path).exists()})
        staged = self._memory.with_suffix(".new")
        staged.write_text(text, encoding="utf-8")
        staged.replace(self._memory)
