"""Services that end are started again: real processes, small ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from orchestrator.command_line.deployment import RestartConfig
from orchestrator.command_line.service import Service, StartFailed
from orchestrator.command_line.supervisor import Announcer, RestartBudget, keep_running

STUB = Path(__file__).with_name("stub_service.py")
WAIT_S = 30.0
"""Upper bound of every wait; reached only if something hangs."""

QUICK = RestartConfig(max_restarts=2, first_pause_s=0.01, max_pause_s=0.01)


@pytest.mark.parametrize(
    ("ends_s", "pauses_s"),
    [
        pytest.param([0, 1, 2], [0.5, 1.0, 2.0], id="doubling"),
        pytest.param([0, 1, 2, 3, 4], [0.5, 1.0, 2.0, 3.0, None], id="at most 3 s, four times"),
        pytest.param([0, 100, 200, 300, 400], [0.5] * 5, id="those long ago are forgotten"),
        pytest.param([0, 50, 99, 101, 150], [0.5, 1.0, 2.0, 2.0, 2.0], id="within 100 s"),
    ],
)
def test_pauses_double_until_a_service_stays_down(
    ends_s: list[float], pauses_s: list[float | None]
) -> None:
    budget = RestartBudget(
        RestartConfig(max_restarts=4, window_s=100, first_pause_s=0.5, max_pause_s=3.0)
    )

    assert [budget.pause_s(end_s) for end_s in ends_s] == pauses_s


def test_no_restarts_means_none() -> None:
    assert RestartBudget(RestartConfig(max_restarts=0)).pause_s(0.0) is None


@dataclass
class Supervised:
    """A stub service under supervision, and what was said about it."""

    service: Service
    announcements: asyncio.Queue[str]
    supervising: asyncio.Task[None]

    async def next_announcement(self) -> str:
        return await asyncio.wait_for(self.announcements.get(), WAIT_S)

    async def end(self) -> None:
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            async with httpx.AsyncClient() as client:
                await client.post(f"{self.service.url}/exit")


def stub(tmp_path: Path, *behaviours: str, needs_others: bool = False) -> Service:
    state_file = tmp_path / "state"
    state_file.write_text("\n".join(behaviours))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (sys.executable, str(STUB), str(port), str(state_file))
    return Service("stub", f"http://127.0.0.1:{port}", command, needs_others=needs_others)


@contextlib.asynccontextmanager
async def supervised(service: Service, config: RestartConfig = QUICK) -> AsyncIterator[Supervised]:
    announcements: asyncio.Queue[str] = asyncio.Queue()
    await service.start()
    try:
        await service.wait_until_healthy(WAIT_S)
        supervising = asyncio.create_task(
            keep_running(
                service,
                config,
                start_timeout_s=WAIT_S,
                observer=Announcer(service, config, announcements.put_nowait),
            )
        )
        yield Supervised(service, announcements, supervising)
        supervising.cancel()
        await asyncio.wait({supervising})
    finally:
        await service.kill()


async def test_a_service_that_ends_is_started_again(tmp_path: Path) -> None:
    async with supervised(stub(tmp_path, "healthy")) as found:
        await found.end()

        said = "stub ended with status 3; it is started again in 0.01 s"
        assert await found.next_announcement() == said
        assert await found.next_announcement() == "stub is back"
        await found.service.wait_until_healthy(WAIT_S)


async def test_a_service_that_waits_for_others_is_back_as_soon_as_it_answers(
    tmp_path: Path,
) -> None:
    """As a router does whose nodes are all away; at the very first start nobody is greeted
    before it can serve."""
    service = stub(tmp_path, "healthy", "ill", needs_others=True)
    async with supervised(service) as found:
        await found.end()

        await found.next_announcement()
        assert await found.next_announcement() == "stub is back"
        with pytest.raises(StartFailed, match="stub is not healthy after 0 s"):
            await service.wait_until_healthy(0.0)


async def test_a_service_that_says_it_is_beyond_help_is_started_again(tmp_path: Path) -> None:
    service = stub(tmp_path, "hopeless", "healthy")
    await service.start()
    try:
        with pytest.raises(StartFailed, match="stub cannot start: hopeless, as told"):
            await service.wait_until_healthy(WAIT_S)
        announcements: asyncio.Queue[str] = asyncio.Queue()
        supervising = asyncio.create_task(
            keep_running(
                service,
                QUICK,
                start_timeout_s=WAIT_S,
                observer=Announcer(service, QUICK, announcements.put_nowait),
            )
        )

        first = await asyncio.wait_for(announcements.get(), WAIT_S)
        second = await asyncio.wait_for(announcements.get(), WAIT_S)

        assert first.startswith("stub cannot serve any more: hopeless, as told; it is started")
        assert second == "stub is back"
        supervising.cancel()
    finally:
        await service.kill()


async def test_a_service_that_does_not_come_back_is_given_up_with_the_reason(
    tmp_path: Path,
) -> None:
    """It ends once by itself and twice at its start: three ends, and two restarts are allowed."""
    async with supervised(stub(tmp_path, "healthy", "exit 7")) as found:
        await found.end()
        await asyncio.wait_for(found.supervising, WAIT_S)

        said = [await found.next_announcement() for _ in range(3)]

    assert said[1] == (
        "stub did not come back: stub ended with status 7; its log above says why; "
        "it is started again in 0.01 s"
    )
    assert said[2].endswith("it stays down after 2 restarts within 300 s; its log above says why")


async def test_a_service_that_stops_answering_is_killed_and_started_again(tmp_path: Path) -> None:
    """Nothing ends a stopped process from inside."""
    config = RestartConfig(max_unhealthy_s=0.1, first_pause_s=0.01)
    service = stub(tmp_path, "healthy", "healthy")
    async with supervised(service, config) as found:
        pid = _pid_of(service)
        os.kill(pid, signal.SIGSTOP)

        assert "has not been healthy for 0.1 s: it does not answer" in (
            await found.next_announcement()
        )
        assert await found.next_announcement() == "stub is back"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _pid_of(service: Service) -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    port = service.url.rpartition(":")[2]
    (pid,) = [
        int(child)
        for child in children
        if f"\0{port}\0" in Path(f"/proc/{child}/cmdline").read_text()
    ]
    return pid
