"""Notifications to the kernel: what it is to drop from, or put into, its own caches.

They travel on sockets of their own to the channel's notifier threads, which write each to /dev/fuse and answer with
the result, in order. So a call here returns when the kernel has done it, and one that waits for a lock holds up no
reply. Those that never wait have a lane (a socket and a thread) to themselves; names, pages, and pages of files that
are being written have theirs, because each kind may wait for something that another one frees. Formats:
``include/uapi/linux/fuse.h``, ``fuse_notify_code``.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import os
import socket
import struct
from array import array

from fuseclient._native import lib

_HEADER = struct.Struct("=IiQ")
_INVAL_INODE = struct.Struct("=Qqq")
_INVAL_ENTRY = struct.Struct("=QII")
_STORE = struct.Struct("=QQII")
_RESULT = struct.Struct("=i")
_ID = struct.Struct("=I")

_CODE_INVAL_INODE = 2
_CODE_INVAL_ENTRY = 3
_CODE_STORE = 4
_CODE_INC_EPOCH = 8
_CODE_BACKING_OPEN = int(lib.BPFUSE_NOTIFY_BACKING_OPEN)
_CODE_BACKING_CLOSE = int(lib.BPFUSE_NOTIFY_BACKING_CLOSE)
_CODE_DROP_INODES = int(lib.BPFUSE_NOTIFY_DROP_INODES)
#: Inodes dropped by one message.
_AT_ONCE = 512

_GONE = "the channel closed the notification socket"


class _Lane:
    """One socket: notifications in order, any number on their way."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._waiting: collections.deque[asyncio.Future[int]] = collections.deque()
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._loop.add_reader(self._socket, self._on_readable)
        self.sent = 0

    async def notify(self, code: int, body: bytes, allowed: tuple[int, ...] = ()) -> int:
        """Send one and wait for its result (0 or an errno); raise OSError unless it is ENOENT or ``allowed``."""
        self.sent += 1
        try:
            return await self.ask(code, body)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *allowed):
                raise
            return error.errno

    async def ask(self, code: int, body: bytes, descriptor: int | None = None) -> int:
        """Send a message, with a descriptor if there is one; return its result, or raise OSError for a negative one."""
        result: asyncio.Future[int] = self._loop.create_future()
        async with self._sending:
            if self._socket.fileno() < 0:
                raise ConnectionResetError(_GONE)
            message = _HEADER.pack(_HEADER.size + len(body), code, 0) + body
            if descriptor is None:
                await self._loop.sock_sendall(self._socket, message)
            else:
                await self._send_descriptor(message, descriptor)
            self._waiting.append(result)
        value = await result
        if value < 0:
            raise OSError(-value, os.strerror(-value))
        return value

    async def _send_descriptor(self, message: bytes, descriptor: int) -> None:
        while True:
            try:
                socket.send_fds(self._socket, [message], [descriptor])
                return
            except BlockingIOError:
                writable = self._loop.create_future()
                self._loop.add_writer(self._socket, _wake, writable)
                try:
                    await writable
                finally:
                    self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            answer = self._socket.recv(_RESULT.size)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        if not answer:
            self.close()
            return
        result = self._waiting.popleft()
        if not result.done():
            result.set_result(_RESULT.unpack(answer)[0])

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        while self._waiting:
            result = self._waiting.popleft()
            if not result.done():
                result.set_exception(ConnectionResetError(_GONE))


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Notifier:
    """Sends notifications, to be used from the event loop only. ``slow`` are the lanes of names, pages and written
    pages; without them all share one."""

    def __init__(self, fd: int, slow: tuple[int, int, int] | None = None) -> None:
        self._instant = _Lane(fd)
        self._lanes = [self._instant, *map(_Lane, slow or ())]
        self._names, self._pages, self._written = self._lanes[1:] if slow else [self._instant] * 3

    @property
    def sent(self) -> int:
        """How many notifications were sent."""
        return sum(lane.sent for lane in self._lanes)

    async def invalidate_inode(self, ino: int) -> bool:
        """Drop an inode's attributes and its pages; False if the kernel does not know it. Waits for reads of it."""
        return await self._pages.notify(_CODE_INVAL_INODE, _INVAL_INODE.pack(ino, 0, 0)) == 0

    async def invalidate_written(self, ino: int) -> bool:
        """As :meth:`invalidate_inode`, of a file that is being written here: waits for writes, too."""
        return await self._written.notify(_CODE_INVAL_INODE, _INVAL_INODE.pack(ino, 0, 0)) == 0

    async def invalidate_unused(self, inos: array[int]) -> None:
        """As :meth:`invalidate_inode`, of many (of type Q) that nobody uses, known to the kernel or not."""
        for start in range(0, len(inos), _AT_ONCE):
            await self._written.notify(_CODE_DROP_INODES, inos[start : start + _AT_ONCE].tobytes())

    async def invalidate_attributes(self, ino: int) -> bool:
        """Drop an inode's attributes only; never waits for a lock. False if the kernel does not know the inode."""
        return await self._instant.notify(_CODE_INVAL_INODE, _INVAL_INODE.pack(ino, -1, 0)) == 0

    async def invalidate_entry(self, parent: int, name: bytes) -> None:
        """Drop a name. Waits for the directory's lock, so for requests in flight in it."""
        await self._names.notify(_CODE_INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0")

    async def increment_epoch(self) -> bool:
        """Expire every name at once, without a lock; False where the kernel (before 7.44) does not know how."""
        return await self._instant.notify(_CODE_INC_EPOCH, b"", allowed=(errno.EINVAL,)) == 0

    async def store(self, ino: int, offset: int, data: bytes) -> None:
        """Put bytes into an inode's page cache."""
        await self._pages.notify(_CODE_STORE, _STORE.pack(ino, offset, len(data), 0) + data)

    async def open_backing(self, descriptor: int) -> int:
        """Have the kernel take a file as a backing for passthrough; return its id. Raises OSError."""
        return await self._instant.ask(_CODE_BACKING_OPEN, b"", descriptor)

    async def close_backing(self, backing_id: int) -> None:
        """Give a backing's id back; files that are open with it keep it. Raises OSError."""
        await self._instant.ask(_CODE_BACKING_CLOSE, _ID.pack(backing_id))

    def close(self) -> None:
        """Close the sockets; whoever still waits is told that the channel is gone."""
        for lane in self._lanes:
            lane.close()
