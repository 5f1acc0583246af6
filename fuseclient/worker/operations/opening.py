"""Operations that open and close: directories, and listing them, files that are there, and new ones."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final, NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext

from fuseclient.data.grants import NO_GRANT, Grant
from fuseclient.data.passthrough import Opening
from fuseclient.data.writer import Closed
from fuseclient.worker import handles
from fuseclient.worker.attributes import dot_entry, entry_of
from fuseclient.worker.directories import Listing
from fuseclient.worker.errors import answered, answered_of_inode
from fuseclient.worker.guard import Token
from fuseclient.worker.listings import DOTS
from fuseclient.worker.operations.base import Begun, check_name
from fuseclient.worker.operations.inodes import InodeOperations
from fuseclient.worker.rpc import Refused
from metaserver import wire

#: How often a file that others make and remove all the time is tried to be made or opened.
_CREATE_TRIES: Final = 64
#: Threads of which it is known that they look again.
_LOOKS_AGAIN: Final = 1024


class OpenOperations(InodeOperations):
    """Of handles."""

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
            if not self._tell(token, listing):
                return
            complete = listing.complete
            if listing.entries:
                cookie, told = listing.entries[-1].cookie, True
        if not told:
            await self._kernel.before_end(ino)

    def _tell(self, token: ReaddirToken, listing: Listing) -> bool:
        """Put these entries into a reply; say whether there was room for all."""
        ttl_s, has_room = self._lease.ttl_s(), True
        kept = []
        for entry in listing.entries:
            fresh = listing.is_fresh(entry)
            told = entry_of(self._overlay(entry.attributes), ttl_s if fresh else 0.0)
            has_room = pyfuse3.readdir_reply(token, entry.name, told, entry.cookie + DOTS)
            if not has_room:
                break
            if fresh:
                kept.append(entry.attributes)
        self._feeder.tells_all(kept)
        return has_room

    @answered
    async def releasedir(self, fh: int) -> None:
        self._released(fh)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._writer.sync(None)

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
        check_name(name)
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
        check_name(name)
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

    def _is_earlier_writer(self, fh: int) -> bool:
        handle = handles.decode(fh)
        return handle.writing and handle.generation != self._generation


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
