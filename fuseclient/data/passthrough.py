"""Large files that the kernel reads by itself, from a file of the disk cache: FUSE passthrough.

The kernel's rule: an inode is open cached or in passthrough, never both; as long as it is open in passthrough, each
further open must be so, too, with the same backing. So an inode begins only when none of its handles is open, by the
count that the BPF program, this worker and those before it keep together, and ends when none is. Between, the inode is
*live*: it has a backing in the kernel, and opens for reading are answered with it, by the BPF program where the inode
lies in the maps.

- Opened for writing while nobody has it open, a live inode ends, and all is as without passthrough.
- Opened for writing while a reader has it open, it is opened with the same backing, and *direct*: its reads and writes
  come to the worker. Each write goes to the writer, as always, and into the backing file, where readers and mappings
  see it at once. Reads are answered from there. What somebody writes through a mapping lands in the backing file only;
  it is carried over to the writer when the file is flushed, synced or released, and in the end when nobody has it
  mapped to write any more.
- Changed by another client, or by an operation that has no bytes to be put into the backing file, its backing file is
  made equal to the new content before the lease is used on. Until then it is opened by the worker only, which waits.

A backing file has a second name, ``live/MOUNT/ID-INO`` below the volume's caches, by which the next worker of the mount
finds it while handles are open. If a backing file cannot be written (no space), reads of new handles come to the
worker; those who had it open before see what it was. That is logged.

Concurrency: what is done to one inode is done under its lock; what decides how an inode is opened, and the count of the
handle that comes of it, have no await between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from fuseclient.data.backing_file import BLOCK, BackingFile
from fuseclient.data.disk_cache import DiskCache
from fuseclient.data.reader import Reader
from fuseclient.data.whole_files import LEAST_BYTES, WholeFiles
from fuseclient.data.writer import Writer
from fuseclient.levels import Level, reach
from fuseclient.worker.rpc import Refused
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache
    from fuseclient.worker.feeding import Feeder
    from fuseclient.worker.guard import Token

_log = logging.getLogger(__name__)

#: Inodes that are live at one time.
MOST: Final = 256
_STEP: Final = 4 * BLOCK
_ATTEMPTS: Final = 5
_TO_THE_END: Final = 1 << 62
#: How long is waited before it is looked again whether somebody has a file mapped to write, in seconds.
_LOOK_S: Final = (0.01, 0.05, 0.25)
#: Failures to register a backing that no later one will be spared.
_HOPELESS: Final = (errno.EPERM, errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ELOOP)


class Kernel(Protocol):
    """What this needs of :class:`~fuseclient.worker.notifier.Notifier`. Both raise OSError."""

    async def open_backing(self, descriptor: int) -> int: ...
    async def close_backing(self, backing_id: int) -> None: ...


class Opening(NamedTuple):
    """How to answer an open: with a backing; ``direct``: reads and writes come to the worker all the same."""

    backing_id: int
    direct: bool


@dataclass(eq=False)
class _Live:
    ino: int
    id: int
    file: BackingFile
    #: The content it had when it was taken from the disk cache; ``None``: it is this mount's own now.
    layout: str | None
    version: int
    #: It is not what the file of the mount holds, and is to be made so.
    stale: bool = False
    #: How often it became so.
    changes: int = 0
    #: It could not be.
    broken: bool = False


class _Lock(asyncio.Lock):
    """Of an inode; it lives as long as somebody has it or waits for it."""

    users = 0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What passthrough works with."""

    disk: DiskCache
    whole: WholeFiles
    reader: Reader
    writer: Writer
    feeder: Feeder
    cache: Cache
    kernel: Kernel
    #: Of the mount, within the volume's caches.
    directory: Path


class Passthrough:
    """The live inodes. ``None`` for the surroundings: there is no passthrough, for the reason given."""

    def __init__(self, surroundings: Surroundings | None, reason: str = "") -> None:
        self._with = surroundings
        self._off = reason
        self._lives: OrderedDict[int, _Live] = OrderedDict()
        self._locks: dict[int, _Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._opens = self._direct_opens = self._busy = self._failed = 0
        self._refreshed = self._absorbed = 0

    async def start(self, *, inherits: bool) -> None:
        """Take over what an earlier worker of this mount has left open; without one, remove what is found."""
        if self._with is None:
            return
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.scandir(self._with.directory), key=lambda entry: entry.name):
                backing_id, _, ino = entry.name.partition("-")
                if inherits and backing_id.isdigit() and ino:
                    live = _Live(int(ino, 16), int(backing_id), BackingFile(Path(entry.path)), None, 0, stale=True)
                    self._lives[live.ino] = live
                    self._with.cache.set_backing(live.ino, 0)
                else:
                    os.unlink(entry.path)
        self._with.whole.spoilt = self._spoilt

    @property
    def is_stale(self) -> bool:
        """Whether there is anything to :meth:`refresh`."""
        return any(live.stale for live in self._lives.values())

    def has(self, ino: int) -> bool:
        """Say whether an inode is live."""
        return ino in self._lives

    # Opening and closing

    async def open(self, token: Token, attributes: wire.Attributes, *, writing: bool) -> Opening | None:
        """Say how an inode is to be opened; ``None``: as without passthrough. The handle is to be counted at once.

        The token is that of the attributes. An inode that is opened for writing must be open in the writer.
        """
        ino = attributes.ino
        if self._with is None or (attributes.size < LEAST_BYTES and ino not in self._lives):
            return None
        async with self._locked(ino):
            live = self._lives.get(ino)
            if live is not None and (writing or not await self._is_current(live, attributes)):
                live = None if await self._retire(live) else live
            if live is not None:
                return await self._join(live, writing=writing)
            if writing or self._with.writer.is_open(ino):
                return None
            return await self._begin(self._with, token, attributes)

    async def _is_current(self, live: _Live, attributes: wire.Attributes) -> bool:
        if live.layout is not None and not live.stale and live.version != attributes.version:
            assert self._with is not None
            live.stale = await self._with.whole.layout_digest(attributes) != live.layout
            live.version = attributes.version
        return not live.stale

    async def _join(self, live: _Live, *, writing: bool) -> Opening:
        """Open what is open already."""
        if live.stale:
            await self._refresh(live)
        if writing:
            await self._make_own(live)
            await self._run(live, live.file.measure)
        direct = writing or live.broken
        self._opens += 1
        self._direct_opens += direct
        return Opening(live.id, direct)

    async def _begin(self, parts: Surroundings, token: Token, attributes: wire.Attributes) -> Opening | None:
        ino = attributes.ino
        file = None if self._off else await parts.whole.current(attributes)
        if file is None:
            return None
        if parts.cache.is_open(ino) or not await self._make_room():
            self._busy += 1
            return None
        live = await self._register(parts, ino, file.name, file.layout, attributes.version)
        if live is None:
            return None
        self._lives[ino] = live
        changed = not parts.feeder.unchanged(token, ino) or parts.writer.is_open(ino)
        if changed or parts.cache.is_open(ino) or not parts.cache.set_backing(ino, live.id):
            await self._end(live)
            return None
        parts.feeder.inode(token, attributes)
        self._opens += 1
        return Opening(live.id, False)

    async def _register(self, parts: Surroundings, ino: int, name: str, layout: str, version: int) -> _Live | None:
        """Make a file of the disk cache a backing; ``None`` if that fails."""
        source = parts.disk.path(name)
        backing_id = None
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                backing_id = await parts.kernel.open_backing(descriptor)
            finally:
                os.close(descriptor)
            path = parts.directory / f"{backing_id}-{ino:x}"
            await parts.disk.run(_link, source, path)
        except OSError as error:
            self._failed += 1
            self._say_failure(error, register=backing_id is None)
            if backing_id is not None:
                await self._close_backing(backing_id)
            return None
        return _Live(ino, backing_id, BackingFile(path), layout, version)

    def _say_failure(self, error: OSError, *, register: bool) -> None:
        if register and error.errno in _HOPELESS:
            self._off = f"the kernel refuses a backing file: {error.strerror}"
            _log.warning("large files are read by the worker: %s", self._off)
        elif self._failed == 1:
            _log.warning("a large file is read by the worker, as its backing file cannot be made: %s", error)

    async def _make_room(self) -> bool:
        """Say whether one more can be live; the one that was begun first and is not open ends for it."""
        for live in list(self._lives.values()) if len(self._lives) >= MOST else ():
            if live.ino not in self._locks and await self._retire(live):
                break
        return len(self._lives) < MOST

    async def _retire(self, live: _Live) -> bool:
        """End an inode that is not open; False if it is."""
        assert self._with is not None
        self._with.cache.set_backing(live.ino, 0)
        self._with.feeder.drop_inode(live.ino)
        if self._with.cache.is_open(live.ino):
            self._with.cache.set_backing(live.ino, 0 if live.stale or live.broken else live.id)
            return False
        await self._end(live)
        return True

    async def _end(self, live: _Live) -> None:
        assert self._with is not None
        self._lives.pop(live.ino, None)
        await self._close_backing(live.id)
        with contextlib.suppress(OSError):
            await self._with.disk.run(os.unlink, live.file.path)
        self._with.cache.forget_backing(live.ino)

    async def _close_backing(self, backing_id: int) -> None:
        assert self._with is not None
        with contextlib.suppress(OSError):  # the mount is gone, and the backing with it
            await self._with.kernel.close_backing(backing_id)

    def may_evict(self, ino: int) -> bool:
        """Say whether the disk cache may give up an inode's file; if so, and it is live, it soon is no more."""
        if ino not in self._lives or self._with is None:
            return True
        if self._with.cache.is_open(ino):
            return False
        self._start(self._retire_unused(ino))
        return True

    def released(self, ino: int) -> None:
        """A handle was released: an inode whose backing file is its own, and of use to nobody then, ends."""
        live = self._lives.get(ino)
        if live is not None and live.layout is None and self._with is not None and not self._with.cache.is_open(ino):
            self._start(self._retire_unused(ino))

    async def _retire_unused(self, ino: int) -> None:
        async with self._locked(ino):
            live = self._lives.get(ino)
            if live is not None and self._with is not None and not self._with.writer.is_open(ino):
                await self._retire(live)

    # Reading and writing what is live

    async def read(self, ino: int, offset: int, length: int) -> bytes | None:
        """Return bytes for a handle that is direct; ``None``: they are to be read as without passthrough."""
        live = self._lives.get(ino)
        if live is None or live.stale or live.broken:
            return None
        reach(Level.DISK_CACHE)
        data: bytes | None = await self._run(live, live.file.read, offset, length)
        return data

    async def write(self, ino: int, offset: int, data: bytes) -> None:
        """Write, to the writer and where readers see it."""
        assert self._with is not None
        async with self._locked(ino):
            await self._with.writer.write(ino, offset, data)
            live = self._lives.get(ino)
            if live is not None:
                await self._make_own(live)
                await self._run(live, live.file.patch, offset, data)

    async def resized(self, ino: int, size: int) -> None:
        """A file was cut, or made longer."""
        if ino not in self._lives:
            return
        async with self._locked(ino):
            live = self._lives.get(ino)
            if live is not None and not await self._retire(live):
                await self._make_own(live)
                await self._run(live, live.file.resize, size)

    async def absorb(self, ino: int, *, last: bool = False) -> None:
        """Hand to the writer what somebody has written through a mapping; ``last``: look even if it does not show."""
        if ino not in self._lives or self._with is None or not self._with.writer.is_open(ino):
            return
        async with self._locked(ino):
            live = self._lives.get(ino)
            if live is None or live.layout is not None or live.broken:
                return
            foreign = await self._run(live, live.file.changed_by_others)
            if not foreign and not last:
                return
            await self._run(live, live.file.settle)
            differing = functools.partial(live.file.differing, changed_here=foreign)
            number = 0
            while found := await self._run(live, differing, number):
                await self._with.writer.write(ino, found[0] * BLOCK, found[1])
                self._absorbed += 1
                number = found[0] + 1

    async def absorb_all(self) -> None:
        """Do so with all that is live, before the end."""
        for ino in list(self._lives):
            await self.absorb(ino, last=True)

    def end_writing(self, ino: int, end: Callable[[], Any]) -> None:
        """A writing handle was released: have ``end`` called when nobody has the file mapped to write."""
        self._start(self._end_writing(ino, end))

    async def _end_writing(self, ino: int, end: Callable[[], Any]) -> None:
        for pause_s in itertools.chain(_LOOK_S, itertools.repeat(_LOOK_S[-1])):
            live = self._lives.get(ino)
            if live is None or not await self._run(live, live.file.is_written):
                break
            await asyncio.sleep(pause_s)
        await self.absorb(ino, last=True)
        await end()
        await self._retire_unused(ino)

    # Keeping it equal

    def changed_elsewhere(self, inos: Iterable[int] | None) -> None:
        """Others have changed these inodes, ``None``: any: :meth:`refresh` before what is live is used on."""
        for ino in list(self._lives) if inos is None else inos:
            live = self._lives.get(ino)
            if live is not None and self._with is not None:
                live.stale = True
                live.changes += 1
                self._with.cache.set_backing(ino, 0)

    async def changed_here(self, ino: int) -> None:
        """The content was changed through this mount, but not by :meth:`write` and :meth:`resized`."""
        if ino in self._lives:
            self.changed_elsewhere([ino])
            await self.refresh()

    async def refresh(self) -> None:
        """Make what is live equal to what the files of the mount hold. Raises Refused, Disconnected, StoreError.

        What changes meanwhile stays stale.
        """
        for ino in [ino for ino, live in self._lives.items() if live.stale]:
            async with self._locked(ino):
                live = self._lives.get(ino)
                if live is not None and live.stale and not await self._retire(live):
                    await self._refresh(live)

    async def _refresh(self, live: _Live) -> None:
        assert self._with is not None
        changes = live.changes
        try:
            await self._copy(self._with, live)
        except Refused as error:
            if error.code != wire.ErrorCode.NOT_FOUND:
                raise
        live.stale = live.changes != changes
        self._refreshed += 1
        if not live.broken and not live.stale:
            self._with.cache.set_backing(live.ino, live.id)
            self._with.feeder.drop_inode(live.ino)

    async def _copy(self, parts: Surroundings, live: _Live) -> None:
        """Write the content to the backing file where it differs, until it is one version's."""
        for _ in range(_ATTEMPTS):
            await parts.writer.before_read(live.ino, 0, _TO_THE_END)
            attributes = (await parts.reader.read(live.ino, 0, 1)).attributes
            if live.layout is not None and await parts.whole.layout_digest(attributes) == live.layout:
                live.version = attributes.version
                return
            await self._make_own(live)
            for offset in range(0, attributes.size, _STEP):
                reading = await parts.reader.read(live.ino, offset, _STEP)
                await self._run(live, live.file.replace, offset, reading.data)
            await self._run(live, live.file.resize, attributes.size)
            if (await parts.reader.read(live.ino, 0, 1)).attributes.version == attributes.version:
                if parts.writer.is_open(live.ino):
                    await self._run(live, live.file.measure)
                return

    async def _make_own(self, live: _Live) -> None:
        """Before the first change: the disk cache gives the file up, and this mount's name for it remains."""
        if live.layout is None:
            return
        assert self._with is not None
        live.layout = None
        await self._with.whole.forget(live.ino)

    async def _run(self, live: _Live, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do something to a backing file. One that fails is used no more: reads of new handles come to the worker."""
        assert self._with is not None
        try:
            return await self._with.disk.run(work, *arguments)
        except OSError as error:
            if not live.broken:
                _log.error(
                    "the backing file %s of inode %d cannot be kept right, so those who have it open may see what it "
                    "was: %s", live.file.path, live.ino, error.strerror or error,
                )  # fmt: skip
            live.broken = True
            self._with.cache.set_backing(live.ino, 0)
            self._with.feeder.drop_inode(live.ino)
            return None

    async def _spoilt(self, ino: int) -> None:
        """A file of the disk cache that is live was found damaged: it is no more in the cache, and to be mended."""
        live = self._lives.get(ino)
        if live is not None:
            live.layout = None
            await self.changed_here(ino)

    # The rest

    def figures(self) -> dict[str, Any]:
        """Return what ``stats`` shows. ``opens`` are those that the worker answered."""
        return {
            "state": f"off: {self._off}" if self._off else "on",
            "live": len(self._lives),
            "opens": self._opens,
            "direct_opens": self._direct_opens,
            "busy": self._busy,
            "failed": self._failed,
            "refreshed": self._refreshed,
            "absorbed_blocks": self._absorbed,
        }

    async def close(self) -> None:
        """End what is not open; what is stays for the next worker."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._with is None:
            return
        for live in list(self._lives.values()):
            await self._retire(live)
        with contextlib.suppress(OSError):
            self._with.directory.rmdir()
            self._with.directory.parent.rmdir()

    @contextlib.asynccontextmanager
    async def _locked(self, ino: int) -> AsyncIterator[None]:
        lock = self._locks.setdefault(ino, _Lock())
        lock.users += 1
        try:
            async with lock:
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[ino]

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    os.link(source, path)
