"""Ports of the loopback device."""

from __future__ import annotations

import contextlib
import os
import socket


def listens(port: int) -> bool:
    """Say whether somebody listens on a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def free_ports(count: int, *distances: int) -> list[int]:
    """Return ports that are free, as are those at these distances from each; raise :exc:`RuntimeError`.

    They are not those of outgoing connections, and processes that ask at the same time look far from each other.
    """
    found: list[int] = []
    for port in range(12_000 + os.getpid() * 997 % 8000, 22_000):
        if all(_is_free(port + distance) for distance in (0, *distances)):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
