"""Verbs on ranges of files: zeros, copies without the bytes being moved, and where data and holes are.

A range can be larger than what one transaction may touch. So each verb does as much as fits and says how far it came.
What is not stored reads as zeros: a range made of zeros takes no space, and is a hole to who looks for one.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from metaserver import chunks, keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.inodes import MAX_SIZE, Edit, load_regular
from metaserver.records import Inode
from metaserver.volumes import Context, Volume
from metaserver.wire import ErrorCode, InodeFlag, Slice


def allocate(txn: Transaction, context: Context, request: wire.Allocate) -> wire.Changed:
    """Make a range zeros, or only have the size cover it; NOT_FOUND, IS_A_DIRECTORY, INVALID, TOO_LARGE."""
    edit = Edit(txn, context)
    inode = edit.regular(request.ino)
    end = _end_of(request.offset, request.length)
    edit.touch(inode, modified=True)
    done = _zero(edit, inode, request.offset, end) if request.zero else end
    if not request.keep_size:
        edit.resize(inode, max(inode.size, done))
    return edit.changed(inode, done=done - request.offset)


def _end_of(offset: int, length: int) -> int:
    if not length or offset + length > MAX_SIZE:
        raise Refused(ErrorCode.TOO_LARGE if length else ErrorCode.INVALID, f"{length} bytes from {offset} on")
    return offset + length


def _zero(edit: Edit, inode: Inode, start: int, end: int) -> int:
    """Make [start, end) zeros and return up to where that was done."""
    if inode.is_inline:
        stored = _stored(edit.txn, edit.volume, inode)
        _store(edit, inode, _overlaid(stored, start, b"", end))
        return end
    behind = min(end, inode.size)
    reached = chunks.replace(edit.txn, edit.volume, inode, start, behind, [])
    return end if reached >= behind else reached


def _overlaid(stored: bytes, start: int, data: bytes, end: int) -> bytes:
    """Return stored bytes with data, and zeros behind it, laid over [start, end)."""
    behind = stored[end:]
    middle = data.ljust(end - start, b"\0") if behind else data
    before = stored[:start]
    return (before.ljust(start, b"\0") if middle else before) + middle + behind


def _stored(snapshot: Snapshot, volume: Volume, inode: Inode) -> bytes:
    return snapshot.get(keys.content(volume.id, inode.ino)) or b""


def _store(edit: Edit, inode: Inode, content: bytes) -> None:
    key = keys.content(edit.volume.id, inode.ino)
    inode.stored = len(content)
    if content:
        edit.txn.put(key, content)
    else:
        edit.txn.delete(key)


def copy_range(txn: Transaction, context: Context, request: wire.CopyRange) -> wire.Changed:
    """Copy without moving bytes; NOT_FOUND, IS_A_DIRECTORY, INVALID, TOO_LARGE, UNSUPPORTED."""
    edit = Edit(txn, context)
    source, inode = edit.regular(request.source), edit.regular(request.ino)
    length = max(0, min(request.length, source.size - request.source_offset))
    if not length:
        return edit.changed(inode)
    end = _end_of(request.offset, length)
    if source is inode and abs(request.offset - request.source_offset) < length:
        raise Refused(ErrorCode.INVALID, f"inode {inode.ino}: the ranges overlap")
    edit.touch(inode, modified=True)
    if source.is_inline:
        done = _copy_inline(edit, source, request.source_offset, inode, request.offset, end)
    else:
        done = _copy_slices(edit, source, request.source_offset, inode, request.offset, end)
    edit.resize(inode, max(inode.size, done))
    return edit.changed(inode, done=done - request.offset)


def _copy_inline(edit: Edit, source: Inode, source_offset: int, inode: Inode, start: int, end: int) -> int:
    """Copy to [start, end) from an inline file; return up to where."""
    data = _stored(edit.txn, edit.volume, source)[source_offset : source_offset + end - start]
    if not data:
        return _zero(edit, inode, start, end)
    if not inode.is_inline or start + len(data) > edit.volume.inline_limit:
        raise Refused(ErrorCode.UNSUPPORTED, f"inode {source.ino} is inline, and inode {inode.ino} cannot be")
    _store(edit, inode, _overlaid(_stored(edit.txn, edit.volume, inode), start, data, end))
    return end


def _copy_slices(edit: Edit, source: Inode, source_offset: int, inode: Inode, start: int, end: int) -> int:
    """Have [start, end) share the slices of another file; return up to where."""
    if inode.is_inline:
        if _stored(edit.txn, edit.volume, inode):
            raise Refused(ErrorCode.UNSUPPORTED, f"inode {inode.ino} has inline content")
        inode.flags &= ~InodeFlag.INLINE
    shift = start - source_offset
    pieces, stop = chunks.seen(edit.txn, edit.volume, source.ino, source_offset, source_offset + end - start)
    shifted = [Slice(s.offset + shift, s.length, s.slice_id, s.start) for s in pieces]
    return chunks.replace(edit.txn, edit.volume, inode, start, stop + shift, shifted)


def seek(snapshot: Snapshot, context: Context, request: wire.Seek) -> wire.Sought:
    """Find data or a hole; NOT_FOUND, IS_A_DIRECTORY, INVALID."""
    volume = context.volume
    inode = load_regular(snapshot, volume, request.ino)
    if request.offset >= inode.size:
        return wire.Sought(None)
    if inode.is_inline:
        stored = len(_stored(snapshot, volume, inode))
        extents, stop = [(request.offset, stored)] if request.offset < stored else [], inode.size
    else:
        pieces, stop = chunks.seen(snapshot, volume, inode.ino, request.offset, inode.size)
        extents = [(s.offset, s.offset + s.length) for s in pieces]
    return _hole(request.offset, extents, stop, inode.size) if request.hole else _data(extents, stop, inode.size)


def _data(extents: list[tuple[int, int]], stop: int, size: int) -> wire.Sought:
    if extents:
        return wire.Sought(extents[0][0])
    return wire.Sought(None) if stop >= size else wire.Sought(stop, True)


def _hole(offset: int, extents: Iterable[tuple[int, int]], stop: int, size: int) -> wire.Sought:
    """Find where the extents, that are known up to ``stop``, leave the first gap."""
    for begin, end in chain(extents, [(stop, stop)]):
        if begin > offset:
            return wire.Sought(offset)
        offset = end
    return wire.Sought(offset, offset < size)
