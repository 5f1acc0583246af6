"""How both sides find out that the other's machine is gone."""

from __future__ import annotations

import asyncio
import socket

__all__ = ["keep_alive"]


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Let the kernel find out when a TCP peer's machine is gone, though nothing is sent to it: within a minute."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
