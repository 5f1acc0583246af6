"""The FUSE requests that pyfuse3 has no method for: FALLOCATE, LSEEK, COPY_FILE_RANGE, TMPFILE and those for locks;
OPEN, which it cannot answer with a backing for passthrough; SETXATTR, of which it makes two requests when it has flags;
FLUSH and RELEASE, of which it does not tell the lock owner.

They come over a socket of their own, one message each, and are answered on it, each by a task of its own; what is not
known here is answered ENOSYS, after which the kernel does without. This is an edge to the kernel, as operations.py is
for all else: it speaks of errno, and what is below does not.

An INTERRUPT makes a copy stop at the next piece, with a short count if it has come so far, and ends the wait for a
lock; all else is soon through.
The socket's end is the worker's (see process.py); requests in hand are carried out, but nobody is told.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from types import SimpleNamespace
from typing import Any, Final

from pyfuse3 import FUSEError

from fuseclient.data.ranges import Ranges
from fuseclient.worker import extra_messages as messages
from fuseclient.worker.errors import errno_of
from fuseclient.worker.lock_store import Held, Key
from fuseclient.worker.locks import Locks, Lost
from fuseclient.worker.operations import Operations
from metaserver.wire import LockOutcome

_log = logging.getLogger(__name__)

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10
#: What each mode of fallocate(2) means that is carried out: (the size stays, the range becomes zeros).
_MODES: Final = {
    0: (False, False),
    _KEEP_SIZE: (True, False),
    _KEEP_SIZE | _PUNCH_HOLE: (True, True),
    _ZERO_RANGE: (False, True),
    _KEEP_SIZE | _ZERO_RANGE: (True, True),
}
#: What a program is told when it does not get a lock.
_LOCK_ERRORS: Final = {
    LockOutcome.DENIED: errno.EAGAIN,
    LockOutcome.DEADLOCK: errno.EDEADLK,
    LockOutcome.FULL: errno.ENOLCK,
    LockOutcome.CANCELLED: errno.EINTR,
}
#: What a reply to COPY_FILE_RANGE can say, in bytes, in whole pages.
_COUNT_32: Final = (1 << 32) - 4096


class ExtraOps:
    """Serves a socket from :meth:`start` to :meth:`close`. To be used on the event loop."""

    def __init__(self, fd: int, operations: Operations, ranges: Ranges, locks: Locks) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._operations = operations
        self._ranges = ranges
        self._locks = locks
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Requests in hand, by their unique; the event is set when one is interrupted.
        self._running: dict[int, asyncio.Event] = {}

    def start(self) -> None:
        """Take requests from now on."""
        self._loop.add_reader(self._socket, self._on_readable)

    async def close(self) -> None:
        """Take no more requests, and return when those in hand are through. Twice does no harm."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        for interrupted in self._running.values():
            interrupted.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._socket.close()

    def _on_readable(self) -> None:
        try:
            message, _, flags, _ = self._socket.recvmsg(messages.MESSAGE_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            message, flags = b"", 0
        if not message:
            self._loop.remove_reader(self._socket)
            return
        try:
            self._take(message, cut_off=bool(flags & socket.MSG_TRUNC))
        except messages.Malformed as error:
            _log.error("the channel sent what cannot be: %s", error)
            if error.unique:
                self._start(self._send(messages.encode_error(error.unique, errno.EIO)))

    def _take(self, message: bytes, *, cut_off: bool) -> None:
        if cut_off:
            raise messages.Malformed("a request of more bytes than any has", messages.unique_of(message))
        header, body = messages.decode(message)
        if not isinstance(body, messages.Interrupt):
            self._running[header.unique] = asyncio.Event()
            self._start(self._answer(header, body))
        elif body.unique in self._running:
            self._running[body.unique].set()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, header: messages.Header, body: messages.Body) -> None:
        try:
            reply = messages.encode(header.unique, await self._carry_out(header, body))
        except FUSEError as error:
            reply = messages.encode_error(header.unique, error.errno)
        except Lost:
            reply = messages.encode_error(header.unique, errno.EIO)
        except Exception as error:
            gone = errno.ENOENT if isinstance(body, messages.Tmpfile) else errno.ESTALE
            reply = messages.encode_error(header.unique, errno_of(error, type(body).__name__.lower(), gone=gone))
        finally:
            del self._running[header.unique]
        await self._send(reply)

    async def _send(self, reply: bytes) -> None:
        async with self._sending:
            try:
                await self._loop.sock_sendall(self._socket, reply)
            except OSError as error:
                _log.debug("a reply has nobody to go to: %s", error)

    async def _carry_out(self, header: messages.Header, body: messages.Body) -> bytes:
        """Do what is asked for, and return the body of the reply."""
        match body:
            case messages.Open():
                return messages.encode_open(*await self._operations.open_file(header.nodeid, body.flags))
            case messages.SetXattr(name, value, flags):
                create, replace = bool(flags & os.XATTR_CREATE), bool(flags & os.XATTR_REPLACE)
                await self._operations.set_xattr(header.nodeid, name, value, create=create, replace=replace)
                return b""
            case messages.Flush():
                return await self._flush(header, body)
            case messages.Release():
                return await self._release(header, body)
            case messages.GetLock():
                return await self._get_lock(header, body)
            case messages.SetLock():
                return await self._set_lock(header, body)
            case messages.Fallocate():
                return await self._fallocate(header, body)
            case messages.Lseek():
                return await self._lseek(header, body)
            case messages.CopyFileRange():
                return await self._copy_file_range(header, body)
            case messages.Tmpfile():
                context: Any = SimpleNamespace(uid=header.uid, gid=header.gid, pid=header.pid, umask=0)
                opened, entry = await self._operations.tmpfile(header.nodeid, body.mode, body.flags, context)
                return messages.encode_opened(entry, opened)
            case _:
                raise FUSEError(errno.ENOSYS)

    async def _flush(self, header: messages.Header, request: messages.Flush) -> bytes:
        try:
            await self._operations.flush(request.fh)
        finally:
            await self._locks.closed(header.nodeid, request.owner)
        return b""

    async def _release(self, header: messages.Header, request: messages.Release) -> bytes:
        try:
            await self._operations.release(request.fh)
        finally:
            if self._locks.has(header.nodeid):
                fh = None if self._operations.is_shared(request.fh) else request.fh
                await self._locks.released(header.nodeid, fh, request.flock_owner)
        return b""

    async def _get_lock(self, header: messages.Header, request: messages.GetLock) -> bytes:
        key = Key(header.nodeid, request.flock, request.owner)
        wanted = Held(key, request.start, request.end, request.exclusive, request.pid, request.fh)
        lock = await self._locks.test(wanted)
        return messages.encode_lock(None if lock is None else (lock.start, lock.end, lock.exclusive, lock.pid))

    async def _set_lock(self, header: messages.Header, request: messages.SetLock) -> bytes:
        key = Key(header.nodeid, request.flock, request.owner)
        if request.exclusive is None:
            outcome = await self._locks.unlock(key, request.start, request.end)
        else:
            wanted = Held(key, request.start, request.end, request.exclusive, request.pid, request.fh)
            outcome = await self._locks.take(wanted, self._running[header.unique] if request.wait else None)
        if outcome is not LockOutcome.GRANTED:
            raise FUSEError(_LOCK_ERRORS[outcome])
        return b""

    async def _fallocate(self, header: messages.Header, request: messages.Fallocate) -> bytes:
        if request.mode not in _MODES:
            raise FUSEError(errno.EOPNOTSUPP)
        keep_size, zero = _MODES[request.mode]
        await self._operations.adopt(request.fh)
        async with self._operations.changing(header.nodeid):
            await self._ranges.allocate(header.nodeid, request.offset, request.length, keep_size=keep_size, zero=zero)
        return b""

    async def _lseek(self, header: messages.Header, request: messages.Lseek) -> bytes:
        if request.whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FUSEError(errno.EINVAL)
        if request.offset < 0:
            raise FUSEError(errno.ENXIO)
        await self._operations.absorb(header.nodeid)
        found = await self._ranges.seek(header.nodeid, request.offset, hole=request.whence == os.SEEK_HOLE)
        if found is None:
            raise FUSEError(errno.ENXIO)
        return messages.encode_offset(found)

    async def _copy_file_range(self, header: messages.Header, request: messages.CopyFileRange) -> bytes:
        if request.flags:
            raise FUSEError(errno.EINVAL)
        await self._operations.adopt(request.fh_out)
        length = request.length if request.size_64 else min(request.length, _COUNT_32)
        interrupted = self._running[header.unique]
        async with self._operations.changing(header.nodeid, request.nodeid_out):
            copied = await self._ranges.copy(
                header.nodeid,
                request.offset_in,
                request.nodeid_out,
                request.offset_out,
                length,
                interrupted.is_set,
            )
        if length and not copied and interrupted.is_set():
            raise FUSEError(errno.EINTR)
        return messages.encode_count(copied, size_64=request.size_64)
