"""The client of a channel's control socket: one JSON line asked, one JSON line answered."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

import msgspec

from fuseclient.errors import UserError

_REPLY_MAX: Final = 4 * 1024 * 1024


class ControlError(UserError):
    """The channel did not answer, or refused the command."""


def ask(path: Path, command: str, arguments: dict[str, Any] | None = None, timeout_s: float = 10.0) -> dict[str, Any]:
    """Send a command to the channel that listens at ``path`` and return its reply; raise :exc:`ControlError`."""
    request = msgspec.json.encode({"command": command, "arguments": arguments or {}}) + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(request)
            line = _read_line(connection)
    except TimeoutError:
        raise ControlError(f"the mount does not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ControlError(f"the mount's control socket {path}: {error.strerror or error}") from None
    return _decode(line)


def _read_line(connection: socket.socket) -> bytes:
    """Read to the newline. The timeout of the connection holds for each piece."""
    received = bytearray()
    while not received.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece or len(received) + len(piece) > _REPLY_MAX:
            raise ControlError("the mount ended its answer in the middle, or it is too long")
        received += piece
    return bytes(received)


def _decode(line: bytes) -> dict[str, Any]:
    try:
        reply = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ControlError(f"the mount's answer cannot be understood: {error}") from None
    if "error" in reply:
        raise ControlError(str(reply["error"]))
    return reply
