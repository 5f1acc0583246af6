"""Gathering of writes: what is written stays in memory until it is flushed to the metaserver and the object store.

One :class:`_File` for each inode that is open for writing. A flush takes all of a file's extents at once; while they
are on their way they still count in the file's size, and what is written meanwhile gathers anew. A file that stays
within the inline limit is written to the metaserver itself; a larger one becomes slices whose objects are durable
before the metaserver is told of them. Extents that lie apart share an object.

Concurrency: everything runs on the event loop. A file's ``lock`` is held while its data is on the way, so flushes of
one file follow each other in the order of the writes, and :meth:`Writer.settled` keeps them away from a change of its
size or times. ``dirty``, ``flushing`` and ``bytes`` change without an await between them.

Errors: a flush that fails gives its data up, as the kernel's own write-back does, and its error is kept until a flush,
fsync or write on that file reports it. So data is never reported safe that is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from fuseclient.data.caller import Caller
from fuseclient.data.extents import Extents
from fuseclient.data.objects import MAX_OBJECT, StoreError
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: A file's extents are flushed in the background from so many bytes or extents on; at twice that its writers wait.
FLUSH_BYTES: Final = 4 * 1024 * 1024
FLUSH_EXTENTS: Final = 256
#: All files together, in bytes; beyond it writers wait.
TOTAL_BYTES: Final = 64 * 1024 * 1024
#: What has waited this long, in seconds, is flushed.
FLUSH_AGE_S: Final = 5.0
#: Slice ids are reserved in blocks of this many.
ID_BLOCK: Final = 64
_PUTS_AT_ONCE: Final = 4
_ATTEMPTS: Final = 8
#: Refusals that mean somebody else changed the file meanwhile: look again.
_OVERTAKEN_INLINE: Final[tuple[wire.ErrorCode, ...]] = (wire.ErrorCode.TOO_LARGE,)
_OVERTAKEN_SLICES: Final[tuple[wire.ErrorCode, ...]] = (wire.ErrorCode.BUSY, wire.ErrorCode.INVALID)
#: The metaserver keeps slices by chunks of so many bytes, and takes a commit to so many of them.
_CHUNK: Final = 64 * 1024 * 1024
_COMMIT_CHUNKS: Final = 16

#: What goes into one object: (offset in the file, bytes), by rising offset.
_Pieces = list[tuple[int, memoryview]]


class Objects(Protocol):
    """What the writer needs of :class:`~fuseclient.data.objects.ObjectStore`."""

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview, /) -> None: ...
    async def delete(self, slice_ids: list[int], /) -> None: ...


@dataclass(eq=False, slots=True)
class _File:
    #: The newest known from the metaserver.
    attributes: wire.Attributes
    #: Others changed the file: ``attributes`` are to be asked for again before they decide anything.
    stale: bool = False
    writers: int = 0
    dirty: Extents = field(default_factory=Extents)
    flushing: Extents | None = None
    #: When the newest byte not yet committed was written, in ns since 1970.
    written_ns: int = 0
    error: Exception | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    timer: asyncio.TimerHandle | None = None
    #: The whole content, when the last flush happened to hold it.
    content: bytes | None = None


@dataclass(frozen=True)
class Closed:
    """What is known of a file when its last writer has gone: attributes, and the whole content if it is at hand."""

    attributes: wire.Attributes
    content: bytes | None


class Writer:
    """The files open for writing. ``committed`` is told of each reply that changed a file, before a flush returns."""

    def __init__(
        self,
        caller: Caller,
        store: Objects,
        inline_limit: int,
        committed: Callable[[wire.Changed], None],
        *,
        flush_age_s: float = FLUSH_AGE_S,
        total_bytes: int = TOTAL_BYTES,
    ) -> None:
        self._caller = caller
        self._store = store
        self._inline_limit = inline_limit
        self._committed = committed
        self._flush_age_s = flush_age_s
        self._total_bytes = total_bytes
        self._files: dict[int, _File] = {}
        self._ids = _SliceIds(caller)
        self._puts = asyncio.Semaphore(_PUTS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        #: Bytes written and not yet committed, of all files.
        self.bytes = 0

    @property
    def count(self) -> int:
        """How many files are open for writing."""
        return len(self._files)

    def is_open(self, ino: int) -> bool:
        """Whether a file is open for writing."""
        return ino in self._files

    def open(self, attributes: wire.Attributes) -> None:
        """Count one more writer of a file; each is to be ended by :meth:`close`."""
        file = self._files.get(attributes.ino)
        if file is None:
            file = self._files[attributes.ino] = _File(attributes)
        self._observe(file, attributes)
        file.writers += 1

    async def close(self, ino: int) -> Closed | None:
        """Flush, and count one writer less. What is known of the file if this was the last one, else None."""
        file = self._files[ino]
        await self._drain(file)
        file.writers -= 1
        while file.writers == 0 and file.dirty:
            await self._drain(file)
        if file.writers or self._files.get(ino) is not file:
            return None
        del self._files[ino]
        if file.error is not None:
            _log.error("data written to inode %d was lost: %s", ino, file.error)
        return None if file.stale else Closed(file.attributes, file.content)

    async def write(self, ino: int, offset: int, data: bytes) -> None:
        """Gather a write; raises an error that an earlier flush left, instead."""
        file = self._files[ino]
        _raise_error(file)
        self._gather(file, offset, data)
        if _is_full(file, 2):
            await self._relieve(file)
        elif _is_full(file, 1) and not file.lock.locked():
            self._in_background(self._relieve(file))
        while self.bytes > self._total_bytes:
            await self._drain(max(self._files.values(), key=_held))
        _raise_error(file)

    def _gather(self, file: _File, offset: int, data: bytes) -> None:
        before = file.dirty.bytes
        file.dirty.write(offset, data)
        self.bytes += file.dirty.bytes - before
        file.written_ns = time.time_ns()
        file.content = None
        if file.timer is None:
            loop = asyncio.get_running_loop()
            file.timer = loop.call_later(self._flush_age_s, self._grown_old, file)

    def _grown_old(self, file: _File) -> None:
        file.timer = None
        self._in_background(self._drain(file))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def flush(self, ino: int) -> None:
        """Return when all that was written is durable; raise the error of what could not be, once."""
        file = self._files.get(ino)
        if file is not None:
            await self._drain(file)
            _raise_error(file)

    async def flush_all(self) -> None:
        """Flush every file; errors stay with their files."""
        await asyncio.gather(*(self._drain(file) for file in self._files.values()))

    async def before_read(self, ino: int, offset: int, length: int) -> None:
        """Return when the metaserver knows of all that was written to the range, and of the size that a read of it
        sees; raise the error if it cannot be."""
        file = self._files.get(ino)
        if file is not None and any(_concerns(each, offset, length, file) for each in _uncommitted(file)):
            await self._drain(file)
            if file.error is not None:
                raise file.error

    @contextlib.asynccontextmanager
    async def settled(self, ino: int) -> AsyncIterator[None]:
        """A context in which nothing written before is uncommitted and nothing written since is committed."""
        file = self._files.get(ino)
        if file is None:
            yield
            return
        async with file.lock:
            await self._drain_locked(file)
            yield

    def overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return a file's attributes as they will be when all that is written is committed."""
        file = self._files.get(attributes.ino)
        if file is None:
            return attributes
        self._observe(file, attributes)
        ends = [each.end for each in _uncommitted(file)]
        if not ends:
            return file.attributes
        size = max(file.attributes.size, *ends)
        return msgspec.structs.replace(file.attributes, size=size, mtime_ns=file.written_ns, ctime_ns=file.written_ns)

    def known(self, ino: int) -> wire.Attributes | None:
        """Return the attributes last heard of a file that is open for writing, unless others changed it since."""
        file = self._files.get(ino)
        return file.attributes if file is not None and not file.stale else None

    def changed_elsewhere(self, ino: int) -> None:
        """Another client changed this inode."""
        file = self._files.get(ino)
        if file is not None:
            file.stale = True
            file.content = None

    def everything_changed(self) -> None:
        """Other clients may have changed anything."""
        for ino in self._files:
            self.changed_elsewhere(ino)

    def _observe(self, file: _File, attributes: wire.Attributes) -> None:
        if attributes.version >= file.attributes.version:
            if attributes.version > file.attributes.version:
                file.content = None
            file.attributes, file.stale = attributes, False

    async def _drain(self, file: _File) -> None:
        """Commit what is gathered; an error is left in the file."""
        async with file.lock:
            await self._drain_locked(file)

    async def _drain_locked(self, file: _File) -> None:
        while file.dirty:
            batch, file.dirty = file.dirty, Extents()
            await self._send(file, batch)

    async def _relieve(self, file: _File) -> None:
        """Commit the most of what is gathered, in whole objects, and leave the rest to grow."""
        async with file.lock:
            while _is_full(file, 1):
                await self._send(file, file.dirty.take_units(MAX_OBJECT))

    async def _send(self, file: _File, batch: Extents) -> None:
        """Commit a batch that was just taken out of ``dirty``; an error is left in the file."""
        file.flushing = batch
        if file.timer is not None and not file.dirty:
            file.timer.cancel()
            file.timer = None
        try:
            await self._commit(file, batch)
        except Exception as error:
            self._failed(file, error)
        finally:
            file.flushing = None
            self.bytes -= batch.bytes

    def _failed(self, file: _File, error: Exception) -> None:
        expected = isinstance(error, Refused | Disconnected | StoreError)
        _log.error("writing to inode %d failed: %s", file.attributes.ino, error, exc_info=None if expected else error)
        file.error = error
        file.stale = True
        file.content = None

    async def _commit(self, file: _File, batch: Extents) -> None:
        for _ in range(_ATTEMPTS):
            attributes = await self._current(file)
            if attributes.flags & wire.InodeFlag.INLINE and batch.end <= self._inline_limit:
                attempt, overtaken = self._commit_inline, _OVERTAKEN_INLINE
            else:
                attempt, overtaken = self._commit_slices, _OVERTAKEN_SLICES
            try:
                await attempt(file, batch)
                return
            except Refused as error:
                if error.code not in overtaken:
                    raise
                refusal, file.stale = error, True
        raise refusal

    async def _current(self, file: _File) -> wire.Attributes:
        if file.stale:
            found = await self._caller.call(wire.GetAttributes(file.attributes.ino), wire.Found)
            self._observe(file, found.attributes)
            file.stale = False
        return file.attributes

    def _changed(self, file: _File, changed: wire.Changed) -> None:
        self._observe(file, changed.attributes[0])
        self._committed(changed)

    async def _commit_inline(self, file: _File, batch: Extents) -> None:
        for offset, buffer in batch:
            data = bytes(buffer)
            request = wire.WriteInline(file.attributes.ino, offset, data)
            self._changed(file, await self._caller.call(request, wire.Changed))
            if offset == 0 and file.attributes.size == len(data) and not file.dirty:
                file.content = data

    async def _commit_slices(self, file: _File, batch: Extents) -> None:
        ino, version = file.attributes.ino, 0
        replaces = bool(file.attributes.flags & wire.InodeFlag.INLINE and file.attributes.size)
        if replaces:
            content = await self._caller.call(wire.GetContent(ino, 0, wire.MAX_INLINE), wire.Content)
            if content.inline is None:
                raise Refused(wire.ErrorCode.BUSY, "the file is inline no more")
            batch, version = _laid_over(content.inline, batch), content.attributes.version
        objects = list(_objects(batch))
        ids = await self._store_objects(objects)
        for done, (slice_id, pieces) in enumerate(zip(ids, objects, strict=True)):
            request = wire.CommitSlices(
                ino, _slices(slice_id, pieces), _end(pieces), replaces and not done, 0 if done else version
            )
            try:
                self._changed(file, await self._caller.call(request, wire.Changed))
            except Refused as error:
                if error.code != wire.ErrorCode.INTERNAL:
                    await self._delete_quietly(ids[done:])
                raise

    async def _store_objects(self, objects: list[_Pieces]) -> list[int]:
        """Store objects under new slice ids; return these. If one fails, none is kept."""
        ids = await self._ids.take(len(objects))
        puts = (self._put(slice_id, pieces) for slice_id, pieces in zip(ids, objects, strict=True))
        results = await asyncio.gather(*puts, return_exceptions=True)
        for result in results:
            if result is not None:
                await self._delete_quietly(ids)
                raise result
        return ids

    async def _put(self, slice_id: int, pieces: _Pieces) -> None:
        async with self._puts:
            views = [view for _, view in pieces]
            await self._store.put(slice_id, views[0] if len(views) == 1 else b"".join(views))

    async def _delete_quietly(self, slice_ids: list[int]) -> None:
        """Delete objects that nothing refers to. If that fails they are garbage, and nothing worse."""
        with contextlib.suppress(StoreError):
            await self._store.delete(slice_ids)


class _SliceIds:
    """Reserved slice ids."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._free: list[int] = []
        self._lock = asyncio.Lock()

    async def take(self, count: int) -> list[int]:
        """Return ``count`` ids, by rising value within a block."""
        async with self._lock:
            while len(self._free) < count:
                request = wire.NewSlices(max(ID_BLOCK, count - len(self._free)))
                self._free += (await self._caller.call(request, wire.SliceIds)).ids
            taken, self._free = self._free[:count], self._free[count:]
        return taken


def _concerns(extents: Extents, offset: int, length: int, file: _File) -> bool:
    """Say whether a read sees something of what is not committed: bytes, or a hole that they make."""
    behind = offset + length > file.attributes.size and extents.end > file.attributes.size
    return behind or extents.overlaps(offset, length)


def _uncommitted(file: _File) -> list[Extents]:
    return [each for each in (file.flushing, file.dirty) if each]


def _held(file: _File) -> int:
    return sum(each.bytes for each in _uncommitted(file))


def _is_full(file: _File, times: int) -> bool:
    return file.dirty.bytes >= FLUSH_BYTES * times or len(file.dirty) >= FLUSH_EXTENTS * times


def _raise_error(file: _File) -> None:
    error, file.error = file.error, None
    if error is not None:
        raise error


def _laid_over(below: bytes, batch: Extents) -> Extents:
    """Return a batch with the inline content below it."""
    whole = Extents()
    whole.write(0, below)
    for offset, buffer in batch:
        whole.write(offset, buffer)
    return whole


def _objects(batch: Extents) -> Iterator[_Pieces]:
    """Cut and pack extents into objects. Each is committed by itself, so it stays within what a commit may touch."""
    pieces: _Pieces = []
    room, chunks = MAX_OBJECT, set[int]()
    for start, buffer in batch:
        view, position = memoryview(buffer), 0
        while position < len(view):
            offset = start + position
            taken = view[position : position + room]
            touched = chunks.union(range(offset // _CHUNK, (offset + len(taken) - 1) // _CHUNK + 1))
            if not taken or len(touched) > _COMMIT_CHUNKS:
                yield pieces
                pieces, room, chunks = [], MAX_OBJECT, set()
                continue
            pieces.append((offset, taken))
            position, room, chunks = position + len(taken), room - len(taken), touched
    yield pieces


def _slices(slice_id: int, pieces: _Pieces) -> list[wire.Slice]:
    slices, start = [], 0
    for offset, view in pieces:
        slices.append(wire.Slice(offset, len(view), slice_id, start))
        start += len(view)
    return slices


def _end(pieces: _Pieces) -> int:
    offset, view = pieces[-1]
    return offset + len(view)
