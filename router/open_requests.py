"""The requests that a router is serving, so that a shutdown can end them all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.core.errors import NodeUnavailable


class OpenRequests:
    """Requests under way. Belongs to one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._has_ended = False

    def end_all(self) -> None:
        """Interrupt every body of `until_shutdown`, wherever it waits, and refuse later ones."""
        self._has_ended = True
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    @contextmanager
    def until_shutdown(self) -> Iterator[None]:
        """Run the body, a part of serving one request, unless all requests are ended.

        Raises:
            NodeUnavailable: `end_all` was called, before the body or in the middle of it.
        """
        if self._has_ended:
            raise _shutting_down()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            was_interrupted = task not in self._tasks
            if not was_interrupted or task.uncancel() > 0:
                raise  # By another one as well, who has to see it.
            raise _shutting_down() from None
        finally:
            self._tasks.discard(task)


def _shutting_down() -> NodeUnavailable:
    return NodeUnavailable("the router is shutting down; try again")
