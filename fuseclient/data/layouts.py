"""Where the bytes of files are, as the metaserver said: the slices of each chunk of 64 MiB, asked for once.

What is kept of an inode is used only while the lease runs, and dropped with it: whatever changes a file here or is
heard to have changed it elsewhere drops its inode. An answer that was on its way when that happened is used by those
who waited for it, and not kept.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, Protocol

from fuseclient.data.caller import Caller
from fuseclient.levels import Level, reach
from metaserver import wire

CHUNK_BYTES: Final = 64 * 1024 * 1024
#: Chunks kept, and the pieces of all of them.
_CHUNKS: Final = 4096
_PIECES: Final = 200_000


class Piece(NamedTuple):
    """``length`` bytes at ``offset`` of the file, from byte ``start`` of an object."""

    offset: int
    length: int
    slice_id: int
    start: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Freshness(Protocol):
    """What this needs of :class:`~fuseclient.worker.feeding.Feeder`."""

    def begin(self) -> AbstractContextManager[Any]: ...
    def unchanged(self, token: Any, ino: int, /) -> bool: ...


class Layout(NamedTuple):
    """A part of a file: its pieces in order, that do not overlap, or the inline bytes from ``begin`` on."""

    attributes: wire.Attributes
    begin: int
    end: int
    inline: bytes | None
    pieces: Sequence[Piece]

    def within(self, begin: int, end: int) -> list[Piece]:
        """Return the pieces of [begin, end), cut to it."""
        first = bisect_right(self.pieces, begin, key=lambda piece: piece.end)
        behind = bisect_left(self.pieces, end, key=lambda piece: piece.offset)
        return [_cut(piece, begin, end) for piece in self.pieces[first:behind]]


class Layouts:
    """The layouts of files. ``lease_left_s`` says for how long what was heard before may be used."""

    def __init__(self, caller: Caller, freshness: Freshness, lease_left_s: Callable[[], float]) -> None:
        self._caller = caller
        self._freshness = freshness
        self._lease_left_s = lease_left_s
        self._kept: OrderedDict[tuple[int, int], Layout] = OrderedDict()
        self._of_inode: dict[int, set[int]] = {}
        self._pieces = 0
        self._coming: dict[tuple[int, int], asyncio.Task[Layout]] = {}
        self._hits = self._misses = 0

    async def chunk(self, ino: int, number: int) -> Layout:
        """Return the layout of a chunk. Raises Refused and Disconnected."""
        key = ino, number
        kept = self._kept.get(key)
        if kept is not None and self._lease_left_s() > 0:
            self._hits += 1
            self._kept.move_to_end(key)
            return kept
        task = self._coming.get(key)
        if task is None:
            self._misses += 1
            task = self._coming[key] = asyncio.create_task(self._ask_chunk(ino, number), name=f"layout {ino}/{number}")
            task.add_done_callback(lambda done: self._arrived(key, done))
        reach(Level.METASERVER)
        return await asyncio.shield(task)

    async def range(self, ino: int, begin: int, end: int) -> Layout:
        """Ask for a part of a file; nothing is kept of it. Raises Refused and Disconnected."""
        content = await self._caller.call(wire.GetContent(ino, begin, end - begin), wire.Content)
        return Layout(content.attributes, begin, end, content.inline, visible(content.slices, begin, end))

    def drop(self, ino: int | None) -> None:
        """Forget an inode's layout; ``None``: everything."""
        if ino is None:
            self._kept.clear()
            self._of_inode.clear()
            self._coming.clear()
            self._pieces = 0
            return
        for number in self._of_inode.pop(ino, ()):
            self._pieces -= len(self._kept.pop((ino, number)).pieces)
        for key in [key for key in self._coming if key[0] == ino]:
            del self._coming[key]

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows."""
        return {"chunks": len(self._kept), "pieces": self._pieces, "hits": self._hits, "misses": self._misses}

    async def _ask_chunk(self, ino: int, number: int) -> Layout:
        begin = number * CHUNK_BYTES
        with self._freshness.begin() as token:
            layout = await self.range(ino, begin, begin + CHUNK_BYTES)
            if layout.inline is None and self._freshness.unchanged(token, ino):
                self._keep((ino, number), layout)
        return layout

    def _keep(self, key: tuple[int, int], layout: Layout) -> None:
        self._kept[key] = layout
        self._of_inode.setdefault(key[0], set()).add(key[1])
        self._pieces += len(layout.pieces)
        while len(self._kept) > _CHUNKS or (self._pieces > _PIECES and len(self._kept) > 1):
            (ino, number), oldest = self._kept.popitem(last=False)
            self._pieces -= len(oldest.pieces)
            self._of_inode[ino].discard(number)
            if not self._of_inode[ino]:
                del self._of_inode[ino]

    def _arrived(self, key: tuple[int, int], task: asyncio.Task[Layout]) -> None:
        if self._coming.get(key) is task:
            del self._coming[key]
        if not task.cancelled():
            task.exception()  # it is raised to those who wait; they may all have been interrupted


def visible(slices: Sequence[wire.Slice], begin: int, end: int) -> list[Piece]:
    """Return what of the slices is seen in [begin, end): later ones lie over earlier ones; holes are left out."""
    if begin >= end:
        return []
    begins, ends = [begin], [end]  # of what no slice so far covers, in order
    pieces: list[Piece] = []
    for each in reversed(slices):
        first = bisect_right(ends, each.offset)
        behind = bisect_left(begins, each.offset + each.length)
        if first >= behind:
            continue
        left: list[tuple[int, int]] = []
        for gap in zip(begins[first:behind], ends[first:behind], strict=True):
            covered = max(gap[0], each.offset), min(gap[1], each.offset + each.length)
            if each.slice_id:
                start = each.start + covered[0] - each.offset
                pieces.append(Piece(covered[0], covered[1] - covered[0], each.slice_id, start))
            left += [part for part in ((gap[0], covered[0]), (covered[1], gap[1])) if part[0] < part[1]]
        begins[first:behind] = [part[0] for part in left]
        ends[first:behind] = [part[1] for part in left]
    pieces.sort()
    return pieces


def _cut(piece: Piece, begin: int, end: int) -> Piece:
    first, behind = max(piece.offset, begin), min(piece.end, end)
    return Piece(first, behind - first, piece.slice_id, piece.start + first - piece.offset)
