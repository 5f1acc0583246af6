"""Files that a client has made by itself, and now tells of: names, inodes and content, in one transaction.

A client that is alone on its volume answers the making of a file itself, with an inode number that was reserved for it,
and tells later what has become of the file. So each number is given out once, and a file comes with what it holds.
"""

from __future__ import annotations

import stat
import zlib
from collections.abc import Sequence

from metaserver import keys, wire
from metaserver.engine.base import Transaction
from metaserver.errors import Refused
from metaserver.inodes import Edit, check_absent, check_name
from metaserver.records import Inode
from metaserver.volumes import Context
from metaserver.wire import ErrorCode


def reserve_inodes(txn: Transaction, context: Context, request: wire.ReserveInodes) -> wire.InodesReserved:
    """Give out inode numbers: nobody else gets them. All are of one shard, which is the session's."""
    number = keys.shard_of(zlib.crc32(context.session))
    edit = Edit(txn, context)
    first = edit.reserve(number, request.count)
    edit.save()
    return wire.InodesReserved(first, keys.SHARDS, request.count)


def make_files(txn: Transaction, context: Context, request: wire.MakeFiles) -> wire.Changed:
    """Make files as their client has them, all or none; EXISTS, INVALID (the number), TOO_LARGE, NOT_FOUND, and so on.

    The reply tells of the files, in their order, and then of their directories.
    """
    for file in request.files:
        check_name(file.name)
    _have_at_hand(txn, context.volume.id, request.files)
    edit = Edit(txn, context)
    directories: dict[int, Inode] = {}
    made = []
    for file in request.files:
        parent = directories[file.parent] = edit.directory(file.parent)
        check_absent(edit, parent, file.name)
        made.append(_make(edit, parent, file))
    return edit.changed(*made, *directories.values())


def _have_at_hand(txn: Transaction, volume: int, files: Sequence[wire.NewFile]) -> None:
    """Read all at once that is looked at one by one: where a read is a round trip, there is one."""
    asked = [keys.inode(volume, ino) for file in files for ino in (file.parent, file.ino)]
    txn.get_many([*asked, *(keys.entry(volume, file.parent, file.name) for file in files)])


def _make(edit: Edit, parent: Inode, file: wire.NewFile) -> Inode:
    volume = edit.volume
    if len(file.content) > volume.inline_limit:
        raise Refused(ErrorCode.TOO_LARGE, f"inode {file.ino} cannot hold {len(file.content)} bytes inline")
    inode = edit.adopt(file.ino, stat.S_IFREG | stat.S_IMODE(file.mode), file.uid, file.gid, parent)
    if file.content:
        edit.txn.put(keys.content(volume.id, inode.ino), file.content)
        inode.stored = len(file.content)
        edit.resize(inode, len(file.content))
    inode.atime_ns, inode.mtime_ns, inode.ctime_ns = file.atime_ns, file.mtime_ns, file.ctime_ns
    edit.enter(parent, file.name, inode.ino, made_ns=file.made_ns)
    return inode
