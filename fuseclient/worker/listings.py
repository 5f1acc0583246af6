"""Listings on their way into the kernel cache: whole directories, put together from fetches that follow one another.

A directory's listing is what BPF answers READDIR from, so it is put when the last of it has come, and only if no name
was made or removed since the first. Who drops a name says so here. Nothing is awaited.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

#: Positions of "." and ".." in a listing; entries follow at their cookie and this.
DOTS: Final = 2
#: Directories that are being put together at once.
_AT_ONCE: Final = 16
#: ``struct fuse_dirent``: inode, offset, length of the name, type. The name follows, filled up to 8 bytes.
_DIRENT: Final = struct.Struct("=QQII")
_PADDING: Final = [bytes(-(_DIRENT.size + length) % 8) for length in range(wire.MAX_NAME + 1)]
_DIRECTORY: Final = 4


class Entry(NamedTuple):
    """One entry of a listing."""

    name: bytes
    cookie: int
    attributes: wire.Attributes


class _Part:
    """The beginning of a directory, up to ``last``."""

    def __init__(self, ino: int) -> None:
        self.chunks = [b"".join(_dirent(ino, dots, _DIRECTORY, b"." * dots) for dots in range(1, DOTS + 1))]
        self.last = 0
        self.bytes = 0

    def add(self, entries: Iterable[Entry | wire.DirectoryEntry]) -> None:
        chunk = b"".join(
            _dirent(entry.attributes.ino, entry.cookie + DOTS, entry.attributes.mode >> 12, entry.name)
            for entry in entries
        )
        self.chunks.append(chunk)
        self.bytes += len(chunk)


def _dirent(ino: int, offset: int, kind: int, name: bytes) -> bytes:
    return _DIRENT.pack(ino, offset, len(name), kind) + name + _PADDING[len(name)]


class Listings:
    """The directories that are being put together. Those of more than ``cache.listing_limit`` bytes are not."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._parts: OrderedDict[int, _Part] = OrderedDict()

    def fetched(self, ino: int, after: int, entries: Sequence[Entry | wire.DirectoryEntry], *, complete: bool) -> None:
        """All entries of a directory behind the cookie ``after`` have come, in order; ``complete``: to its end."""
        part = self._parts.get(ino)
        if part is None:
            if after or not self._cache.listing_limit:
                return
            part = self._parts[ino] = _Part(ino)
        elif after > part.last:
            return
        part.add(entry for entry in entries if entry.cookie > part.last)
        if entries:
            part.last = max(part.last, entries[-1].cookie)
        if complete:
            self._cache.put_listing(ino, b"".join(part.chunks))
        if complete or part.bytes > self._cache.listing_limit:
            del self._parts[ino]
        elif len(self._parts) > _AT_ONCE:
            self._parts.popitem(last=False)

    def forget(self, ino: int) -> None:
        """A name was made in a directory, or removed: its listing is out of date."""
        self._parts.pop(ino, None)
        self._cache.drop_listing(ino)

    def clear(self) -> None:
        """Everything may be out of date; the caller drops what is in the kernel cache."""
        self._parts.clear()
