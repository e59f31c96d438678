"""Connections to nodes notice by themselves that the other end was cut off."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from router.node_client import NodeClient
from tests.router.fake_node import FakeNode

ROOT = Path(__file__).parents[2]
ISOLATED = ("unshare", "--user", "--map-root-user", "--net")


def sockets_to(port: int) -> list[socket.socket]:
    """Return the connections of this process to a port of this machine, duplicated."""
    links = list(Path("/proc/self/fd").iterdir())
    fds = [int(link.name) for link in links if _target(link).startswith("socket:")]
    found = []
    for fd in fds:
        duplicate = socket.socket(fileno=os.dup(fd))
        try:
            is_wanted = duplicate.getpeername()[1:2] == (port,)
        except OSError:  # listening, or not connected
            is_wanted = False
        if is_wanted:
            found.append(duplicate)
        else:
            duplicate.close()
    return found


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # closed since it was listed
        return ""


async def test_connections_to_nodes_probe_the_other_end_and_give_up_after_two_seconds(
    node: FakeNode,
) -> None:
    client = NodeClient(connect_timeout_s=1.0, stall_timeout_s=5.0)
    await client.snapshot(node.url, timeout_s=5.0)
    port = int(node.url.rpartition(":")[2])

    (connection,) = sockets_to(port)

    with connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = {
            name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in (
                "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT", "TCP_NODELAY"
            )
        }  # fmt: skip
    client.close()
    assert options == {
        "TCP_KEEPIDLE": 1,
        "TCP_KEEPINTVL": 1,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 2000,
        "TCP_NODELAY": 1,
    }


@pytest.fixture
def _isolation() -> None:
    """For tests that cut a network: one of their own."""
    if subprocess.run([*ISOLATED, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine allows no network namespaces")


@pytest.mark.usefixtures("_isolation")
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_node_that_is_cut_off_is_noticed_before_and_after_its_first_token(
    num_tokens: int,
) -> None:
    """No end of the connection arrives, and it may be silent for 1,000 s: only probing tells."""
    result = subprocess.run(
        [*ISOLATED, sys.executable, "-m", "tests.router.cut_off", str(num_tokens)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    assert "Connection timed out" in result.stdout, result.stderr
