"""Directories that were put into the kernel cache whole, so that warming them again can pass them over.

A name that others change, and every doubt, makes a directory unknown. What the kernel has evicted is not noticed here:
the kernel cache is to be asked for the inodes before a directory is passed over.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final, NamedTuple

#: Beside the number of an inode: it is a directory.
DIRECTORY: Final = 1 << 62
INO: Final = (1 << 48) - 1
#: What all of them may take up here, in bytes, and what one takes without its entries.
_BYTES: Final = 64 << 20
_OVERHEAD: Final = 400


class WarmDirectory(NamedTuple):
    """What was put: the entries' inodes with their marks, and the pages that content and listing took.

    ``files``: inode and size, in turn, of the files whose content does not come with their directory. ``data``: all
    other content was put, as far as there was room.
    """

    inodes: array[int]
    files: array[int]
    pages: int
    data: bool

    @property
    def bytes(self) -> int:
        """Of memory, about."""
        return _OVERHEAD + 8 * (len(self.inodes) + len(self.files))


class WarmDirectories:
    """Some directories, the latest put."""

    def __init__(self, most_bytes: int = _BYTES) -> None:
        self._most_bytes = most_bytes
        self._known: OrderedDict[int, WarmDirectory] = OrderedDict()
        self._bytes = 0

    def put(self, ino: int, directory: WarmDirectory) -> None:
        """All of a directory has been put."""
        self.forget(ino)
        self._known[ino] = directory
        self._bytes += directory.bytes
        while self._bytes > self._most_bytes:
            self._bytes -= self._known.popitem(last=False)[1].bytes

    def get(self, ino: int) -> WarmDirectory | None:
        """Return what was put of a directory, if nothing has been heard of it since."""
        return self._known.get(ino)

    def forget(self, ino: int) -> None:
        """A directory may have changed."""
        if (known := self._known.pop(ino, None)) is not None:
            self._bytes -= known.bytes

    def clear(self) -> None:
        """All may have changed."""
        self._known.clear()
        self._bytes = 0
