"""The verbs of the file system, as one table for reads and one for writes, and those about names and inodes.

A verb takes a snapshot or a transaction, the context it is called in, and a request of :mod:`metaserver.wire`, and
returns a reply; it refuses with :exc:`~metaserver.errors.Refused`. It checks no permissions. It can run twice.

The other verbs: new_files.py, renames.py, listing.py, content.py, ranges.py, xattrs.py, references.py (slice ids),
garbage.py.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from typing import Any, Final

from metaserver import content, garbage, keys, listing, new_files, ranges, references, renames, wire, xattrs
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.garbage import has_garbage, reap_session, sessions_with_orphans, sweep
from metaserver.inodes import Edit, check_absent, check_name, find_entry, load, load_directory
from metaserver.records import Inode, Shard, unpack_attributes
from metaserver.volumes import Context, Volume, create_volume, list_volumes, open_volume
from metaserver.wire import ErrorCode, InodeFlag

__all__ = [
    "READS",
    "WRITES",
    "Context",
    "Volume",
    "check_name",
    "create_volume",
    "has_garbage",
    "list_volumes",
    "open_volume",
    "reap_session",
    "sessions_with_orphans",
    "sweep",
]

#: Links that a file may have. A directory may have any number of subdirectories.
MAX_LINKS: Final = 65000

_DEVICES: Final = (stat.S_IFCHR, stat.S_IFBLK)
_KINDS: Final = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, *_DEVICES)


def lookup(snapshot: Snapshot, context: Context, request: wire.Lookup) -> wire.Found:
    """Return an entry's inode; NOT_FOUND, NOT_A_DIRECTORY, INVALID."""
    check_name(request.name)
    volume = context.volume
    entry = find_entry(snapshot, volume, request.parent, request.name)
    if entry is None:
        load_directory(snapshot, volume, request.parent)
        raise Refused(ErrorCode.NOT_FOUND, f"directory {request.parent} has no {request.name!r}")
    return wire.Found(load(snapshot, volume, entry.ino).attributes(), entry.cookie)


def get_attributes(snapshot: Snapshot, context: Context, request: wire.GetAttributes) -> wire.Found:
    """Return an inode, orphans included; NOT_FOUND."""
    value = snapshot.get(keys.inode(context.volume.id, request.ino))
    if value is None:
        raise Refused(ErrorCode.NOT_FOUND, f"there is no inode {request.ino}")
    return wire.Found(unpack_attributes(request.ino, value))


def open_file(snapshot: Snapshot, context: Context, request: wire.OpenFile) -> wire.Found:
    """Return an inode that has links, or is held for this session; NOT_FOUND."""
    inode = load(snapshot, context.volume, request.ino)
    if not inode.nlink and snapshot.get(keys.orphan(context.volume.id, context.session, request.ino)) is None:
        raise Refused(ErrorCode.NOT_FOUND, f"inode {request.ino} is removed")
    return wire.Found(inode.attributes())


def read_link(snapshot: Snapshot, context: Context, request: wire.ReadLink) -> wire.TargetIs:
    """Return a symlink's target; NOT_FOUND, INVALID for what is none."""
    inode = load(snapshot, context.volume, request.ino)
    target = snapshot.get(keys.content(context.volume.id, request.ino))
    if not stat.S_ISLNK(inode.mode) or target is None:
        raise Refused(ErrorCode.INVALID, f"inode {request.ino} is not a symlink")
    return wire.TargetIs(target)


def get_statistics(snapshot: Snapshot, context: Context, request: wire.GetStatistics) -> wire.Statistics:
    """Return the number of inodes, orphans included, and the sum of all files' sizes, with the engine's space."""
    shards = [Shard.unpack(value) for _, value in snapshot.range(*keys.shards(context.volume.id))]
    space = snapshot.space()
    inodes, size = sum(shard.inodes for shard in shards), sum(shard.total_bytes for shard in shards)
    return wire.Statistics(inodes, size, space.total, space.free)


def make_node(txn: Transaction, context: Context, request: wire.MakeNode) -> wire.Changed:
    """Make an inode and its entry; EXISTS, INVALID, NOT_FOUND, NOT_A_DIRECTORY."""
    _check_node(request)
    edit = Edit(txn, context)
    parent = edit.directory(request.parent)
    check_absent(edit, parent, request.name)
    mode, gid = _inherited(parent, request)
    inode = edit.make(parent, request.name, mode, request.uid, gid, request.rdev)
    if request.target is not None:
        inode.size = inode.stored = len(request.target)
        txn.put(keys.content(context.volume.id, inode.ino), request.target)
    cookie = edit.enter(parent, request.name, inode.ino)
    parent.nlink += stat.S_ISDIR(mode)
    return edit.changed(inode, parent, cookie=cookie)


def _check_node(request: wire.MakeNode) -> None:
    check_name(request.name)
    kind = stat.S_IFMT(request.mode)
    if kind not in _KINDS:
        raise Refused(ErrorCode.INVALID, f"{request.mode:#o} is no kind of node")
    if (request.target is None) == (kind == stat.S_IFLNK):
        raise Refused(ErrorCode.INVALID, "a symlink has a target, and nothing else has")
    if request.target is not None and b"\0" in request.target:
        raise Refused(ErrorCode.INVALID, "a symlink's target with a NUL in it")
    if request.rdev and kind not in _DEVICES:
        raise Refused(ErrorCode.INVALID, "only a device has a device number")


def make_temporary(txn: Transaction, context: Context, request: wire.MakeTemporary) -> wire.Changed:
    """Make a file without a name, held by the session; INVALID, NOT_FOUND, NOT_A_DIRECTORY."""
    if not stat.S_ISREG(request.mode):
        raise Refused(ErrorCode.INVALID, f"{request.mode:#o} is no regular file")
    edit = Edit(txn, context)
    parent = edit.directory(request.parent)
    mode, gid = _inherited(parent, request)
    inode = edit.make(parent, b"", mode, request.uid, gid, 0)
    inode.nlink = inode.parent = 0
    inode.flags |= InodeFlag.NAMELESS
    edit.hold(inode)
    return edit.changed(inode)


def _inherited(parent: Inode, request: wire.MakeNode | wire.MakeTemporary) -> tuple[int, int]:
    """Return mode and group of a new node."""
    mode = stat.S_IFMT(request.mode) | stat.S_IMODE(request.mode)
    if not parent.mode & stat.S_ISGID:
        return mode, request.gid
    return mode | (stat.S_ISGID if stat.S_ISDIR(mode) else 0), parent.gid


def link(txn: Transaction, context: Context, request: wire.Link) -> wire.Changed:
    """Give an inode another entry; NOT_PERMITTED for a directory, TOO_MANY_LINKS, NOT_FOUND also for a removed one."""
    check_name(request.name)
    edit = Edit(txn, context)
    inode = edit.inode(request.ino)
    parent = edit.directory(request.parent)
    if stat.S_ISDIR(inode.mode):
        raise Refused(ErrorCode.NOT_PERMITTED, "a directory has one name only")
    if inode.nlink == 0:
        edit.let_be_named(inode)
    check_absent(edit, parent, request.name)
    if inode.nlink >= MAX_LINKS:
        raise Refused(ErrorCode.TOO_MANY_LINKS, f"inode {inode.ino} has {inode.nlink} links")
    edit.touch(inode)
    inode.nlink += 1
    inode.parent = parent.ino
    cookie = edit.enter(parent, request.name, inode.ino)
    return edit.changed(inode, parent, cookie=cookie)


def remove(txn: Transaction, context: Context, request: wire.Remove) -> wire.Changed:
    """Unlink or rmdir; NOT_FOUND, IS_A_DIRECTORY, NOT_A_DIRECTORY, NOT_EMPTY."""
    check_name(request.name)
    edit = Edit(txn, context)
    parent = edit.directory(request.parent)
    entry = edit.existing(parent, request.name)
    inode = edit.inode(entry.ino)
    _check_removable(edit, inode, request.directory)
    edit.leave(parent, request.name, entry)
    parent.nlink -= stat.S_ISDIR(inode.mode)
    edit.unlink(inode, parent)
    return edit.changed(inode, parent)


def remove_names(txn: Transaction, context: Context, request: wire.RemoveNames) -> wire.Changed:
    """Unlink names that their client has unlinked by itself, all or none; NOT_FOUND, IS_A_DIRECTORY, and so on.

    The reply tells of the inodes, in their order, and then of their directories.
    """
    edit = Edit(txn, context)
    removed, directories = list[Inode](), dict[int, Inode]()
    for each in request.names:
        check_name(each.name)
        parent = directories[each.parent] = edit.directory(each.parent)
        entry = edit.existing(parent, each.name)
        if entry.ino != each.ino:
            raise Refused(ErrorCode.NOT_FOUND, f"{each.name!r} in {each.parent} is inode {entry.ino}, not {each.ino}")
        inode = edit.inode(entry.ino)
        _check_removable(edit, inode, False)
        edit.leave(parent, each.name, entry, each.removed_ns)
        edit.unlink(inode, parent, each.removed_ns)
        removed.append(inode)
    return edit.changed(*removed, *directories.values())


def _check_removable(edit: Edit, inode: Inode, as_directory: bool) -> None:
    is_directory = stat.S_ISDIR(inode.mode)
    if as_directory and not is_directory:
        raise Refused(ErrorCode.NOT_A_DIRECTORY, f"inode {inode.ino} is not a directory")
    if is_directory and not as_directory:
        raise Refused(ErrorCode.IS_A_DIRECTORY, f"inode {inode.ino} is a directory")
    if is_directory and not edit.is_empty(inode):
        raise Refused(ErrorCode.NOT_EMPTY, f"directory {inode.ino} is not empty")


#: Request type -> verb(snapshot, context, request) -> reply; FetchDirectory's returns a list of DirectoryPage.
READS: Final[Mapping[type, Callable[[Snapshot, Context, Any], Any]]] = {
    wire.Lookup: lookup,
    wire.GetAttributes: get_attributes,
    wire.OpenFile: open_file,
    wire.FetchDirectory: listing.fetch_directory,
    wire.ReadLink: read_link,
    wire.GetXattr: xattrs.get_xattr,
    wire.ListXattrs: xattrs.list_xattrs,
    wire.GetContent: content.get_content,
    wire.GetStatistics: get_statistics,
    wire.ListSlices: references.list_slices,
    wire.InspectSlices: references.inspect_slices,
    wire.Seek: ranges.seek,
}

#: Request type -> verb(transaction, context, request) -> reply.
WRITES: Final[Mapping[type, Callable[[Transaction, Context, Any], Any]]] = {
    wire.SetAttributes: content.set_attributes,
    wire.MakeNode: make_node,
    wire.Link: link,
    wire.Remove: remove,
    wire.RemoveNames: remove_names,
    wire.Rename: renames.rename,
    wire.Reap: garbage.reap,
    wire.SetXattr: xattrs.set_xattr,
    wire.RemoveXattr: xattrs.remove_xattr,
    wire.WriteInline: content.write_inline,
    wire.NewSlices: references.new_slices,
    wire.CommitSlices: content.commit_slices,
    wire.ForgetSlices: references.forget_slices,
    wire.RetireSlices: references.retire_slices,
    wire.CompactSlices: content.compact_slices,
    wire.MakeTemporary: make_temporary,
    wire.MakeFiles: new_files.make_files,
    wire.Allocate: ranges.allocate,
    wire.CopyRange: ranges.copy_range,
}
