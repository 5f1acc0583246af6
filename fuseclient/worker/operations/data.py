"""Operations on open files: reading, writing, and what makes it durable."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable

from pyfuse3 import FUSEError

from fuseclient.worker import handles
from fuseclient.worker.errors import answered_of_inode, answered_of_writer
from fuseclient.worker.operations.opening import OpenOperations
from metaserver import wire


class DataOperations(OpenOperations):
    """Of what open files hold."""

    @answered_of_inode
    async def read(self, fh: int, off: int, size: int) -> bytes:
        ino = handles.decode(fh).ino
        self._feeder.paged.add(ino)
        if self._passthrough.has(ino):
            data = await self._passthrough.read(ino, off, size)
            if data is not None:
                return data
        await self._writer.before_read(ino, off, size)
        if (found := await self._directories.content(ino)) is not None:
            data = found.data[off : off + size]
            self._on_read(found.attributes, len(data))
            return data
        with self._feeder.begin() as token:
            reading = await self._reader.read(ino, off, size)
            if reading.content is not None:
                self._feeder.inode(token, reading.attributes, reading.content)
        if reading.content is not None and off == 0:
            self._on_small_read(ino)
        self._on_read(reading.attributes, len(reading.data))
        return reading.data

    @answered_of_writer
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        _check_end(off + len(buf))
        await self.adopt(fh & ~handles.APPENDS)
        ino = handles.decode(fh).ino
        if not self._locks.may_write(ino):
            raise FUSEError(errno.EIO)
        if self._passthrough.has(ino):
            await self._passthrough.write(ino, off, buf)
        elif fh & handles.APPENDS:
            await self._writer.append(ino, buf)
        else:
            await self._writer.write(ino, off, buf)
        return len(buf)

    def write_now(self, fh: int, off: int, data: memoryview) -> bool:
        """Take a write for which nothing has to be waited; else return False, with nothing done."""
        _check_end(off + len(data))
        ino = handles.decode(fh).ino
        if fh & handles.APPENDS or self._is_earlier_writer(fh) or self._passthrough.has(ino):
            return False
        return self._locks.may_write(ino) and self._writer.write_now(ino, off, data)

    def on_withdraw(self, withdraw: Callable[[int], Awaitable[None]]) -> None:
        """Have :meth:`grant` taken back by this: see :class:`~fuseclient.data.writer_hooks.WriterHooks`."""
        self._writer.hooks.withdraw = withdraw

    def take_posted(self, fh: int, off: int, data: memoryview, made_ns: int) -> int:
        """Take a write that was answered already, because of a :meth:`grant`; return what that is to be renewed by."""
        ino = handles.decode(fh).ino
        self._writer.write_posted(ino, off, data, made_ns)
        return self._writer.renewal(ino)

    def take_change(self, request: wire.SetAttributes) -> None:
        """Take a change of attributes that was answered already, because of a :meth:`grant`."""
        self._writer.change_posted(request)

    def syncs(self, ino: int) -> None:
        """A FLUSH or an FSYNC has come, before which the channel has ended that it answers changes of attributes."""
        self._writer.end_changes(ino)

    async def absorb(self, ino: int) -> None:
        """Have what was written through mappings of a passthrough file come to the writer."""
        await self._passthrough.absorb(ino)

    @contextlib.asynccontextmanager
    async def changing(self, *inos: int) -> AsyncIterator[None]:
        """A context in which the content of a file is changed other than by :meth:`write`; it is the last of these."""
        for ino in inos:
            await self._passthrough.absorb(ino)
        yield
        await self._passthrough.changed_here(inos[-1])

    @answered_of_writer
    async def flush(self, fh: int) -> None:
        self._check_opens()
        await self._sync(fh, self._writer.flush)

    @answered_of_writer
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._sync(fh, self._writer.sync)

    def flush_now(self, fh: int) -> bool:
        """Flush a new file that is committed later; else return False, with nothing done."""
        handle = handles.decode(fh)
        return handle.writing and not self._is_earlier_writer(fh) and self._writer.flush_now(handle.ino)

    async def _sync(self, fh: int, sync: Callable[..., Awaitable[None]]) -> None:
        """Commit what was written through any handle; say once what an earlier worker may have lost."""
        handle = handles.decode(fh)
        await self._passthrough.absorb(handle.ino)
        await sync(handle.ino, for_reader=not handle.writing)
        if self._is_earlier_writer(fh) and fh not in self._reported:
            self._reported.add(fh)
            raise FUSEError(errno.EIO)

    def is_shared(self, fh: int) -> bool:
        """Whether another open handle may be the same as this one, which was released."""
        handle = handles.decode(fh)
        return not handle.kernel and handle.generation == self._generation and self._serials.in_use(fh)

    async def adopt(self, fh: int) -> None:
        """Open the file of a writing handle that an earlier worker gave out, at its first use here."""
        if self._is_earlier_writer(fh) and fh not in self._adopted:
            with self._feeder.begin() as token:
                attributes, fresh = await self._open_inode(token, handles.decode(fh).ino, writing=True)
                if fh not in self._adopted:
                    self._adopted.add(fh)
                    self._begin_writing(attributes, fresh)


def _check_end(end: int) -> None:
    if end > wire.MAX_FILE:
        raise FUSEError(errno.EFBIG)
