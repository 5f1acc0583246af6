"""The FUSE messages that do not go through pyfuse3, taken apart (see direct_ops.py for some) and put together.

Formats: ``include/uapi/linux/fuse.h``, of protocol 7.44; numbers are in the machine's own order. Every length is
checked here, so the code behind sees only whole requests.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple, TypeAlias

import pyfuse3

from fuseclient._native import lib
from fuseclient.data.grants import NO_GRANT, Grant
from fuseclient.data.passthrough import Opening

_HEADER: Final = struct.Struct("=IIQQIIIHH")
_REPLY: Final = struct.Struct("=IiQ")
_FALLOCATE: Final = struct.Struct("=QQQII")
_LSEEK: Final = struct.Struct("=QqII")
_COPY: Final = struct.Struct("=QQQQQQQ")
_CREATE: Final = struct.Struct("=IIII")
_INTERRUPT: Final = struct.Struct("=Q")
_LSEEK_REPLY: Final = struct.Struct("=Q")
_COPY_REPLY: Final = struct.Struct("=II")
_COPY_64_REPLY: Final = struct.Struct("=Q")
_ENTRY: Final = struct.Struct("=QQQQII")
_ATTRIBUTES: Final = struct.Struct("=QQQqqqIIIIIIIIII")
_ATTRIBUTES_VALID: Final = struct.Struct("=QII")
_OPEN: Final = struct.Struct("=QII")
_WRITTEN: Final = struct.Struct("=II")
_INODE: Final = struct.Struct("=Q")
_RENEWED: Final = struct.Struct("=QII")
_OPEN_REQUEST: Final = struct.Struct("=II")
_CLOSING: Final = struct.Struct("=QIIq")
_LOCK: Final = struct.Struct("=QqQQIIII")
_LOCK_REPLY: Final = struct.Struct("=QQII")
_SETXATTR: Final = struct.Struct("=II")

HEADER_BYTES: Final = _HEADER.size
#: The longest message, in bytes: a WRITE's headers and BPFUSE_PAYLOAD.
MESSAGE_MAX: Final = 266240 + 4096
_INT64: Final = 1 << 63
_SECOND_NS: Final = 1_000_000_000
_READ_LOCK, _WRITE_LOCK, _UNLOCK = range(3)
_LOCK_IS_FLOCK: Final = 1 << 0
_RELEASE_ENDS_FLOCK: Final = 1 << 1
_FOPEN_DIRECT_IO: Final = 1 << 0
_FOPEN_KEEP_CACHE: Final = 1 << 1
_FOPEN_PASSTHROUGH: Final = 1 << 7


class Malformed(Exception):
    """What came is not a request of the protocol. ``unique`` is that of the request to be refused; 0: unknown."""

    def __init__(self, text: str, unique: int = 0) -> None:
        super().__init__(text)
        self.unique = unique


#: Of the channel's word that it has taken back grants.
WITHDRAWN: Final = int(lib.BPFUSE_WITHDRAWN_OPCODE)


class Opcode(enum.IntEnum):
    """The opcodes of this socket."""

    LOOKUP = 1
    GETATTR = 3
    SETATTR = 4
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    FLUSH = 25
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    CREATE = 35
    INTERRUPT = 36
    FALLOCATE = 43
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    COPY_FILE_RANGE_64 = 53


class Header(NamedTuple):
    """Who asks for what. ``unique`` names the request in its reply and in an interrupt."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int


class Open(NamedTuple):
    flags: int


class SetXattr(NamedTuple):
    """``flags``: XATTR_CREATE and XATTR_REPLACE."""

    name: bytes
    value: bytes
    flags: int


class Fallocate(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


class Lseek(NamedTuple):
    """``offset`` may be negative."""

    fh: int
    offset: int
    whence: int


class CopyFileRange(NamedTuple):
    """``size_64``: the reply has room for a count of 64 bits."""

    fh_in: int
    offset_in: int
    nodeid_out: int
    fh_out: int
    offset_out: int
    length: int
    flags: int
    size_64: bool


class Tmpfile(NamedTuple):
    """The kernel has applied the umask."""

    flags: int
    mode: int


class Flush(NamedTuple):
    """A descriptor is closed. ``owner``: of the ranges that its process has locked."""

    fh: int
    owner: int


class Release(NamedTuple):
    """``flock_owner`` of a file that may have been locked by flock."""

    fh: int
    flock_owner: int | None


class GetLock(NamedTuple):
    """Bytes ``start`` to ``end``, the last one included; ``owner`` is signed.

    ``exclusive`` None: what the owner itself has locked of them (F_OFD_GETLK with F_UNLCK).
    """

    fh: int
    owner: int
    start: int
    end: int
    exclusive: bool | None
    pid: int
    flock: bool


class SetLock(NamedTuple):
    """As :class:`GetLock`; ``exclusive`` None: unlock."""

    fh: int
    owner: int
    start: int
    end: int
    exclusive: bool | None
    pid: int
    flock: bool
    wait: bool


class Interrupt(NamedTuple):
    unique: int


class Unknown(NamedTuple):
    """A request of a kind that is not decoded."""


# fmt: off
Body: TypeAlias = (
    Open | Release | SetXattr | Flush | GetLock | SetLock | Fallocate | Lseek | CopyFileRange | Tmpfile | Interrupt
    | Unknown
)
# fmt: on


def decode(message: bytes | memoryview) -> tuple[Header, Body]:
    """Take a request apart; raise :exc:`Malformed`."""
    header = decode_header(message)
    return header, decode_body(header, message)


def decode_header(message: bytes | memoryview) -> Header:
    """Take the header of a request apart; raise :exc:`Malformed`."""
    if len(message) < HEADER_BYTES:
        raise Malformed(f"a request of {len(message)} bytes")
    length, opcode, unique, nodeid, uid, gid, pid, _, _ = _HEADER.unpack_from(message)
    if length != len(message):
        raise Malformed(f"a request of {len(message)} bytes that says {length}", unique)
    return Header(opcode, unique, nodeid, uid, gid, pid)


def decode_body(header: Header, message: bytes | memoryview) -> Body:
    """Take apart what follows the header of one of the opcodes above; raise :exc:`Malformed`."""
    try:
        return _decode_body(header.opcode, bytes(message[HEADER_BYTES:]))
    except (struct.error, ValueError) as error:
        text = f"a request of opcode {header.opcode} and {len(message)} bytes: {error}"
        raise Malformed(text, header.unique) from None


def unique_of(message: bytes | memoryview) -> int:
    """Return the unique of what may be cut off; 0 if it has none."""
    return int(_HEADER.unpack_from(message)[2]) if len(message) >= _HEADER.size else 0


def _decode_body(opcode: int, body: bytes) -> Body:
    match opcode:
        case Opcode.OPEN:
            return Open(_OPEN_REQUEST.unpack(body)[0])
        case Opcode.SETXATTR:
            size, flags = _SETXATTR.unpack_from(body)
            name, end, value = body[_SETXATTR.size :].partition(b"\0")
            if not end or len(value) != size:
                raise ValueError(f"a value of {len(value)} bytes that says {size}")
            return SetXattr(name, value, flags)
        case Opcode.RELEASE:
            fh, _, flags, owner = _CLOSING.unpack(body)
            return Release(fh, owner if flags & _RELEASE_ENDS_FLOCK else None)
        case Opcode.FLUSH:
            fh, _, _, owner = _CLOSING.unpack(body)
            return Flush(fh, owner)
        case Opcode.GETLK | Opcode.SETLK | Opcode.SETLKW:
            return _decode_lock(opcode, body)
        case Opcode.FALLOCATE:
            fh, offset, length, mode, _ = _FALLOCATE.unpack(body)
            _check_range(offset, length)
            return Fallocate(fh, offset, length, mode)
        case Opcode.LSEEK:
            fh, offset, whence, _ = _LSEEK.unpack(body)
            return Lseek(fh, offset, whence)
        case Opcode.COPY_FILE_RANGE | Opcode.COPY_FILE_RANGE_64:
            fh_in, offset_in, nodeid_out, fh_out, offset_out, length, flags = _COPY.unpack(body)
            _check_range(offset_in, length)
            _check_range(offset_out, length)
            size_64 = opcode == Opcode.COPY_FILE_RANGE_64
            return CopyFileRange(fh_in, offset_in, nodeid_out, fh_out, offset_out, length, flags, size_64)
        case Opcode.TMPFILE:
            flags, mode, _, _ = _CREATE.unpack_from(body)
            if body.find(b"\0", _CREATE.size) != len(body) - 1:
                raise ValueError("its name does not end where it does")
            return Tmpfile(flags, mode)
        case Opcode.INTERRUPT:
            return Interrupt(*_INTERRUPT.unpack(body))
        case _:
            return Unknown()


def _decode_lock(opcode: int, body: bytes) -> GetLock | SetLock:
    fh, owner, start, end, kind, pid, flags, _ = _LOCK.unpack(body)
    if start > end or end >= _INT64:
        raise ValueError("a lock of a range that is none")
    if kind not in (_READ_LOCK, _WRITE_LOCK, _UNLOCK):
        raise ValueError(f"a lock of kind {kind}")
    flock = bool(flags & _LOCK_IS_FLOCK)
    exclusive = None if kind == _UNLOCK else kind == _WRITE_LOCK
    if opcode == Opcode.GETLK:
        return GetLock(fh, owner, start, end, exclusive, pid, flock)
    return SetLock(fh, owner, start, end, exclusive, pid, flock, opcode == Opcode.SETLKW)


def _check_range(offset: int, length: int) -> None:
    if offset + length >= _INT64:
        raise ValueError("a range beyond every file")


def encode(unique: int, body: bytes = b"") -> bytes:
    """Return the reply to a request that was carried out."""
    return _REPLY.pack(_REPLY.size + len(body), 0, unique) + body


def encode_error(unique: int, number: int) -> bytes:
    """Return the reply to a request that failed with an errno."""
    return _REPLY.pack(_REPLY.size, -number, unique)


def encode_offset(offset: int) -> bytes:
    """Return the body of a reply to LSEEK."""
    return _LSEEK_REPLY.pack(offset)


def encode_lock(lock: tuple[int, int, bool, int] | None) -> bytes:
    """Return the body of a reply to GETLK: the first byte, the last, exclusive?, and the process; ``None``: free."""
    if lock is None:
        return _LOCK_REPLY.pack(0, 0, _UNLOCK, 0)
    start, end, exclusive, pid = lock
    return _LOCK_REPLY.pack(start, end, _WRITE_LOCK if exclusive else _READ_LOCK, pid)


def encode_count(count: int, *, size_64: bool) -> bytes:
    """Return the body of a reply to COPY_FILE_RANGE; of 32 bits, unless ``size_64``."""
    return _COPY_64_REPLY.pack(count) if size_64 else _COPY_REPLY.pack(count, 0)


def encode_entry(entry: pyfuse3.EntryAttributes) -> bytes:
    """Return the body of a reply that tells of a name's inode, or of its absence."""
    entry_valid, entry_valid_ns = _timeout(entry.entry_timeout)
    attr_valid, attr_valid_ns = _timeout(entry.attr_timeout)
    head = _ENTRY.pack(entry.st_ino, 0, entry_valid, attr_valid, entry_valid_ns, attr_valid_ns)
    return head + _attributes(entry)


def encode_attributes(entry: pyfuse3.EntryAttributes) -> bytes:
    """Return the body of a reply that tells of an inode."""
    return _ATTRIBUTES_VALID.pack(*_timeout(entry.attr_timeout), 0) + _attributes(entry)


def _attributes(entry: pyfuse3.EntryAttributes) -> bytes:
    atime, atime_ns = divmod(entry.st_atime_ns, _SECOND_NS)
    mtime, mtime_ns = divmod(entry.st_mtime_ns, _SECOND_NS)
    ctime, ctime_ns = divmod(entry.st_ctime_ns, _SECOND_NS)
    return _ATTRIBUTES.pack(
        entry.st_ino, entry.st_size, entry.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev, entry.st_blksize, 0,
    )  # fmt: skip


def encode_opened(entry: pyfuse3.EntryAttributes, opened: pyfuse3.FileInfo, grant: Grant = NO_GRANT) -> bytes:
    """Return the body of a reply to CREATE or TMPFILE: an inode, and a handle of it."""
    return encode_entry(entry) + _OPEN.pack(opened.fh, _open_flags(opened), _grant(grant))


def encode_written(count: int, grant: Grant) -> bytes:
    """Return the body of a reply to WRITE."""
    return _WRITTEN.pack(count, _grant(grant))


def _grant(grant: Grant) -> int:
    """Return what tells the channel of a grant (``enum bpfuse_grant``)."""
    unit, most = int(lib.BPFUSE_GRANT_UNIT), int(lib.BPFUSE_GRANT_MOST)
    sizes = min(grant.credit // unit, most) | min(grant.closes // unit, most) << int(lib.BPFUSE_GRANT_CLOSE_SHIFT)
    return sizes | grant.changes << int(lib.BPFUSE_GRANT_CHANGES_BIT)


def encode_renewal(fh: int, count: int) -> bytes:
    """Return what says that so many bytes were taken that were posted by a handle (``struct bpfuse_renewed``)."""
    return encode(int(lib.BPFUSE_RENEW_UNIQUE), _RENEWED.pack(fh, count // int(lib.BPFUSE_GRANT_UNIT), 0))


def encode_withdrawal(ino: int) -> bytes:
    """Return what takes back all that was granted of an inode; 0: of all (``enum bpfuse_withdrawal``)."""
    return encode(int(lib.BPFUSE_WITHDRAW_UNIQUE), _INODE.pack(ino))


def encode_open(opened: pyfuse3.FileInfo, opening: Opening | None, grant: Grant = NO_GRANT) -> bytes:
    """Return the body of a reply to OPEN: a handle, and the backing that it reads from, or what is granted."""
    if opening is None:
        return _OPEN.pack(opened.fh, _open_flags(opened), _grant(grant))
    flags = _FOPEN_PASSTHROUGH | (_FOPEN_DIRECT_IO if opening.direct else 0)
    return _OPEN.pack(opened.fh, flags, opening.backing_id)


def _open_flags(opened: pyfuse3.FileInfo) -> int:
    return _FOPEN_KEEP_CACHE * opened.keep_cache | _FOPEN_DIRECT_IO * opened.direct_io


def _timeout(seconds: float) -> tuple[int, int]:
    return divmod(int(seconds * _SECOND_NS), _SECOND_NS)
