"""The repairs, by name. Each is one small transaction that looks again, and does nothing where nothing is wrong.

A repair is a function of an :class:`~metaserver.inodes.Edit` and the arguments that a finding carries. The counts and
parents that it leaves wrong are found in the next round; no repair throws content away.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Any, Final

from metaserver import chunks, garbage, keys
from metaserver.deferred import Kind as TaskKind
from metaserver.deferred import put_off
from metaserver.fsck.rows import find_inode
from metaserver.inodes import Edit, find_entry
from metaserver.records import Entry, Inode, Shard, pack_listed, pack_number, unpack_listed, unpack_number
from metaserver.wire import ROOT_INO, InodeFlag

#: Where inodes go that no entry names; with a number behind it if something else has the name.
LOST_AND_FOUND: Final = b"lost+found"

_BITMAP_BYTES: Final = keys.BLOCK_SLICES // 8


def delete_key(edit: Edit, key: bytes) -> None:
    edit.txn.delete(key)


# Entries and listings


def drop_entry(edit: Edit, ino: int, directory: int, cookie: int) -> None:
    """Delete the entry of an inode that has this place in the listing, or may have had."""
    name = _name_of(edit, ino, directory, cookie)
    if name is not None:
        edit.leave(edit.inode(directory), name, Entry(ino, cookie))


def write_listing(edit: Edit, directory: int, name: bytes) -> None:
    """Put an entry into its directory's listing, at a new place if another entry has its own."""
    entry = find_entry(edit.txn, edit.volume, directory, name)
    if entry is None:
        return
    row = edit.txn.get(keys.listing(edit.volume.id, directory, entry.cookie))
    if row == pack_listed(entry.ino, name):
        return
    taken = row is not None and _is_right(edit, directory, entry.cookie, row)
    edit.enter(edit.inode(directory), name, entry.ino, None if taken else entry.cookie)


def drop_listing(edit: Edit, directory: int, cookie: int) -> None:
    """Delete a listing's row unless there is its entry."""
    key = keys.listing(edit.volume.id, directory, cookie)
    row = edit.txn.get(key)
    if row is not None and not _is_right(edit, directory, cookie, row):
        edit.txn.delete(key)
        inode = find_inode(edit.txn, edit.volume, directory)
        if inode is not None:
            edit.touch(edit.inode(directory), modified=True)


def _is_right(edit: Edit, directory: int, cookie: int, row: bytes) -> bool:
    """Whether a listing's row has an entry that says the same."""
    ino, name = unpack_listed(row)
    return edit.txn.get(keys.entry(edit.volume.id, directory, name)) == Entry(ino, cookie).pack()


def _name_of(edit: Edit, ino: int, directory: int, cookie: int) -> bytes | None:
    """Return an entry's name by its place in the listing; ``None`` unless the two agree."""
    row = edit.txn.get(keys.listing(edit.volume.id, directory, cookie))
    if row is None or not _is_right(edit, directory, cookie, row):
        return None
    listed, name = unpack_listed(row)
    return name if listed == ino else None


# Inodes


def make_inode(
    edit: Edit, ino: int, is_directory: bool, parent: int, nlink: int, size: int, version: int, is_inline: int
) -> None:
    """Make an inode anew for entries or content that have lost theirs. It is root's, and nobody else may use it."""
    if find_inode(edit.txn, edit.volume, ino) is not None:
        return
    mode = stat.S_IFDIR | (0o755 if ino == ROOT_INO else 0o700) if is_directory else stat.S_IFREG | 0o600
    inode = Inode.made(ino, mode, 0, 0, 0, edit.context.now_ns)
    inode.parent, inode.nlink, inode.size, inode.version = parent, nlink, size, version
    inode.flags = InodeFlag.INLINE if is_inline and not is_directory else 0
    edit.txn.put(keys.inode(edit.volume.id, ino), inode.pack())
    add_to_statistics(edit, 1, size)


def attach(edit: Edit, ino: int, nlink: int) -> None:
    """Give an inode that no entry names one in the directory for lost and found ones."""
    inode = edit.inode(ino)
    directory = _lost_and_found(edit)
    if directory.ino == ino:
        return
    name = b"#%d" % ino
    while edit.entry(directory, name) is not None:
        name += b"~"
    edit.touch(inode)
    inode.nlink = nlink
    inode.flags &= ~InodeFlag.NAMELESS
    edit.enter(directory, name, ino)
    inode.parent = directory.ino
    if stat.S_ISDIR(inode.mode):
        directory.nlink += 1


def break_loop(edit: Edit, ino: int, directory: int, cookie: int) -> None:
    """Take a directory out of the loop that it is in."""
    inode = edit.inode(ino)
    drop_entry(edit, ino, directory, cookie)
    edit.inode(directory).nlink -= 1
    attach(edit, ino, inode.nlink)


def _lost_and_found(edit: Edit) -> Inode:
    root = edit.inode(ROOT_INO)
    name, tries = LOST_AND_FOUND, 0
    while (entry := edit.entry(root, name)) is not None:
        inode = find_inode(edit.txn, edit.volume, entry.ino)
        if inode is not None and stat.S_ISDIR(inode.mode):
            return edit.inode(entry.ino)
        tries += 1
        name = LOST_AND_FOUND + b".%d" % tries
    directory = edit.make(root, name, stat.S_IFDIR | 0o700, 0, 0, 0)
    edit.enter(root, name, directory.ino)
    root.nlink += 1
    return directory


def delete_inode(edit: Edit, ino: int) -> None:
    """Delete an inode that has no links."""
    inode = edit.inode(ino)
    if inode.nlink == 0:
        garbage.delete(edit, inode)


def reap(edit: Edit, session: bytes, ino: int) -> None:
    """Delete an unlinked inode and the record that a session may use it."""
    key = keys.orphan(edit.volume.id, session, ino)
    if edit.txn.get(key) is not None:
        edit.txn.delete(key)
        delete_inode(edit, ino)


def set_nlink(edit: Edit, ino: int, nlink: int) -> None:
    inode = edit.inode(ino)
    edit.touch(inode)
    inode.nlink = nlink


def set_parent(edit: Edit, ino: int, parent: int) -> None:
    inode = edit.inode(ino)
    edit.touch(inode)
    inode.parent = parent


def set_version(edit: Edit, ino: int, least: int) -> None:
    inode = edit.inode(ino)
    edit.touch(inode)
    inode.version = max(inode.version, least)


def set_flag(edit: Edit, ino: int, flag: int, is_set: bool) -> None:
    inode = edit.inode(ino)
    edit.touch(inode)
    inode.flags = inode.flags | flag if is_set else inode.flags & ~flag


def set_size(edit: Edit, ino: int, size: int) -> None:
    inode = edit.inode(ino)
    edit.touch(inode)
    if stat.S_ISREG(inode.mode):
        edit.resize(inode, size)
    inode.size = size
    inode.stored = min(inode.stored, size)


# Content


def set_target(edit: Edit, ino: int, target: bytes) -> None:
    """Give a symlink that has lost its target another one, which leads nowhere."""
    inode = edit.inode(ino)
    edit.touch(inode)
    edit.txn.put(keys.content(edit.volume.id, ino), target)
    inode.size = inode.stored = len(target)


def delete_content(edit: Edit, ino: int) -> None:
    """Delete inline content that the inode cannot have."""
    inode = edit.inode(ino)
    edit.touch(inode, modified=True)
    edit.txn.delete(keys.content(edit.volume.id, ino))
    inode.stored = 0


def void_slices(edit: Edit, ino: int) -> None:
    """Give up all slices of an inode that cannot have any."""
    inode = edit.inode(ino)
    edit.touch(inode, modified=True)
    chunks.cut(edit.txn, edit.volume, inode, 0)


def give_up_content(edit: Edit, ino: int) -> None:
    """Give up what is left of an inode that does not exist."""
    if find_inode(edit.txn, edit.volume, ino) is None:
        edit.txn.delete(keys.content(edit.volume.id, ino))
        chunks.give_up(edit.txn, edit.volume, ino)


# Slices and counters


def set_references(edit: Edit, slice_id: int, count: int) -> None:
    """Set how many chunks use a slice; without any it is unused, and its object will be deleted."""
    reference, block = keys.references(edit.volume.id, slice_id), keys.unused(edit.volume.id, slice_id)
    bitmap, bit = int.from_bytes(edit.txn.get(block) or b""), 1 << slice_id % keys.BLOCK_SLICES
    bitmap = bitmap & ~bit if count else bitmap | bit
    if count:
        edit.txn.put(reference, pack_number(count))
    else:
        edit.txn.delete(reference)
    if bitmap:
        edit.txn.put(block, bitmap.to_bytes(_BITMAP_BYTES))
    else:
        edit.txn.delete(block)


def raise_slices(edit: Edit, least: int) -> None:
    """Give out no slice id below ``least`` any more."""
    edit.txn.put(keys.next_slice(edit.volume.id), pack_number(least))


def raise_inodes(edit: Edit, number: int, least: int) -> None:
    """Give out no inode number of a shard that comes before the shard's ``least``."""
    key = keys.shard(edit.volume.id, number)
    shard = Shard.unpack(edit.txn.get(key))
    shard.next = max(shard.next, least)
    edit.txn.put(key, shard.pack())


def add_to_statistics(edit: Edit, inodes: int, size: int) -> None:
    key = keys.shard(edit.volume.id, 0)
    shard = Shard.unpack(edit.txn.get(key))
    shard.inodes += inodes
    shard.total_bytes += size
    edit.txn.put(key, shard.pack())


# Events


def forget_events(edit: Edit, version: int) -> None:
    """Forget all events before a version: who follows them is told so."""
    put_off(edit.txn, edit.volume, TaskKind.FORGET, b"", [version])


def raise_events(edit: Edit, version: int) -> None:
    """Count on from an event."""
    key = keys.last_event(edit.volume.id)
    edit.txn.put(key, pack_number(max(version, unpack_number(edit.txn.get(key), 0))))


REPAIRS: Final[dict[str, Callable[..., None]]] = {
    repair.__name__: repair
    for repair in (
        delete_key, drop_entry, write_listing, drop_listing, make_inode, attach, break_loop, delete_inode, reap,
        set_nlink, set_parent, set_version, set_flag, set_size, set_target, delete_content, void_slices,
        give_up_content, set_references, raise_slices, raise_inodes, add_to_statistics, forget_events, raise_events,
    )
}  # fmt: skip


def apply(edit: Edit, repair: str, arguments: list[Any]) -> None:
    """Do a repair and save; raises :exc:`~metaserver.errors.Refused` when what it is about is gone by now."""
    REPAIRS[repair](edit, *arguments)
    edit.save()
