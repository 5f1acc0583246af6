"""What the sessions of an identity may reach and change, looked at in the snapshot or transaction of each request.

**The subtree.** Its directory is inode 1 for the session, both ways: no message can name what is above it. Any other
inode that a request names has to lie below it, which its directory tells: a directory knows its parent, and so does a
file, unless it has, or had, several names. It is looked up each time, so that a rename counts from its commit on, and
no cache has to be kept right. Of a file with several names only one directory is known; so the session may use it, too,
when it was told of it by a name in the subtree: until it ends, like a file that is open. An inode without names is its
who unlinked or held it.

**The rights.** The client's kernel checks its users' rights, and is believed about who they are. What it is not
believed is root, or anybody at all: with ``ROOT`` the session may do only what some user other than root may; with
``ALL`` only what the one user may who all are. So what belongs to root is as open as its group and other bits say, and
made nodes belong to somebody else.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from metaserver import keys, namespace, wire
from metaserver.engine.base import Snapshot
from metaserver.errors import Refused
from metaserver.inodes import find_entry, load, load_directory
from metaserver.records import Inode
from metaserver.volumes import Context, Volume
from metaserver.wire import ErrorCode, Squash

_R: Final = 4
_W: Final = 2
_X: Final = 1
#: A directory is never deeper; a walk up that is longer goes round in circles.
_DEEPEST: Final = 1 << 16
#: Files with several names that a session is known to have been told of.
_MOST_TOLD: Final = 1 << 20

#: The fields of requests that name an inode. Lists of what a session has of its own are not among them.
_INODES: Final[Mapping[type, tuple[str, ...]]] = {
    wire.Lookup: ("parent",),
    wire.FetchDirectory: ("ino",),
    wire.GetAttributes: ("ino",),
    wire.SetAttributes: ("ino",),
    wire.MakeNode: ("parent",),
    wire.MakeTemporary: ("parent",),
    wire.Link: ("ino", "parent"),
    wire.Remove: ("parent",),
    wire.Rename: ("parent", "new_parent"),
    wire.ReadLink: ("ino",),
    wire.GetXattr: ("ino",),
    wire.ListXattrs: ("ino",),
    wire.SetXattr: ("ino",),
    wire.RemoveXattr: ("ino",),
    wire.GetContent: ("ino",),
    wire.WriteInline: ("ino",),
    wire.CommitSlices: ("ino",),
    wire.Allocate: ("ino",),
    wire.CopyRange: ("source", "ino"),
    wire.Seek: ("ino",),
    wire.OpenFile: ("ino",),
    wire.CompactSlices: ("ino",),
}
#: Those that name none and are about the session, or the volume as a whole.
_NAMELESS: Final = (wire.Reap, wire.NewSlices, wire.GetStatistics)
_DEVICES: Final = (stat.S_IFCHR, stat.S_IFBLK)


def root_of(snapshot: Snapshot, volume: Volume, path: bytes) -> int:
    """Return the directory of a subtree; NOT_FOUND, NOT_A_DIRECTORY."""
    ino = wire.ROOT_INO
    for name in filter(None, path.split(b"/")):
        entry = find_entry(snapshot, volume, ino, name)
        if entry is None:
            raise Refused(ErrorCode.NOT_FOUND, "the directory that the identity is confined to is not there")
        ino = load_directory(snapshot, volume, entry.ino).ino
    return ino


class Guard:
    """The bounds of one session. ``squash`` is not AUTO."""

    def __init__(self, identity: wire.Identity, squash: Squash, root: int) -> None:
        self._read_only = identity.read_only
        self._squash = squash
        self._uid, self._gid = identity.uid, identity.gid
        self.root = root
        self._told: dict[int, None] = {}

    @property
    def is_confined(self) -> bool:
        """Whether only a part of the volume may be reached."""
        return self.root != wire.ROOT_INO

    def go_on_from(self, earlier: Guard) -> None:
        """The session was another guard's before."""
        self.root, self._told = earlier.root, earlier._told

    # Numbers

    def inward(self, request: wire.Request) -> wire.Request:
        """Return a request as it is meant; NOT_FOUND."""
        request = self._owned(request) if self._squash is not Squash.NONE else request
        if not self.is_confined:
            return request
        fields: dict[str, Any] = {name: self._inward(getattr(request, name)) for name in _INODES.get(type(request), ())}
        if isinstance(request, wire.WriteInline) and request.then is not None:
            fields["then"] = msgspec.structs.replace(request.then, ino=fields["ino"])
        if isinstance(request, wire.TestLock | wire.SetLock):
            fields["lock"] = self._lock_inward(request.lock)
        if isinstance(request, wire.HoldLocks):
            fields["locks"] = [self._lock_inward(lock) for lock in request.locks]
        return msgspec.structs.replace(request, **fields) if fields else request

    def _inward(self, ino: int) -> int:
        if ino == self.root:
            raise _not_here(ino)
        return self.root if ino == wire.ROOT_INO else ino

    def numbers_inward(self, inos: Iterable[int]) -> list[int]:
        """Return which inodes are meant, whether they may be reached or not."""
        return [self.root if self.is_confined and ino == wire.ROOT_INO else ino for ino in inos]

    def _lock_inward(self, lock: wire.Lock) -> wire.Lock:
        return msgspec.structs.replace(lock, ino=self._inward(lock.ino))

    def _owned(self, request: wire.Request) -> wire.Request:
        """Say whose a node is to be that is made."""
        if not isinstance(request, wire.MakeNode | wire.MakeTemporary):
            return request
        if self._squash is Squash.ALL:
            return msgspec.structs.replace(request, uid=self._uid, gid=self._gid)
        return msgspec.structs.replace(request, uid=request.uid or self._uid, gid=request.gid or self._gid)

    def outward(self, reply: wire.Reply) -> wire.Reply:
        """Return a reply, or a break, as the client is to see it."""
        if isinstance(reply, wire.DirectoryPage) and self._squash is not Squash.NONE:
            reply = msgspec.structs.replace(reply, entries=[self._readable(entry) for entry in reply.entries])
        if not self.is_confined:
            return reply
        if isinstance(reply, wire.Found):
            return msgspec.structs.replace(reply, attributes=self._outward(reply.attributes))
        if isinstance(reply, wire.Changed):
            return msgspec.structs.replace(reply, attributes=[self._outward(each) for each in reply.attributes])
        if isinstance(reply, wire.DirectoryPage):
            return msgspec.structs.replace(reply, directory=self._outward(reply.directory))
        if isinstance(reply, wire.Break | wire.Renewed):
            names = [(self._number(ino), name) for ino, name in reply.names]
            return msgspec.structs.replace(reply, names=names, inodes=[self._number(ino) for ino in reply.inodes])
        if isinstance(reply, wire.LockIs) and reply.lock is not None:
            return wire.LockIs(msgspec.structs.replace(reply.lock, ino=self._number(reply.lock.ino)))
        return reply

    def frame_outward(self, frame: bytes) -> bytes:
        """Return the frame of a break as the client is to see it."""
        if not self.is_confined:
            return frame
        number, reply = wire.decode_reply(frame[wire.HEADER_BYTES :])
        return wire.encode(number, self.outward(reply))

    def _number(self, ino: int) -> int:
        return wire.ROOT_INO if ino == self.root else ino

    def _outward(self, attributes: wire.Attributes) -> wire.Attributes:
        return msgspec.structs.replace(attributes, ino=wire.ROOT_INO) if attributes.ino == self.root else attributes

    def _readable(self, entry: wire.DirectoryEntry) -> wire.DirectoryEntry:
        """Leave out content that may not be read."""
        if entry.data is None or stat.S_ISLNK(entry.attributes.mode) or self._may(entry.attributes, _R, _X):
            return entry
        return msgspec.structs.replace(entry, data=None)

    # What may be

    def check(self, snapshot: Snapshot, context: Context, request: wire.Request) -> None:
        """Raise :exc:`Refused` (READ_ONLY, NOT_FOUND, ACCESS_DENIED, NOT_PERMITTED) for what may not be.

        Of locks that a session tells of, see :meth:`forbidden`.
        """
        kind = type(request)
        if self._read_only:
            self._check_reads(request)
        if isinstance(request, wire.MakeFiles | wire.RemoveNames):
            raise Refused(ErrorCode.ACCESS_DENIED, "the identity's files are made and removed one by one")
        if self.is_confined:
            self._check_place(snapshot, context, request)
        if isinstance(request, wire.SetLock) and not request.unlock:
            self._check_lock(snapshot, context, request.lock)
        if self._squash is not Squash.NONE and (rule := _RULES.get(kind)) is not None:
            rule(_Rights(self, snapshot, context.volume), request)

    def forbidden(self, snapshot: Snapshot, volume: Volume, locks: Sequence[wire.Lock]) -> set[int]:
        """Return the indexes of locks that the session says it holds, and may not have."""
        return {index for index, lock in enumerate(locks) if not self._may_lock(snapshot, volume, lock)}

    def _may_lock(self, snapshot: Snapshot, volume: Volume, lock: wire.Lock) -> bool:
        """Whether a file can be open in the way that the kernel asks for: for writing, for an exclusive range (fcntl);
        for reading, for a shared one; in any way, for a whole file (flock).
        """
        writes = lock.exclusive and not lock.flock
        if writes and self._read_only:
            return False
        if self._squash is Squash.NONE:
            return True
        value = snapshot.get(keys.inode(volume.id, lock.ino))
        wants = (_W,) if writes else (_R, _X, _W) if lock.flock else (_R, _X)
        return value is not None and self._may(Inode.unpack(lock.ino, value), *wants)

    def _check_reads(self, request: wire.Request) -> None:
        changes = type(request) in namespace.WRITES and not isinstance(request, wire.Reap)
        if changes or (isinstance(request, wire.OpenFile) and request.writing):
            raise Refused(ErrorCode.READ_ONLY, "the identity may change nothing")

    def _check_lock(self, snapshot: Snapshot, context: Context, lock: wire.Lock) -> None:
        if not self._may_lock(snapshot, context.volume, lock):
            raise Refused(ErrorCode.ACCESS_DENIED, f"inode {lock.ino} may not be open so to the identity's users")

    def _check_place(self, snapshot: Snapshot, context: Context, request: wire.Request) -> None:
        if isinstance(request, wire.HoldLocks):
            inodes = [lock.ino for lock in request.locks]
        elif isinstance(request, wire.TestLock | wire.SetLock):
            inodes = [request.lock.ino]
        elif type(request) in _INODES:
            inodes = [getattr(request, name) for name in _INODES[type(request)]]
        elif isinstance(request, _NAMELESS):
            inodes = []
        else:
            raise Refused(ErrorCode.ACCESS_DENIED, "this concerns more than the identity's part of the volume")
        for ino in inodes:
            if not self.reaches(snapshot, context, ino):
                raise _not_here(ino)

    def reaches(self, snapshot: Snapshot, context: Context, ino: int) -> bool:
        """Whether an inode is in the subtree, or the session's own."""
        volume = context.volume
        value = snapshot.get(keys.inode(volume.id, ino))
        if value is None:
            return False
        inode = Inode.unpack(ino, value)
        if stat.S_ISDIR(inode.mode):
            return self._is_below(snapshot, volume, inode)
        if not inode.nlink:
            return snapshot.get(keys.orphan(volume.id, context.session, ino)) is not None
        if inode.parent and self._is_below(snapshot, volume, load(snapshot, volume, inode.parent)):
            return True
        return (inode.nlink > 1 or not inode.parent) and ino in self._told

    def _is_below(self, snapshot: Snapshot, volume: Volume, directory: Inode) -> bool:
        for _ in range(_DEEPEST):
            if directory.ino == self.root:
                return True
            if directory.ino == wire.ROOT_INO:
                return False
            value = snapshot.get(keys.inode(volume.id, directory.parent))
            if value is None:  # it was removed with all above it
                return False
            directory = Inode.unpack(directory.parent, value)
        return False

    def tells(self, snapshot: Snapshot, context: Context, request: wire.Request, reply: Any) -> None:
        """Take note of files in a reply of which their records do not say that they are in the subtree."""
        if not self.is_confined:
            return
        if isinstance(request, wire.Lookup):
            self._tell(snapshot, context.volume, request.parent, [reply.attributes])
        elif isinstance(request, wire.FetchDirectory):
            for page in reply:
                self._tell(snapshot, context.volume, request.ino, [entry.attributes for entry in page.entries])
        elif isinstance(request, wire.Link):
            self._tell(snapshot, context.volume, 0, reply.attributes[:1])

    def _tell(self, snapshot: Snapshot, volume: Volume, directory: int, told: Iterable[wire.Attributes]) -> None:
        for attributes in told:
            if stat.S_ISDIR(attributes.mode) or attributes.ino in self._told:
                continue
            if attributes.nlink > 1 or load(snapshot, volume, attributes.ino).parent != directory:
                if len(self._told) >= _MOST_TOLD:
                    del self._told[next(iter(self._told))]
                self._told[attributes.ino] = None

    def _owns(self, inode: Inode | wire.Attributes) -> bool:
        return inode.uid != 0 if self._squash is Squash.ROOT else inode.uid == self._uid

    def _may(self, inode: Inode | wire.Attributes, *wants: int) -> bool:
        """Whether one of the rights is there. An owner, who could give them to himself, has them all."""
        if self._owns(inode):
            return True
        group, other = inode.mode >> 3 & 7, inode.mode & 7
        if self._squash is Squash.ROOT:
            bits = other | group if inode.gid else other
        else:
            bits = group if inode.gid == self._gid else other
        return any(bits & want == want for want in wants)


def _not_here(ino: int) -> Refused:
    return Refused(ErrorCode.NOT_FOUND, f"there is no inode {ino}")


class _Rights:
    """What a guard says of the inodes of one request."""

    def __init__(self, guard: Guard, snapshot: Snapshot, volume: Volume) -> None:
        self._guard = guard
        self._snapshot = snapshot
        self._volume = volume

    def may(self, ino: int, *wants: int) -> None:
        """Raise ACCESS_DENIED unless one of the rights is there."""
        if not self._guard._may(load(self._snapshot, self._volume, ino), *wants):
            raise Refused(ErrorCode.ACCESS_DENIED, f"inode {ino} is not open to the identity's users")

    def may_remove(self, parent: int, name: bytes) -> None:
        """Raise unless an entry, if there is one, may be taken from a directory."""
        self.may(parent, _W | _X)
        directory = load(self._snapshot, self._volume, parent)
        entry = find_entry(self._snapshot, self._volume, parent, name)
        if entry is None or not directory.mode & stat.S_ISVTX or self._guard._owns(directory):
            return
        self.must_own(load(self._snapshot, self._volume, entry.ino))

    def must_own(self, inode: Inode) -> None:
        """Raise NOT_PERMITTED unless an inode belongs to one of the identity's users."""
        if not self._guard._owns(inode):
            raise Refused(ErrorCode.NOT_PERMITTED, f"inode {inode.ino} belongs to none of the identity's users")

    # The rules, by request

    def make(self, request: wire.MakeNode | wire.MakeTemporary) -> None:
        self.may(request.parent, _W | _X)
        if stat.S_IFMT(request.mode) in _DEVICES:
            raise Refused(ErrorCode.NOT_PERMITTED, "only root makes devices")
        parent = load(self._snapshot, self._volume, request.parent)
        gid = parent.gid if parent.mode & stat.S_ISGID else request.gid
        self._check_setgid(request.mode, gid)

    def _check_setgid(self, mode: int, gid: int) -> None:
        """Raise NOT_PERMITTED for a program that would run with the rights of a group that is not the users'."""
        guard = self._guard
        is_theirs = gid == guard._gid if guard._squash is Squash.ALL else gid != 0
        if mode & stat.S_ISGID and not stat.S_ISDIR(mode) and not is_theirs:
            raise Refused(ErrorCode.NOT_PERMITTED, f"none of the identity's users is in group {gid}")

    def link(self, request: wire.Link) -> None:
        self.may(request.parent, _W | _X)
        self.may(request.ino, _R | _W)

    def rename(self, request: wire.Rename) -> None:
        self.may_remove(request.parent, request.name)
        self.may_remove(request.new_parent, request.new_name)
        if request.parent != request.new_parent:
            self._may_move(request.parent, request.name)
            if request.exchange:
                self._may_move(request.new_parent, request.new_name)

    def _may_move(self, parent: int, name: bytes) -> None:
        """Raise ACCESS_DENIED for a directory that may not be written to: its parent is about to be another one."""
        entry = find_entry(self._snapshot, self._volume, parent, name)
        if entry is not None and stat.S_ISDIR(load(self._snapshot, self._volume, entry.ino).mode):
            self.may(entry.ino, _W)

    def open(self, request: wire.OpenFile) -> None:
        if request.writing:
            self.may(request.ino, _W)
        else:
            self.may(request.ino, _R, _X)

    def write_inline(self, request: wire.WriteInline) -> None:
        self.may(request.ino, _W)
        if request.then is not None:
            self.set_attributes(request.then)

    def copy(self, request: wire.CopyRange) -> None:
        self.may(request.source, _R, _X)
        self.may(request.ino, _W)

    def set_attributes(self, request: wire.SetAttributes) -> None:
        guard, inode = self._guard, load(self._snapshot, self._volume, request.ino)
        if request.uid not in (None, inode.uid):
            raise Refused(ErrorCode.NOT_PERMITTED, "only root gives files away")
        if request.gid not in (None, inode.gid):
            self.must_own(inode)
            if request.gid == 0 or (guard._squash is Squash.ALL and request.gid != guard._gid):
                raise Refused(ErrorCode.NOT_PERMITTED, "only root gives files to a group that is not one's own")
        if request.mode is not None and not _takes_away(inode.mode, request.mode):
            self.must_own(inode)
            if not inode.mode & stat.S_ISGID:
                self._check_setgid(stat.S_IFMT(inode.mode) | stat.S_IMODE(request.mode), inode.gid)
        else:
            self.may(request.ino, _W)

    def set_xattr(self, request: wire.SetXattr | wire.RemoveXattr) -> None:
        if request.name.startswith(b"user."):
            self.may(request.ino, _W)
        elif request.name.startswith((b"trusted.", b"security.")):
            raise Refused(ErrorCode.NOT_PERMITTED, "this attribute is root's")
        else:
            self.must_own(load(self._snapshot, self._volume, request.ino))


def _takes_away(before: int, after: int) -> bool:
    """Whether a change of mode does no more than writing does: take setuid and setgid away."""
    gone = stat.S_IMODE(before) ^ stat.S_IMODE(after)
    return not gone & ~(stat.S_ISUID | stat.S_ISGID) and not gone & ~stat.S_IMODE(before)


_RULES: Final[Mapping[type, Callable[[_Rights, Any], None]]] = {
    wire.Lookup: lambda rights, request: rights.may(request.parent, _X),
    wire.FetchDirectory: lambda rights, request: rights.may(request.ino, _R | _X),
    wire.OpenFile: _Rights.open,
    wire.GetContent: lambda rights, request: rights.may(request.ino, _R, _X),
    wire.Seek: lambda rights, request: rights.may(request.ino, _R, _X),
    wire.GetXattr: lambda rights, request: rights.may(request.ino, _R),
    wire.MakeNode: _Rights.make,
    wire.MakeTemporary: _Rights.make,
    wire.Link: _Rights.link,
    wire.Remove: lambda rights, request: rights.may_remove(request.parent, request.name),
    wire.Rename: _Rights.rename,
    wire.SetAttributes: _Rights.set_attributes,
    wire.SetXattr: _Rights.set_xattr,
    wire.RemoveXattr: _Rights.set_xattr,
    wire.WriteInline: _Rights.write_inline,
    wire.CommitSlices: lambda rights, request: rights.may(request.ino, _W),
    wire.CompactSlices: lambda rights, request: rights.may(request.ino, _W),
    wire.Allocate: lambda rights, request: rights.may(request.ino, _W),
    wire.CopyRange: _Rights.copy,
}
