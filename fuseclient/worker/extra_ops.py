"""The FUSE requests that do not go through pyfuse3.

It has no method for FALLOCATE, LSEEK, COPY_FILE_RANGE, TMPFILE and those for locks, does not tell of a FLUSH and a
RELEASE whose locks they end, cannot answer OPEN with a backing for passthrough, makes two requests of a SETXATTR with
flags, and takes long over the frequent ones, which are direct_ops.py's.

They come over a socket of their own, one message each, and are answered on it, at once or by a task of their own; what
is not known here is answered ENOSYS, after which the kernel does without. This is an edge to the kernel, as
operations/ is for all else: it speaks of errno, and what is below does not.

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
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from pyfuse3 import FUSEError

from fuseclient import levels
from fuseclient.data.grants import NO_GRANT
from fuseclient.data.ranges import Ranges
from fuseclient.worker import extra_messages as messages
from fuseclient.worker.direct_ops import Answer, Asked, DirectOps
from fuseclient.worker.errors import errno_of
from fuseclient.worker.lock_store import Held, Key
from fuseclient.worker.locks import Locks, Lost
from fuseclient.worker.operations import Operations
from metaserver.wire import Lock, LockOutcome

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
#: Requests that are taken before others have their turn.
_A_TURN: Final = 32
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
        self._direct = DirectOps(operations, self._send).handlers
        self._buffer = bytearray(messages.MESSAGE_MAX)
        self._view = memoryview(self._buffer)
        #: Replies that the channel has not taken yet.
        self._unsent: deque[bytes] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Requests in hand, by their unique; the event is set when one is interrupted.
        self._running: dict[int, asyncio.Event] = {}
        self._has_ended = False
        #: Those who wait for the channel to have taken back what was granted, in the order of their asking.
        self._withdrawals: deque[asyncio.Future[None]] = deque()
        operations.catch_up = self._catch_up
        operations.on_withdraw(self._withdraw)

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
        self._catch_up()
        self._ended()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._unsent:
            self._loop.remove_writer(self._socket)
        self._socket.close()

    def _on_readable(self) -> None:
        for _ in range(_A_TURN):
            if not self._receive():
                return

    def _catch_up(self) -> None:
        """Take all that was sent up to now, if the socket is not closed: there may be writes that were answered."""
        while self._socket.fileno() >= 0 and self._receive():
            pass

    def _receive(self) -> bool:
        """Take a request; say whether there was one."""
        try:
            length = self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            length = 0
        if not length:
            self._loop.remove_reader(self._socket)
            self._ended()
            return False
        try:
            self._take(self._view[:length], cut_off=length > len(self._buffer))
        except messages.Malformed as error:
            _log.error("the channel sent what cannot be: %s", error)
            if error.unique:
                self._send(messages.encode_error(error.unique, errno.EIO))
        return True

    def _take(self, message: memoryview, *, cut_off: bool) -> None:
        if cut_off:
            raise messages.Malformed("a request of more bytes than any has", messages.unique_of(message))
        header = messages.decode_header(message)
        if header.opcode == messages.WITHDRAWN:
            self._withdrawn()
            return
        self._operations.seen(header.nodeid)
        if (handler := self._direct.get(header.opcode)) is not None:
            self._answer_directly(header, handler, message[messages.HEADER_BYTES :])
            return
        body = messages.decode_body(header, message)
        if isinstance(body, messages.Interrupt):
            if body.unique in self._running:
                self._running[body.unique].set()
        elif self._is_done_now(header, body):
            levels.at_once()
            self._send(messages.encode(header.unique))
        else:
            self._running[header.unique] = asyncio.Event()
            gone = errno.ENOENT if isinstance(body, messages.Tmpfile) else errno.ESTALE
            work = self._carry_out(header, body)
            self._start(self._answer(header, work, type(body).__name__.lower(), gone))

    def _is_done_now(self, header: messages.Header, body: messages.Body) -> bool:
        """Release or flush a handle of which nothing has to be waited for, no lock either; False: nothing is done."""
        match body:
            case messages.Release():
                return not self._locks.has(header.nodeid) and self._operations.release_now(body.fh)
            case messages.Flush():
                self._operations.syncs(header.nodeid)
                return not self._locks.has(header.nodeid) and self._operations.flush_now(body.fh)
            case _:
                return False

    def _answer_directly(self, header: messages.Header, handler: Callable[[Asked], Answer], body: memoryview) -> None:
        """Answer a request at once, or start what it has to wait for."""
        try:
            answer = handler(Asked(header.nodeid, header.uid, header.gid, header.pid, body))
        except FUSEError as error:
            levels.at_once()
            self._send(messages.encode_error(header.unique, error.errno))
        except messages.Malformed as error:
            error.unique = header.unique
            raise
        except Exception as error:
            self._send(messages.encode_error(header.unique, errno_of(error, handler.__name__)))
        else:
            if isinstance(answer, bytes):
                levels.at_once()
                self._send(messages.encode(header.unique, answer))
            elif answer is not None:
                self._start(self._answer(header, answer, handler.__name__, errno.ESTALE))

    async def _withdraw(self, ino: int) -> None:
        """Return when nothing is granted of an inode (0: of any), and all is taken that was posted before."""
        if self._has_ended:
            return
        done = self._loop.create_future()
        self._withdrawals.append(done)
        self._send(messages.encode_withdrawal(ino))
        await done

    def _withdrawn(self) -> None:
        """The channel answers in order; it may answer one more, which the worker before this one asked for."""
        if self._withdrawals and not (done := self._withdrawals.popleft()).done():
            done.set_result(None)

    def _ended(self) -> None:
        """No more requests come, so nothing is granted any more."""
        self._has_ended = True
        while self._withdrawals:
            self._withdrawn()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, header: messages.Header, work: Coroutine[Any, Any, bytes], name: str, gone: int) -> None:
        request = levels.begin()
        try:
            reply = messages.encode(header.unique, await work)
        except FUSEError as error:
            reply = messages.encode_error(header.unique, error.errno)
        except Lost:
            reply = messages.encode_error(header.unique, errno.EIO)
        except Exception as error:
            reply = messages.encode_error(header.unique, errno_of(error, name, gone=gone))
        finally:
            self._running.pop(header.unique, None)
            levels.end(request)
        self._send(reply)

    def _send(self, reply: bytes) -> None:
        if not self._unsent:
            try:
                self._socket.send(reply)
                return
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._on_writable)
            except OSError as error:
                _log.debug("a reply has nobody to go to: %s", error)
                return
        self._unsent.append(reply)

    def _on_writable(self) -> None:
        try:
            while self._unsent:
                self._socket.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            _log.debug("%d replies have nobody to go to: %s", len(self._unsent), error)
            self._unsent.clear()
        self._loop.remove_writer(self._socket)

    async def _carry_out(self, header: messages.Header, body: messages.Body) -> bytes:
        """Do what is asked for, and return the body of the reply."""
        match body:
            case messages.Open():
                opened, opening = await self._operations.open_file(header.nodeid, body.flags)
                grant = NO_GRANT if body.flags & os.O_APPEND else self._operations.grant(opened.fh)
                return messages.encode_open(opened, opening, grant)
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
                context = Asked(header.nodeid, header.uid, header.gid, header.pid, memoryview(b"")).context
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
        lock: Held | Lock | None
        if request.exclusive is None:
            lock = self._locks.own(key, request.start, request.end)
        else:
            wanted = Held(key, request.start, request.end, request.exclusive, request.pid, request.fh)
            lock = await self._locks.test(wanted)
        return messages.encode_lock(None if lock is None else (lock.start, lock.end, lock.exclusive, lock.pid))

    async def _set_lock(self, header: messages.Header, request: messages.SetLock) -> bytes:
        key = Key(header.nodeid, request.flock, request.owner)
        if request.exclusive is None:
            outcome = await self._locks.unlock(key, request.start, request.end)
        else:
            wanted = Held(key, request.start, request.end, request.exclusive, request.pid, request.fh)
            interrupted = self._running[header.unique] if request.wait else None
            outcome = await self._locks.take(wanted, interrupted, header.pid)
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
