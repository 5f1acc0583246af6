"""Reading of file content: asks the metaserver where the bytes are and puts them together.

Nothing is kept between two reads: the kernel's page cache is above this, and small files lie in the BPF maps. Slices
are immutable, so the objects of one answer belong together; an object that has been deleted since, because its slice
was overwritten, is found missing, and the answer is then asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from fuseclient.data.caller import Caller
from fuseclient.data.objects import ObjectMissing
from metaserver import wire

_ATTEMPTS: Final = 3
_READS_AT_ONCE: Final = 8


class Objects(Protocol):
    """What the reader needs of :class:`~fuseclient.data.objects.ObjectStore`."""

    async def read(self, slice_id: int, start: int, length: int, /) -> memoryview: ...


@dataclass(frozen=True)
class Reading:
    """``data`` is what was asked for, short at the file's end; ``content`` the whole content of a small file."""

    data: bytes
    attributes: wire.Attributes
    content: bytes | None


class Piece(NamedTuple):
    """``length`` bytes at ``offset`` of the file, from byte ``start`` of an object."""

    offset: int
    length: int
    slice_id: int
    start: int


class Reader:
    """Reads files as the metaserver knows them."""

    def __init__(self, caller: Caller, store: Objects) -> None:
        self._caller = caller
        self._store = store
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)

    async def read(self, ino: int, offset: int, length: int) -> Reading:
        """Read up to ``length`` bytes.

        Raises :exc:`~fuseclient.worker.rpc.Refused`, :exc:`~fuseclient.worker.rpc.Disconnected` and
        :exc:`~fuseclient.data.objects.StoreError`.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._read(ino, offset, length)
            except ObjectMissing:
                continue
        return await self._read(ino, offset, length)

    async def _read(self, ino: int, offset: int, length: int) -> Reading:
        """One attempt. The first bytes of a file are asked for with all that a small file has."""
        near = offset < wire.MAX_INLINE
        begin, end = (0, max(offset + length, wire.MAX_INLINE)) if near else (offset, offset + length)
        content = await self._caller.call(wire.GetContent(ino, begin, end - begin), wire.Content)
        size = content.attributes.size
        if near and size <= wire.MAX_INLINE:
            whole = await self._assemble(content, 0, 0, size)
            return Reading(whole[offset : offset + length], content.attributes, whole)
        data = await self._assemble(content, begin, offset, min(offset + length, size))
        return Reading(data, content.attributes, None)

    async def _assemble(self, content: wire.Content, inline_begin: int, begin: int, end: int) -> bytes:
        """Return the bytes [begin, end) of a file; its inline bytes, if any, begin at ``inline_begin``."""
        if end <= begin:
            return b""
        if content.inline is not None:
            return content.inline[begin - inline_begin : end - inline_begin].ljust(end - begin, b"\0")
        pieces = visible(content.slices, begin, end)
        parts = await asyncio.gather(*(self._fetch(piece) for piece in pieces))
        if len(parts) == 1 and len(parts[0]) == end - begin:
            return bytes(parts[0])
        buffer = bytearray(end - begin)
        for piece, part in zip(pieces, parts, strict=True):
            buffer[piece.offset - begin : piece.offset - begin + piece.length] = part
        return bytes(buffer)

    async def _fetch(self, piece: Piece) -> memoryview:
        async with self._reads:
            return await self._store.read(piece.slice_id, piece.start, piece.length)


def visible(slices: Sequence[wire.Slice], begin: int, end: int) -> list[Piece]:
    """Return what of the slices is seen in [begin, end): later ones lie over earlier ones; holes are left out."""
    gaps, pieces = [(begin, end)], []
    for each in reversed(slices):
        left = []
        for gap_begin, gap_end in gaps:
            first, behind = max(gap_begin, each.offset), min(gap_end, each.offset + each.length)
            if first >= behind:
                left.append((gap_begin, gap_end))
                continue
            if each.slice_id:
                pieces.append(Piece(first, behind - first, each.slice_id, each.start + first - each.offset))
            left += [gap for gap in ((gap_begin, first), (behind, gap_end)) if gap[0] < gap[1]]
        gaps = left
    return sorted(pieces)
