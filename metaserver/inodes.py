"""The inodes that one transaction works on.

A verb loads inodes through its :class:`Edit` and gets the same object for the same number, marks what it changes, and
saves all of it at the end: an inode is written once a transaction, its version rises by one, and every verb's times
and counters are kept by one piece of code.
"""

from __future__ import annotations

import stat
import zlib
from typing import Final

from metaserver import keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.records import Entry, Inode, Shard, pack_listed
from metaserver.volumes import Context, Volume
from metaserver.wire import ErrorCode, InodeFlag

#: The largest size of a file, in bytes.
MAX_SIZE: Final = wire.MAX_FILE
#: Sessions beside the one that unlinks it for which an inode lives on.
MOST_OPENERS: Final = 32


def check_name(name: bytes) -> None:
    """Refuse what cannot be an entry's name, as INVALID or NAME_TOO_LONG."""
    if len(name) > wire.MAX_NAME:
        raise Refused(ErrorCode.NAME_TOO_LONG, f"a name of {len(name)} bytes")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise Refused(ErrorCode.INVALID, f"{name!r} is not a name")


def load(snapshot: Snapshot, volume: Volume, ino: int) -> Inode:
    """Return an inode, orphans included; NOT_FOUND."""
    value = snapshot.get(keys.inode(volume.id, ino))
    if value is None:
        raise Refused(ErrorCode.NOT_FOUND, f"there is no inode {ino}")
    return Inode.unpack(ino, value)


def load_directory(snapshot: Snapshot, volume: Volume, ino: int) -> Inode:
    """Return a directory, removed ones included; NOT_FOUND, NOT_A_DIRECTORY."""
    inode = load(snapshot, volume, ino)
    if not stat.S_ISDIR(inode.mode):
        raise Refused(ErrorCode.NOT_A_DIRECTORY, f"inode {ino} is not a directory")
    return inode


def load_regular(snapshot: Snapshot, volume: Volume, ino: int) -> Inode:
    """Return a regular file; NOT_FOUND, IS_A_DIRECTORY, INVALID for all other kinds."""
    return _regular(load(snapshot, volume, ino))


def _regular(inode: Inode) -> Inode:
    if stat.S_ISREG(inode.mode):
        return inode
    code = ErrorCode.IS_A_DIRECTORY if stat.S_ISDIR(inode.mode) else ErrorCode.INVALID
    raise Refused(code, f"inode {inode.ino} is not a regular file")


def find_entry(snapshot: Snapshot, volume: Volume, directory: int, name: bytes) -> Entry | None:
    value = snapshot.get(keys.entry(volume.id, directory, name))
    return None if value is None else Entry.unpack(value)


class Edit:
    """The inodes of one transaction of one session."""

    def __init__(self, txn: Transaction, context: Context) -> None:
        self.txn = txn
        self.context = context
        self.volume = context.volume
        self._inodes: dict[int, Inode] = {}
        self._touched: dict[int, Inode] = {}
        self._shards: dict[int, Shard] = {}

    def inode(self, ino: int) -> Inode:
        """Return an inode, orphans included; NOT_FOUND."""
        inode = self._inodes.get(ino)
        if inode is None:
            inode = self._inodes[ino] = load(self.txn, self.volume, ino)
        return inode

    def regular(self, ino: int) -> Inode:
        """Return a regular file; NOT_FOUND, IS_A_DIRECTORY, INVALID."""
        return _regular(self.inode(ino))

    def directory(self, ino: int) -> Inode:
        """Return a directory that can take entries; NOT_A_DIRECTORY, NOT_FOUND also if it is removed."""
        inode = self.inode(ino)
        if not stat.S_ISDIR(inode.mode):
            raise Refused(ErrorCode.NOT_A_DIRECTORY, f"inode {ino} is not a directory")
        if inode.nlink == 0:
            raise Refused(ErrorCode.NOT_FOUND, f"directory {ino} is removed")
        return inode

    def entry(self, directory: Inode, name: bytes) -> Entry | None:
        return find_entry(self.txn, self.volume, directory.ino, name)

    def existing(self, directory: Inode, name: bytes) -> Entry:
        """Return an entry; NOT_FOUND."""
        entry = self.entry(directory, name)
        if entry is None:
            raise Refused(ErrorCode.NOT_FOUND, f"directory {directory.ino} has no {name!r}")
        return entry

    def is_empty(self, directory: Inode) -> bool:
        return not self.txn.range(*keys.listing_from(self.volume.id, directory.ino, 0), limit=1)

    # Changes

    def touch(self, inode: Inode, *, modified: bool = False, written_ns: int | None = None) -> None:
        """The inode changes in this transaction; ``modified``: its content or its entries do, at ``written_ns`` or now.

        A change of content that was made known when it was written does not change the times again when it comes here.
        """
        if inode.ino not in self._touched:
            self._touched[inode.ino] = inode
            inode.version += 1
        if written_ns is None:
            inode.ctime_ns = self.context.now_ns
        else:
            inode.ctime_ns = max(inode.ctime_ns, written_ns)
        if modified:
            inode.mtime_ns = self.context.now_ns if written_ns is None else written_ns

    def make(self, parent: Inode, name: bytes, mode: int, uid: int, gid: int, rdev: int) -> Inode:
        """Return a new inode with a number that was never used before."""
        ino = self.reserve(keys.shard_of(zlib.crc32(name, parent.ino & 0xFFFFFFFF)), 1)
        if stat.S_ISDIR(mode):
            self.txn.is_new(keys.entry(self.volume.id, ino, b""))
        return self._made(Inode.made(ino, mode, uid, gid, rdev, self.context.now_ns, parent.ino))

    def reserve(self, number: int, count: int) -> int:
        """Take numbers of a shard, which will never be given out again; return the first. They are SHARDS apart."""
        shard = self._shard(number)
        first = shard.next * keys.SHARDS + number
        shard.next += count
        return first

    def adopt(self, ino: int, mode: int, uid: int, gid: int, parent: Inode) -> Inode:
        """Return a new file with a number that was reserved; INVALID if it was not, or is in use."""
        if ino // keys.SHARDS >= self._shard(keys.shard_of(ino)).next or ino < keys.SHARDS:
            raise Refused(ErrorCode.INVALID, f"inode number {ino} was never given out")
        if ino in self._inodes or self.txn.get(keys.inode(self.volume.id, ino)) is not None:
            raise Refused(ErrorCode.INVALID, f"inode number {ino} is in use")
        return self._made(Inode.made(ino, mode, uid, gid, 0, self.context.now_ns, parent.ino))

    def _made(self, inode: Inode) -> Inode:
        self._shard(keys.shard_of(inode.ino)).inodes += 1
        if stat.S_ISREG(inode.mode):
            inode.flags = InodeFlag.INLINE
        self._inodes[inode.ino] = self._touched[inode.ino] = inode
        return inode

    def resize(self, inode: Inode, size: int) -> None:
        """Set a regular file's size and count its bytes; TOO_LARGE."""
        if size > MAX_SIZE:
            raise Refused(ErrorCode.TOO_LARGE, f"a file of {size} bytes")
        if size != inode.size:
            self._shard(keys.shard_of(inode.ino)).total_bytes += size - inode.size
            inode.size = size

    def drop(self, inode: Inode) -> None:
        """Delete the inode's record."""
        self.txn.delete(keys.inode(self.volume.id, inode.ino))
        shard = self._shard(keys.shard_of(inode.ino))
        shard.inodes -= 1
        shard.total_bytes -= inode.size if stat.S_ISREG(inode.mode) else 0

    def enter(
        self, directory: Inode, name: bytes, ino: int, cookie: int | None = None, *, made_ns: int | None = None
    ) -> int:
        """Make ``name`` stand for ``ino``, in the listing's place ``cookie`` or at its end; return the cookie.

        ``made_ns``: when its client made it, which may be one of several names of this transaction.
        """
        if made_ns is None:
            self.touch(directory, modified=True)
        else:
            directory.version += directory.ino in self._touched  # each name has its own cookie
            self.touch(directory, modified=True, written_ns=max(made_ns, directory.mtime_ns))
        cookie = directory.version if cookie is None else cookie
        self.txn.put(keys.entry(self.volume.id, directory.ino, name), Entry(ino, cookie).pack())
        self.txn.put(keys.listing(self.volume.id, directory.ino, cookie), pack_listed(ino, name))
        return cookie

    def leave(self, directory: Inode, name: bytes, entry: Entry, removed_ns: int | None = None) -> None:
        """Delete an entry. ``removed_ns``: when its client did, which may be one of several of this transaction."""
        at_ns = None if removed_ns is None else max(removed_ns, directory.mtime_ns)
        self.touch(directory, modified=True, written_ns=at_ns)
        self.txn.delete(keys.entry(self.volume.id, directory.ino, name))
        self.txn.delete(keys.listing(self.volume.id, directory.ino, entry.cookie))

    def unlink(self, inode: Inode, directory: Inode, removed_ns: int | None = None) -> None:
        """Take a link from an inode that has just lost its entry in a directory; with the last one it is an orphan.

        ``removed_ns`` as in :meth:`leave`.
        """
        self.touch(inode, written_ns=removed_ns)
        if inode.parent == directory.ino and not stat.S_ISDIR(inode.mode):
            inode.parent = 0
        inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        if inode.nlink == 0:
            self.hold(inode)

    def hold(self, inode: Inode) -> None:
        """An inode without links lives on for the sake of this session, and of others that have it open."""
        openers = self.context.openers.get(inode.ino, ())
        others = [each for each in openers if self.txn.get(keys.session(each)) is not None]
        sessions = [self.context.session, *others[:MOST_OPENERS]]
        for session in sessions:
            rest = b"".join(each for each in sessions if each != session)
            self.txn.put(keys.orphan(self.volume.id, session, inode.ino), rest)

    def let_be_named(self, inode: Inode) -> None:
        """A nameless file of this session is to get its first link; NOT_FOUND for what is removed."""
        orphan = keys.orphan(self.volume.id, self.context.session, inode.ino)
        if not inode.flags & InodeFlag.NAMELESS or self.txn.get(orphan) is None:
            raise Refused(ErrorCode.NOT_FOUND, f"inode {inode.ino} is removed")
        self.txn.delete(orphan)
        inode.flags &= ~InodeFlag.NAMELESS

    # The end

    def save(self) -> None:
        """Write the touched inodes and the counters."""
        for inode in self._touched.values():
            self.txn.put(keys.inode(self.volume.id, inode.ino), inode.pack())
        for number, shard in self._shards.items():
            self.txn.put(keys.shard(self.volume.id, number), shard.pack())

    def changed(self, *inodes: Inode, cookie: int = 0, done: int = 0) -> wire.Changed:
        """Save, and return the reply that tells of these inodes, each once."""
        self.save()
        unique = {inode.ino: inode for inode in inodes}
        return wire.Changed([inode.attributes() for inode in unique.values()], cookie, done)

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = Shard.unpack(self.txn.get(keys.shard(self.volume.id, number)))
        return shard


def check_absent(edit: Edit, parent: Inode, name: bytes) -> None:
    """Refuse a name that a directory has, as EXISTS."""
    if edit.entry(parent, name) is not None:
        raise Refused(ErrorCode.EXISTS, f"directory {parent.ino} has {name!r} already")
