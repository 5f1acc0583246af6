"""Objects as the reader wants them: from memory, from the disk cache, or from the store.

An object is kept as it is stored, with its header and the checksums of its blocks (object_format.py), so what is read
from a cache is checked like what comes from the store; what is damaged there is dropped, counted and read again.

With a disk cache an object is fetched whole at the first use of any of it. Without one, only what is asked for is,
unless the reader sees that the rest will be wanted, too: :meth:`CachedObjects.prefetch`. Whoever needs an object that
is on its way waits for it; a fetch once begun goes on when they do not.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, Final, NamedTuple, Protocol

from fuseclient.data.disk_cache import DiskCache
from fuseclient.data.object_format import MAX_HEADER, Header, parse_header
from fuseclient.data.store_errors import ObjectDamaged
from fuseclient.levels import Level, reach

#: Whole objects in memory, in bytes.
MEMORY_BYTES: Final = 64 * 1024 * 1024
#: Objects that wait for being written to the disk cache; then fetches wait for them.
_WRITES: Final = 8
_HEADERS: Final = 8192


class Store(Protocol):
    """What this needs of :class:`~fuseclient.data.objects.ObjectStore`."""

    async def read(self, slice_id: int, start: int, length: int) -> memoryview: ...
    async def whole(self, slice_id: int) -> tuple[Header, memoryview]: ...


class _Whole(NamedTuple):
    header: Header
    stored: memoryview


class CachedObjects:
    """Reads objects. Raises :exc:`~fuseclient.data.store_errors.StoreError` as the store does; caches never fail."""

    def __init__(self, store: Store, disk: DiskCache | None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._store = store
        self._disk = disk
        self._memory_bytes = memory_bytes
        self._memory: OrderedDict[int, _Whole] = OrderedDict()
        self._held = 0
        self._headers: OrderedDict[int, Header] = OrderedDict()
        self._coming: dict[int, asyncio.Task[_Whole]] = {}
        self._writes: dict[int, asyncio.Task[bool]] = {}
        self._memory_hits = self._hits = self._misses = 0

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        """Return ``length`` bytes of an object's content from byte ``start`` on."""
        found = await self._cached(slice_id, start, length)
        if found is not None:
            return found
        reach(Level.STORE)
        if self._disk is None and slice_id not in self._coming:
            return await self._store.read(slice_id, start, length)
        whole = await self._fetched(slice_id)
        _check_range(whole.header, start, length)
        return await _content(whole.header, _part(whole, start, length), start, length)

    async def prefetch(self, slice_id: int) -> None:
        """Have an object near, if it is not; errors are left to those who read it."""
        near = slice_id in self._memory or (self._disk is not None and self._disk.may_have(_name(slice_id)))
        if not near:
            await asyncio.wait({self._fetch(slice_id)})

    def is_kept(self, slice_id: int) -> bool:
        """Say whether an object is in the disk cache, as far as is known without looking there."""
        return self._disk is not None and self._disk.has(_name(slice_id))

    async def keep(self, slice_id: int) -> bool:
        """Have an object in the disk cache; say whether it is. Raises as :meth:`read` does."""
        if self._disk is None or self._disk.has(_name(slice_id)):
            return self._disk is not None
        whole = self._memory.get(slice_id) or await self._fetched(slice_id)
        return await asyncio.shield(self._write(self._disk, slice_id, whole))

    async def _cached(self, slice_id: int, start: int, length: int) -> memoryview | None:
        whole = self._memory.get(slice_id)
        if whole is not None:
            self._memory.move_to_end(slice_id)
            self._memory_hits += 1
            _check_range(whole.header, start, length)
            return await _content(whole.header, _part(whole, start, length), start, length)
        if self._disk is None or slice_id in self._coming or not self._disk.may_have(_name(slice_id)):
            return None
        try:
            found = await self._from_disk(self._disk, slice_id, start, length)
        except ObjectDamaged:
            self._headers.pop(slice_id, None)
            await self._disk.drop(_name(slice_id), damaged=True)
            return None
        self._hits += found is not None
        reach(Level.DISK_CACHE)
        return found

    async def _from_disk(self, disk: DiskCache, slice_id: int, start: int, length: int) -> memoryview | None:
        name = _name(slice_id)
        header = self._headers.get(slice_id)
        if header is None:
            begin = await disk.read(name, 0, MAX_HEADER)
            if begin is None:
                return None
            header = self._headers[slice_id] = parse_header(slice_id, begin)
            if len(self._headers) > _HEADERS:
                self._headers.popitem(last=False)
        _check_range(header, start, length)
        stored = await disk.read(name, *header.place(start, length))
        return None if stored is None else await _content(header, stored, start, length)

    async def _fetched(self, slice_id: int) -> _Whole:
        self._misses += self._disk is not None
        return await asyncio.shield(self._fetch(slice_id))

    def _fetch(self, slice_id: int) -> asyncio.Task[_Whole]:
        """Return the task that brings an object, which is begun if it does not run yet."""
        task = self._coming.get(slice_id)
        if task is None:
            task = self._coming[slice_id] = asyncio.create_task(self._bring(slice_id), name=f"fetch object {slice_id}")
            task.add_done_callback(lambda done: self._arrived(slice_id, done))
        return task

    def _arrived(self, slice_id: int, task: asyncio.Task[_Whole]) -> None:
        del self._coming[slice_id]
        if not task.cancelled():
            task.exception()  # it is raised to those who wait; if nobody does, it is of no concern

    async def _bring(self, slice_id: int) -> _Whole:
        while len(self._writes) >= _WRITES:
            await asyncio.wait(self._writes.values(), return_when=asyncio.FIRST_COMPLETED)
        whole = _Whole(*await self._store.whole(slice_id))
        self._remember(slice_id, whole)
        if self._disk is not None:
            self._write(self._disk, slice_id, whole)
        return whole

    def _write(self, disk: DiskCache, slice_id: int, whole: _Whole) -> asyncio.Task[bool]:
        """Return the task that writes an object to the disk cache, which is begun if it does not run yet."""
        task = self._writes.get(slice_id)
        if task is None:
            put = disk.put(_name(slice_id), whole.stored)
            task = self._writes[slice_id] = asyncio.create_task(put, name=f"cache object {slice_id}")
            task.add_done_callback(lambda _: self._writes.pop(slice_id))
        return task

    def _remember(self, slice_id: int, whole: _Whole) -> None:
        self._memory[slice_id] = whole
        self._held += len(whole.stored)
        while self._held > self._memory_bytes:
            self._held -= len(self._memory.popitem(last=False)[1].stored)

    def figures(self) -> dict[str, Any]:
        """Return what ``stats`` shows: reads answered from memory and from the disk cache, and objects fetched."""
        figures: dict[str, Any] = {"memory_hits": self._memory_hits, "memory_bytes": self._held}
        if self._disk is not None:
            figures |= {"hits": self._hits, "misses": self._misses}
        return figures

    async def close(self) -> None:
        """Wait for what is on its way to the disk cache; give up the rest."""
        for task in self._coming.values():
            task.cancel()
        pending: set[asyncio.Task[Any]] = {*self._coming.values(), *self._writes.values()}
        if pending:
            await asyncio.wait(pending)


def _name(slice_id: int) -> str:
    return f"objects/{slice_id & 0xFF:02x}/{slice_id:012x}"


def _part(whole: _Whole, start: int, length: int) -> memoryview:
    at, size = whole.header.place(start, length)
    return whole.stored[at : at + size]


def _check_range(header: Header, start: int, length: int) -> None:
    if start + length > header.length:
        raise ObjectDamaged(f"object {header.slice_id} ends at byte {header.length}, before {start + length}")


async def _content(header: Header, stored: memoryview, start: int, length: int) -> memoryview:
    if header.codec:  # unpacking takes long enough to be felt by everybody else
        return await asyncio.to_thread(header.content, stored, start, length)
    return header.content(stored, start, length)
