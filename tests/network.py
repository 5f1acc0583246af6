"""A network of the test's own: namespaces, each with a cable to one in the middle, that can be unplugged.

The namespaces belong to processes that end with the test's process; nothing of them has a name in the file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

import pytest
import rig

#: Where the one in the middle is reached from all others.
MIDDLE: Final = "10.77.255.1"


class Network:
    """Namespaces are known by name; commands run in one by its :meth:`prefix`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._pids: dict[str, int] = {}
        self._add("middle")
        self._ip("middle", "link", "set", "lo", "up")
        self._ip("middle", "address", "add", f"{MIDDLE}/32", "dev", "lo")

    def add(self, name: str) -> None:
        """Add a namespace with a cable of its own to the middle."""
        number = len(self._pids)
        cable, near, far = f"to-{name}", f"10.77.{number}.1", f"10.77.{number}.2"
        self._add(name)
        peer = ("peer", "name", "cable", "netns", str(self._pids[name]))
        self._ip("middle", "link", "add", cable, "type", "veth", *peer)
        for where, device, address in (("middle", cable, near), (name, "cable", far)):
            self._ip(where, "address", "add", f"{address}/24", "dev", device)
            self._ip(where, "link", "set", device, "up")
        self._ip(name, "route", "add", "default", "via", near)

    def unplug(self, name: str) -> None:
        """Have nothing come through from now on, in either direction; nobody is told."""
        self._ip("middle", "link", "set", f"to-{name}", "down")

    def plug_in(self, name: str) -> None:
        """Have everything come through again."""
        self._ip("middle", "link", "set", f"to-{name}", "up")

    def prefix(self, name: str) -> tuple[str, ...]:
        """Return what a command is to be run by to be in a namespace."""
        return "nsenter", f"--net=/proc/{self._pids[name]}/ns/net"

    def _add(self, name: str) -> None:
        process = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._stack.callback(_end, process)
        here = os.readlink("/proc/self/ns/net")
        rig.wait_for(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != here, "there is a namespace")
        self._pids[name] = process.pid

    def _ip(self, where: str, *arguments: str) -> None:
        subprocess.run([*self.prefix(where), "ip", *arguments], check=True, stdin=subprocess.DEVNULL)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(rig.WAIT_S)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network for the body. Skips where there can be none."""
    for program in ("ip", "nsenter", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with contextlib.ExitStack() as stack:
        try:
            made = Network(stack)
            made.add("trial")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces with cables here: {error}")
        yield made
