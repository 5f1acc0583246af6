"""Reading of file content: puts together what the layouts say and the objects hold, and looks ahead.

Objects are immutable and a layout's belong together. One that has been deleted since, because its slice was
overwritten and the news is on its way, is found missing: the layout is then asked for again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final, Protocol

from fuseclient.data.layouts import CHUNK_BYTES, Layout, Layouts, Piece, visible
from fuseclient.data.read_ahead import ReadAhead
from fuseclient.data.store_errors import ObjectMissing
from fuseclient.worker.rpc import Refused
from metaserver import wire

__all__ = ["Objects", "Piece", "Reader", "Reading", "visible"]

_ATTEMPTS: Final = 3
_READS_AT_ONCE: Final = 16


class Objects(Protocol):
    """What the reader needs of :class:`~fuseclient.data.cached_objects.CachedObjects`."""

    async def read(self, slice_id: int, start: int, length: int, /) -> memoryview: ...
    async def prefetch(self, slice_id: int, /) -> None: ...


@dataclass(frozen=True)
class Reading:
    """``data`` is what was asked for, short at the file's end; ``content`` the whole content of a small file."""

    data: bytes
    attributes: wire.Attributes
    content: bytes | None


class Reader:
    """Reads files as the metaserver knows them."""

    def __init__(self, layouts: Layouts, objects: Objects) -> None:
        self._layouts = layouts
        self._objects = objects
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)
        self._ahead = ReadAhead(self._look_ahead)

    async def read(self, ino: int, offset: int, length: int) -> Reading:
        """Read up to ``length`` bytes.

        Raises :exc:`~fuseclient.worker.rpc.Refused`, :exc:`~fuseclient.worker.rpc.Disconnected` and
        :exc:`~fuseclient.data.store_errors.StoreError`.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._read(ino, offset, length)
            except ObjectMissing:
                self._layouts.drop(ino)
        return await self._read(ino, offset, length)

    async def slices(self, ino: int, size: int) -> list[int]:
        """Return the objects that the first ``size`` bytes of a file lie in. Raises as :meth:`read` does."""
        found: dict[int, None] = {}
        begin = 0
        while begin < size:
            layout = await self._layout(ino, begin, size - begin)
            found.update(dict.fromkeys(piece.slice_id for piece in layout.pieces))
            begin = layout.end
        return list(found)

    def closed(self, ino: int) -> None:
        """Nobody has the file open any more: what was begun to be read ahead is given up."""
        self._ahead.stop(ino)

    def figures(self) -> dict[str, Any]:
        """Return what ``stats`` shows."""
        return {"layouts": self._layouts.figures(), "read_ahead": self._ahead.figures()}

    async def close(self) -> None:
        """Stop reading ahead."""
        await self._ahead.close()

    async def _read(self, ino: int, offset: int, length: int) -> Reading:
        """One attempt. Where the first bytes of a small file are wanted, all of it is read."""
        layout = await self._layout(ino, offset, length)
        attributes = layout.attributes
        if offset < wire.MAX_INLINE and attributes.size <= wire.MAX_INLINE:
            whole = bytes(await self._assemble(layout, 0, attributes.size))
            return Reading(whole[offset : offset + length], attributes, whole)
        end = min(offset + length, attributes.size)
        self._ahead.read(ino, offset, end, attributes.size)
        data = bytes(await self._assemble(layout, offset, min(end, layout.end)))
        while len(data) < end - offset and layout.end < end:  # it goes on in the next chunk
            layout = await self._layout(ino, layout.end, end - layout.end)
            end = min(end, layout.attributes.size)
            data += await self._assemble(layout, layout.begin, min(end, layout.end))
        return Reading(data, attributes, None)

    async def _layout(self, ino: int, offset: int, length: int) -> Layout:
        """Return a layout in which ``offset`` lies: the chunk's, or if that is too long the range's."""
        try:
            return await self._layouts.chunk(ino, offset // CHUNK_BYTES)
        except Refused as error:
            if error.code != wire.ErrorCode.TOO_LARGE:
                raise
        begin = 0 if offset < wire.MAX_INLINE else offset
        return await self._layouts.range(ino, begin, max(offset + length, wire.MAX_INLINE))

    async def _assemble(self, layout: Layout, begin: int, end: int) -> bytes | memoryview:
        """Return the bytes [begin, end) of a file, which lie in the layout."""
        if end <= begin:
            return b""
        if layout.inline is not None:
            return layout.inline[begin - layout.begin : end - layout.begin].ljust(end - begin, b"\0")
        pieces = layout.within(begin, end)
        if len(pieces) == 1 and pieces[0].length == end - begin:
            return await self._fetch(pieces[0])
        parts = await asyncio.gather(*(self._fetch(piece) for piece in pieces))
        buffer = bytearray(end - begin)
        for piece, part in zip(pieces, parts, strict=True):
            buffer[piece.offset - begin : piece.end - begin] = part
        return memoryview(buffer)

    async def _fetch(self, piece: Piece) -> memoryview:
        async with self._reads:
            return await self._objects.read(piece.slice_id, piece.start, piece.length)

    async def _look_ahead(self, ino: int, begin: int, end: int) -> None:
        """Bring the objects of a range near."""
        while begin < end:
            layout = await self._layout(ino, begin, end - begin)
            for slice_id in dict.fromkeys(piece.slice_id for piece in layout.within(begin, min(end, layout.end))):
                await self._objects.prefetch(slice_id)
            begin = layout.end
