"""The FUSE operations, as pyfuse3 calls them for each request that nothing in the kernel answered.

Each method asks the metaserver, brings the caches up to date, and only then answers: when an operation has returned,
no cache of this mount holds the state before it. This is the only module, with errors.py, that speaks of errno.

Requests of one mount run at once, each in a task of its own. The kernel serialises changes within one directory, and
writes to and truncation of one file; nothing else may be relied upon.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

import msgspec
import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from fuseclient.data.grants import NO_GRANT, Grant
from fuseclient.data.passthrough import Opening, Passthrough
from fuseclient.data.reader import Reader
from fuseclient.data.writer import Closed, Writer
from fuseclient.worker import handles
from fuseclient.worker.attributes import absent_entry, dot_entry, entry_of, statistics_of
from fuseclient.worker.changes import OpenedVersions
from fuseclient.worker.closings import Closings
from fuseclient.worker.creations import Creations
from fuseclient.worker.directories import Directories
from fuseclient.worker.errors import answered, answered_of_inode, answered_of_writer
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.fetches import Session
from fuseclient.worker.guard import Token
from fuseclient.worker.invalidation import Invalidator
from fuseclient.worker.lease import Lease
from fuseclient.worker.listings import DOTS
from fuseclient.worker.locks import Locks
from fuseclient.worker.orphans import Orphans
from fuseclient.worker.removals import Removals
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.told_lately import ToldLately
from fuseclient.worker.xattrs import ROOT_XATTRS, Xattrs
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

_INT64: Final = 1 << 63
#: How long a volume's figures are answered from the kernel.
_STATISTICS_NS: Final = 1_000_000_000
#: How often a file that others make and remove all the time is tried to be made or opened.
_CREATE_TRIES: Final = 64
#: Threads of which it is known that they look again.
_LOOKS_AGAIN: Final = 1024
#: Kinds of xattr that are kept.
_KEPT_XATTRS: Final = (b"user.", b"trusted.", b"security.")
#: Access control lists, of which there are none.
_ACLS: Final = b"system.posix_acl_"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the operations are made of."""

    session: Session
    feeder: Feeder
    directories: Directories
    writer: Writer
    creations: Creations
    removals: Removals
    reader: Reader
    orphans: Orphans
    closings: Closings
    lease: Lease
    cache: Cache
    opened: OpenedVersions
    kernel: Invalidator
    locks: Locks
    #: Handles given out by this worker and not yet released, by inode.
    open_handles: Counter[int]
    told_lately: ToldLately
    passthrough: Passthrough
    #: Told of each read that was answered from objects: of which file, and how many bytes.
    on_read: Callable[[wire.Attributes, int], None]
    #: Told of each small file whose beginning was not answered in the kernel.
    on_small_read: Callable[[int], None]
    #: Of the worker; part of its handles.
    generation: int
    #: False: each request is answered by the metaserver.
    may_remember: bool
    #: OPEN, OPENDIR and FLUSH are answered ENOSYS: the kernel sends no more of them.
    opens_nothing: bool


class Begun(NamedTuple):
    """A file that was made here, and is open; ``grant`` is what may be done to it without waiting."""

    opened: FileInfo
    entry: EntryAttributes
    grant: Grant


class Operations(pyfuse3.Operations):
    """Every request of one mount."""

    supports_dot_lookup = False

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._session = parts.session
        self._feeder = parts.feeder
        self._directories = parts.directories
        self._writer = parts.writer
        self._creations = parts.creations
        self._removals = parts.removals
        self._reader = parts.reader
        self._orphans = parts.orphans
        self._closings = parts.closings
        self._lease = parts.lease
        self._cache = parts.cache
        self._opened = parts.opened
        self._kernel = parts.kernel
        self._locks = parts.locks
        self._open_handles = parts.open_handles
        self._told_lately = parts.told_lately
        #: By thread, what was last answered so that the kernel looks again.
        self._looks_again: dict[int, tuple[int, bytes]] = {}
        self._serials = handles.Serials()
        self._passthrough = parts.passthrough
        self._on_read = parts.on_read
        self._on_small_read = parts.on_small_read
        self._generation = parts.generation % handles.GENERATIONS
        self._may_remember = parts.may_remember
        self._xattrs = Xattrs(parts.session, parts.feeder, parts.cache)
        self._opens_nothing = parts.opens_nothing
        #: Takes what was sent on the other socket (extra_ops.py) before the request at hand, writes above all.
        self.catch_up: Callable[[], None] = lambda: None
        #: Writing handles of earlier workers that are used here, and those of them whose loss was reported.
        self._adopted: set[int] = set()
        self._reported: set[int] = set()

    # Names

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        held = self.lookup_now(parent_inode, name)
        if held is not None:
            return held
        answer = await self._directories.lookup(parent_inode, name)
        if answer.attributes is None:
            return absent_entry(self._lease.ttl_s() if answer.fresh else 0.0)
        if stat.S_ISREG(answer.attributes.mode):
            self._told_lately.add(answer.attributes.ino)
        return self._entry(answer.attributes, answer.fresh)

    def lookup_now(self, parent: int, name: bytes) -> EntryAttributes | None:
        """Answer a lookup of what is known to be absent, or was just made here; None: it is to be looked up."""
        _check_name(name)
        ino = self._creations.find(parent, name)
        if ino is not None:
            return self.getattr_now(ino)
        return absent_entry(self._lease.ttl_s()) if self._directories.lacks(parent, name) else None

    @answered
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return self._changed_entry(*await self._make(parent_inode, name, mode, ctx, rdev=rdev))

    @answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._changed_entry(*await self._make(parent_inode, name, mode, ctx))

    @answered
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        if not 0 < len(target) <= wire.MAX_TARGET:
            raise FUSEError(errno.ENAMETOOLONG if target else errno.ENOENT)
        return self._changed_entry(*await self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target))

    async def _make(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext, *, rdev: int = 0, target: bytes | None = None
    ) -> tuple[wire.Attributes, bool]:
        """Make a node and return it, and whether it may be kept; the caches know of it."""
        _check_name(name)
        request = wire.MakeNode(parent, name, mode, ctx.uid, ctx.gid, rdev, target)
        async with self._changing((parent, name)) as token:
            changed = await self._session.call(request, wire.Changed)
            made = changed.attributes[0]
            fresh = self._named(token, parent, name, changed)
            if target is not None and fresh:
                self._feeder.content(made, target)
            if fresh and stat.S_ISDIR(mode):
                self._feeder.know_whole(token, made.ino, {}, self._feeder.losses(made.ino))
        return made, fresh

    def _named(self, token: Token, parent: int, name: bytes, changed: wire.Changed) -> bool:
        """A name was given to the first inode of a reply: put both; say whether they may be kept."""
        ino = changed.attributes[0].ino
        fresh = self._feeder.fresh(token, parent, name, ino)
        self._feeder.changed(token, changed.attributes)
        self._feeder.named(token, parent, name, ino)
        return fresh

    @answered
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        _check_name(new_name)
        self.catch_up()
        async with self._changing((new_parent_inode, new_name), inodes=(inode,)) as token:
            changed = await self._session.call(wire.Link(inode, new_parent_inode, new_name), wire.Changed)
            fresh = self._named(token, new_parent_inode, new_name, changed)
        self._orphans.linked(inode)
        return self._changed_entry(changed.attributes[0], fresh)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        if not self.unlink_now(parent_inode, name):
            await self._remove(parent_inode, name, directory=False)

    def unlink_now(self, parent: int, name: bytes) -> bool:
        """Remove a file's name, of which the metaserver is told later; False: that cannot be, and nothing is done.

        The kernel has found the name, and that it is no directory's, under the lock that keeps it so.
        """
        _check_name(name)
        if not self._may_remember or self._creations.find(parent, name) is not None:
            return False
        return self._removals.remove(parent, name, self._creations.directory(parent))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._remove(parent_inode, name, directory=True)

    async def _remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        _check_name(name)
        async with self._changing((parent, name)) as token:
            changed = await self._session.call(wire.Remove(parent, name, directory), wire.Changed)
            self._feeder.changed(token, changed.attributes)
            self._feeder.unnamed(token, parent, name)
            if directory:
                self._feeder.forget_whole(changed.attributes[0].ino)
        self._note_orphan(changed.attributes[0])

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if self.rename_now(parent_inode_old, name_old, parent_inode_new, name_new, flags):
            return
        exchange, no_replace = bool(flags & pyfuse3.RENAME_EXCHANGE), bool(flags & pyfuse3.RENAME_NOREPLACE)
        if flags & ~(pyfuse3.RENAME_EXCHANGE | pyfuse3.RENAME_NOREPLACE):
            raise FUSEError(errno.EINVAL)
        request = wire.Rename(parent_inode_old, name_old, parent_inode_new, name_new, no_replace, exchange)
        async with self._changing((parent_inode_old, name_old), (parent_inode_new, name_new)) as token:
            changed = await self._session.call(request, wire.Changed)
            self._renamed(token, request, changed)

    def rename_now(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> bool:
        """Rename a closed file that the metaserver is told of later; False: that cannot be, and nothing is done."""
        _check_name(name)
        _check_name(new_name)
        if parent != new_parent or name == new_name or flags & ~pyfuse3.RENAME_NOREPLACE:
            return False
        renamed = self._creations.rename(parent, name, new_name)
        if renamed is None:
            return False
        self._feeder.renamed(parent, name, new_name, Closed(*renamed), self._creations.directory(parent))
        return True

    def _renamed(self, token: Token, request: wire.Rename, changed: wire.Changed) -> None:
        old, new = (request.parent, request.name), (request.new_parent, request.new_name)
        moved = changed.attributes[0]
        others = [each for each in changed.attributes[1:] if each.ino not in (request.parent, request.new_parent)]
        self._feeder.changed(token, changed.attributes)
        if request.exchange and others:
            self._feeder.named(token, *old, others[0].ino)
        elif others or moved.nlink == 1 or stat.S_ISDIR(moved.mode):
            self._feeder.unnamed(token, *old)
            for each in others:
                self._note_orphan(each)
        else:
            # The two may have been names of one inode, which leaves both.
            self._feeder.drop_name(*old)
        self._feeder.named(token, *new, moved.ino)

    @contextlib.asynccontextmanager
    async def _changing(self, *names: tuple[int, bytes], inodes: Sequence[int] = ()) -> AsyncIterator[Token]:
        """A change of this mount: gives the token for its reply.

        If it fails the names are dropped, because the kernel asked for it because of what it holds of them; and if it
        is not known whether it was made the inodes are, too, and the kernel is to ask for all of them again.
        """
        directories = [parent for parent, _ in names]
        locked = (*directories, *inodes)
        self._kernel.busy.update(locked)
        try:
            with self._feeder.begin() as token:
                yield token
        except (Refused, Disconnected) as error:
            for parent, name in names:
                self._feeder.drop_name(parent, name)
            if isinstance(error, Disconnected) or error.code is wire.ErrorCode.INTERNAL:
                for ino in locked:
                    self._feeder.drop_inode(ino)
                await self._kernel.doubt(names, locked)
            raise
        except BaseException:
            for parent, name in names:
                self._feeder.drop_name(parent, name)
            raise
        finally:
            self._kernel.busy.subtract(locked)
            for ino in locked:
                if not self._kernel.busy[ino]:
                    del self._kernel.busy[ino]

    def _note_orphan(self, attributes: wire.Attributes) -> None:
        if attributes.nlink == 0:
            self._orphans.add(attributes.ino)

    @answered_of_inode
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return (await self._session.call(wire.ReadLink(inode), wire.TargetIs)).target

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self._orphans.forgotten(ino for ino, _ in inode_list)

    # Attributes

    @answered_of_inode
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        entry = self.getattr_now(inode)
        if entry is None:
            entry = self._entry(*await self._get_attributes(inode))
        return entry

    def getattr_now(self, ino: int) -> EntryAttributes | None:
        """Return the attributes of a file that was just made here; None: they are to be asked for."""
        new = self._writer.known_new(ino)
        if new is None and self._creations.is_alone():
            new = self._creations.closed_file(ino)
        return self._entry(new) if new is not None and self._may_remember and self._lease.left_s() > 0 else None

    async def _get_attributes(self, ino: int) -> tuple[wire.Attributes, bool]:
        """Return attributes from the metaserver, and whether they are fresh; they are in the maps."""
        with self._feeder.begin() as token:
            found = await self._session.call(wire.GetAttributes(ino), wire.Found)
            return found.attributes, self._feeder.inode(token, found.attributes)

    @answered_of_inode
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        return await self.change(_setattr_request(inode, attr, fields))

    @answered_of_inode
    async def change(self, request: wire.SetAttributes) -> EntryAttributes:
        """Change attributes, and return them all."""
        entry = self.change_now(request)
        return self._changed_entry(await self._set_attributes(request)) if entry is None else entry

    def change_now(self, request: wire.SetAttributes) -> EntryAttributes | None:
        """Change attributes of a new file, of which the metaserver is told later, or with its first flush; None: that
        cannot be."""
        deferred = self._writer.defer(request)
        if deferred is None and (changed := self._creations.change(request)) is not None:
            self._feeder.closed(Closed(*changed))
            deferred, _ = changed
        return None if deferred is None else self._changed_entry(deferred)

    async def _set_attributes(self, request: wire.SetAttributes) -> wire.Attributes:
        if request.size is None and self._writer.will_sync(request.ino):
            request = msgspec.structs.replace(request, lazy=True)
        async with self._writer.settled(request.ino, request.size):
            attributes = await self._change_inode(request)
            if request.size is not None:
                self._writer.cut(request.ino, request.size)
                attributes = self._writer.overlay(attributes)
        if request.size is not None:
            await self._passthrough.resized(request.ino, request.size)
        return attributes

    async def _change_inode(self, request: wire.Request) -> wire.Attributes:
        """Make a change of one inode and return it as it is now."""
        ino: int = request.ino  # type: ignore[union-attr]
        async with self._changing(inodes=(ino,)) as token:
            changed = await self._session.call(request, wire.Changed)
            fresh = self._feeder.unchanged(token, ino)
            self._feeder.changed(token, changed.attributes)
            attributes = self._writer.overlay(changed.attributes[0])
            if not fresh:
                self._writer.changed_elsewhere(ino)
            return attributes

    @answered
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Permissions are the kernel's (default_permissions): it asks nobody."""
        return True

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        statistics = await self._session.call(wire.GetStatistics(), wire.Statistics)
        data = statistics_of(statistics)
        self._cache.put_statfs(
            bsize=data.f_bsize,
            blocks=data.f_blocks,
            bfree=data.f_bfree,
            bavail=data.f_bavail,
            files=data.f_files,
            ffree=data.f_ffree,
            valid_until_ns=self._lease.until_ns(_STATISTICS_NS),
        )
        return data

    def _entry(self, attributes: wire.Attributes, fresh: bool = True) -> EntryAttributes:
        if fresh:
            self._feeder.tells(attributes)
        return entry_of(self._overlay(attributes), self._lease.ttl_s() if fresh else 0.0)

    def _overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return attributes as they will be when all that was done here is committed."""
        return self._creations.overlay(self._writer.overlay(attributes))

    def _changed_entry(self, attributes: wire.Attributes, fresh: bool = True) -> EntryAttributes:
        """Return what a change is answered with.

        The kernel takes such attributes whatever it was told to drop since the request was sent, so they are not for
        keeping: a break may overtake the reply on its way. The next to ask is answered by BPF.
        """
        entry = self._entry(attributes, fresh)
        entry.attr_timeout = 0.0
        return entry

    # Extended attributes

    @answered_of_inode
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """The kernel asks for security.capability before each write: so files that are written are answered here."""
        _check_xattr(name)
        written = self._writer.known(inode) if self._may_remember else None
        if name.startswith(_ACLS) or (written and not written.flags & wire.InodeFlag.HAS_XATTRS):
            raise FUSEError(errno.ENODATA)
        if not self._may_remember:
            if self._lacks_xattrs(inode):
                raise FUSEError(errno.ENODATA)
            return (await self._session.call(wire.GetXattr(inode, name), wire.XattrIs)).value
        value = await self._xattrs.get(inode, name)
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    def _lacks_xattrs(self, ino: int) -> bool:
        """Say whether it is known, under the lease, that an inode has no xattrs."""
        return self._cache.lacks_xattrs(ino) and self._lease.left_s() > 0

    @answered_of_inode
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        if self._may_remember:
            names = await self._xattrs.names(inode)
        else:
            names = (await self._session.call(wire.ListXattrs(inode), wire.XattrNames)).names
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(ROOT_XATTRS)]

    @answered_of_inode
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an xattr. The channel sends SETXATTR to extra_ops.py, which knows its flags."""
        await self.set_xattr(inode, name, value)

    async def set_xattr(
        self, ino: int, name: bytes, value: bytes, *, create: bool = False, replace: bool = False
    ) -> None:
        """Set an xattr, which must not be there, or must."""
        _check_xattr(name)
        if name.startswith(_ACLS):
            raise FUSEError(errno.EOPNOTSUPP)
        if len(value) > wire.MAX_XATTR_VALUE:
            raise FUSEError(errno.ENOSPC)
        await self._change_inode(wire.SetXattr(ino, name, value, create, replace))

    @answered_of_inode
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        _check_xattr(name)
        if name.startswith(_ACLS):
            return
        await self._change_inode(wire.RemoveXattr(inode, name))

    # Directories

    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        self._check_opens()
        return self._handle(inode, os.O_RDONLY)

    @answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        ino = handles.decode(fh).ino
        self.catch_up()
        self._feeder.listed.add(ino)
        for position in range(start_id, DOTS):
            if not pyfuse3.readdir_reply(token, b"." * (position + 1), dot_entry(ino), position + 1):
                return
        cookie, complete = max(0, start_id - DOTS), False
        told = start_id < DOTS
        while not complete:
            listing = await self._directories.listing(ino, cookie)
            complete = listing.complete
            for entry in listing.entries:
                attributes = self._entry(entry.attributes, listing.is_fresh(entry))
                if not pyfuse3.readdir_reply(token, entry.name, attributes, entry.cookie + DOTS):
                    return
                cookie, told = entry.cookie, True
        if not told:
            await self._kernel.before_end(ino)

    @answered
    async def releasedir(self, fh: int) -> None:
        self._released(fh)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._writer.sync(None)

    # Files

    @answered_of_inode
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file without passthrough. The channel sends OPEN to extra_ops.py, which does more."""
        return (await self.open_file(inode, flags, passthrough=False))[0]

    async def open_file(self, ino: int, flags: int, *, passthrough: bool = True) -> tuple[FileInfo, Opening | None]:
        """Open a file, and say from which backing the kernel may read it."""
        self._check_opens()
        writing = _writes(flags)
        with self._feeder.begin() as token, self._opening(ino):
            attributes, fresh = await self._open_inode(token, ino, writing=writing)
            if writing:
                self._begin_writing(attributes, fresh)
            try:
                if flags & os.O_TRUNC and writing:
                    attributes = await self._set_attributes(wire.SetAttributes(ino, size=0))
                opening = await self._passthrough.open(token, attributes, writing=writing) if passthrough else None
            except BaseException:
                if writing:
                    await self._end_writing(ino)
                raise
            # The handle is counted before anything is awaited: see passthrough.py.
            handle = self._handle(ino, flags)
        keep = self._opened.opened(ino, attributes.version)
        self._feeder.paged.add(ino)
        return FileInfo(fh=handle, keep_cache=keep, direct_io=_appends(flags)), opening

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it. The channel sends CREATE to direct_ops.py, which does more."""
        begun = await self.create_file(parent_inode, name, mode, flags, ctx)
        return begun.opened, begun.entry

    @answered
    async def create_file(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext) -> Begun:
        """Make a file and open it. One that exists, which the kernel did not know, is answered ESTALE.

        The kernel then looks again, says who may open it, and opens it. But it does so once only, and others may remove
        the file and make it again in the meantime: so who asks again is answered here, if he is the file's owner.
        """
        _check_name(name)
        writing = _writes(flags)
        for _ in range(_CREATE_TRIES):
            if writing and self._may_remember:
                await self._creations.learn(parent_inode)
            here = self.create_now(parent_inode, name, mode, flags, ctx)
            if here is not None:
                return here
            kind = stat.S_IFREG | stat.S_IMODE(mode)
            # Its closing, or an fsync, waits until it is durable; so this need not.
            request = wire.MakeNode(parent_inode, name, kind, ctx.uid, ctx.gid, lazy=writing, writing=writing)
            try:
                async with self._changing((parent_inode, name)) as token:
                    changed = await self._session.call(request, wire.Changed)
                    made = changed.attributes[0]
                    opened = self._opened_new(token, made, flags)
                    fresh = self._named(token, parent_inode, name, changed)
            except Refused as error:
                if error.code != wire.ErrorCode.EXISTS or flags & os.O_EXCL:
                    raise
            else:
                return Begun(opened, self._changed_entry(made, fresh), NO_GRANT)
            if self._looks_again.get(ctx.pid) != (parent_inode, name):
                self._look_again(ctx.pid, parent_inode, name)
            existing = await self._open_existing(parent_inode, name, flags, ctx.uid)
            if existing is not None:
                return existing
        raise FUSEError(errno.ESTALE)

    def _look_again(self, tid: int, parent: int, name: bytes) -> NoReturn:
        """Have the kernel look once more for a name that a thread wants to make."""
        self._looks_again[tid] = (parent, name)
        if len(self._looks_again) > _LOOKS_AGAIN:
            del self._looks_again[next(iter(self._looks_again))]
        raise FUSEError(errno.ESTALE)

    async def _open_existing(self, parent: int, name: bytes, flags: int, uid: int) -> Begun | None:
        """Open a file for its owner, who may: the kernel checks no permissions then. None: it is not there any more.

        The kernel is to keep neither the name nor the attributes: both may have changed since.
        """
        found = (await self._directories.lookup(parent, name)).attributes
        if found is None:
            return None
        if not _owner_may_open(found, uid, flags) or self._passthrough.has(found.ino):
            raise FUSEError(errno.ESTALE)
        try:
            opened, _ = await self.open_file(found.ino, flags, passthrough=False)
        except Refused as error:
            if error.code is not wire.ErrorCode.NOT_FOUND:
                raise
            return None
        try:
            attributes, _ = await self._get_attributes(found.ino)
            if self._passthrough.has(found.ino):
                raise FUSEError(errno.ESTALE)
        except BaseException:
            await self.release(opened.fh)
            raise
        return Begun(opened, self._changed_entry(attributes, fresh=False), NO_GRANT)

    def create_now(self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext) -> Begun | None:
        """Make a file that the metaserver is told of later; None: that cannot be.

        Its attributes are for the kernel to keep: who drops them waits until it knows the file (see invalidation.py).
        If the kernel keeps none they are put into the maps, and nothing is granted, which would make them out of date.
        """
        _check_name(name)
        if not _writes(flags) or not self._may_remember:
            return None
        made = self._creations.make(parent, name, mode, ctx.uid, ctx.gid)
        if made is None:
            return None
        with self._feeder.begin() as token:
            opened = self._opened_new(token, made, flags, held=True)
        grant = NO_GRANT if _appends(flags) or not self._lease.ttl_s() else self.grant(opened.fh, changes=True)
        self._feeder.made(parent, name, made, self._creations.directory(parent))
        self._kernel.making.add(made.ino)
        return Begun(opened, self._entry(made), grant)

    def seen(self, ino: int) -> None:
        """The kernel asked for something of an inode, so it knows it."""
        self._kernel.making.discard(ino)

    @answered
    async def tmpfile(
        self, parent_inode: int, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file without a name and open it; pyfuse3 has no such method, extra_ops.py calls it."""
        writing = _writes(flags)
        request = wire.MakeTemporary(parent_inode, stat.S_IFREG | stat.S_IMODE(mode), ctx.uid, ctx.gid, writing)
        async with self._changing() as token:
            made = (await self._session.call(request, wire.Changed)).attributes[0]
            opened, fresh = self._opened_new(token, made, flags), self._feeder.unchanged(token, made.ino)
        self._orphans.add(made.ino)
        return opened, self._changed_entry(made, fresh)

    def _opened_new(self, token: Token, made: wire.Attributes, flags: int, *, held: bool = False) -> FileInfo:
        """Open a file that was just made."""
        if _writes(flags):
            self._writer.open(made, is_new=True, held=held)
            if not self._feeder.unchanged(token, made.ino):
                self._writer.changed_elsewhere(made.ino)
        self._opened.opened(made.ino, made.version)
        self._feeder.paged.add(made.ino)
        return FileInfo(fh=self._handle(made.ino, flags), keep_cache=True, direct_io=_appends(flags))

    @answered_of_inode
    async def read(self, fh: int, off: int, size: int) -> bytes:
        ino = handles.decode(fh).ino
        self._feeder.paged.add(ino)
        if self._passthrough.has(ino):
            data = await self._passthrough.read(ino, off, size)
            if data is not None:
                return data
        await self._writer.before_read(ino, off, size)
        if (found := await self._directories.content(ino)) is not None:
            data = found.data[off : off + size]
            self._on_read(found.attributes, len(data))
            return data
        with self._feeder.begin() as token:
            reading = await self._reader.read(ino, off, size)
            if reading.content is not None:
                self._feeder.inode(token, reading.attributes, reading.content)
        if reading.content is not None and off == 0:
            self._on_small_read(ino)
        self._on_read(reading.attributes, len(reading.data))
        return reading.data

    @answered_of_writer
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        _check_end(off + len(buf))
        await self.adopt(fh & ~handles.APPENDS)
        ino = handles.decode(fh).ino
        if not self._locks.may_write(ino):
            raise FUSEError(errno.EIO)
        if self._passthrough.has(ino):
            await self._passthrough.write(ino, off, buf)
        elif fh & handles.APPENDS:
            await self._writer.append(ino, buf)
        else:
            await self._writer.write(ino, off, buf)
        return len(buf)

    def write_now(self, fh: int, off: int, data: memoryview) -> bool:
        """Take a write for which nothing has to be waited; else return False, with nothing done."""
        _check_end(off + len(data))
        ino = handles.decode(fh).ino
        if fh & handles.APPENDS or self._is_earlier_writer(fh) or self._passthrough.has(ino):
            return False
        return self._locks.may_write(ino) and self._writer.write_now(ino, off, data)

    def grant(self, fh: int, *, changes: bool = False) -> Grant:
        """Return what may be done through a handle without waiting for a word of it; ``changes``: it makes the file.

        Nothing while there are locks: a write under one that is lost is to be refused, and closing ends some.
        """
        handle = handles.decode(fh)
        if not handle.writing or fh & handles.APPENDS or self._is_earlier_writer(fh):
            return NO_GRANT
        if self._passthrough.has(handle.ino) or self._locks.has(handle.ino):
            return NO_GRANT
        return self._writer.grant(handle.ino, changes=changes)

    def on_withdraw(self, withdraw: Callable[[int], Awaitable[None]]) -> None:
        """Have :meth:`grant` taken back by this: see :class:`~fuseclient.data.writer_hooks.WriterHooks`."""
        self._writer.hooks.withdraw = withdraw

    def take_posted(self, fh: int, off: int, data: memoryview, made_ns: int) -> int:
        """Take a write that was answered already, because of a :meth:`grant`; return what that is to be renewed by."""
        ino = handles.decode(fh).ino
        self._writer.write_posted(ino, off, data, made_ns)
        return self._writer.renewal(ino)

    def take_change(self, request: wire.SetAttributes) -> None:
        """Take a change of attributes that was answered already, because of a :meth:`grant`."""
        self._writer.change_posted(request)

    def syncs(self, ino: int) -> None:
        """A FLUSH or an FSYNC has come, before which the channel has ended that it answers changes of attributes."""
        self._writer.end_changes(ino)

    async def absorb(self, ino: int) -> None:
        """Have what was written through mappings of a passthrough file come to the writer."""
        await self._passthrough.absorb(ino)

    @contextlib.asynccontextmanager
    async def changing(self, *inos: int) -> AsyncIterator[None]:
        """A context in which the content of a file is changed other than by :meth:`write`; it is the last of these."""
        for ino in inos:
            await self._passthrough.absorb(ino)
        yield
        await self._passthrough.changed_here(inos[-1])

    @answered_of_writer
    async def flush(self, fh: int) -> None:
        self._check_opens()
        await self._sync(fh, self._writer.flush)

    @answered_of_writer
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._sync(fh, self._writer.sync)

    def flush_now(self, fh: int) -> bool:
        """Flush a new file that is committed later; else return False, with nothing done."""
        handle = handles.decode(fh)
        return handle.writing and not self._is_earlier_writer(fh) and self._writer.flush_now(handle.ino)

    async def _sync(self, fh: int, sync: Callable[..., Awaitable[None]]) -> None:
        """Commit what was written through any handle; say once what an earlier worker may have lost."""
        handle = handles.decode(fh)
        await self._passthrough.absorb(handle.ino)
        await sync(handle.ino, for_reader=not handle.writing)
        if self._is_earlier_writer(fh) and fh not in self._reported:
            self._reported.add(fh)
            raise FUSEError(errno.EIO)

    @answered
    async def release(self, fh: int) -> None:
        handle = handles.decode(fh)
        self._reported.discard(fh)
        written = fh in self._adopted if self._is_earlier_writer(fh) else handle.writing
        self._adopted.discard(fh)
        if written and self._passthrough.has(handle.ino):
            self._passthrough.end_writing(handle.ino, lambda: self._end_writing(handle.ino))
        elif written:
            await self._end_writing(handle.ino)
        self._released(fh)

    def release_now(self, fh: int) -> bool:
        """Release a handle through which nothing was written that waits; else return False, with nothing done."""
        handle = handles.decode(fh)
        if handle.writing:
            if self._is_earlier_writer(fh) or self._passthrough.has(handle.ino):
                return False
            if not self._writer.is_settled(handle.ino):
                return False
            self._ended_writing(handle.ino, self._writer.close_settled(handle.ino))
        self._released(fh)
        return True

    # Handles

    def _check_opens(self) -> None:
        """Have a kernel that is to do without opening and closing do so."""
        if self._opens_nothing:
            raise FUSEError(errno.ENOSYS)

    def _handle(self, ino: int, flags: int) -> int:
        self._open_handles[ino] += 1
        self._cache.opened(ino)
        return handles.encode(ino, writing=_writes(flags), generation=self._generation, serial=self._serials.take(ino))

    @contextlib.contextmanager
    def _opening(self, ino: int) -> Iterator[None]:
        """An inode is being opened: to who asks it is open already."""
        self._open_handles[ino] += 1
        try:
            yield
        finally:
            self._closed_here(ino)

    def _closed_here(self, ino: int) -> None:
        self._open_handles[ino] -= 1
        if not self._open_handles[ino]:
            del self._open_handles[ino]

    def _released(self, fh: int) -> None:
        handle = handles.decode(fh)
        self._cache.released(handle.ino)
        if not handle.kernel and handle.generation == self._generation:
            self._serials.give_back(fh)
            self._closed_here(handle.ino)
            if handle.ino not in self._open_handles:
                self._reader.closed(handle.ino)
        self._passthrough.released(handle.ino)
        self._orphans.closed(handle.ino)

    def is_shared(self, fh: int) -> bool:
        """Whether another open handle may be the same as this one, which was released."""
        handle = handles.decode(fh)
        return not handle.kernel and handle.generation == self._generation and self._serials.in_use(fh)

    def _is_earlier_writer(self, fh: int) -> bool:
        handle = handles.decode(fh)
        return handle.writing and handle.generation != self._generation

    async def adopt(self, fh: int) -> None:
        """Open the file of a writing handle that an earlier worker gave out, at its first use here."""
        if self._is_earlier_writer(fh) and fh not in self._adopted:
            with self._feeder.begin() as token:
                attributes, fresh = await self._open_inode(token, handles.decode(fh).ino, writing=True)
                if fh not in self._adopted:
                    self._adopted.add(fh)
                    self._begin_writing(attributes, fresh)

    async def _open_inode(self, token: Token, ino: int, *, writing: bool) -> tuple[wire.Attributes, bool]:
        """Return the attributes of a file that is being opened, and whether they are fresh."""
        if writing:
            self._closings.opening(ino)
        attributes = (await self._session.call(wire.OpenFile(ino, writing), wire.Found)).attributes
        return attributes, self._feeder.inode(token, attributes)

    def _begin_writing(self, attributes: wire.Attributes, fresh: bool) -> None:
        self._writer.open(attributes)
        self._feeder.drop_inode(attributes.ino)
        if fresh:
            self._feeder.written(attributes)
        else:
            self._writer.changed_elsewhere(attributes.ino)

    async def _end_writing(self, ino: int) -> None:
        self._ended_writing(ino, await self._writer.close(ino))

    def _ended_writing(self, ino: int, closed: Closed | None) -> None:
        if closed is not None:
            self._feeder.closed(closed)
        if not self._writer.is_open(ino) and ino not in self._creations:
            self._closings.closed(ino)


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def _owner_may_open(attributes: wire.Attributes, uid: int, flags: int) -> bool:
    """Whether this is a regular file of this user, whose mode lets him open it so."""
    needed = 0 if flags & os.O_ACCMODE == os.O_WRONLY else stat.S_IRUSR
    if _writes(flags) or flags & os.O_TRUNC:
        needed |= stat.S_IWUSR
    return stat.S_ISREG(attributes.mode) and attributes.uid == uid and not needed & ~attributes.mode


def _appends(flags: int) -> bool:
    """Whether a file is opened to append: it is direct then, as the kernel may not know where the bytes go."""
    return bool(flags & os.O_APPEND) and _writes(flags)


def _check_name(name: bytes) -> None:
    """The kernel lets longer names through than a directory holds; it never sends any other bad one."""
    if len(name) > wire.MAX_NAME:
        raise FUSEError(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise FUSEError(errno.EINVAL)


def _check_end(end: int) -> None:
    if end > wire.MAX_FILE:
        raise FUSEError(errno.EFBIG)


def _check_xattr(name: bytes) -> None:
    """Refuse the names of kinds that are not kept, before it is asked whether there are any."""
    if not name.startswith((*_KEPT_XATTRS, _ACLS)):
        raise FUSEError(errno.EOPNOTSUPP)
    if name in _KEPT_XATTRS:
        raise FUSEError(errno.EINVAL)


def _setattr_request(ino: int, attr: EntryAttributes, fields: SetattrFields) -> wire.SetAttributes:
    return wire.SetAttributes(
        ino,
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=_nanoseconds(attr.st_atime_ns) if fields.update_atime else None,
        mtime_ns=_nanoseconds(attr.st_mtime_ns) if fields.update_mtime else None,
    )


def _nanoseconds(time_ns: int) -> int:
    """Return the nearest time that is kept: years 1677 to 2262."""
    return max(-_INT64, min(_INT64 - 1, time_ns))
