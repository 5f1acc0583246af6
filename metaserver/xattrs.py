"""Extended attributes: one key each, and a flag in the inode that tells whether there are any."""

from __future__ import annotations

from typing import Final

from metaserver import keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.inodes import Edit, load
from metaserver.volumes import Context
from metaserver.wire import ErrorCode, InodeFlag

#: The most extended attributes of one inode.
MAX_XATTRS: Final = 256
#: Access control lists would have to be obeyed, not just stored.
_PREFIXES: Final = (b"user.", b"trusted.", b"security.")


def get_xattr(snapshot: Snapshot, context: Context, request: wire.GetXattr) -> wire.XattrIs:
    """Return a value; NO_XATTR."""
    load(snapshot, context.volume, request.ino)
    value = snapshot.get(keys.xattr(context.volume.id, request.ino, request.name))
    if value is None:
        raise _missing(request.ino, request.name)
    return wire.XattrIs(value)


def list_xattrs(snapshot: Snapshot, context: Context, request: wire.ListXattrs) -> wire.XattrNames:
    """Return the names, sorted."""
    load(snapshot, context.volume, request.ino)
    rows = snapshot.range(*keys.xattrs(context.volume.id, request.ino))
    return wire.XattrNames([keys.xattr_name(key) for key, _ in rows])


def set_xattr(txn: Transaction, context: Context, request: wire.SetXattr) -> wire.Changed:
    """Set a value; ``create`` and ``replace`` ask that it is, or is not, new: both never are, and are refused.

    XATTR_EXISTS, NO_XATTR, and NO_SPACE when there are too many.
    """
    _check_name(request.name)
    edit = Edit(txn, context)
    inode = edit.inode(request.ino)
    key = keys.xattr(context.volume.id, inode.ino, request.name)
    exists = txn.get(key) is not None
    if exists and request.create:
        raise Refused(ErrorCode.XATTR_EXISTS, f"inode {inode.ino} has {request.name!r} already")
    if not exists and request.replace:
        raise _missing(inode.ino, request.name)
    if not exists and len(txn.range(*keys.xattrs(context.volume.id, inode.ino), limit=MAX_XATTRS)) == MAX_XATTRS:
        raise Refused(ErrorCode.NO_SPACE, f"inode {inode.ino} has {MAX_XATTRS} extended attributes")
    txn.put(key, request.value)
    edit.touch(inode)
    inode.flags |= InodeFlag.HAS_XATTRS
    return edit.changed(inode)


def remove_xattr(txn: Transaction, context: Context, request: wire.RemoveXattr) -> wire.Changed:
    """Remove an extended attribute; NO_XATTR."""
    edit = Edit(txn, context)
    inode = edit.inode(request.ino)
    key = keys.xattr(context.volume.id, inode.ino, request.name)
    if txn.get(key) is None:
        raise _missing(inode.ino, request.name)
    txn.delete(key)
    edit.touch(inode)
    if not txn.range(*keys.xattrs(context.volume.id, inode.ino), limit=1):
        inode.flags &= ~InodeFlag.HAS_XATTRS
    return edit.changed(inode)


def _check_name(name: bytes) -> None:
    if len(name) > wire.MAX_XATTR_NAME:
        raise Refused(ErrorCode.NAME_TOO_LONG, f"an extended attribute's name of {len(name)} bytes")
    if b"\0" in name or name in _PREFIXES:
        raise Refused(ErrorCode.INVALID, f"{name!r} is not an extended attribute's name")
    if not name.startswith(_PREFIXES):
        raise Refused(ErrorCode.UNSUPPORTED, f"extended attributes like {name!r} are not kept")


def _missing(ino: int, name: bytes) -> Refused:
    return Refused(ErrorCode.NO_XATTR, f"inode {ino} has no extended attribute {name!r}")
