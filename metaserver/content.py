"""What files hold: inline bytes or slices, their size, and the attributes that a client sets.

A file begins inline. It stays so while its stored bytes are within the volume's inline limit, however large a hole
makes it; a commit of slices takes it out of there, and cutting it to nothing brings it back.
"""

from __future__ import annotations

import stat

from metaserver import chunks, keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.inodes import MAX_SIZE, Edit, load_regular
from metaserver.records import Inode
from metaserver.volumes import Context
from metaserver.wire import ErrorCode, InodeFlag


def get_content(snapshot: Snapshot, context: Context, request: wire.GetContent) -> wire.Content:
    """Return where a range of a file is; NOT_FOUND, IS_A_DIRECTORY, INVALID, and TOO_LARGE to ask for less."""
    volume = context.volume
    inode = load_regular(snapshot, volume, request.ino)
    length = max(0, min(request.length, inode.size - request.offset))
    if inode.is_inline:
        stored = snapshot.get(keys.content(volume.id, inode.ino)) or b""
        return wire.Content(inode.attributes(), stored[request.offset : request.offset + length], [])
    slices = chunks.slices_of(snapshot, volume, inode.ino, request.offset, length)
    return wire.Content(inode.attributes(), None, slices)


def write_inline(txn: Transaction, context: Context, request: wire.WriteInline) -> wire.Changed:
    """Write bytes of an inline file; TOO_LARGE, BUSY. Writing none changes nothing."""
    edit = Edit(txn, context)
    inode = edit.regular(request.ino)
    end = request.offset + len(request.data)
    if not inode.is_inline or end > context.volume.inline_limit:
        raise Refused(ErrorCode.TOO_LARGE, f"inode {inode.ino} cannot hold {end} bytes inline")
    _check_end(inode, request.appended_at)
    if request.data:
        key = keys.content(context.volume.id, inode.ino)
        stored = txn.get(key) or b""
        content = stored[: request.offset].ljust(request.offset, b"\0") + request.data + stored[end:]
        txn.put(key, content)
        inode.stored = len(content)
        edit.touch(inode, modified=True, written_ns=request.written_ns)
        edit.resize(inode, max(inode.size, end))
    if request.then is not None:
        _set(edit, inode, request.then)
    return edit.changed(inode)


def commit_slices(txn: Transaction, context: Context, request: wire.CommitSlices) -> wire.Changed:
    """Lay slices over a file's content, which may have been inline; INVALID, BUSY, TOO_LARGE."""
    edit = Edit(txn, context)
    inode = edit.regular(request.ino)
    end = _check_slices(request)
    _check_end(inode, request.appended_at)
    if inode.is_inline:
        _leave_inline(edit, inode, request)
    elif request.replaces_inline:
        code = ErrorCode.INVALID if request.inline_version == inode.version else ErrorCode.BUSY
        raise Refused(code, f"inode {inode.ino} is not inline")
    edit.touch(inode, modified=True, written_ns=request.written_ns)
    edit.resize(inode, max(inode.size, request.size, end))
    chunks.lay(txn, context.volume, inode, request.slices)
    return edit.changed(inode)


def _check_end(inode: Inode, appended_at: int | None) -> None:
    if appended_at not in (None, inode.size):
        raise Refused(ErrorCode.BUSY, f"inode {inode.ino} ends at {inode.size}, not at {appended_at}")


def compact_slices(txn: Transaction, context: Context, request: wire.CompactSlices) -> wire.Done:
    """Replace slices of a chunk by others of the same content; BUSY, INVALID, TOO_LARGE. No version changes."""
    inode = load_regular(txn, context.volume, request.ino)
    if inode.is_inline:
        raise Refused(ErrorCode.BUSY, f"inode {inode.ino} has no slices any more")
    chunks.compact(txn, context.volume, inode, request)
    return wire.Done()


def _check_slices(request: wire.CommitSlices) -> int:
    """Return where the last slice ends; INVALID, TOO_LARGE."""
    if any(s.length == 0 or s.start + s.length > 2**63 for s in request.slices):
        raise Refused(ErrorCode.INVALID, "a slice without length or beyond every slice's end")
    end = max((s.offset + s.length for s in request.slices), default=0)
    if end > MAX_SIZE:
        raise Refused(ErrorCode.TOO_LARGE, f"a slice that ends at {end}")
    return end


def _leave_inline(edit: Edit, inode: Inode, request: wire.CommitSlices) -> None:
    key = keys.content(edit.volume.id, inode.ino)
    if not request.replaces_inline:
        if edit.txn.get(key):
            raise Refused(ErrorCode.INVALID, f"inode {inode.ino} has inline content that would be lost")
    elif request.inline_version != inode.version:
        raise Refused(ErrorCode.BUSY, f"inode {inode.ino} has changed: read it again")
    edit.txn.delete(key)
    inode.flags &= ~InodeFlag.INLINE
    inode.stored = 0


def set_attributes(txn: Transaction, context: Context, request: wire.SetAttributes) -> wire.Changed:
    """Change mode, owner, times and size; a size of what is not a regular file: IS_A_DIRECTORY, INVALID."""
    edit = Edit(txn, context)
    inode = edit.inode(request.ino) if request.size is None else edit.regular(request.ino)
    if request.size is not None:
        _set_size(edit, inode, request.size)
    _set(edit, inode, request)
    return edit.changed(inode)


def _set(edit: Edit, inode: Inode, request: wire.SetAttributes) -> None:
    """Change all but the size."""
    edit.touch(inode, written_ns=request.changed_ns)
    if request.mode is not None:
        inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(request.mode)
    for field in ("uid", "gid", "atime_ns", "mtime_ns"):
        value = getattr(request, field)
        if value is not None:
            setattr(inode, field, value)


def _set_size(edit: Edit, inode: Inode, size: int) -> None:
    old = inode.size
    edit.touch(inode, modified=True)
    edit.resize(inode, size)
    if size >= old:
        return
    if inode.is_inline:
        _cut_inline(edit, inode, size)
        return
    chunks.cut(edit.txn, edit.volume, inode, size)
    if size == 0:
        inode.flags |= InodeFlag.INLINE


def _cut_inline(edit: Edit, inode: Inode, size: int) -> None:
    key = keys.content(edit.volume.id, inode.ino)
    stored = edit.txn.get(key) or b""
    inode.stored = min(len(stored), size)
    if size == 0:
        edit.txn.delete(key)
    elif size < len(stored):
        edit.txn.put(key, stored[:size])
