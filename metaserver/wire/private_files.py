"""Files that hold secrets, as both sides read them: tokens, keys, passwords and credentials of stores."""

from __future__ import annotations

import os
import stat
from typing import Final

#: The most bytes that such a file has.
_MOST: Final = 1 << 20


class NotPrivate(Exception):
    """A file of secrets cannot be used. The text is one line for the user."""


def read_private(path: str) -> bytes:
    """Return the content of a file that is its owner's alone; raise :exc:`NotPrivate`."""
    try:
        with open(path, "rb", buffering=0, opener=_open) as file:
            _check(path, os.fstat(file.fileno()))
            content = file.read(_MOST + 1) or b""
    except OSError as error:
        raise NotPrivate(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > _MOST:
        raise NotPrivate(f"{path} is larger than {_MOST} bytes")
    return content


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # nobody may ever open a FIFO's other end


def _check(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotPrivate(f"{path} is not a file")
    if status.st_uid != os.geteuid():
        raise NotPrivate(f"{path} belongs to uid {status.st_uid}; it has to be owned by uid {os.geteuid()}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise NotPrivate(f"{path} can be used by others (mode {mode:04o}); make it private: chmod 600 {path}")
