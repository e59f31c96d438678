"""Starts a service again when it ends, until it does so too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.command_line.deployment import RestartConfig
from orchestrator.command_line.service import Service, StartFailed
from orchestrator.core.backoff import backoff_s


class RestartObserver(Protocol):
    """Hears what becomes of a service that is kept running."""

    def restarts(self, end: str, pause_s: float) -> None:
        """It has come to this `end`, and is started again after a pause."""

    def is_back(self) -> None:
        """It is well again."""

    def stays_down(self, end: str) -> None:
        """It has come to this `end`, too often to be started again."""


class Announcer:
    """Tells an operator."""

    def __init__(
        self, service: Service, config: RestartConfig, announce: Callable[[str], None]
    ) -> None:
        self._name = service.name
        self._config = config
        self._announce = announce

    def restarts(self, end: str, pause_s: float) -> None:
        """It is started again."""
        self._announce(f"{self._name} {end}; it is started again in {pause_s:g} s")

    def is_back(self) -> None:
        """It is well again."""
        self._announce(f"{self._name} is back")

    def stays_down(self, end: str) -> None:
        """It is not started again."""
        self._announce(
            f"{self._name} {end}; it stays down after {self._config.max_restarts} restarts within "
            f"{self._config.window_s:g} s; its log above says why"
        )


class RestartBudget:
    """How often one service may still be started again. Pure: time comes in as an argument."""

    def __init__(self, config: RestartConfig) -> None:
        self._config = config
        self._ends_s: list[float] = []

    def pause_s(self, now_s: float) -> float | None:
        """Return how long to wait before a service that ends now is started again.

        None: it has ended too often of late, and stays down.
        """
        config = self._config
        self._ends_s = [end_s for end_s in self._ends_s if now_s - end_s < config.window_s]
        self._ends_s.append(now_s)
        if len(self._ends_s) > config.max_restarts:
            return None
        return backoff_s(len(self._ends_s), first_s=config.first_pause_s, max_s=config.max_pause_s)


async def keep_running(
    service: Service,
    config: RestartConfig,
    *,
    start_timeout_s: float,
    observer: RestartObserver,
) -> None:
    """Start a running service again whenever it ends; return once it is given up, and stopped."""
    budget = RestartBudget(config)
    while True:
        end = await service.wait_for_end(max_unhealthy_s=config.max_unhealthy_s)
        while (pause_s := budget.pause_s(time.monotonic())) is not None:
            observer.restarts(end, pause_s)
            # Whoever has ended needs no time, and nobody waits for one that does not answer.
            await service.kill()
            await asyncio.sleep(pause_s)
            await service.start()
            try:
                await service.wait_until_well(start_timeout_s)
            except StartFailed as error:
                end = f"did not come back: {error}"
            else:
                observer.is_back()
                break
        else:
            await service.kill()
            observer.stays_down(end)
            return
