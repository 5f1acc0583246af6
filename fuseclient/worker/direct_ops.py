"""The requests that make and write files, the most frequent of those that no cache answers, without pyfuse3.

A turn of pyfuse3 takes some 100 us of this process (a task, locks, the socket put into epoll and out again); what
these requests need is often at hand: the name that a whole directory lacks, the attributes of a file made here, room
for some bytes. So each is taken apart here; it is answered in the same turn of the loop if it can be, and by the
method of :class:`~fuseclient.worker.operations.Operations` that pyfuse3 would call if it has to wait.

Formats: ``include/uapi/linux/fuse.h``, of protocol 7.44. Every length is checked before anything is used.
"""

from __future__ import annotations

import stat
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple, cast

from pyfuse3 import RequestContext

from fuseclient import levels
from fuseclient.worker.extra_messages import (
    Malformed,
    Opcode,
    encode_attributes,
    encode_entry,
    encode_opened,
    encode_renewal,
    encode_written,
)
from fuseclient.worker.operations import Begun, Operations
from metaserver import wire

_GETATTR: Final = struct.Struct("=IIQ")
_SETATTR: Final = struct.Struct("=IIQQQqqqIIIIIIII")
_MKDIR: Final = struct.Struct("=II")
_RENAME: Final = struct.Struct("=Q")
_RENAME2: Final = struct.Struct("=QII")
_READ: Final = struct.Struct("=QQIIQII")
_WRITE: Final = struct.Struct("=QQIIQII")
_FSYNC: Final = struct.Struct("=QII")
_DATA_ONLY: Final = 1 << 0
_CREATE: Final = struct.Struct("=IIII")

#: Bits of fuse_setattr_in.valid.
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_NOW, _MTIME_NOW, _CTIME = 1, 2, 4, 8, 16, 32, 128, 256, 1024
_MODE_BITS: Final = 0o7777
_SECOND_NS: Final = 1_000_000_000
_INT64: Final = 1 << 63

#: What a request comes to: the body of its reply, or what is to be awaited for it; None: it was answered before.
Answer = bytes | Coroutine[Any, Any, bytes] | None


class Asked(NamedTuple):
    """A request without its header: ``body`` is valid until the handler returns. The names are pyfuse3's."""

    nodeid: int
    uid: int
    gid: int
    pid: int
    body: memoryview
    umask: int = 0

    @property
    def context(self) -> RequestContext:
        return cast(RequestContext, self)


class DirectOps:
    """Answers them; ``handlers`` has one for each opcode. ``tell`` sends the channel what answers none.

    A handler raises :exc:`~fuseclient.worker.extra_messages.Malformed`, ``FUSEError``, or whatever an operation does.
    """

    def __init__(self, operations: Operations, tell: Callable[[bytes], None] = lambda message: None) -> None:
        self._operations = operations
        self._tell = tell
        self.handlers: Final[dict[int, Callable[[Asked], Answer]]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._fsync,
            Opcode.CREATE: self._create,
        }

    def _lookup(self, asked: Asked) -> Answer:
        name = _name(asked.body, 0)
        entry = self._operations.lookup_now(asked.nodeid, name)
        return self._looked_up(asked, name) if entry is None else encode_entry(entry)

    async def _looked_up(self, asked: Asked, name: bytes) -> bytes:
        return encode_entry(await self._operations.lookup(asked.nodeid, name, asked.context))

    def _getattr(self, asked: Asked) -> Answer:
        _fields(_GETATTR, asked.body)
        entry = self._operations.getattr_now(asked.nodeid)
        return self._got_attributes(asked) if entry is None else encode_attributes(entry)

    async def _got_attributes(self, asked: Asked) -> bytes:
        return encode_attributes(await self._operations.getattr(asked.nodeid, asked.context))

    def _setattr(self, asked: Asked) -> Answer:
        fields = _fields(_SETATTR, asked.body)
        request, posted = _set_attributes(asked.nodeid, fields), fields[1]
        if posted:
            levels.at_once(posted)
            self._operations.take_change(request)
            return None
        entry = self._operations.change_now(request)
        return self._changed(request) if entry is None else encode_attributes(entry)

    async def _changed(self, request: wire.SetAttributes) -> bytes:
        return encode_attributes(await self._operations.change(request))

    def _mkdir(self, asked: Asked) -> Answer:
        mode, _ = _fields(_MKDIR, asked.body, longer=True)
        return self._made(asked, _name(asked.body, _MKDIR.size), stat.S_IFDIR | mode)

    async def _made(self, asked: Asked, name: bytes, mode: int) -> bytes:
        return encode_entry(await self._operations.mkdir(asked.nodeid, name, mode, asked.context))

    def _unlink(self, asked: Asked) -> Answer:
        name = _name(asked.body, 0)
        if self._operations.unlink_now(asked.nodeid, name):
            return b""
        return _nothing(self._operations.unlink(asked.nodeid, name, asked.context))

    def _rmdir(self, asked: Asked) -> Answer:
        return _nothing(self._operations.rmdir(asked.nodeid, _name(asked.body, 0), asked.context))

    def _rename(self, asked: Asked) -> Answer:
        (parent,) = _fields(_RENAME, asked.body, longer=True)
        return self._moved(asked, asked.body[_RENAME.size :], parent, 0)

    def _rename2(self, asked: Asked) -> Answer:
        parent, flags, _ = _fields(_RENAME2, asked.body, longer=True)
        return self._moved(asked, asked.body[_RENAME2.size :], parent, flags)

    def _moved(self, asked: Asked, names: memoryview, parent: int, flags: int) -> Answer:
        end = bytes(names).find(b"\0") + 1
        old, new = _name(names[:end], 0), _name(names, end)
        if self._operations.rename_now(asked.nodeid, old, parent, new, flags):
            return b""
        return _nothing(self._operations.rename(asked.nodeid, old, parent, new, flags, asked.context))

    def _write(self, asked: Asked) -> Answer:
        fh, offset, size, _, made_ns, _, posted = _fields(_WRITE, asked.body, longer=True)
        data = asked.body[_WRITE.size :]
        if len(data) != size:
            raise Malformed(f"a write of {len(data)} bytes that says {size}")
        if posted:
            levels.at_once(posted)
            if taken := self._operations.take_posted(fh, offset, data, made_ns):
                self._tell(encode_renewal(fh, taken))
            return None
        if self._operations.write_now(fh, offset, data):
            return encode_written(size, self._operations.grant(fh))
        return self._written(fh, offset, bytes(data))

    async def _written(self, fh: int, offset: int, data: bytes) -> bytes:
        written = await self._operations.write(fh, offset, data)
        return encode_written(written, self._operations.grant(fh))

    def _read(self, asked: Asked) -> Answer:
        fh, offset, size, *_ = _fields(_READ, asked.body)
        return self._operations.read(fh, offset, size)

    def _fsync(self, asked: Asked) -> Answer:
        fh, flags, _ = _fields(_FSYNC, asked.body)
        self._operations.syncs(asked.nodeid)
        return _nothing(self._operations.fsync(fh, bool(flags & _DATA_ONLY)))

    def _create(self, asked: Asked) -> Answer:
        flags, mode, *_ = _fields(_CREATE, asked.body, longer=True)
        name = _name(asked.body, _CREATE.size)
        here = self._operations.create_now(asked.nodeid, name, mode, flags, asked.context)
        if here is not None:
            return _encode_begun(here)
        return self._created(asked, name, mode, flags)

    async def _created(self, asked: Asked, name: bytes, mode: int, flags: int) -> bytes:
        return _encode_begun(await self._operations.create_file(asked.nodeid, name, mode, flags, asked.context))


def _encode_begun(begun: Begun) -> bytes:
    return encode_opened(begun.entry, begun.opened, begun.grant)


async def _nothing(work: Coroutine[Any, Any, None]) -> bytes:
    await work
    return b""


def _fields(layout: struct.Struct, body: memoryview, *, longer: bool = False) -> tuple[Any, ...]:
    """Take apart what a body begins with, or is, unless it may be ``longer``."""
    if len(body) < layout.size or (len(body) > layout.size and not longer):
        raise Malformed(f"a body of {len(body)} bytes; {layout.size} belong there")
    return layout.unpack_from(body)


def _name(body: memoryview, offset: int) -> bytes:
    """Return the name that a body ends with, without its NUL."""
    name = bytes(body[offset:])
    if not name or name.find(b"\0") != len(name) - 1:
        raise Malformed("a name that does not end where it does")
    return name[:-1]


def _set_attributes(ino: int, fields: tuple[Any, ...]) -> wire.SetAttributes:
    (valid, _, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, _, uid, gid, _) = fields
    now_ns = time.time_ns() if valid & (_ATIME_NOW | _MTIME_NOW) else 0
    return wire.SetAttributes(
        ino,
        mode=mode & _MODE_BITS if valid & _MODE else None,
        uid=uid if valid & _UID else None,
        gid=gid if valid & _GID else None,
        size=size if valid & _SIZE else None,
        atime_ns=_time(valid, _ATIME, _ATIME_NOW, atime, atime_ns, now_ns),
        mtime_ns=_time(valid, _MTIME, _MTIME_NOW, mtime, mtime_ns, now_ns),
        changed_ns=_time(valid, _CTIME, 0, ctime, ctime_ns, 0),
    )


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int, now_ns: int) -> int | None:
    """Return the nearest time that is kept (years 1677 to 2262); None: it is not to be changed."""
    if valid & now:
        return now_ns
    return max(-_INT64, min(_INT64 - 1, seconds * _SECOND_NS + nanoseconds)) if valid & given else None
