"""Content brought into the disk cache before anybody asks for it, as far as there is room.

What one :class:`Keeper` has brought, or found there, is not to be evicted for what it brings next: it adds up what that
takes, and ends where the limit is. Where objects are kept, a file's objects are; where only whole files are, because
the store is on this machine anyway, files that the kernel can read by itself are put together.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from fuseclient.data.cached_objects import CachedObjects
from fuseclient.data.disk_cache import DiskCache
from fuseclient.data.reader import Reader
from fuseclient.data.whole_files import LEAST_BYTES, WholeFiles
from metaserver import wire


class Kept(enum.Enum):
    """What came of bringing a file."""

    BROUGHT = enum.auto()
    WAS_THERE = enum.auto()
    NO_ROOM = enum.auto()
    #: Such files are read from the store, which is on this machine; or there is no disk cache.
    NO_PLACE = enum.auto()


class Keeper:
    """Brings files into a disk cache. ``objects`` and ``whole``: in which form; ``None``: not in this one."""

    def __init__(
        self, disk: DiskCache | None, reader: Reader, objects: CachedObjects | None, whole: WholeFiles | None
    ) -> None:
        self._disk = disk
        self._reader = reader
        self._objects = objects
        self._whole = whole
        self._bytes = 0

    @property
    def limit_bytes(self) -> int:
        """What may lie in the disk cache at most."""
        return self._disk.room_bytes() if self._disk is not None else 0

    async def bring(self, attributes: wire.Attributes) -> Kept:
        """Have a file's content here. Raises as the reader does."""
        if self._disk is None or (self._objects is None and (self._whole is None or attributes.size < LEAST_BYTES)):
            return Kept.NO_PLACE
        if self._bytes + attributes.size > self.limit_bytes:
            return Kept.NO_ROOM
        self._bytes += attributes.size
        outcome = await (
            self._bring_objects(self._objects, attributes) if self._objects else self._bring_whole(attributes)
        )
        if outcome is Kept.NO_ROOM:
            self._bytes -= attributes.size
        return outcome

    async def _bring_objects(self, objects: CachedObjects, attributes: wire.Attributes) -> Kept:
        slices = await self._reader.slices(attributes.ino, attributes.size)
        missing = [each for each in slices if not objects.is_kept(each)]
        kept = [await objects.keep(each) for each in missing]
        return _outcome(bool(missing), kept)

    async def _bring_whole(self, attributes: wire.Attributes) -> Kept:
        assert self._whole is not None
        missing = await self._whole.current(attributes) is None
        return _outcome(missing, [await self._whole.put_together(attributes)] if missing else [])


def _outcome(was_missing: bool, kept: Sequence[bool]) -> Kept:
    if not was_missing:
        return Kept.WAS_THERE
    return Kept.BROUGHT if all(kept) else Kept.NO_ROOM
