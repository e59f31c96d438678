"""Several hosts on one machine: network namespaces behind a switch that delays, loses and cuts.

Each host has a TAP device in a namespace of its own; the switch is a thread of this process that
passes frames between them and one device of the machine itself. What it does not pass is lost
without a word, as behind a cut cable: nobody hears an end of a connection. Needs root, Debian's
iproute2, and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

TUNSETIFF = 0x400454CA  # from linux/if_tun.h
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
MAX_FRAME_BYTES = 65_536

_TUN = Path("/dev/net/tun")
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def obstacle() -> str | None:
    """Return why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs ip: apt-get install iproute2"
    probe = f"probe{os.getpid()}"
    try:
        os.close(os.open(_TUN, os.O_RDWR))
        _ip("netns", "add", probe)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces or TAP devices are refused: {error}"
    _ip("netns", "delete", probe)
    return None


@dataclass
class Link:
    """How frames travel to and from one host. Changes count at once."""

    is_cut: bool = False
    delay_s: float = 0.0
    """Of each frame, one way."""

    jitter_s: float = 0.0
    """Up to so much more of it, drawn for each frame: some overtake others."""

    loss: float = 0.0
    """Share of frames that are lost, one way."""


@dataclass
class Host:
    """One of the hosts; number 0 is this machine itself."""

    number: int
    address: str
    namespace: str | None
    descriptor: int
    link: Link = field(default_factory=Link)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return a command that runs `arguments` on this host."""
        if self.namespace is None:
            return list(arguments)
        return ["ip", "netns", "exec", self.namespace, *arguments]


@contextlib.contextmanager
def hosts(num_hosts: int) -> Iterator[list[Host]]:
    """Yield this machine and so many hosts, which reach each other at their addresses."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(_host(number)) for number in range(num_hosts + 1)]
        stack.enter_context(_switching(made))
        yield made


@contextlib.contextmanager
def _host(number: int) -> Iterator[Host]:
    """A host with an address that no other test process uses."""
    name = f"lab{_WORKER}h{number}"
    address = f"10.77.{_WORKER}.{number or 254}"
    with contextlib.ExitStack() as stack:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        flags = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
        fcntl.ioctl(descriptor, TUNSETIFF, flags)
        namespace = None
        if number > 0:
            namespace = name
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("link", "set", name, "netns", name)
        inside = () if namespace is None else ("-n", namespace)
        _ip(*inside, "address", "add", f"{address}/24", "dev", name)
        _ip(*inside, "link", "set", name, "up")
        if namespace is not None:
            _ip(*inside, "link", "set", "lo", "up")
        yield Host(number, address, namespace, descriptor)


@contextlib.contextmanager
def _switching(made: Sequence[Host]) -> Iterator[None]:
    """Pass frames between hosts, in a thread."""
    loop = uvloop.new_event_loop()
    places: dict[bytes, Host] = {}  # by hardware address

    def receive(source: Host) -> None:
        frame = os.read(source.descriptor, MAX_FRAME_BYTES)
        target, places[frame[6:12]] = places.get(frame[:6]), source
        for host in made if target is None else (target,):
            if host is not source:
                send(frame, source, host)

    def send(frame: bytes, source: Host, target: Host) -> None:
        links = (source.link, target.link)
        if any(link.is_cut or random.random() < link.loss for link in links):
            return
        delay_s = sum(link.delay_s + random.random() * link.jitter_s for link in links)
        if delay_s > 0:
            loop.call_later(delay_s, write, target.descriptor, frame)
        else:
            write(target.descriptor, frame)

    for host in made:
        loop.add_reader(host.descriptor, receive, host)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for host in made:
            loop.remove_reader(host.descriptor)
        loop.close()


def write(descriptor: int, frame: bytes) -> None:
    """Hand a frame to a host; one that takes none just now loses it."""
    with contextlib.suppress(OSError):
        os.write(descriptor, frame)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
