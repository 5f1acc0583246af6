"""Where an inode is in the tree, for people. Directories are sought in their parents' listings, up to a limit."""

from __future__ import annotations

import stat
from typing import Final

from metaserver import keys
from metaserver.engine.base import Snapshot
from metaserver.fsck.findings import text_of
from metaserver.fsck.rows import find_inode
from metaserver.records import unpack_listed
from metaserver.volumes import Volume
from metaserver.wire import ROOT_INO

#: Paths of directories that are remembered, rows of a listing that are searched, and directories above one another.
_REMEMBERED: Final = 10_000
_SEARCHED: Final = 100_000
_DEEPEST: Final = 256
_PAGE: Final = 1000


class Paths:
    """The paths of one snapshot. What cannot be found is called "inode N"."""

    def __init__(self, snapshot: Snapshot, volume: Volume) -> None:
        self._snapshot = snapshot
        self._volume = volume
        self._known: dict[int, str] = {}

    def of(self, ino: int, directory: int, cookie: int) -> str:
        """Return the path of an inode by one of its entries."""
        row = self._snapshot.get(keys.listing(self._volume.id, directory, cookie))
        if row is None:
            return f"inode {ino}"
        return self.below(directory, unpack_listed(row)[1])

    def below(self, directory: int, name: bytes) -> str:
        """Return the path of an entry."""
        return f"{self.of_directory(directory).removesuffix('/')}/{text_of(name)}"

    def of_directory(self, ino: int, depth: int = 0) -> str:
        """Return a directory's path; anything else than a directory is called by its number."""
        if ino == ROOT_INO:
            return "/"
        path = self._known.get(ino)
        if path is None:
            path = self._find(ino, depth)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[ino] = path
        return path

    def _find(self, ino: int, depth: int) -> str:
        inode = find_inode(self._snapshot, self._volume, ino)
        if inode is None or not stat.S_ISDIR(inode.mode) or depth >= _DEEPEST:
            return f"inode {ino}"
        name = self._name(inode.parent, ino)
        if name is None:
            return f"inode {ino}"
        return f"{self.of_directory(inode.parent, depth + 1).removesuffix('/')}/{text_of(name)}"

    def _name(self, directory: int, ino: int) -> bytes | None:
        start, end = keys.listing_from(self._volume.id, directory, 0)
        for _ in range(_SEARCHED // _PAGE):
            rows = self._snapshot.range(start, end, limit=_PAGE)
            for _, value in rows:
                listed, name = unpack_listed(value)
                if listed == ino:
                    return name
            if len(rows) < _PAGE:
                return None
            start = rows[-1][0] + b"\0"
        return None
