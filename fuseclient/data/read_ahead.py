"""Who reads a file from front to back, and how far ahead of him the objects are to be fetched.

The kernel reads ahead by itself, some hundred KiB in several requests at once, so the requests of one sequential reader
come a little out of order. What follows closely on the furthest byte read so far goes on with a stream. A stream's
window doubles with the distance read, up to ``WINDOW_BYTES``; each inode has a few streams, for several readers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from fuseclient.data.store_errors import StoreError
from fuseclient.worker.rpc import Disconnected, Refused

_log = logging.getLogger(__name__)

#: The most that is fetched ahead of a reader, and the distance read from which on that is done.
WINDOW_BYTES: Final = 16 * 1024 * 1024
BEGIN_BYTES: Final = 256 * 1024
#: How far from a stream's furthest byte a read may be that belongs to it.
_SLACK: Final = 1024 * 1024
_STREAMS: Final = 4
_INODES: Final = 1024
#: Of all inodes, at once.
_TASKS: Final = 4


class _Stream:
    __slots__ = ("begin", "fetched", "position")

    def __init__(self, offset: int) -> None:
        self.begin = self.position = self.fetched = offset


class ReadAhead:
    """Calls ``fetch(ino, begin, end)`` for what will be read soon."""

    def __init__(self, fetch: Callable[[int, int, int], Awaitable[None]]) -> None:
        self._fetch = fetch
        self._streams: OrderedDict[int, list[_Stream]] = OrderedDict()
        self._tasks: dict[asyncio.Task[None], int] = {}
        self._bytes = 0

    def read(self, ino: int, offset: int, end: int, size: int) -> None:
        """Somebody reads [offset, end) of a file of ``size`` bytes."""
        stream = self._stream(ino, offset)
        stream.position = max(stream.position, end)
        distance = stream.position - stream.begin
        if distance < BEGIN_BYTES:
            return
        window = min(2 * distance, WINDOW_BYTES)
        begin, target = max(stream.fetched, stream.position), min(stream.position + window, size)
        # In halves of a window: not a task for each request, and never nothing on its way.
        if target - begin >= min(window // 2, size - begin) > 0 and len(self._tasks) < _TASKS:
            stream.fetched = target
            self._start(ino, begin, target)

    def stop(self, ino: int) -> None:
        """Forget an inode's streams, and fetch no more for them."""
        self._streams.pop(ino, None)
        for task, owner in self._tasks.items():
            if owner == ino:
                task.cancel()

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows."""
        return {"bytes": self._bytes, "running": len(self._tasks)}

    async def close(self) -> None:
        """Stop everything."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def _stream(self, ino: int, offset: int) -> _Stream:
        streams = self._streams.setdefault(ino, [])
        self._streams.move_to_end(ino)
        for index, stream in enumerate(streams):
            if abs(offset - stream.position) <= _SLACK and offset >= stream.begin:
                streams.append(streams.pop(index))
                return stream
        streams.append(_Stream(offset))
        del streams[:-_STREAMS]
        if len(self._streams) > _INODES:
            self._streams.popitem(last=False)
        return streams[-1]

    def _start(self, ino: int, begin: int, end: int) -> None:
        self._bytes += end - begin
        task = asyncio.create_task(self._run(ino, begin, end), name=f"read ahead {ino}")
        self._tasks[task] = ino
        task.add_done_callback(self._tasks.pop)

    async def _run(self, ino: int, begin: int, end: int) -> None:
        try:
            await self._fetch(ino, begin, end)
        except (Refused, Disconnected, StoreError) as error:
            _log.debug("reading ahead of inode %d: %s", ino, error)  # who reads it is told
