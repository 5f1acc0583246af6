"""Extended attributes for whoever asks: small ones enter the kernel cache, all of an inode's together.

The reply that grants them is that to GetAttributes: who changes them later breaks it, and the token is void.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from fuseclient.data.caller import Caller
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.rpc import Refused
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

#: Kinds of xattr that only root may know of. The kernel sees to it that only root gets and sets them.
ROOT_XATTRS: Final = b"trusted."
#: Xattrs of an inode that are fetched at once.
_MOST: Final = 8
#: Inodes whose xattrs are known to be too many or too large.
_LARGE: Final = 4096


class Xattrs:
    """Gets and lists them at the metaserver. Methods raise what the caller's calls raise."""

    def __init__(self, caller: Caller, feeder: Feeder, cache: Cache) -> None:
        self._caller = caller
        self._feeder = feeder
        self._cache = cache
        self._large: OrderedDict[int, None] = OrderedDict()

    async def get(self, ino: int, name: bytes) -> bytes | None:
        """Return a value, or None if there is no such xattr."""
        known = await self._fetch(ino)
        if known is not None:
            return known.get(name)
        return await self.value(ino, name)

    async def names(self, ino: int) -> list[bytes]:
        """Return the names that an inode has."""
        known = await self._fetch(ino)
        return list(known) if known is not None else await self._names(ino)

    async def _names(self, ino: int) -> list[bytes]:
        return list((await self._caller.call(wire.ListXattrs(ino), wire.XattrNames)).names)

    async def _fetch(self, ino: int) -> dict[bytes, bytes] | None:
        """Return all xattrs of an inode, which are in the kernel cache then; None if they are not as small as that."""
        if ino in self._large:
            return None
        with self._feeder.begin() as token:
            attributes = (await self._caller.call(wire.GetAttributes(ino), wire.Found)).attributes
            self._feeder.inode(token, attributes)
            if not attributes.flags & wire.InodeFlag.HAS_XATTRS:
                return {}
            names = await self._names(ino)
            if len(names) > _MOST:
                self._note_large(ino)
                return None
            found = {name: await self.value(ino, name) for name in names}
            if any(value is None for value in found.values()):
                return None  # they change at this moment
            xattrs = {name: value for name, value in found.items() if value is not None}
            if not self._feeder.unchanged(token, ino):
                return None
            listed = not any(name.startswith(ROOT_XATTRS) for name in names)
            if not self._cache.put_xattrs(ino, xattrs, listed=listed):
                self._note_large(ino)
            return xattrs

    async def value(self, ino: int, name: bytes) -> bytes | None:
        """As :meth:`get`, straight from the metaserver: nothing enters the kernel cache."""
        try:
            return (await self._caller.call(wire.GetXattr(ino, name), wire.XattrIs)).value
        except Refused as error:
            if error.code != wire.ErrorCode.NO_XATTR:
                raise
            return None

    def _note_large(self, ino: int) -> None:
        self._large[ino] = None
        if len(self._large) > _LARGE:
            self._large.popitem(last=False)
