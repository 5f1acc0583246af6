"""Changes of ranges of files and the search for data and holes, with regard to what is written and not yet committed.

The metaserver does the work, as much in one transaction as fits; this asks again for the rest. What was written
before is committed first: a hole then lies over it, and a copy has it.

A copy shares the slices of its source. Bytes that cannot be shared, because one of the two files is inline, are read
and written here; that is never more than a few pieces, for a file that has been written to is inline no longer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from fuseclient.data.caller import Caller
from fuseclient.data.objects import StoreError
from fuseclient.data.reader import Reader
from fuseclient.data.writer import Writer
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

#: A length that reaches to the end of every file.
_TO_THE_END: Final = 1 << 62


class Ranges:
    """Operations on ranges. ``committed`` is told of each reply that changed a file.

    ``write_back`` has the kernel send what was written through mappings and is still in its page cache. It does so by
    itself before it asks for a change, but not before it asks where data is.

    All raise :exc:`Refused`, :exc:`Disconnected` and :exc:`StoreError`. The files that are changed must be open for
    writing in ``writer``.
    """

    def __init__(
        self,
        caller: Caller,
        writer: Writer,
        reader: Reader,
        committed: Callable[[wire.Changed], None],
        write_back: Callable[[int], Awaitable[None]],
    ) -> None:
        self._caller = caller
        self._writer = writer
        self._reader = reader
        self._committed = committed
        self._write_back = write_back

    async def allocate(self, ino: int, offset: int, length: int, *, keep_size: bool, zero: bool) -> None:
        """Have the size cover a range, unless ``keep_size``, and, if ``zero``, the range read as zeros."""
        async with self._writer.settled(ino):
            done = 0
            while done < length:
                request = wire.Allocate(ino, offset + done, length - done, keep_size, zero)
                done += await self._change(request)

    async def seek(self, ino: int, offset: int, *, hole: bool) -> int | None:
        """Return where data, or a hole, first is at or after ``offset``; None: there is none before the end."""
        if self._writer.is_open(ino):
            await self._write_back(ino)
        await self._writer.before_read(ino, offset, _TO_THE_END)
        position: int | None = offset
        further = True
        while further and position is not None:
            sought = await self._caller.call(wire.Seek(ino, position, hole), wire.Sought)
            position, further = sought.offset, sought.further
        return position

    async def copy(
        self, source: int, source_offset: int, ino: int, offset: int, length: int, interrupted: Callable[[], bool]
    ) -> int:
        """Copy a range, and return of how many bytes: less at the source's end, or when ``interrupted`` says so.

        An error after some bytes makes the count short; it comes back at the next attempt.
        """
        done = 0
        while done < length and not interrupted():
            try:
                copied = await self._copy_some(source, source_offset + done, ino, offset + done, length - done)
            except (Refused, Disconnected, StoreError):
                if not done:
                    raise
                break
            if not copied:
                break
            done += copied
        return done

    async def _copy_some(self, source: int, source_offset: int, ino: int, offset: int, length: int) -> int:
        await self._writer.before_read(source, source_offset, length)
        try:
            async with self._writer.settled(ino):
                return await self._change(wire.CopyRange(source, source_offset, ino, offset, length))
        except Refused as error:
            if error.code != wire.ErrorCode.UNSUPPORTED:
                raise
        return await self._carry(source, source_offset, ino, offset, min(length, wire.MAX_INLINE))

    async def _carry(self, source: int, source_offset: int, ino: int, offset: int, length: int) -> int:
        """Copy by reading and writing."""
        data = (await self._reader.read(source, source_offset, length)).data
        await self._writer.write(ino, offset, data)
        return len(data)

    async def _change(self, request: wire.Allocate | wire.CopyRange) -> int:
        changed = await self._caller.call(request, wire.Changed)
        if changed.done:
            self._committed(changed)
        return changed.done
