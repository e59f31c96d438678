from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

from orchestrator.command_line.launch.log_files import (
    RotatingLog,
    follow,
    last_lines,
    previous,
)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_log_begins_anew_behind_the_line_that_fills_it(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    log = RotatingLog(path, max_bytes=10)
    for data in (b"first\n", b"second, of two", b" parts\n", b"third\n"):
        log.write(data)
    log.close()

    assert previous(path).read_bytes() == b"first\nsecond, of two parts\n"
    assert path.read_bytes() == b"third\n"


def test_a_log_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    for data in (b"first\n", b"second\n"):
        log = RotatingLog(path)
        log.write(data)
        log.close()

    assert path.read_bytes() == b"first\nsecond\n"


def test_the_last_lines_reach_into_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    previous(path).write_text("1\n2\n")
    path.write_text("3\n4")

    assert last_lines(path, 3) == ["2", "3", "4"]
    assert last_lines(path, 9) == ["1", "2", "3", "4"]
    assert last_lines(tmp_path / "none.log", 3) == []


def test_following_shows_each_new_line_once_across_files(tmp_path: Path) -> None:
    path, other = tmp_path / "node.log", tmp_path / "router.log"
    path.write_text("old\n")
    steps: Iterator[Callable[[], object]] = iter(
        [
            lambda: append(path, "half a "),
            lambda: append(path, "line\nanother\n"),
            lambda: path.rename(previous(path)),
            lambda: append(path, "in a new file\n"),
            lambda: append(other, "born\n"),
        ]
    )

    def change(_: float) -> None:
        next(steps)()

    with closing(follow({"node": path, "router": other}, sleep=change)) as lines:
        found = list(islice(lines, 4))

    assert found == [
        ("node", "half a line"),
        ("node", "another"),
        ("node", "in a new file"),
        ("router", "born"),
    ]
