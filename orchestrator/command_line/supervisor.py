"""Starts a service again when it ends, until it does so too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from orchestrator.command_line.deployment import RestartConfig
from orchestrator.command_line.service import Service, StartFailed
from orchestrator.core.backoff import backoff_s


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
    announce: Callable[[str], None],
) -> None:
    """Start a running service again whenever it ends; return once it is given up, and stopped."""
    budget = RestartBudget(config)
    while True:
        end = await service.wait_for_end(max_unhealthy_s=config.max_unhealthy_s)
        while (pause_s := budget.pause_s(time.monotonic())) is not None:
            announce(f"{service.name} {end}; it is started again in {pause_s:g} s")
            # Whoever has ended needs no time, and nobody waits for one that does not answer.
            await service.kill()
            await asyncio.sleep(pause_s)
            await service.start()
            try:
                await service.wait_until_well(start_timeout_s)
            except StartFailed as error:
                end = f"did not come back: {error}"
            else:
                announce(f"{service.name} is back")
                break
        else:
            await service.kill()
            announce(
                f"{service.name} {end}; it stays down after {config.max_restarts} restarts within "
                f"{config.window_s:g} s; its log above says why"
            )
            return
