"""Who stands for the authority over an LMDB directory: each has a file there with its address, locked while it lives.

So the dead are known by their files, which the kernel has unlocked, and whoever looks next deletes those.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from metaserver.errors import EngineError

_DIRECTORY: Final = "metaservers"
_NAME_BYTES: Final = 8
#: The largest address that is read, in bytes.
_MOST: Final = 512
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW


class Announcements:
    """The files in the directory of an engine, and the one that is ours."""

    def __init__(self, engine: Path) -> None:
        self._directory = engine / _DIRECTORY
        self._path = self._directory / os.urandom(_NAME_BYTES).hex()
        self._descriptor: int | None = None

    def announce(self, address: str) -> list[str]:
        """Have a file with this address, unless it is empty; return the addresses of all. Raises EngineError."""
        try:
            for directory in (self._directory.parent, self._directory):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if address:
                self._have(address)
            return [found for path in self._directory.iterdir() if (found := _address(path))]
        except OSError as error:
            raise EngineError(f"{self._directory}: {error.strerror}") from None

    def withdraw(self) -> None:
        """Delete the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(descriptor)

    def _have(self, address: str) -> None:
        if self._descriptor is not None and os.fstat(self._descriptor).st_nlink:
            return
        self.withdraw()  # somebody has looked before it was locked, and deleted it
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        os.write(self._descriptor, address.encode())


def _address(path: Path) -> str:
    """Return what a file says; nothing if its owner is gone, or has said nothing yet."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, _MOST).decode(errors="replace")
    else:
        path.unlink(missing_ok=True)
        return ""
    finally:
        os.close(descriptor)
