"""The key space: every key that the metaserver stores, and the only functions that build or take apart one.

Numbers are big-endian, so that they sort. ``V`` stands for ``01`` and the volume's number (u32).

======================================  ===================================  ===========================================
key                                     value                                what it is
======================================  ===================================  ===========================================
00 'e'                                  u64                                  the server's epoch (see fencing.py)
00 'i' name                             Known (see identities.py)             an identity
00 'n'                                  u64                                  the next volume's number
00 'o' session slot                     sequence, reply                      the last outcome of a session's slot
00 's' session                          volume, lease, alone, owner          a session that was not ended
00 'u'                                  nothing, 1                           a server runs, or ended without a farewell
00 'v' name                             number, inline limit, store          a volume
V 'c'                                   u64                                  the next slice id
V 'd' ino                               bytes                                inline content, up to a tail of zeros that
                                                                             the size implies, or a symlink's target
V 'e' directory name                    ino, cookie                          an entry, found by name
V 'g' ino                               rules (chunk, version)               parts of this file that are void and are to
                                                                             be deleted (see chunks.py)
V 'h' version                           wire.Event                           one change, for who follows the volume
V 'h' FF...                             u64                                  the last version of those
V 'i' ino                               Inode                                an inode
V 'k'                                   count, seconds                       how many events are kept, and for how long
V 'l' directory cookie                  ino, name                            the same entry, in the listing's order
V 'o' session ino                       other sessions that it was held for  an orphan: no links, perhaps open there
V 'p' ino chunk version index           slices                               a part of a chunk's list of slices
V 'q' number                            a task                               deletions put off (see deferred.py)
V 'r' slice                             u64                                  the number of chunks that use the slice
V 's' shard                             next, inodes, bytes                  inode numbers to give out, and statistics
V 'u' block                             4096 bits                            slices unused, whose objects may be deleted
V 'x' ino name                          bytes                                an extended attribute
======================================  ===================================  ===========================================

ino, directory, cookie, version, slice, block: u64; chunk: u32; index: u16; shard, slot: u8; session: 16 bytes.

The statistics and the inode numbers are in 16 shards, so that transactions in different directories seldom conflict
over them: an inode belongs to the shard of its number modulo 16.
"""

from __future__ import annotations

import struct
from typing import Final

#: The letters of all kinds of keys that a volume has, in their order.
KINDS: Final = b"cdeghiklopqrsux"
SHARDS: Final = 16
#: Slice ids that share one block of the bitmap of unused slices.
BLOCK_SLICES: Final = 4096
#: The largest chunk index and version, for ranges without an end.
LAST_CHUNK: Final = 2**32 - 1
LAST_VERSION: Final = 2**64 - 1

_NUMBER: Final = struct.Struct(">BIcQ")
_PAIR: Final = struct.Struct(">BIcQQ")
_KIND: Final = struct.Struct(">BIc")
_SHARD: Final = struct.Struct(">BIcB")
_PART: Final = struct.Struct(">BIcQIQH")
_CHUNK: Final = struct.Struct(">BIcQI")
_PART_TAIL: Final = struct.Struct(">IQH")

_NAME_AT: Final = _NUMBER.size
_CHUNK_AT: Final = _NUMBER.size
_SESSION_AT: Final = _KIND.size

Range = tuple[bytes, bytes]


def _kind_range(volume: int, kind: bytes) -> Range:
    return _KIND.pack(1, volume, kind), _KIND.pack(1, volume, bytes((kind[0] + 1,)))


def kind_range(volume: int, kind: bytes) -> Range:
    """All keys of a kind, given by its letter."""
    return _kind_range(volume, kind)


def volume_range(volume: int) -> Range:
    """All keys of a volume."""
    return _KIND.pack(1, volume, b"\0")[:-1], _KIND.pack(1, volume + 1, b"\0")[:-1]


def kind_of(key: bytes) -> bytes:
    """Return the letter of a volume's key; nothing if it has none."""
    return key[_KIND.size - 1 : _KIND.size]


def number_of(key: bytes) -> int:
    """Return the first number after a volume's key's letter: inode, directory, slice, block or task."""
    return int.from_bytes(key[_KIND.size : _NUMBER.size])


# The registry


def next_volume() -> bytes:
    return b"\0n"


def unclean() -> bytes:
    return b"\0u"


def volume(name: str) -> bytes:
    return b"\0v" + name.encode()


def volumes() -> Range:
    return b"\0v", b"\0w"


def volume_name(key: bytes) -> str:
    return key[2:].decode()


# Identities


def identity(name: str) -> bytes:
    return b"\0i" + name.encode()


def identities(after: str = "") -> Range:
    """All identities, or those whose name sorts after ``after``."""
    return b"\0i" + after.encode() + (b"\0" if after else b""), b"\0j"


# Servers and sessions


def epoch() -> bytes:
    return b"\0e"


def session(session_id: bytes) -> bytes:
    return b"\0s" + session_id


def sessions() -> Range:
    return b"\0s", b"\0t"


def session_id(key: bytes) -> bytes:
    return key[2:]


def outcome(session_id: bytes, slot: int) -> bytes:
    return b"\0o" + session_id + bytes((slot,))


def outcomes(session_id: bytes) -> Range:
    return outcome(session_id, 0), outcome(session_id, 255)


# Inodes and what they hold


def inode(volume: int, ino: int) -> bytes:
    return _NUMBER.pack(1, volume, b"i", ino)


def content(volume: int, ino: int) -> bytes:
    return _NUMBER.pack(1, volume, b"d", ino)


def xattr(volume: int, ino: int, name: bytes) -> bytes:
    return _NUMBER.pack(1, volume, b"x", ino) + name


def xattrs(volume: int, ino: int) -> Range:
    return _NUMBER.pack(1, volume, b"x", ino), _NUMBER.pack(1, volume, b"x", ino + 1)


def xattr_name(key: bytes) -> bytes:
    return key[_NAME_AT:]


# Directories


def entry(volume: int, directory: int, name: bytes) -> bytes:
    return _NUMBER.pack(1, volume, b"e", directory) + name


def listing(volume: int, directory: int, cookie: int) -> bytes:
    return _PAIR.pack(1, volume, b"l", directory, cookie)


def listing_from(volume: int, directory: int, cookie: int) -> Range:
    """The entries of a directory whose cookie is at least ``cookie``, in order."""
    return _PAIR.pack(1, volume, b"l", directory, cookie), _NUMBER.pack(1, volume, b"l", directory + 1)


def entry_name(key: bytes) -> bytes:
    return key[_NAME_AT:]


def listing_cookie(key: bytes) -> int:
    return int.from_bytes(key[-8:])


# Orphans


def orphan(volume: int, session: bytes, ino: int) -> bytes:
    return _KIND.pack(1, volume, b"o") + session + ino.to_bytes(8)


def orphans(volume: int, session: bytes) -> Range:
    return orphan(volume, session, 0), orphan(volume, session, 2**64 - 1)


def orphans_after(volume: int, session: bytes) -> Range:
    """The orphans of all sessions whose id sorts after ``session`` (empty: of all sessions)."""
    start, end = _kind_range(volume, b"o")
    return (orphan(volume, session, 2**64 - 1) if session else start), end


def orphan_session(key: bytes) -> bytes:
    return key[_SESSION_AT:-8]


def orphan_ino(key: bytes) -> int:
    return int.from_bytes(key[-8:])


def orphans_beside(volume: int, ino: int, value: bytes) -> list[bytes]:
    """The keys under which an inode was held for others, by the value of one."""
    return [orphan(volume, value[at : at + 16], ino) for at in range(0, len(value), 16)]


# Slices


def next_slice(volume: int) -> bytes:
    return _KIND.pack(1, volume, b"c")


def part(volume: int, ino: int, chunk: int, version: int, index: int) -> bytes:
    return _PART.pack(1, volume, b"p", ino, chunk, version, index)


def parts(volume: int, ino: int, first: int, last: int) -> Range:
    """The parts of the chunks ``first`` to ``last`` of a file, by chunk and in the order of laying."""
    start = _CHUNK.pack(1, volume, b"p", ino, first)
    if last < LAST_CHUNK:
        return start, _CHUNK.pack(1, volume, b"p", ino, last + 1)
    return start, _NUMBER.pack(1, volume, b"p", ino + 1)


def part_of(key: bytes) -> tuple[int, int, int]:
    """Return (chunk, version, index) of a part's key."""
    chunk, version, index = _PART_TAIL.unpack_from(key, _CHUNK_AT)
    return chunk, version, index


def references(volume: int, slice_id: int) -> bytes:
    return _NUMBER.pack(1, volume, b"r", slice_id)


def unused(volume: int, slice_id: int) -> bytes:
    """The block of the bitmap that a slice belongs to."""
    return _NUMBER.pack(1, volume, b"u", slice_id // BLOCK_SLICES)


def all_unused(volume: int) -> Range:
    return _kind_range(volume, b"u")


def unused_first(key: bytes) -> int:
    """Return the first slice id of a bitmap's block."""
    return int.from_bytes(key[-8:]) * BLOCK_SLICES


# Events


def event(volume: int, version: int) -> bytes:
    return _NUMBER.pack(1, volume, b"h", version)


def events_from(volume: int, version: int) -> Range:
    """The events whose version is at least ``version``, in order."""
    return event(volume, version), last_event(volume)


def last_event(volume: int) -> bytes:
    """Where the last version is kept: beside the last event, so that a change touches one page of both."""
    return event(volume, LAST_VERSION)


def event_version(key: bytes) -> int:
    return int.from_bytes(key[-8:])


def kept_events(volume: int) -> bytes:
    return _KIND.pack(1, volume, b"k")


# Counters and things to clear up


def shard_of(ino: int) -> int:
    return ino % SHARDS


def shard(volume: int, number: int) -> bytes:
    return _SHARD.pack(1, volume, b"s", number)


def shards(volume: int) -> Range:
    return _kind_range(volume, b"s")


def void(volume: int, ino: int) -> bytes:
    return _NUMBER.pack(1, volume, b"g", ino)


def all_void(volume: int) -> Range:
    return _kind_range(volume, b"g")


def void_ino(key: bytes) -> int:
    return int.from_bytes(key[-8:])


def task(volume: int, number: int) -> bytes:
    return _NUMBER.pack(1, volume, b"q", number)


def tasks(volume: int) -> Range:
    return _kind_range(volume, b"q")


def task_number(key: bytes) -> int:
    return int.from_bytes(key[-8:])
