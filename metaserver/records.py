"""The values stored under the keys of :mod:`metaserver.keys`, packed and unpacked.

Fixed big-endian layouts: an inode takes 88 bytes, a slice 32. The layout of an inode begins with the fields of
:class:`metaserver.wire.Attributes` in their order, so that reading one for a client is a single unpack.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from metaserver.wire import KEPT_EVENTS, KEPT_S, Attributes, InodeFlag, Slice

_ATTRIBUTES: Final = struct.Struct(">5IQ3qIQQ")
_INODE: Final = struct.Struct(">5IQ3qIQQQ")
_NUMBER: Final = struct.Struct(">Q")
_VOLUME: Final = struct.Struct(">II16s")
_PAIR: Final = struct.Struct(">QQ")
_SHARD: Final = struct.Struct(">Qqq")
_SLICE: Final = struct.Struct(">4Q")
_RULE: Final = struct.Struct(">IQ")

SLICE_BYTES: Final = _SLICE.size


class Inode(msgspec.Struct, gc=False):
    """An inode while a transaction works on it. Times are nanoseconds since 1970."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    flags: int
    version: int
    stored: int
    #: The directory that a directory is in, or that a file has a name in; 0: there is none, or it is not known.
    parent: int

    @classmethod
    def made(cls, ino: int, mode: int, uid: int, gid: int, rdev: int, now_ns: int, parent: int = 0) -> Inode:
        """Return a new inode of version 1 with one link, or the two of an empty directory."""
        links = 2 if stat.S_ISDIR(mode) else 1
        return cls(ino, mode, links, uid, gid, rdev, 0, now_ns, now_ns, now_ns, 0, 1, 0, parent)

    @classmethod
    def unpack(cls, ino: int, value: bytes) -> Inode:
        return cls(ino, *_INODE.unpack(value))

    def pack(self) -> bytes:
        return _INODE.pack(
            self.mode, self.nlink, self.uid, self.gid, self.rdev, self.size, self.atime_ns, self.mtime_ns,
            self.ctime_ns, self.flags, self.version, self.stored, self.parent,
        )  # fmt: skip

    def attributes(self) -> Attributes:
        return Attributes(
            self.ino, self.mode, self.nlink, self.uid, self.gid, self.rdev, self.size, self.atime_ns, self.mtime_ns,
            self.ctime_ns, self.flags, self.version, self.stored,
        )  # fmt: skip

    @property
    def is_inline(self) -> bool:
        return bool(self.flags & InodeFlag.INLINE)


def unpack_attributes(ino: int, value: bytes) -> Attributes:
    """Return what a client sees of a packed inode."""
    return Attributes(ino, *_ATTRIBUTES.unpack_from(value))


class Entry(NamedTuple):
    """What a name in a directory stands for, and its place in the listing."""

    ino: int
    cookie: int

    @classmethod
    def unpack(cls, value: bytes) -> Entry:
        return cls(*_PAIR.unpack(value))

    def pack(self) -> bytes:
        return _PAIR.pack(*self)


def pack_listed(ino: int, name: bytes) -> bytes:
    return _NUMBER.pack(ino) + name


def unpack_listed(value: bytes) -> tuple[int, bytes]:
    return int.from_bytes(value[:8]), value[8:]


class Shard(msgspec.Struct, gc=False):
    """A share of the volume's counters: ``inodes`` and ``total_bytes`` mean something only summed over all shards."""

    next: int = 1
    inodes: int = 0
    total_bytes: int = 0

    @classmethod
    def unpack(cls, value: bytes | None) -> Shard:
        return cls() if value is None else cls(*_SHARD.unpack(value))

    def pack(self) -> bytes:
        return _SHARD.pack(self.next, self.inodes, self.total_bytes)


class Rule(NamedTuple):
    """All parts of a file's chunks from ``chunk`` on whose version is below ``version`` are void."""

    chunk: int
    version: int


def pack_rules(rules: Iterable[Rule]) -> bytes:
    return b"".join(_RULE.pack(*rule) for rule in rules)


def unpack_rules(value: bytes | None) -> list[Rule]:
    return [Rule(*fields) for fields in _RULE.iter_unpack(value or b"")]


def pack_slices(slices: Iterable[Slice]) -> bytes:
    return b"".join(_SLICE.pack(s.offset, s.length, s.slice_id, s.start) for s in slices)


def unpack_slices(value: bytes) -> list[Slice]:
    return [Slice(*fields) for fields in _SLICE.iter_unpack(value)]


def slices_within(value: bytes, start: int, end: int) -> list[Slice]:
    """Return what touches [start, end) of a packed list."""
    return [Slice(*f) for f in _SLICE.iter_unpack(value) if f[0] < end and f[0] + f[1] > start]


def slice_ids(value: bytes) -> set[int]:
    """Return the slices that a packed list uses, holes left out."""
    ids = {fields[2] for fields in _SLICE.iter_unpack(value)}
    ids.discard(0)
    return ids


class Kept(NamedTuple):
    """How many events of a volume are kept, and for how many seconds."""

    events: int
    seconds: int

    @classmethod
    def unpack(cls, value: bytes | None) -> Kept:
        return cls(KEPT_EVENTS, KEPT_S) if value is None else cls(*_PAIR.unpack(value))

    def pack(self) -> bytes:
        return _PAIR.pack(*self)


def pack_number(number: int) -> bytes:
    return _NUMBER.pack(number)


def unpack_number(value: bytes | None, missing: int) -> int:
    return missing if value is None else int(_NUMBER.unpack(value)[0])


def pack_numbers(numbers: Iterable[int]) -> bytes:
    return b"".join(map(_NUMBER.pack, numbers))


def unpack_numbers(value: bytes) -> list[int]:
    return [fields[0] for fields in _NUMBER.iter_unpack(value)]


def pack_volume(number: int, inline_limit: int, identity: bytes, store: str) -> bytes:
    return _VOLUME.pack(number, inline_limit, identity) + store.encode()


def unpack_volume(value: bytes) -> tuple[int, int, bytes, str]:
    return *_VOLUME.unpack_from(value), value[_VOLUME.size :].decode()
