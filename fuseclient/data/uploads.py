"""Objects on their way to the store: what goes into one, the id it gets, and its upload, which runs by itself.

An upload begins at once and nobody need wait for it before its commit; how many run at a time is the store's limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from fuseclient.data.caller import Caller
from fuseclient.data.extents import Extents
from fuseclient.data.objects import MAX_OBJECT, StoreError
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Slice ids are reserved in blocks of this many.
ID_BLOCK: Final = 64
#: The metaserver keeps slices by chunks of so many bytes, and takes a commit to so many of them.
CHUNK: Final = 64 * 1024 * 1024
COMMIT_CHUNKS: Final = 16

#: What goes into one object: (offset in the file, bytes), by rising offset, without overlaps.
Pieces = list[tuple[int, memoryview]]


class Objects(Protocol):
    """What this needs of :class:`~fuseclient.data.objects.ObjectStore`."""

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview, /) -> None: ...
    async def delete(self, slice_ids: list[int], /) -> None: ...


class Upload:
    """One object, on its way or stored."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        #: Bytes of content.
        self.bytes = sum(len(view) for _, view in pieces)
        self.task: asyncio.Task[None]
        #: 0 until it has one.
        self.slice_id = 0

    @property
    def end(self) -> int:
        """The offset in the file behind its last byte."""
        offset, view = self.pieces[-1]
        return offset + len(view)

    @property
    def is_stored(self) -> bool:
        """Whether the object is durable in the store."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None

    @property
    def chunks(self) -> set[int]:
        """The chunks of the file that it touches."""
        return {chunk for offset, view in self.pieces for chunk in chunks_of(offset, len(view))}

    def move(self, distance: int) -> None:
        """Its bytes go so much further behind, or before, where they were to go."""
        self.pieces = [(offset + distance, view) for offset, view in self.pieces]

    def overlaps(self, offset: int, length: int) -> bool:
        """Say whether it holds a byte of a range of the file."""
        return any(at < offset + length and offset < at + len(view) for at, view in self.pieces)

    def slices(self) -> list[wire.Slice]:
        """Return what is to be committed."""
        slices, start = [], 0
        for offset, view in self.pieces:
            slices.append(wire.Slice(offset, len(view), self.slice_id, start))
            start += len(view)
        return slices


#: Refusals after which it is not known whether a commit was made.
UNKNOWN: Final = (wire.ErrorCode.INTERNAL,)


class Uploads:
    """Starts uploads, and gives objects up that nothing refers to."""

    def __init__(self, caller: Caller, store: Objects) -> None:
        self._store = store
        self._ids = _SliceIds(caller)
        self._discarding: set[asyncio.Task[None]] = set()

    def start(self, pieces: Pieces) -> Upload:
        """Begin to store an object; its ``task`` raises StoreError, Refused or Disconnected."""
        upload = Upload(pieces)
        upload.task = asyncio.create_task(self._run(upload))
        return upload

    async def _run(self, upload: Upload) -> None:
        (upload.slice_id,) = await self._ids.take(1)
        views = [view for _, view in upload.pieces]
        await self._store.put(upload.slice_id, views[0] if len(views) == 1 else b"".join(views))

    def discard(self, uploads: Iterable[Upload]) -> None:
        """Give objects up, in the background: wait for their uploads to end, then delete them.

        If that fails they are garbage, and nothing worse.
        """
        given_up = list(uploads)
        if given_up:
            task = asyncio.create_task(self._discard(given_up))
            self._discarding.add(task)
            task.add_done_callback(self._discarding.discard)

    async def _discard(self, uploads: Sequence[Upload]) -> None:
        await asyncio.gather(*(each.task for each in uploads), return_exceptions=True)
        with contextlib.suppress(StoreError):
            await self._store.delete([each.slice_id for each in uploads if each.slice_id])

    def abandon(self, uploads: Iterable[Upload]) -> None:
        """Leave objects alone that may or may not be referred to; the errors of their uploads are known."""
        for each in uploads:
            each.task.add_done_callback(_forget_outcome)

    async def settle(self) -> None:
        """Wait until everything that was given up is gone."""
        while self._discarding:
            await asyncio.wait(self._discarding)


def _forget_outcome(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and isinstance(error := task.exception(), Exception):
        expected = isinstance(error, Refused | Disconnected | StoreError)
        _log.debug("an upload that was given up failed: %s", error, exc_info=None if expected else error)


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


def chunks_of(offset: int, length: int) -> range:
    """Return the chunks that a range of a file touches."""
    return range(offset // CHUNK, (offset + length - 1) // CHUNK + 1)


def pack(batch: Extents) -> Iterator[Pieces]:
    """Cut and pack extents into objects. Each can be committed by itself: it stays within what a commit may touch."""
    pieces: Pieces = []
    room, chunks = MAX_OBJECT, set[int]()
    for start, buffer in batch:
        view, position = memoryview(buffer), 0
        while position < len(view):
            offset = start + position
            taken = view[position : position + room]
            touched = chunks.union(chunks_of(offset, len(taken))) if taken else chunks
            if not taken or len(touched) > COMMIT_CHUNKS:
                yield pieces
                pieces, room, chunks = [], MAX_OBJECT, set()
                continue
            pieces.append((offset, taken))
            position, room, chunks = position + len(taken), room - len(taken), touched
    if pieces:
        yield pieces
