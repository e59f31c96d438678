"""Tasks on several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Workers:
    """Does tasks in any order and returns their answers in the tasks' order."""

    def __init__(self, pool: ProcessPoolExecutor | None, progress: Progress) -> None:
        self._pool = pool
        self._progress = progress

    def do(
        self, title: str, function: Callable[[Task], Answer], tasks: Sequence[Task]
    ) -> list[Answer]:
        """Return `function` of each task; the bar beside `title` counts them."""
        bar = self._progress.add_task(title, total=len(tasks))
        answers = map(function, tasks) if self._pool is None else self._pool.map(function, tasks)
        collected = []
        for answer in answers:
            collected.append(answer)
            self._progress.advance(bar)
        return collected


@contextmanager
def workers(num_processes: int, console: Console) -> Iterator[Workers]:
    """Give workers on `num_processes` processes; for one that is this process itself."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        if num_processes == 1:
            yield Workers(None, progress)
            return
        # Spawned: forking a process that has threads, such as the progress bar's, is not safe.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            yield Workers(pool, progress)
