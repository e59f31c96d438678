"""A real etcd for tests, started, stopped, killed and held."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.integration.deployments import free_port, until

needs_etcd = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="needs etcd: apt-get install etcd-server"
)


@dataclass
class EtcdServer:
    """One server, whose data outlives its process."""

    directory: Path
    port: int
    peer_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "etcd",
                    *("--data-dir", str(self.directory / "data")),
                    *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
                    *("--listen-peer-urls", f"http://127.0.0.1:{self.peer_port}"),
                    *("--unsafe-no-fsync", "--logger", "zap"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(self._is_healthy, "etcd answers")

    def kill(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def hold(self) -> None:
        """Have it say nothing, with all its connections open."""
        self._send(signal.SIGSTOP)

    def let_go(self) -> None:
        """Have it go on."""
        self._send(signal.SIGCONT)

    def wipe(self) -> None:
        """Kill it and start it without anything that it knew."""
        self.kill()
        shutil.rmtree(self.directory / "data")
        self.start()

    def _send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def _is_healthy(self) -> bool:
        try:
            return '"true"' in httpx.get(f"{self.url}/health", timeout=5.0).text
        except httpx.TransportError:
            return False


@contextmanager
def running_etcd(directory: Path) -> Iterator[EtcdServer]:
    """Run a server of its own, with its data in `directory`."""
    server = EtcdServer(directory, free_port(), free_port())
    server.start()
    try:
        yield server
    finally:
        server.let_go()
        server.kill()
