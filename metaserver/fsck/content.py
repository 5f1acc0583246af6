"""What one inode holds: inline content, slices, extended attributes; and whether that fits the inode."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from metaserver import chunks, keys
from metaserver.engine.base import Row, Snapshot
from metaserver.fsck.findings import Kind
from metaserver.fsck.rows import Stream
from metaserver.fsck.sorting import Sorter
from metaserver.inodes import MAX_SIZE
from metaserver.records import Inode, Rule, unpack_rules, unpack_slices
from metaserver.volumes import Volume
from metaserver.wire import InodeFlag

#: Says what is wrong with the inode at hand, and names the repair with its arguments.
Report = Callable[[Kind, str, str, list[Any]], None]


@dataclass(slots=True)
class Holding:
    """What is stored under an inode's number. Sizes in bytes."""

    #: Of the inline content or symlink's target; ``None``: there is none.
    stored: int | None = None
    has_xattrs: bool = False
    #: Whether any slices are laid that no rule has made void, where what is seen of them ends, and the last version.
    has_slices: bool = False
    end: int = 0
    version: int = 0
    #: Everything that is left is garbage of a deleted inode.
    is_given_up: bool = False

    @property
    def has_content(self) -> bool:
        return bool(self.stored or self.has_slices)


class Holdings:
    """Reads what inodes hold, in the order of their numbers, and puts every use of a slice into ``uses``.

    A use is (slice, bytes of it that are needed, inode, chunk).
    """

    def __init__(self, snapshot: Snapshot, volume: Volume, stray: Callable[[bytes], None], uses: Sorter) -> None:
        self._contents, self._parts, self._rules, self._xattrs = (
            Stream(snapshot, volume, kind, stray) for kind in (b"d", b"p", b"g", b"x")
        )
        self._uses = uses

    @property
    def number(self) -> int | None:
        """The next inode that holds anything; ``None`` after the last."""
        streams = (self._contents, self._parts, self._rules, self._xattrs)
        return min((stream.number for stream in streams if stream.number is not None), default=None)

    def take(self, ino: int) -> Holding:
        """Return what an inode holds."""
        holding = Holding()
        for _, value in self._contents.take(ino):
            holding.stored = len(value)
        holding.has_xattrs = len(list(self._xattrs.take(ino))) > 0
        rules = [rule for _, value in self._rules.take(ino) for rule in unpack_rules(value)]
        holding.is_given_up = any(rule.version == keys.LAST_VERSION for rule in rules)
        for chunk, parts in groupby(self._parts.take(ino), lambda row: keys.part_of(row[0])[0]):
            self._chunk(holding, ino, chunk, parts, rules)
        return holding

    def _chunk(self, holding: Holding, ino: int, chunk: int, parts: Iterator[Row], rules: list[Rule]) -> None:
        needed: dict[int, int] = {}
        live = []
        for key, value in parts:
            version = keys.part_of(key)[1]
            slices = unpack_slices(value[1:])
            is_void = any(chunk >= rule.chunk and version < rule.version for rule in rules)
            for s in slices:
                needed[s.slice_id] = max(needed.get(s.slice_id, 0), 0 if is_void else s.start + s.length)
            if not is_void:
                live += slices
                holding.version = max(holding.version, version)
        needed.pop(0, None)
        for slice_id, end in needed.items():
            self._uses.add(slice_id, end, ino, chunk)
        if live:
            holding.has_slices = True
            holding.end = max([holding.end, *(s.offset + s.length for s in chunks.resolve(live)[-1:])])


def check(inode: Inode, holding: Holding, report: Report) -> None:
    """Report what of an inode's content does not fit it."""
    if stat.S_ISREG(inode.mode):
        _check_regular(inode, holding, report)
    else:
        _check_other(inode, holding, report)
    has_flag = bool(inode.flags & InodeFlag.HAS_XATTRS)
    if has_flag != holding.has_xattrs:
        what = f"has {'no ' * has_flag}extended attributes, and its flag says otherwise"
        report(Kind.WRONG_XATTR_FLAG, what, "set_flag", [inode.ino, int(InodeFlag.HAS_XATTRS), not has_flag])
    if holding.version > inode.version:
        what = f"is of version {inode.version}, and its content of version {holding.version}"
        report(Kind.WRONG_VERSION, what, "set_version", [inode.ino, holding.version])


def _check_regular(inode: Inode, holding: Holding, report: Report) -> None:
    is_inline = inode.is_inline
    if is_inline and holding.has_slices:
        if holding.stored:
            report(Kind.STRAY_CONTENT, "is inline, and has slices, too", "void_slices", [inode.ino])
        else:
            is_inline = False
            what = "has its content in slices, and its flag says inline"
            report(Kind.WRONG_INLINE_FLAG, what, "set_flag", [inode.ino, int(InodeFlag.INLINE), False])
    elif not is_inline and holding.stored is not None:
        if holding.has_slices or not holding.stored:
            report(Kind.STRAY_CONTENT, "is in slices, and has inline content, too", "delete_content", [inode.ino])
        else:
            is_inline = True
            what = "has its content inline, and its flag says in slices"
            report(Kind.WRONG_INLINE_FLAG, what, "set_flag", [inode.ino, int(InodeFlag.INLINE), True])
    end = (holding.stored or 0) if is_inline else holding.end
    if inode.size < end or inode.size > MAX_SIZE:
        what = f"is {inode.size} bytes long, and its content ends at {end}"
        report(Kind.WRONG_SIZE, what, "set_size", [inode.ino, end])


_LOST_TARGET: Final = b"(the target is lost)"


def _check_other(inode: Inode, holding: Holding, report: Report) -> None:
    """Symlinks hold their target; directories and special files nothing."""
    size = 0
    if stat.S_ISLNK(inode.mode):
        size = holding.stored or 0
        if not size:
            report(Kind.LOST_TARGET, "has lost its target", "set_target", [inode.ino, _LOST_TARGET])
            size = inode.size
    elif holding.stored is not None:
        report(Kind.STRAY_CONTENT, "is no regular file, and has content", "delete_content", [inode.ino])
    if holding.has_slices:
        report(Kind.STRAY_CONTENT, "is no regular file, and has slices", "void_slices", [inode.ino])
    if inode.flags & InodeFlag.INLINE:
        what = "is no regular file, and its flag says inline"
        report(Kind.WRONG_INLINE_FLAG, what, "set_flag", [inode.ino, int(InodeFlag.INLINE), False])
    if inode.size != size:
        report(Kind.WRONG_SIZE, f"is {inode.size} bytes long instead of {size}", "set_size", [inode.ino, size])
