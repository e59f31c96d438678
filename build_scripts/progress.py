"""Progress bars of a build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class WorkProgress:
    """One bar per part of the work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def console(self) -> Console:
        """Where lines can be printed above the bars."""
        return self._progress.console

    def part(self, name: str, total: float) -> Callable[[float], None]:
        """Show a bar and return what sets how much of `total` is done."""
        task = self._progress.add_task(name, total=total)
        return lambda done: self._progress.update(task, completed=done)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Show a bar that moves while the block runs, of which nobody knows how long it takes."""
        task = self._progress.add_task(name, total=None)
        try:
            yield
        except BaseException:
            self._progress.stop_task(task)
            raise
        self._progress.update(task, total=1, completed=1)


@contextmanager
def work_progress(console: Console) -> Iterator[WorkProgress]:
    """Show bars while the block runs."""
    columns = (TextColumn("{task.description:22}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield WorkProgress(progress)
