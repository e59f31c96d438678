"""Logs of processes, bounded in size, and reading their ends."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

MAX_LOG_BYTES = 16 * 1024 * 1024
"""Of one file; the one before it, with `.1` at its end, is kept too."""

POLL_S = 0.2
"""Pause between two looks for new lines."""

_CHUNK_BYTES = 65_536


class RotatingLog:
    """A file that begins anew when it is full. Bytes go into it as they come."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append, and begin a new file behind the last line that fits."""
        self._file.write(data)
        if self._file.tell() > self._max_bytes and data.endswith(b"\n"):
            self._file.close()
            self._path.replace(previous(self._path))
            self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """End writing."""
        self._file.close()


def previous(path: Path) -> Path:
    """Return where the file before a log is."""
    return path.with_name(f"{path.name}.1")


async def copy_output(output: asyncio.StreamReader, log: RotatingLog) -> None:
    """Write all that a process says to a log."""
    while data := await output.read(_CHUNK_BYTES):
        log.write(data)


def last_lines(path: Path, num_lines: int) -> list[str]:
    """Return the last lines of a log, fewer if there are not so many; none without a file."""
    lines: deque[str] = deque(maxlen=num_lines)
    for part in (previous(path), path):
        if part.exists():
            with part.open(encoding="utf-8", errors="replace") as file:
                lines.extend(line.rstrip("\n") for line in file)
    return list(lines)


def follow(
    paths: Mapping[str, Path], *, sleep: Callable[[float], None] = time.sleep
) -> Generator[tuple[str, str]]:
    """Yield (name, line) as lines come to the logs with these names, for ever.

    Lines that are there already do not count; logs may begin, and begin anew, meanwhile.
    """
    readers = {name: _Reader(path) for name, path in paths.items()}
    try:
        while True:
            for name, reader in readers.items():
                for line in reader.new_lines():
                    yield name, line
            sleep(POLL_S)
    finally:
        for reader in readers.values():
            reader.close()


class _Reader:
    """Reads what is appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        if path.exists():
            self._file = path.open("rb")
            self._file.seek(0, 2)

    def new_lines(self) -> Iterator[str]:
        if self._file is not None:
            yield from self._lines(self._file)
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if self._file is not None and _is_same(file, self._file):
                return
        self.close()
        self._file = self._path.open("rb")
        yield from self._lines(self._file)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        *lines, self._rest = (self._rest + file.read()).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def _is_same(first: BinaryIO, second: BinaryIO) -> bool:
    return _identity(first) == _identity(second)


def _identity(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino
