"""Compaction: what was written in many small pieces is rewritten, in the background, as few objects.

The writer tells of each commit. When a chunk of a file has got many small slices, what is seen of them is read, packed
into new objects and put in their place by one transaction of the metaserver, which first makes sure that what was read
is still the bottom of the chunk's list. Whatever was laid on top meanwhile stays there, so no write is ever lost or
held up; if the list itself was changed (a truncation, another client's compaction), nothing happens, and the new
objects are deleted. If it is not known whether the transaction was made, they stay. The file's attributes and version
stay: its content is the same.

One chunk at a time, and no faster than ``RATE`` bytes a second on average. Large pieces stay where they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from fuseclient.data.caller import Caller
from fuseclient.data.extents import Extents
from fuseclient.data.layouts import Piece, visible
from fuseclient.data.objects import MAX_OBJECT, ObjectMissing, StoreError
from fuseclient.data.uploads import CHUNK, UNKNOWN, Upload, Uploads, pack
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire
from metaserver.records import pack_slices

_log = logging.getLogger(__name__)

#: Small slices that a chunk must have got before it is looked at.
ENOUGH: Final = 32
#: A piece shorter than this is rewritten, in bytes.
SMALL: Final = 512 * 1024
#: Bytes a second that may be rewritten, on average.
RATE: Final = 16 * 1024 * 1024
#: What is written often is left alone for so long, in seconds, so that it is not rewritten at every turn.
PAUSE_S: Final = 1.0
#: Chunks that are remembered.
_WATCHED: Final = 4096
_READS_AT_ONCE: Final = 8
#: A commit's slices, at most.
_MOST_SLICES: Final = 1024


class Objects(Protocol):
    """What this needs of :class:`~fuseclient.data.objects.ObjectStore`."""

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview, /) -> None: ...
    async def read(self, slice_id: int, start: int, length: int, /) -> memoryview: ...
    async def delete(self, slice_ids: list[int], /) -> None: ...


class Compactor:
    """Compacts what :meth:`laid` tells of; ``replaced`` is told of each inode of which slices were replaced."""

    def __init__(
        self,
        caller: Caller,
        store: Objects,
        replaced: Callable[[int], None] = lambda ino: None,
        *,
        rate: float = RATE,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._caller = caller
        self._store = store
        self._replaced = replaced
        self._rate = rate
        self._pause_s = pause_s
        self._uploads = Uploads(caller, store)
        #: Small slices that (inode, chunk) got since it was last compacted.
        self._got: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._due: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._wanted = asyncio.Event()
        self._counts: Counter[str] = Counter()

    def figures(self) -> dict[str, Any]:
        """Return what was done, and how many chunks wait."""
        names = ("chunks", "bytes", "slices_before", "slices_after", "overtaken", "failed")
        return {"waiting": len(self._due), **{name: self._counts[name] for name in names}}

    def laid(self, ino: int, slices: Sequence[wire.Slice]) -> None:
        """Slices were committed to a file."""
        for each in slices:
            if each.length < SMALL and each.slice_id:
                self._count((ino, each.offset // CHUNK))

    def _count(self, place: tuple[int, int]) -> None:
        got = self._got[place] = self._got.get(place, 0) + 1
        self._got.move_to_end(place)
        if len(self._got) > _WATCHED:
            self._got.popitem(last=False)
        if got >= ENOUGH and place not in self._due and len(self._due) < _WATCHED:
            self._due[place] = None
            self._wanted.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(self._pause_s)
            while self._due:
                place, _ = self._due.popitem(last=False)
                self._got.pop(place, None)
                await asyncio.sleep(await self._try(*place) / self._rate)
            self._wanted.clear()

    async def _try(self, ino: int, chunk: int) -> int:
        """Compact a chunk, whatever comes of it; return how many bytes were rewritten."""
        try:
            return await self.compact(ino, chunk)
        except (Refused, ObjectMissing) as error:
            self._counts["overtaken"] += 1
            _log.debug("compaction of inode %d gave way: %s", ino, error)
        except (Disconnected, StoreError) as error:
            self._counts["failed"] += 1
            _log.warning("inode %d is not compacted for now: %s", ino, error)
        except Exception:
            self._counts["failed"] += 1
            _log.exception("compaction of inode %d failed", ino)
        return 0

    async def compact(self, ino: int, chunk: int) -> int:
        """Compact a chunk of a file if that is worth it; return how many bytes were rewritten.

        Raises :exc:`Refused` when somebody else changed it, ObjectMissing, StoreError and Disconnected.
        """
        begin = chunk * CHUNK
        content = await self._caller.call(wire.GetContent(ino, begin, CHUNK), wire.Content)
        seen, end = content.slices, min(begin + CHUNK, content.attributes.size)
        pieces = visible(seen, begin, end) if content.inline is None and begin < end else []
        small = [piece for piece in pieces if piece.length < SMALL]
        large = [wire.Slice(*piece) for piece in pieces if piece.length >= SMALL]
        if not _is_worth_it(seen, pieces, small):
            return 0
        uploads: list[Upload] = []
        try:
            for group in _groups(small):
                uploads += await self._rewrite(group)
        except BaseException:
            self._uploads.discard(uploads)
            raise
        slices = [*large, *(each for upload in uploads for each in upload.slices())]
        try:
            await self._replace(ino, begin, seen, slices)
        except Refused as error:
            if error.code not in UNKNOWN:
                self._uploads.discard(uploads)
            raise
        # Cut off or cancelled, nobody knows whether the chunk refers to the new objects: they stay, garbage at worst.
        rewritten = sum(each.bytes for each in uploads)
        self._counts.update(chunks=1, bytes=rewritten, slices_before=len(seen), slices_after=len(slices))
        self._replaced(ino)
        return rewritten

    async def _rewrite(self, group: Sequence[Piece]) -> list[Upload]:
        """Read pieces and store what they hold, in as few objects as it takes."""
        reads = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(piece: Piece) -> memoryview:
            async with reads:
                return await self._store.read(piece.slice_id, piece.start, piece.length)

        batch = Extents()
        for piece, data in zip(group, await asyncio.gather(*map(read, group)), strict=True):
            batch.write(piece.offset, data)
        uploads = [self._uploads.start(pieces) for pieces in pack(batch)]
        results = await asyncio.gather(*(each.task for each in uploads), return_exceptions=True)
        for result in results:
            if result is not None:
                self._uploads.discard(uploads)
                raise result
        return uploads

    async def _replace(self, ino: int, begin: int, seen: Sequence[wire.Slice], slices: Sequence[wire.Slice]) -> None:
        if len(slices) > _MOST_SLICES:
            raise Refused(wire.ErrorCode.TOO_LARGE, f"a chunk of {len(slices)} pieces")
        request = wire.CompactSlices(ino, begin, len(seen), digest(seen), list(slices))
        await self._caller.call(request, wire.Done)


def digest(slices: Sequence[wire.Slice]) -> bytes:
    """Return what stands for a list of slices in a CompactSlices."""
    return hashlib.blake2b(pack_slices(slices), digest_size=16).digest()


def _is_worth_it(seen: Sequence[wire.Slice], pieces: Sequence[Piece], small: Sequence[Piece]) -> bool:
    """Say whether the chunk's slices, or the objects that its small pieces lie in, become fewer by half."""
    runs = sum(1 for before, piece in zip([None, *small], small, strict=False) if not _touches(before, piece))
    slices_after = len(pieces) - len(small) + runs
    objects, objects_after = (
        len({each.slice_id for each in small}),
        sum(each.length for each in small) // MAX_OBJECT + 1,
    )
    return 2 * slices_after <= len(seen) or 2 * objects_after <= objects


def _touches(before: Piece | None, piece: Piece) -> bool:
    return before is not None and before.offset + before.length == piece.offset


def _groups(small: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut pieces into groups of no more bytes than one object."""
    group, size = list[Piece](), 0
    for piece in small:
        if group and size + piece.length > MAX_OBJECT:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.length
    if group:
        yield group
