"""Doubles for the data path: a metaserver that keeps one file, and a store in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from fuseclient.data.cached_objects import CachedObjects
from fuseclient.data.layouts import Layouts, visible
from fuseclient.data.objects import ObjectMissing
from fuseclient.data.reader import Reader
from fuseclient.worker.rpc import Refused
from metaserver import wire

INO: Final = 7


class Store:
    """Objects in memory. ``fail`` is raised by puts while it is set; ``gate`` holds them up while it is clear."""

    def __init__(self) -> None:
        self.objects: dict[int, bytes] = {}
        self.fail: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview) -> None:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        if self.fail is not None:
            raise self.fail
        assert slice_id not in self.objects
        self.objects[slice_id] = bytes(data)

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        if slice_id not in self.objects:
            raise ObjectMissing(f"object {slice_id} is missing")
        data = self.objects[slice_id][start : start + length]
        assert len(data) == length
        return memoryview(data)

    async def delete(self, slice_ids: list[int]) -> None:
        for each in slice_ids:
            self.objects.pop(each, None)


class OneFile:
    """What the metaserver does for one regular file, with the checks that matter to a writer."""

    def __init__(self, store: Store, inline_limit: int) -> None:
        self.store = store
        self.inline_limit = inline_limit
        self.inline: bytes | None = b""
        self.slices: list[wire.Slice] = []
        self.requests: list[wire.Request] = []
        #: Called with each request before it is answered; may raise, or change the file.
        self.before: Callable[[Any], None] = lambda request: None
        self._next_slice = 1
        self.attributes = wire.Attributes(INO, 0o100644, 1, 0, 0, 0, 0, 0, 0, 0, int(wire.InodeFlag.INLINE), 1)

    async def call(self, request: Any, reply_type: type[Any]) -> Any:
        self.requests.append(request)
        await asyncio.sleep(0)
        self.before(request)
        reply = getattr(self, type(request).__name__)(request)
        assert isinstance(reply, reply_type)
        return reply

    def touch(self, *, size: int | None = None) -> wire.Changed:
        """Change the attributes, as somebody else may."""
        inline = 0 if self.inline is None else int(wire.InodeFlag.INLINE)
        self.attributes = msgspec.structs.replace(
            self.attributes,
            size=self.attributes.size if size is None else size,
            version=self.attributes.version + 1,
            flags=inline,
        )
        return wire.Changed([self.attributes])

    def GetAttributes(self, request: wire.GetAttributes) -> wire.Found:
        return wire.Found(self.attributes)

    def GetContent(self, request: wire.GetContent) -> wire.Content:
        end = request.offset + request.length
        if self.inline is not None:
            return wire.Content(self.attributes, self.inline[request.offset : end], [])
        touching = [s for s in self.slices if s.offset < end and s.offset + s.length > request.offset]
        return wire.Content(self.attributes, None, touching)

    def WriteInline(self, request: wire.WriteInline) -> wire.Changed:
        end = request.offset + len(request.data)
        if self.inline is None or end > self.inline_limit:
            raise Refused(wire.ErrorCode.TOO_LARGE, "not inline")
        below = self.inline.ljust(request.offset, b"\0")
        self.inline = below[: request.offset] + request.data + below[end:]
        return self.touch(size=max(self.attributes.size, end))

    def NewSlices(self, request: wire.NewSlices) -> wire.SliceIds:
        first, self._next_slice = self._next_slice, self._next_slice + request.count
        return wire.SliceIds(list(range(first, self._next_slice)))

    def CommitSlices(self, request: wire.CommitSlices) -> wire.Changed:
        for each in request.slices:
            assert each.start + each.length <= len(self.store.objects[each.slice_id]), "an object is not stored"
        if self.inline is not None:
            if not request.replaces_inline and self.inline:
                raise Refused(wire.ErrorCode.INVALID, "inline content would be lost")
            if request.replaces_inline and request.inline_version != self.attributes.version:
                raise Refused(wire.ErrorCode.BUSY, "changed meanwhile")
        elif request.replaces_inline:
            raise Refused(wire.ErrorCode.BUSY, "not inline")
        self.inline = None
        self.slices += request.slices
        return self.touch(size=max(self.attributes.size, request.size))

    def Sync(self, request: wire.Sync) -> wire.Done:
        return wire.Done()

    def SetAttributes(self, request: wire.SetAttributes) -> wire.Changed:
        """Only sizes, and only those that extend; other changes are noted."""
        if request.size is None:
            return self.touch()
        assert request.size >= self.attributes.size
        return self.touch(size=request.size)

    def content(self) -> bytes:
        """Return the whole content as a reader elsewhere would see it."""
        size = self.attributes.size
        if self.inline is not None:
            return self.inline.ljust(size, b"\0")
        data = bytearray(size)
        for piece in visible(self.slices, 0, size):
            part = self.store.objects[piece.slice_id][piece.start : piece.start + piece.length]
            data[piece.offset : piece.offset + piece.length] = part
        return bytes(data)


class NothingKept:
    """The freshness of what is never kept."""

    def begin(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def unchanged(self, token: None, ino: int) -> bool:
        return False


def plain_reader(caller: Any, store: Any) -> Reader:
    """Return a reader without caches, that does not read ahead of small files."""
    return Reader(Layouts(caller, NothingKept(), lambda: 0.0), CachedObjects(store, None))
