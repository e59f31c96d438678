"""Asks a node for a sequence, cuts the link between them, and says how the client notices.

For a network namespace of its own, whose loopback device it switches off:

    unshare --user --map-root-user --net python -m tests.router.cut_off NUM_TOKENS_BEFORE
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys

from orchestrator.core.errors import NodeUnavailable
from orchestrator.core.request import SamplingParams
from orchestrator.wire import GenerateRequest, TokenEvent
from router.node_client import NodeClient
from tests.router.fake_node import Beat, FakeNode, Hang

SIOCSIFFLAGS = 0x8914  # from linux/sockios.h
IFF_UP = 1  # from linux/if.h


def switch_loopback(*, is_on: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", IFF_UP if is_on else 0)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


async def notice(url: str, num_tokens: int) -> str:
    client = NodeClient(connect_timeout_s=1.0, stall_timeout_s=1000.0)
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=9, seed=0),
        priority_class="normal",
        weight=1.0,
    )
    num_received = 0
    try:
        async for events in client.generate(url, request):
            num_received += len(events)
            if num_received == num_tokens:
                switch_loopback(is_on=False)
    except NodeUnavailable as error:
        return str(error)
    finally:
        client.close()
    return "the answer ended"


def main() -> None:
    num_tokens = int(sys.argv[1])
    switch_loopback(is_on=True)
    node = FakeNode()
    node.script = lambda _: [*[TokenEvent((65,))] * num_tokens, Beat(), Hang()]
    with node.serve() as server:
        sys.stdout.write(asyncio.run(notice(server.url, num_tokens)))
        server.kill()


if __name__ == "__main__":
    main()
