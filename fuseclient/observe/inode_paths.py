"""The path of an inode of a FUSE mount, as far as the kernel knows one at this moment.

A file handle (open_by_handle_at(2)) of FUSE is the inode's number and generation: ``fuse_encode_fh`` of the kernel's
fs/fuse/inode.c. The kernel finds by it what is in its inode cache and asks nobody.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

#: FILEID_INO64_GEN
_HANDLE_TYPE: Final = 0x81
_ROOT: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_char * 12))


class InodePaths:
    """Finds paths below a mount point. A context, which holds the mount point open."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = os.fsencode(mountpoint)
        self._descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> InodePaths:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def directory(self, ino: int) -> bytes | None:
        """Return the path, from the mount point, of a directory, or of that which a file is in.

        It begins with a slash. ``None``: the kernel knows none now.
        """
        if ino == _ROOT:
            return b"/"
        if (path := self._path(ino, os.O_DIRECTORY)) is not None:
            return path
        path = self._path(ino, os.O_NOFOLLOW)
        return None if path is None else os.path.dirname(path)

    def _path(self, ino: int, flag: int) -> bytes | None:
        descriptor = self._open(ino, flag)
        if descriptor < 0:
            return None
        try:
            found = os.readlink(b"/proc/self/fd/%d" % descriptor)
        finally:
            os.close(descriptor)
        if not found.startswith(self._mountpoint + b"/") or found.endswith(b" (deleted)"):
            return None
        return found[len(self._mountpoint) :]

    def _open(self, ino: int, flag: int) -> int:
        packed = struct.pack("=III", ino >> 32, ino & 0xFFFFFFFF, 0)
        handle = _Handle(len(packed), _HANDLE_TYPE, b"")
        ctypes.memmove(ctypes.addressof(handle) + _Handle.handle.offset, packed, len(packed))
        return int(_libc.open_by_handle_at(self._descriptor, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC | flag))
