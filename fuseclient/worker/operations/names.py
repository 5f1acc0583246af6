"""Operations that name an entry of a directory: they look for it, make, link, remove and rename it."""

from __future__ import annotations

import errno
import stat

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from fuseclient.data.writer import Closed
from fuseclient.worker.attributes import absent_entry
from fuseclient.worker.errors import answered
from fuseclient.worker.guard import Token
from fuseclient.worker.operations.base import check_name
from fuseclient.worker.operations.inodes import InodeOperations
from metaserver import wire


class NameOperations(InodeOperations):
    """Of names."""

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
        check_name(name)
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
        check_name(name)
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

    @answered
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        check_name(new_name)
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
        check_name(name)
        if not self._may_remember or self._creations.find(parent, name) is not None:
            return False
        return self._removals.remove(parent, name, self._creations.directory(parent))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._remove(parent_inode, name, directory=True)

    async def _remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        check_name(name)
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
        check_name(name)
        check_name(new_name)
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
