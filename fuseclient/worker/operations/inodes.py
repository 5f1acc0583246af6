"""Operations that name an inode: attributes, extended attributes, targets of links, and the volume's figures."""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from typing import Final

import msgspec
from pyfuse3 import EntryAttributes, FUSEError, RequestContext, SetattrFields, StatvfsData

from fuseclient.data.writer import Closed
from fuseclient.worker.attributes import statistics_of
from fuseclient.worker.errors import answered, answered_of_inode
from fuseclient.worker.operations.base import Base
from fuseclient.worker.xattrs import ROOT_XATTRS
from metaserver import wire

_INT64: Final = 1 << 63
#: How long a volume's figures are answered from the kernel.
_STATISTICS_NS: Final = 1_000_000_000
#: Kinds of xattr that are kept.
_KEPT_XATTRS: Final = (b"user.", b"trusted.", b"security.")
#: Access control lists, of which there are none.
_ACLS: Final = b"system.posix_acl_"
#: SELinux's label, which a file without one does not just lack: see bpf/xattrs.bpf.h.
_LABEL: Final = b"security.selinux"


class InodeOperations(Base):
    """Of inodes."""

    @answered_of_inode
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return (await self._session.call(wire.ReadLink(inode), wire.TargetIs)).target

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self._orphans.forgotten(ino for ino, _ in inode_list)

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

    @answered_of_inode
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """The kernel asks for security.capability before each write: so files that are written are answered here."""
        _check_xattr(name)
        value = None if name.startswith(_ACLS) else await self._xattr(inode, name)
        if value is None:
            raise FUSEError(errno.EOPNOTSUPP if name == _LABEL else errno.ENODATA)
        return value

    async def _xattr(self, ino: int, name: bytes) -> bytes | None:
        """Return a value, or None if there is no such xattr."""
        if not self._may_remember:
            return None if self._lacks_xattrs(ino) else await self._xattrs.value(ino, name)
        written = self._writer.known(ino)
        if written and not written.flags & wire.InodeFlag.HAS_XATTRS:
            return None
        return await self._xattrs.get(ino, name)

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
