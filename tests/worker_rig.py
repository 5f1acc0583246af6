"""A worker without its process and without a mount: its operations are called directly, against a real metaserver.

The kernel is played by :class:`Maps`, which remembers what a BPF program would answer, and :class:`Kernel`, which
remembers notifications.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pyfuse3
import pytest
from served import VOLUME, Client, Metaserver, serving, until

from fuseclient.config import MapFds, MountOptions, WorkerConfig
from fuseclient.kernel_cache import Evicted, NoKernelCache, Room
from fuseclient.worker.mount import Mount
from fuseclient.worker.operations import Operations
from fuseclient.worker.rpc import Refused
from metaserver import wire

ROOT: Final = wire.ROOT_INO
ME: Final[Any] = SimpleNamespace(uid=0, gid=0, pid=1, umask=0o022)
INLINE_LIMIT: Final = 4096

_NO_FDS: Final = MapFds(
    control=-1,
    names=-1,
    inodes=-1,
    uses=-1,
    xattrs=-1,
    pages=-1,
    opens=-1,
    counters=-1,
    name_capacity=1 << 16,
    inode_capacity=1 << 16,
    page_count=1 << 16,
)


class Maps:
    """The BPF maps: what is in here is answered without the worker."""

    def __init__(self) -> None:
        self.names: dict[tuple[int, bytes], int] = {}
        #: Directories all of whose names are here.
        self.wholes: set[int] = set()
        self._losses: Counter[int] = Counter()
        self.inodes: dict[int, wire.Attributes] = {}
        #: Inodes of which it is known only that they have no xattrs.
        self.written: set[int] = set()
        self.data: dict[int, bytes] = {}
        self.listings: dict[int, bytes] = {}
        #: None: those who list them must be known.
        self.xattrs: dict[int, dict[bytes, bytes] | None] = {}
        self.listing_limit = 1 << 30
        self.opens: dict[int, int] = {}
        self.locks: dict[int, int] = {}
        self.backings: dict[int, int] = {}
        self.deadline_ns = 0
        self.epoch = 0
        self.statfs: dict[str, int] = {}
        self.evicted: list[tuple[int, set[int]]] = []

    def put(self, parent: int, entries: Sequence[wire.DirectoryEntry]) -> None:
        for entry in entries:
            self.put_name(parent, entry.name, entry.attributes.ino)
            self.put_inode(entry.attributes, None if entry.data is None else bytes(entry.data))

    def put_inode(self, attributes: wire.Attributes, data: bytes | None = None) -> None:
        if data is None and (old := self.inodes.get(attributes.ino)) is not None:
            same = (old.version, old.size) == (attributes.version, attributes.size)
            data = self.data.get(attributes.ino) if same else None
        self._drop_inode(attributes.ino)
        if not attributes.mode:
            if not attributes.flags & wire.InodeFlag.HAS_XATTRS:
                self.written.add(attributes.ino)
            return
        self.inodes[attributes.ino] = attributes
        if data is not None:
            self.data[attributes.ino] = data

    def put_name(self, parent: int, name: bytes, ino: int) -> None:
        self.names[parent, name] = ino

    def put_absent(self, parent: int, name: bytes) -> None:
        self.names[parent, name] = 0

    def drop_name(self, parent: int, name: bytes) -> None:
        self._lose(parent)
        self.names.pop((parent, name), None)

    def put_whole(self, directory: int, losses: int) -> bool:
        if losses == self._losses[directory]:
            self.wholes.add(directory)
        return losses == self._losses[directory]

    def losses(self, directory: int) -> int:
        return self._losses[directory]

    def _lose(self, directory: int) -> None:
        self.drop_whole(directory)
        self._losses[directory] += 1

    def drop_whole(self, directory: int) -> None:
        self.wholes.discard(directory)

    room = Room(1 << 20, 1 << 16)

    def evict(self, directory: int) -> None:
        """Give up the entries of a directory."""
        self._lose(directory)
        gone = [key for key in self.names if key[0] == directory]
        inodes = {self.names.pop(key) for key in gone} - {0}
        for ino in inodes:
            self.drop_inode(ino)
        self.evicted.append((directory, inodes))

    def missing(self, inodes: array[int]) -> array[int]:
        return array("Q", [ino for ino in inodes if ino not in self.inodes])

    def take_evicted(self) -> Evicted:
        told, self.evicted = self.evicted, []
        inodes = array("Q", [ino for _, inodes in told for ino in inodes])
        return Evicted(inodes, [directory for directory, _ in told if not self._has_entries(directory)], True)

    def is_used(self, directory: int) -> bool | None:
        return True if self._has_entries(directory) else None

    def _has_entries(self, directory: int) -> bool:
        return directory in self.wholes or any(parent == directory for parent, _ in self.names)

    def has_all(self, inodes: array[int], *, content: bool) -> bool:
        there = [self.inodes.get(each & (1 << 48) - 1) for each in inodes]
        return all(each and (not content or not 0 < each.size <= 65536 or each.ino in self.data) for each in there)

    def drop_inode(self, ino: int) -> None:
        self._drop_inode(ino)
        self.listings.pop(ino, None)

    def _drop_inode(self, ino: int) -> None:
        self.inodes.pop(ino, None)
        self.xattrs.pop(ino, None)
        self.written.discard(ino)
        self.data.pop(ino, None)

    def put_xattrs(self, ino: int, xattrs: Mapping[bytes, bytes], *, listed: bool) -> bool:
        if sum(map(len, xattrs.values())) > 400:
            return False
        self.xattrs[ino] = dict(xattrs) if listed else None
        return True

    def lacks_xattrs(self, ino: int) -> bool:
        return False

    def put_listing(self, ino: int, entries: bytes) -> bool:
        if ino in self.inodes:
            self.listings[ino] = entries
        return ino in self.inodes

    def drop_listing(self, ino: int) -> None:
        self.listings.pop(ino, None)

    def renew(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns

    def bump_epoch(self) -> None:
        self.epoch += 1
        for each in (self.names, self.inodes, self.data, self.written, self.listings, self.xattrs):
            each.clear()

    def put_statfs(self, **figures: int) -> None:
        self.statfs = figures

    def drop_statfs(self) -> None:
        self.statfs = {}

    def is_open(self, ino: int) -> bool:
        return self.opens.get(ino, 0) > 0

    def opened(self, ino: int) -> None:
        self.opens[ino] = self.opens.get(ino, 0) + 1

    def locked(self, ino: int) -> None:
        self.locks[ino] = self.locks.get(ino, 0) + 1

    def unlocked(self, ino: int) -> None:
        self.locks[ino] -= 1

    def released(self, ino: int) -> None:
        self.opens[ino] -= 1

    def set_backing(self, ino: int, backing_id: int) -> bool:
        self.backings[ino] = backing_id
        return True

    def forget_backing(self, ino: int) -> None:
        self.backings.pop(ino, None)

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Forgetful(Maps):
    """No maps, and what a mount keeps that has none."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = NoKernelCache()

    def put(self, parent: int, entries: Sequence[wire.DirectoryEntry]) -> None:
        self._kept.put(parent, entries)

    def put_inode(self, attributes: wire.Attributes, data: bytes | None = None) -> None:
        self._kept.put_inode(attributes, data)

    def drop_inode(self, ino: int) -> None:
        self._kept.drop_inode(ino)

    def bump_epoch(self) -> None:
        self._kept.bump_epoch()
        super().bump_epoch()

    def lacks_xattrs(self, ino: int) -> bool:
        return self._kept.lacks_xattrs(ino)

    def put_name(self, parent: int, name: bytes, ino: int) -> None:
        pass

    def put_absent(self, parent: int, name: bytes) -> None:
        pass

    def put_whole(self, directory: int, losses: int) -> bool:
        return False


class Kernel:
    """Notifications, in order. They wait while ``gate`` is an event that is not set."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.has_epochs = True
        self.gate: Any = None
        #: The files of backing ids that are given out.
        self.backings: dict[int, str] = {}

    async def _pass(self, *what: Any) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.log.append(what)

    async def invalidate_inode(self, ino: int) -> bool:
        await self._pass("inode", ino)
        return True

    async def invalidate_written(self, ino: int) -> bool:
        await self._pass("written", ino)
        return True

    async def invalidate_unused(self, inos: array[int]) -> None:
        await self._pass("unused", sorted(inos))

    async def invalidate_attributes(self, ino: int) -> bool:
        await self._pass("attributes", ino)
        return True

    async def invalidate_entry(self, parent: int, name: bytes) -> None:
        await self._pass("entry", parent, name)

    async def increment_epoch(self) -> bool:
        await self._pass("epoch")
        return self.has_epochs

    async def open_backing(self, descriptor: int) -> int:
        self.backings[len(self.log) + 1] = os.readlink(f"/proc/self/fd/{descriptor}")
        await self._pass("open backing")
        return len(self.log)

    async def close_backing(self, backing_id: int) -> None:
        await self._pass("close backing", backing_id)
        del self.backings[backing_id]


class Rig:
    """A mount, and a second client of its volume to change things behind its back."""

    def __init__(self, metaserver: Metaserver, other: Client, mount: Mount, maps: Maps, kernel: Kernel) -> None:
        self.metaserver = metaserver
        self.other = other
        self.mount = mount
        self.maps = maps
        self.kernel = kernel

    @property
    def remembers(self) -> bool:
        return not isinstance(self.maps, Forgetful)

    @property
    def ops(self) -> Operations:
        return self.mount.operations

    @property
    def session(self) -> Any:
        return self.mount._session

    async def renew(self) -> None:
        """Have the session renew now, and the kernel drop what is to be dropped."""
        connection = self.session._connection
        await self.session._renew(connection)
        assert self.mount._changes is not None
        await self.mount._changes.settle()

    # Shorter forms

    async def create(self, name: bytes, data: bytes = b"", parent: int = ROOT, mode: int = 0o644) -> int:
        """Make a file with content, and close it; return its inode."""
        info, entry = await self.ops.create(parent, name, stat.S_IFREG | mode, 0o102, ME)
        if data:
            await self.ops.write(info.fh, 0, data)
        await self.close(info.fh)
        return entry.st_ino

    async def close(self, fh: int) -> None:
        await self.ops.flush(fh)
        await self.ops.release(fh)

    async def ino(self, name: bytes, parent: int = ROOT) -> int:
        """Look a name up; 0: it is absent."""
        return (await self.ops.lookup(parent, name, ME)).st_ino

    async def content(self, ino: int) -> bytes:
        info = await self.ops.open(ino, 0, ME)
        size = (await self.ops.getattr(ino, ME)).st_size
        data = await self.ops.read(info.fh, 0, size + 10)
        await self.close(info.fh)
        return data

    async def set_attributes(self, ino: int, **values: int) -> pyfuse3.EntryAttributes:
        """Call setattr with attributes by their names in struct stat, without the prefix (size, mode, mtime_ns)."""
        attr = pyfuse3.EntryAttributes()
        names = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
        fields: Any = SimpleNamespace(**{f"update_{name}": False for name in names})
        for name, value in values.items():
            setattr(attr, f"st_{name}", value)
            setattr(fields, f"update_{name.removesuffix('_ns')}", True)
        return await self.ops.setattr(ino, attr, fields, None, ME)

    async def listing(self, ino: int = ROOT, at_once: int = 1000) -> dict[bytes, int]:
        """List a directory through READDIR replies of ``at_once`` entries each."""
        fh = await self.ops.opendir(ino, ME)
        found: list[tuple[bytes, int]] = []
        start = 0
        while entries := await self.readdir(fh, start, at_once):
            found += [(name, entry.st_ino) for name, entry, _ in entries]
            start = entries[-1][2]
        await self.ops.releasedir(fh)
        assert len({name for name, _ in found}) == len(found), "an entry was listed twice"
        assert [name for name, _ in found[:2]] == [b".", b".."]
        return dict(found[2:])

    async def readdir(self, fh: int, start: int, at_once: int) -> list[tuple[bytes, pyfuse3.EntryAttributes, int]]:
        token = Token(at_once)
        await self.ops.readdir(fh, start, token)  # type: ignore[arg-type]
        return token.entries

    async def assert_maps_are_right(self) -> None:
        """Everything in the maps is what the metaserver says."""
        for (parent, name), ino in self.maps.names.items():
            try:
                found = await self.other.connection.call(wire.Lookup(parent, name), wire.Found)
                actual = found.attributes.ino
            except Exception:
                actual = 0
            assert ino == actual, f"{name!r} in {parent} is {ino} in the maps and {actual} in fact"
        for ino, attributes in self.maps.inodes.items():
            assert attributes == await self.other.attributes(ino)
        for ino in self.maps.written:
            with contextlib.suppress(Refused):
                assert not (await self.other.attributes(ino)).flags & wire.InodeFlag.HAS_XATTRS
        for ino, entries in self.maps.listings.items():
            request = wire.FetchDirectory(ino, 0, wire.MAX_FETCH, 0, 0)
            fetched = self.other.connection.stream(request)
            listed = [(entry.name, entry.attributes.ino) async for page in fetched for entry in page.entries]
            assert dirents(entries)[2:] == listed
        for ino, data in self.maps.data.items():
            if stat.S_ISREG(self.maps.inodes[ino].mode):
                content = await self.other.connection.call(wire.GetContent(ino, 0, wire.MAX_INLINE), wire.Content)
                assert content.inline is None or content.inline.ljust(content.attributes.size, b"\0") == data
                assert len(data) == content.attributes.size


def dirents(entries: bytes) -> list[tuple[bytes, int]]:
    """Take a listing apart: names and inodes."""
    found, at = [], 0
    while at < len(entries):
        ino, _, length, _ = struct.unpack_from("=QQII", entries, at)
        found.append((entries[at + 24 : at + 24 + length], ino))
        at += -(-(24 + length) // 8) * 8
    return found


class Token:
    """What stands for pyfuse3's ReaddirToken: a buffer with room for some entries."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.entries: list[tuple[bytes, pyfuse3.EntryAttributes, int]] = []

    def reply(self, name: bytes, attr: pyfuse3.EntryAttributes, next_id: int) -> bool:
        if len(self.entries) >= self.room:
            return False
        self.entries.append((name, attr, next_id))
        return True


def spied(rig: Rig) -> list[wire.Request]:
    """Return the list that every request to the metaserver goes into from now on, but for what is told in passing."""
    log: list[wire.Request] = []
    session = rig.session
    call, stream = session.call, session.stream

    async def spy(request: wire.Request, reply_type: Any) -> Any:
        if not isinstance(request, wire.ClosedForWriting):
            log.append(request)
        return await call(request, reply_type)

    def spy_stream(request: wire.FetchDirectory) -> Any:
        log.append(request)
        return stream(request)

    session.call, session.stream = spy, spy_stream
    return log


@contextlib.asynccontextmanager
async def rigged(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, maps: bool = True, lease_s: float = 30.0, **more: Any
) -> AsyncIterator[Rig]:
    """A metaserver with a volume, another client of it, and a worker's mount."""
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda token, name, attr, next_id: token.reply(name, attr, next_id))
    async with serving(directory, lease_s=lease_s) as metaserver:
        connection = await metaserver.connect()
        await connection.call(wire.CreateVolume(VOLUME, f"file://{directory}/blocks", INLINE_LIMIT), wire.Done)
        other = Client(connection)
        await other.open(VOLUME)
        played, kernel = Maps() if maps else Forgetful(), Kernel()
        mount = Mount(config(metaserver.address, maps=maps, **more), played, kernel)
        await mount.open()
        try:
            yield Rig(metaserver, other, mount, played, kernel)
        finally:
            await mount.close()
            connection.abort()


def config(address: str, *, maps: bool = True, generation: int = 1, session: str | None = None) -> WorkerConfig:
    return WorkerConfig(
        options=MountOptions(url="file:///volume", mountpoint="/mnt", cache_bytes=0),
        address=address,
        volume=VOLUME,
        fuse_fd=-1,
        extra_fd=-1,
        notify_fd=-1,
        status_fd=-1,
        generation=generation,
        maps=_NO_FDS if maps else None,
        session=session,
    )


@contextlib.contextmanager
def fails(number: int) -> Any:
    """The operation answers this errno."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        yield
    assert caught.value.errno == number, f"{errno.errorcode[caught.value.errno]}, not {errno.errorcode[number]}"


def watched(rig: Rig, quiet: tuple[type, ...]) -> list[wire.Request]:
    """Return the list that each request to the metaserver goes into from now on, but for those of ``quiet`` kinds."""
    log: list[wire.Request] = []
    call = rig.session.call

    async def spy(request: wire.Request, reply_type: Any) -> Any:
        if not isinstance(request, quiet):
            log.append(request)
        return await call(request, reply_type)

    rig.session.call = spy
    return log


async def joined(rig: Rig) -> None:
    """Another client is let in."""
    acknowledged: list[object] = []
    assert rig.mount._changes is not None
    rig.session.alone = False
    rig.mount._changes.broken(wire.Break(1, [], [], joined=True), acknowledged.append)
    await until(lambda: acknowledged)
