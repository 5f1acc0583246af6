"""One client's kernel: its dentry, attribute and page caches, its locks, and the requests that it makes of the mount.

What is modelled is what decides whether a stale answer is possible:

* a dentry has a time-to-live and the epoch of the moment its LOOKUP was sent; a rename moves it with both;
* attributes have a time-to-live, and a version that lets the reply to an earlier request be told from a later drop;
  the replies to SETATTR, CREATE, MKDIR and LINK are taken without that check, as Linux does;
* a directory's lock is held exclusively during a change in it and shared during a LOOKUP of a name without a dentry;
  INVAL_ENTRY takes it, INC_EPOCH does not; INVAL_INODE waits for reads and writes of the inode that are under way;
* a reply takes a moment from where it was made to where it is used, in which notifications can overtake it.

Times-to-live run on the monotonic clock, as the kernel's do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final, Protocol

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from fuseclient.worker import handles
from simulation.bpf import Maps
from simulation.loop import VirtualLoop, current_node
from simulation.rwlock import ReadWriteLock

#: What a READ asks for: more than any file has here.
_READ: Final = 65536
_SHARED_FH: Final = 1 << 63


class Requests(Protocol):
    """The way to the worker."""

    async def request(self, operation: str, *args: Any, repeatable: bool) -> Any: ...
    async def lag(self) -> None: ...


@dataclass(eq=False)
class Dentry:
    """What a name stands for (0: nothing), until when, and since which epoch."""

    ino: int
    expires: float
    epoch: int


@dataclass(eq=False)
class Inode:
    """What is cached of an inode. ``version``: of the last reply taken or drop made; ``handles``: open now."""

    ino: int
    lock: ReadWriteLock = field(default_factory=ReadWriteLock)
    page_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    uid: int = 0
    nlink: int = 0
    mode: int = 0
    size: int = 0
    atime_ns: int = 0
    expires: float = 0.0
    version: int = 0
    pages: bytes | None = None
    handles: int = 0


class Kernel:
    """The caches and the system calls of one client. Methods raise :exc:`FUSEError`.

    ``keeps_forever`` True is a rule switched off: times-to-live do not end.
    """

    keeps_forever = False

    def __init__(self, loop: VirtualLoop, maps: Maps | None, worker: Requests) -> None:
        self._loop = loop
        self._maps = maps
        self._worker = worker
        self._dentries: dict[tuple[int, bytes], Dentry] = {}
        self._inodes: dict[int, Inode] = {}
        self._epoch = 0
        self._version = 1
        self._rename_lock = asyncio.Lock()

    # Caches

    def inode(self, ino: int) -> Inode:
        return self._inodes.setdefault(ino, Inode(ino))

    def _valid(self, expires: float) -> bool:
        return self._loop.time() < expires or (self.keeps_forever and expires > 0)

    def _expires(self, ttl_s: float) -> float:
        return self._loop.time() + ttl_s if ttl_s > 0 else 0.0

    def _dentry(self, parent: int, name: bytes) -> Dentry | None:
        """Return a dentry that may be used without asking."""
        dentry = self._dentries.get((parent, name))
        if dentry is None or dentry.epoch < self._epoch or not self._valid(dentry.expires):
            return None
        return dentry

    def _note(self, ino: int, attributes: Attributes, version: int | None) -> None:
        """Take attributes from the reply to a request sent at ``version``; None: without asking when."""
        inode = self.inode(ino)
        if version is not None and inode.version > version:
            inode.expires = 0.0
            return
        self._version += 1
        inode.version = self._version
        inode.uid, inode.nlink, inode.mode, inode.size, inode.atime_ns = attributes[:5]
        inode.expires = self._expires(attributes[5])

    def _drop_attributes(self, ino: int) -> None:
        self.inode(ino).expires = 0.0

    # Notifications: run one after another, by the channel's notifier thread

    async def invalidate_inode(self, ino: int) -> int:
        inode = self._inodes.get(ino)
        if inode is None:
            return -errno.ENOENT
        self._bump(inode)
        async with inode.page_lock:
            inode.pages = None
        return 0

    async def invalidate_attributes(self, ino: int) -> int:
        inode = self._inodes.get(ino)
        if inode is None:
            return -errno.ENOENT
        self._bump(inode)
        return 0

    def _bump(self, inode: Inode) -> None:
        self._version += 1
        inode.version = self._version
        inode.expires = 0.0

    async def invalidate_entry(self, parent: int, name: bytes) -> int:
        if parent not in self._inodes:
            return -errno.ENOENT
        async with self.inode(parent).lock.exclusive():
            self._drop_attributes(parent)
            return 0 if self._dentries.pop((parent, name), None) else -errno.ENOENT

    async def increment_epoch(self) -> int:
        self._epoch += 1
        return 0

    # LOOKUP and GETATTR

    async def lookup(self, parent: int, name: bytes) -> tuple[int, str]:
        """Return what a name stands for (0: nothing), and who said so."""
        dentry = self._dentry(parent, name)
        if dentry is not None:
            return dentry.ino, "dentry"
        known = self._dentries.get((parent, name))
        if known is not None and known.ino and known.epoch >= self._epoch:
            ino, source = await self._ask_lookup(parent, name, known)
            if ino == known.ino:
                return ino, source
            if self._dentries.get((parent, name)) is known:
                del self._dentries[parent, name]
        async with self.inode(parent).lock.shared():
            return await self._lookup_locked(parent, name)

    async def _lookup_locked(self, parent: int, name: bytes) -> tuple[int, str]:
        dentry = self._dentry(parent, name)
        if dentry is not None:
            return dentry.ino, "dentry"
        return await self._ask_lookup(parent, name, None)

    async def _ask_lookup(self, parent: int, name: bytes, revalidated: Dentry | None) -> tuple[int, str]:
        epoch, version = self._epoch, self._version
        answer = self._maps.answer_lookup(parent, name) if self._maps is not None else None
        if answer is not None:
            await self._worker.lag()
            ino = answer.attributes.ino if answer.attributes is not None else 0
            attributes, ttl_s, source = of_wire(answer.attributes, answer.ttl_s), answer.ttl_s, "bpf"
        else:
            entry = await self._worker.request("lookup", parent, name, CONTEXT, repeatable=True)
            ino, attributes, ttl_s, source = entry.st_ino, of_entry(entry), entry.entry_timeout, "worker"
        if ino:
            self._note(ino, attributes, version)
        if revalidated is None:
            self._dentries[parent, name] = Dentry(ino, self._expires(ttl_s), epoch)
        elif revalidated.ino == ino:
            revalidated.expires = self._expires(ttl_s)
        return ino, source

    async def getattr(self, ino: int) -> tuple[Inode, str]:
        """Return an inode whose attributes are valid now, and who said so."""
        inode = self.inode(ino)
        if self._valid(inode.expires):
            return inode, "attributes"
        version = self._version
        answer = self._maps.answer_getattr(ino) if self._maps is not None else None
        if answer is not None:
            await self._worker.lag()
            attributes, source = of_wire(answer.attributes, answer.ttl_s), "bpf"
        else:
            entry = await self._worker.request("getattr", ino, CONTEXT, repeatable=True)
            attributes, source = of_entry(entry), "worker"
        self._note(ino, attributes, version)
        # The system call answers with what the reply said, cached or not.
        uid, nlink, mode, size, atime_ns, _ = attributes
        return Inode(ino, uid=uid, nlink=nlink, mode=mode, size=size, atime_ns=atime_ns), source

    # Changes

    @contextlib.asynccontextmanager
    async def _changing(self, parent: int) -> AsyncIterator[None]:
        async with self.inode(parent).lock.exclusive():
            yield

    async def create(self, parent: int, name: bytes) -> tuple[int, int]:
        """O_CREAT | O_EXCL | O_RDWR: return inode and handle."""
        async with self._changing(parent):
            await self._must_be_absent(parent, name)
            epoch = self._epoch
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            info, entry = await self._change("create", parent, name, stat.S_IFREG | 0o644, flags, CONTEXT)
            self._made(parent, name, entry, epoch)
            self.inode(entry.st_ino).handles += 1
            return entry.st_ino, info.fh

    async def mkdir(self, parent: int, name: bytes) -> int:
        async with self._changing(parent):
            await self._must_be_absent(parent, name)
            epoch = self._epoch
            entry = await self._change("mkdir", parent, name, stat.S_IFDIR | 0o755, CONTEXT)
            self._made(parent, name, entry, epoch)
            return int(entry.st_ino)

    async def symlink(self, parent: int, name: bytes, target: bytes) -> int:
        async with self._changing(parent):
            await self._must_be_absent(parent, name)
            epoch = self._epoch
            entry = await self._change("symlink", parent, name, target, CONTEXT)
            self._made(parent, name, entry, epoch)
            return int(entry.st_ino)

    async def link(self, ino: int, parent: int, name: bytes) -> None:
        async with self._changing(parent):
            await self._must_be_absent(parent, name)
            epoch = self._epoch
            entry = await self._change("link", ino, parent, name, CONTEXT)
            self._made(parent, name, entry, epoch)

    def _made(self, parent: int, name: bytes, entry: EntryAttributes, epoch: int) -> None:
        self._note(entry.st_ino, of_entry(entry), None)
        self._dentries[parent, name] = Dentry(entry.st_ino, self._expires(entry.entry_timeout), epoch)
        self._drop_attributes(parent)

    async def _must_be_absent(self, parent: int, name: bytes) -> None:
        ino, _ = await self._lookup_locked(parent, name)
        if ino:
            raise FUSEError(errno.EEXIST)

    async def _must_be_present(self, parent: int, name: bytes) -> int:
        ino, _ = await self._lookup_locked(parent, name)
        if not ino:
            raise FUSEError(errno.ENOENT)
        return ino

    async def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        async with self._changing(parent):
            ino = await self._must_be_present(parent, name)
            try:
                await self._change("rmdir" if directory else "unlink", parent, name, CONTEXT)
            finally:
                self._dentries.pop((parent, name), None)
                self._drop_attributes(ino)
                self._drop_attributes(parent)
        if not self.inode(ino).handles and not any(each.ino == ino for each in self._dentries.values()):
            await self._worker.request("forget", [(ino, 1)], repeatable=True)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, exchange: bool = False
    ) -> bool:
        """Rename; False: it saw one inode under both names, one after the other, so there was nothing to do."""
        async with contextlib.AsyncExitStack() as stack:
            if parent != new_parent:
                await stack.enter_async_context(self._rename_lock)
            for each in sorted({parent, new_parent}):
                await stack.enter_async_context(self._changing(each))
            ino = await self._must_be_present(parent, name)
            other, _ = await self._lookup_locked(new_parent, new_name)
            if other == ino:
                return False
            if exchange and not other:
                raise FUSEError(errno.ENOENT)
            moved = self._dentries.get((parent, name))
            flags = pyfuse3.RENAME_EXCHANGE if exchange else 0
            try:
                await self._change("rename", parent, name, new_parent, new_name, flags, CONTEXT)
            except FUSEError:
                self._dentries.pop((parent, name), None)
                self._dentries.pop((new_parent, new_name), None)
                raise
            self._moved((parent, name), (new_parent, new_name), moved, ino, exchange=exchange)
            return True

    def _moved(
        self, old: tuple[int, bytes], new: tuple[int, bytes], moved: Dentry | None, ino: int, *, exchange: bool
    ) -> None:
        self._dentries.pop(old, None)
        replaced = self._dentries.pop(new, None)
        if moved is not None:
            self._dentries[new] = moved
        if exchange and replaced is not None:
            self._dentries[old] = replaced
        for each in (ino, old[0], new[0], replaced.ino if replaced is not None else 0):
            if each:
                self._drop_attributes(each)

    async def setattr(self, ino: int, **values: int) -> None:
        """chmod, chown, utimens and truncate: ``values`` are fields of pyfuse3's EntryAttributes without their st_."""
        inode = self.inode(ino)
        async with inode.lock.exclusive():
            attr, fields = setting(values)
            entry = await self._change("setattr", ino, attr, fields, None, CONTEXT)
            self._note(ino, of_entry(entry), None)
            if "size" in values:
                async with inode.page_lock:
                    inode.pages = None

    # Extended attributes

    async def getxattr(self, ino: int, name: bytes) -> tuple[bytes, str]:
        """Return a value, empty if there is none, and who said so."""
        if self._maps is not None and self._maps.answer_getxattr(ino):
            await self._worker.lag()
            return b"", "bpf"
        try:
            return bytes(await self._worker.request("getxattr", ino, name, CONTEXT, repeatable=True)), "worker"
        except FUSEError as error:
            if error.errno != errno.ENODATA:
                raise
            return b"", "worker"

    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        """Set a value; an empty one removes it."""
        async with self.inode(ino).lock.exclusive():
            if value:
                await self._change("setxattr", ino, name, value, CONTEXT)
            else:
                await self._change("removexattr", ino, name, CONTEXT)
            self._drop_attributes(ino)

    async def _change(self, operation: str, *args: Any) -> Any:
        return await self._worker.request(operation, *args, repeatable=False)

    # Files

    async def open(self, ino: int, *, writing: bool, truncate: bool = False, append: bool = False) -> int:
        """Return a handle; drops the pages unless they may be kept."""
        if append:
            return await self._open(ino, os.O_WRONLY | os.O_APPEND)
        if truncate:
            async with self.inode(ino).lock.exclusive():
                return await self._open(ino, os.O_WRONLY | os.O_TRUNC)
        return await self._open(ino, os.O_WRONLY if writing else os.O_RDONLY)

    async def _open(self, ino: int, flags: int) -> int:
        inode = self.inode(ino)
        if flags == os.O_RDONLY and self._maps is not None and self._maps.answer_open(ino):
            await self._worker.lag()
            inode.handles += 1
            return _SHARED_FH | ino
        truncate = bool(flags & os.O_TRUNC)
        info = await self._worker.request("open", ino, flags, CONTEXT, repeatable=not truncate)
        inode.handles += 1
        if truncate:
            self._bump(inode)
            inode.size = 0
            async with inode.page_lock:
                inode.pages = None
        if not info.keep_cache:
            async with inode.page_lock:
                inode.pages = None
        return int(info.fh)

    async def read(self, ino: int, fh: int) -> tuple[bytes, str]:
        """Return a file's content, and who gave it."""
        seen, source = await self.getattr(ino)
        inode = self.inode(ino)
        async with inode.page_lock:
            if inode.pages is not None:
                source = "pages"
            else:
                inode.pages, source = await self._read_pages(ino, fh)
            return inode.pages[: seen.size], source

    async def _read_pages(self, ino: int, fh: int) -> tuple[bytes, str]:
        data = self._maps.answer_content(ino) if self._maps is not None else None
        if data is not None:
            await self._worker.lag()
            return data, "bpf"
        return await self._worker.request("read", fh, 0, _READ, repeatable=True), "worker"

    async def readlink(self, ino: int) -> tuple[bytes, str]:
        """Return a symlink's target, and who gave it."""
        data = self._maps.answer_content(ino) if self._maps is not None else None
        if data is not None:
            await self._worker.lag()
            return data, "bpf"
        return bytes(await self._worker.request("readlink", ino, CONTEXT, repeatable=True)), "worker"

    async def write(self, ino: int, fh: int, data: bytes) -> None:
        """Write a file's content, which has always the same length."""
        inode = self.inode(ino)
        async with inode.lock.exclusive():
            async with inode.page_lock:
                if inode.pages is not None:
                    inode.pages = data
                await self._change("write", fh, 0, data)
            self._version += 1
            inode.version = self._version
            inode.size = max(inode.size, len(data))
            inode.expires = 0.0

    async def append(self, ino: int, fh: int, data: bytes) -> None:
        """Write with O_APPEND, to where this kernel believes that the file ends; the channel marks such a WRITE."""
        inode = self.inode(ino)
        async with inode.lock.exclusive():
            await self._change("write", fh | handles.APPENDS, inode.size, data)
            async with inode.page_lock:
                inode.pages = None
            self._bump(inode)
            inode.size += len(data)

    async def fsync(self, fh: int) -> None:
        """fsync through a writing handle."""
        await self._change("fsync", fh, False)

    async def fsyncdir(self, ino: int) -> None:
        """fsync of a directory."""
        await self._change("fsyncdir", _SHARED_FH | ino, False)

    async def close(self, ino: int, fh: int) -> None:
        """FLUSH and RELEASE; the error of the first is close's."""
        try:
            if not fh & _SHARED_FH:
                await self._change("flush", fh)
        finally:
            self.inode(ino).handles -= 1
            if fh & _SHARED_FH and self._maps is not None:
                self._maps.answer_release(ino)
            else:
                self._loop.spawn(current_node(), self._release(fh))

    async def _release(self, fh: int) -> None:
        with contextlib.suppress(FUSEError):
            await self._change("release", fh)

    async def readdir(self, ino: int) -> dict[bytes, int]:
        """Return a directory's entries."""
        listing = Listing()
        while not listing.ended:
            listing.ended = True
            await self._worker.request("readdir", _SHARED_FH | ino, listing.position, listing, repeatable=True)
        return {name: number for name, number in listing.entries.items() if name not in (b".", b"..")}


class Listing:
    """What stands for pyfuse3's ReaddirToken: a buffer with room for a few entries at once."""

    def __init__(self) -> None:
        self.entries: dict[bytes, int] = {}
        self.position = 0
        self.ended = False
        self._room = 0

    def reply(self, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
        self._room = 8 if self.ended else self._room
        self.ended = False
        if not self._room:
            return False
        self._room -= 1
        self.entries[name] = attr.st_ino
        self.position = next_id
        return True


#: uid, nlink, mode, size, atime in nanoseconds, and time-to-live.
Attributes = tuple[int, int, int, int, int, float]
CONTEXT: Final[Any] = SimpleNamespace(uid=0, gid=0, pid=1, umask=0o022)


def of_entry(entry: EntryAttributes) -> Attributes:
    return entry.st_uid, entry.st_nlink, entry.st_mode, entry.st_size, entry.st_atime_ns, entry.attr_timeout


def of_wire(attributes: Any, ttl_s: float) -> Attributes:
    if attributes is None:
        return 0, 0, 0, 0, 0, 0.0
    return attributes.uid, attributes.nlink, attributes.mode, attributes.size, attributes.atime_ns, ttl_s


def setting(values: dict[str, int]) -> tuple[EntryAttributes, Any]:
    """Return what pyfuse3 gives a setattr that changes these fields."""
    attr = EntryAttributes()
    for name, value in values.items():
        setattr(attr, f"st_{name}", value)
    changed = {name.removesuffix("_ns") for name in values}
    names = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
    return attr, SimpleNamespace(**{f"update_{name}": name in changed for name in names})


class Notifications:
    """A notifier thread of the channel: one notification after another."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[Callable[[], Awaitable[int]], Callable[[int], None]]] = asyncio.Queue()

    def send(self, action: Callable[[], Awaitable[int]], done: Callable[[int], None]) -> None:
        """Have something done after all before it; ``done`` is told the result."""
        self._queue.put_nowait((action, done))

    async def run(self) -> None:
        """Work until cancelled, in the kernel's node."""
        while True:
            action, done = await self._queue.get()
            done(await action())


def patched_readdir_reply(token: Any, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
    """What stands for :func:`pyfuse3.readdir_reply`."""
    return bool(token.reply(name, attr, next_id))
