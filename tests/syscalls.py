"""The system calls on file ranges and nameless files that Python has no function for, and maps of data and holes."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
COLLAPSE_RANGE: Final = 0x08
ZERO_RANGE: Final = 0x10
INSERT_RANGE: Final = 0x20

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
#: struct linux_dirent64, without its name.
_DIRENT: Final = struct.Struct("=QqHB")
_AT_FDCWD: Final = -100
_AT_SYMLINK_FOLLOW: Final = 0x400
_AT_EMPTY_PATH: Final = 0x1000


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _check(_LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def link_open_file(fd: int, path: str | os.PathLike[str], *, by_proc: bool) -> None:
    """Give an open file a name, by its link in /proc or by AT_EMPTY_PATH."""
    if by_proc:
        source, flags, directory = f"/proc/self/fd/{fd}".encode(), _AT_SYMLINK_FOLLOW, _AT_FDCWD
    else:
        source, flags, directory = b"", _AT_EMPTY_PATH, fd
    _check(_LIBC.linkat(directory, source, _AT_FDCWD, os.fsencode(path), flags))


def seek(fd: int, offset: int, whence: int) -> int | None:
    """lseek(2); None for ENXIO."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def getdents(fd: int, size: int) -> list[tuple[bytes, int, int, int]]:
    """getdents64(2) with a buffer of so many bytes: the name, inode, offset and type of each entry it brings."""
    buffer = ctypes.create_string_buffer(size)
    count = int(_LIBC.getdents64(fd, buffer, ctypes.c_size_t(size)))
    _check(count)
    found, at = [], 0
    while at < count:
        ino, offset, length, kind = _DIRENT.unpack_from(buffer, at)
        name = buffer.raw[at + _DIRENT.size : at + length].split(b"\0", 1)[0]
        found.append((name, ino, offset, kind))
        at += length
    return found


def data_map(fd: int, start: int = 0) -> list[tuple[int, int]]:
    """Return the (begin, end) of all data from an offset on, by lseek."""
    found: list[tuple[int, int]] = []
    position: int | None = start
    while position is not None and (begin := seek(fd, position, os.SEEK_DATA)) is not None:
        position = seek(fd, begin, os.SEEK_HOLE)
        assert position is not None
        assert begin < position
        found.append((begin, position))
    return found
