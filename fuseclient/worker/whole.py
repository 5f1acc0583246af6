"""Directories of which every name is known, so that what they lack need not be asked for.

Who makes a file looks for it first; in a directory that was made here, or has been fetched whole, the answer is known
without a request for each new name; and who removes one knows what it stood for. Names made and removed here are kept
up with. What others change, and every doubt, makes a directory unknown again. Pure; the lease is the caller's to look
at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

#: Names kept of all directories together, and directories.
_NAMES: Final = 1 << 18
_DIRECTORIES: Final = 4096


class WholeDirectories:
    """The names of some directories, the latest used."""

    def __init__(self, most_names: int = _NAMES) -> None:
        self._most_names = most_names
        self._known: OrderedDict[int, dict[bytes, int]] = OrderedDict()
        self._count = 0

    def know(self, ino: int, names: Mapping[bytes, int]) -> None:
        """These are all the names that a directory has, and the inodes that they stand for."""
        self.forget(ino)
        known = self._known[ino] = dict(names)
        self._count += len(known)
        while self._known and (self._count > self._most_names or len(self._known) > _DIRECTORIES):
            self._count -= len(self._known.popitem(last=False)[1])

    def lacks(self, ino: int, name: bytes) -> bool:
        """Say whether it is known that a directory has no such name."""
        known = self._known.get(ino)
        if known is None:
            return False
        self._known.move_to_end(ino)
        return name not in known

    def find(self, ino: int, name: bytes) -> int | None:
        """Return the inode that a name stands for, if that is known."""
        known = self._known.get(ino)
        return None if known is None else known.get(name)

    def named(self, ino: int, name: bytes, inode: int) -> None:
        """A name was given to an inode here."""
        known = self._known.get(ino)
        if known is None:
            return
        self._count += name not in known
        known[name] = inode
        if self._count > self._most_names:
            self.forget(ino)

    def unnamed(self, ino: int, name: bytes) -> None:
        """A name was removed here."""
        known = self._known.get(ino)
        if known is not None and name in known:
            del known[name]
            self._count -= 1

    def forget(self, ino: int) -> None:
        """A directory may have changed."""
        self._count -= len(self._known.pop(ino, ()))

    def clear(self) -> None:
        """All may have changed."""
        self._known.clear()
        self._count = 0
