"""The socket a metaserver listens on: who may reach it, and what is left of a dead server's.

A unix socket is made for its owner only. A socket file that nobody listens on is a dead server's and is replaced; one
that somebody listens on is not. What other machines can reach has TLS, or has to be asked for.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from typing import Final

from metaserver import wire

_BACKLOG: Final = 1024
#: Seconds to find out whether a socket file has a live server.
_PROBE_S: Final = 2.0


class ListenError(Exception):
    """The address cannot be listened on. The text is one line for the user."""


def listen(address: wire.UnixAddress | wire.TcpAddress, may_be_reached: bool) -> socket.socket:
    """Return a socket; raise :exc:`ListenError`, also for TCP off this machine unless it ``may_be_reached``."""
    try:
        if isinstance(address, wire.UnixAddress):
            return _listen_unix(address.path)
        return _listen_tcp(address, may_be_reached)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror or error}") from None


def address_of(sock: socket.socket) -> str:
    """Return the address a listening socket has, with the port that the kernel chose for port 0."""
    name = sock.getsockname()
    return str(wire.UnixAddress(name) if sock.family == socket.AF_UNIX else wire.TcpAddress(name[0], name[1]))


def remove_socket(sock: socket.socket) -> None:
    """Remove a unix socket's file."""
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sock.getsockname())


def _listen_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        refused = probe.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        raise ListenError(f"another server listens on {path}")
    os.unlink(path)


def _listen_tcp(address: wire.TcpAddress, may_be_reached: bool) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = found[0]
    if not may_be_reached and not ipaddress.ip_address(where[0]).is_loopback:
        raise ListenError(
            f"{address} can be reached from other machines, and nothing would be encrypted; give --tls-cert and"
            " --tls-key, listen on 127.0.0.1 or a unix socket, or give --insecure"
        )
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
