"""Reading a volume's rows: one kind at a time in the order of the keys, with the rows of a wrong form set apart."""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final

from metaserver import keys, wire
from metaserver.deferred import Kind as TaskKind
from metaserver.engine.base import Row, Snapshot
from metaserver.errors import Refused
from metaserver.events import is_event
from metaserver.inodes import check_name
from metaserver.records import SLICE_BYTES, Entry, Inode, Shard, unpack_rules
from metaserver.volumes import Volume

#: Rows read at once: of kinds whose values are small, and of those that can be 64 KiB.
_PAGE: Final = 1024
_LARGE_PAGE: Final = 64
_LARGE_KINDS: Final = b"dpqx"
_LAST_INO: Final = 2**48 - 1

_BASE: Final = len(keys.inode(0, 0))
_KINDS_OF_INODES: Final = (
    stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK,
)  # fmt: skip


def rows(snapshot: Snapshot, span: keys.Range, page: int = _PAGE) -> Iterator[Row]:
    """Yield all rows of a range of keys, read some at a time."""
    start, end = span
    while True:
        found = snapshot.range(start, end, limit=page)
        yield from found
        if len(found) < page:
            return
        start = found[-1][0] + b"\0"


class Stream:
    """The well-formed rows of one kind, by the number that their keys begin with, which is asked for in order.

    ``stray`` is told of the rows of a wrong form.
    """

    def __init__(self, snapshot: Snapshot, volume: Volume, kind: bytes, stray: Callable[[bytes], None]) -> None:
        page = _LARGE_PAGE if kind in _LARGE_KINDS else _PAGE
        found = rows(snapshot, keys.kind_range(volume.id, kind), page)
        self._rows = well_formed(found, kind, stray)
        #: The number of the next row; ``None`` after the last.
        self.number: int | None = None
        self._advance()

    def take(self, number: int) -> Iterator[Row]:
        """Yield the rows of a number, all of which are to be taken; those before it are passed over."""
        while self._next is not None and self.number is not None and self.number <= number:
            row, found = self._next, self.number
            self._advance()
            if found == number:
                yield row

    def __iter__(self) -> Iterator[Row]:
        while self._next is not None:
            row = self._next
            self._advance()
            yield row

    def _advance(self) -> None:
        self._next = row = next(self._rows, None)
        self.number = keys.number_of(row[0]) if row is not None else None


def find_inode(snapshot: Snapshot, volume: Volume, ino: int) -> Inode | None:
    """Return an inode; ``None`` if it does not exist, or its record is of a wrong form."""
    key = keys.inode(volume.id, ino)
    record = snapshot.get(key)
    return Inode.unpack(ino, record) if record is not None and _FORMS[b"i"](key, record) else None


def unknown_keys(snapshot: Snapshot, volume: Volume) -> Iterator[bytes]:
    """Yield the volume's keys of no known kind."""
    start, end = keys.volume_range(volume.id)
    for letter in keys.KINDS:
        first, after = keys.kind_range(volume.id, bytes((letter,)))
        yield from (key for key, _ in rows(snapshot, (start, first)))
        start = after
    yield from (key for key, _ in rows(snapshot, (start, end)))


def well_formed(found: Iterator[Row], kind: bytes, stray: Callable[[bytes], None]) -> Iterator[Row]:
    """Yield those rows of a kind whose form is right; ``stray`` is told of the others."""
    form = _FORMS[kind]
    for row in found:
        if form(*row):
            yield row
        else:
            stray(row[0])


_Form = Callable[[bytes, bytes], bool]


def _numbered(form: _Form) -> _Form:
    """A key of exactly one number, and what the form asks for."""
    return lambda key, value: len(key) == _BASE and form(key, value)


def _of_inode(form: _Form) -> _Form:
    """A key that begins with an inode's number, and what the form asks for."""
    return lambda key, value: len(key) >= _BASE and 0 < keys.number_of(key) <= _LAST_INO and form(key, value)


def _always(_key: bytes, _value: bytes) -> bool:
    return True


def _is_count(_key: bytes, value: bytes) -> bool:
    return len(value) == 8


def _is_entry(key: bytes, value: bytes) -> bool:
    try:
        check_name(keys.entry_name(key))
        entry = Entry.unpack(value)
    except (Refused, struct.error):
        return False
    return 0 < entry.ino <= _LAST_INO and entry.cookie > 0


def _is_inode(key: bytes, value: bytes) -> bool:
    try:
        inode = Inode.unpack(keys.number_of(key), value)
    except struct.error:
        return False
    return stat.S_IFMT(inode.mode) in _KINDS_OF_INODES


def _is_listed(key: bytes, value: bytes) -> bool:
    return len(key) == _BASE + 8 and 8 < len(value) <= 8 + wire.MAX_NAME


def _is_part(key: bytes, value: bytes) -> bool:
    return len(key) == _BASE + 14 and value[:1] in (b"\0", b"\1") and len(value) % SLICE_BYTES == 1


def _is_task(_key: bytes, value: bytes) -> bool:
    known = len(value) >= 2 and value[0] in TaskKind.__members__.values()
    return known and len(value) >= 2 + value[1] and (len(value) - 2 - value[1]) % 8 == 0


def _are_rules(_key: bytes, value: bytes) -> bool:
    try:
        return bool(unpack_rules(value))
    except struct.error:
        return False


def _is_counter(key: bytes, value: bytes) -> bool:
    return len(key) == len(keys.next_slice(0)) and len(value) == 8


def _is_shard(key: bytes, value: bytes) -> bool:
    try:
        Shard.unpack(value)
    except struct.error:
        return False
    return len(key) == len(keys.shard(0, 0)) and key[-1] < keys.SHARDS


def _is_xattr(key: bytes, value: bytes) -> bool:
    return _BASE < len(key) <= _BASE + wire.MAX_XATTR_NAME and len(value) <= wire.MAX_XATTR_VALUE


def _is_unused_block(key: bytes, value: bytes) -> bool:
    return len(value) == keys.BLOCK_SLICES // 8 and keys.unused_first(key) < 2**63


_FORMS: Final[dict[bytes, _Form]] = {
    b"c": _is_counter,
    b"d": _of_inode(_numbered(_always)),
    b"e": _of_inode(_is_entry),
    b"g": _of_inode(_numbered(_are_rules)),
    b"h": _numbered(is_event),
    b"i": _of_inode(_numbered(_is_inode)),
    b"k": lambda key, value: len(key) == len(keys.kept_events(0)) and len(value) == 16,
    b"l": _of_inode(_is_listed),
    b"o": lambda key, _value: len(key) == len(keys.orphan(0, bytes(16), 0)) and 0 < keys.orphan_ino(key) <= _LAST_INO,
    b"p": _of_inode(_is_part),
    b"q": _numbered(_is_task),
    b"r": _numbered(_is_count),
    b"s": _is_shard,
    b"u": _numbered(_is_unused_block),
    b"x": _of_inode(_is_xattr),
}
