"""Files that this machine keeps of a volume, in a directory of its own: how much, in which order they go, and faults.

What is in a file and whether it is whole is its reader's to know, by checksums; nothing here is synced, and a file that
a crash has cut short is found damaged like any other. A file appears under its name when it is written, and is never
changed after. The names are known from the directory, which is listed in the background: until that is done, a name
that is not known is tried.

Each mount has a place of its own, ``ROOT/0``, ``ROOT/1`` and so on: the first whose lock nobody holds, so that it finds
again what it, or another mount of the volume that has ended, has left. Least recently used files go first; there are
never more bytes than the limit says, nor so many that the file system would be nearly full. When writing fails all the
same, nothing is kept for some seconds, which is said once; reads go on.

Concurrency: the index belongs to the event loop, files are read and written in threads. Descriptors that are kept
open are used on the loop only, where they are closed, and only for what the page cache holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Mounts of one volume on this machine that can each have a place.
PLACES: Final = 64
#: What is kept free of the file system: this part of it, but no more than so many bytes.
_SPARE_SHARE: Final = 20
_SPARE_BYTES: Final = 1 << 30
#: How long nothing is written after a failure.
PAUSE_S: Final = 10.0
_THREADS: Final = 4
_DESCRIPTORS: Final = 256
_UNFINISHED: Final = ".new"
_LOCK: Final = "lock"

Buffer = bytes | bytearray | memoryview


class DiskCache:
    """The cached files of one mount. ``limit_bytes``: of all files. Raises OSError if there can be no directory."""

    def __init__(self, root: Path, limit_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory, self._lock = _take_place(root)
        self.limit_bytes = limit_bytes
        self._clock = clock
        #: Name to bytes, the least recently used first.
        self._entries: OrderedDict[str, int] = OrderedDict()
        self._indexed = False
        self._bytes = 0
        self._arriving = 0
        self._paused_until = 0.0
        self._failing = False
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk-cache")
        self._indexing: asyncio.Task[None] | None = None
        #: Asked before a file is evicted; False keeps it.
        self.may_evict: Callable[[str], bool] = lambda name: True
        self.evictions = self.damaged = self.failures = 0

    def start(self) -> None:
        """List the directory in the background."""
        self._indexing = asyncio.create_task(self._index(), name="disk cache index")

    async def indexed(self) -> None:
        """Return when the directory has been listed."""
        if self._indexing is not None:
            await asyncio.wait({self._indexing})

    @property
    def bytes(self) -> int:
        """Of all files that are known."""
        return self._bytes

    def path(self, name: str) -> Path:
        """Return where a file is, or would be."""
        return self.directory / name

    def names(self, prefix: str) -> list[str]:
        """Return the names of files that are known."""
        return [name for name in self._entries if name.startswith(prefix)]

    def may_have(self, name: str) -> bool:
        """Say whether a file may be there. False is certain."""
        return name in self._entries or not self._indexed

    def has(self, name: str) -> bool:
        """Say whether a file is known to be there."""
        return name in self._entries

    async def read(self, name: str, start: int, length: int) -> memoryview | None:
        """Return bytes of a file, fewer at its end; ``None`` if it is not there or cannot be read."""
        if not self.may_have(name):
            return None
        data = self._read_at_once(name, start, length)
        if data is None:
            try:
                descriptor, data = await self.run(_read, self.path(name), start, length)
            except OSError as error:
                await self._unreadable(name, error)
                return None
            self._keep_open(name, descriptor)
        self.touch(name)
        return data

    async def put(self, name: str, data: Buffer) -> bool:
        """Write a file, unless there is no room or it cannot be written; say whether it is there."""
        if name in self._entries:
            return True
        if not await self.reserve(len(data)):
            return False
        try:
            await self.run(_write, self.path(name), data)
        except OSError as error:
            self.failed(error)
            self.release(len(data))
            return False
        self.added(name, len(data))
        return True

    async def drop(self, name: str, *, damaged: bool = False) -> None:
        """Delete a file."""
        if damaged:
            self.damaged += 1
            _log.warning("the cached file %s is damaged and is not used", self.path(name))
        self._forget(name)
        await self.run(_unlink, [self.path(name)])

    def touch(self, name: str) -> None:
        """A file is used."""
        if name in self._entries:
            self._entries.move_to_end(name)

    # What others write there

    async def reserve(self, size: int) -> bool:
        """Make room for a file; after True, :meth:`added`, or :meth:`release` if it does not come about."""
        if self._clock() < self._paused_until:
            return False
        most = self.room_bytes()
        if size > most:
            return False
        gone = []
        for name in list(self._entries):
            if self._bytes + self._arriving + size <= most:
                break
            if self.may_evict(name):
                self._forget(name)
                gone.append(self.path(name))
        self.evictions += len(gone)
        fits = self._bytes + self._arriving + size <= most
        self._arriving += size if fits else 0
        if gone:
            await self.run(_unlink, gone)
        return fits

    def added(self, name: str, size: int) -> None:
        """A file for which room was made is there."""
        self._arriving -= size
        self._bytes += size - self._entries.pop(name, 0)
        self._entries[name] = size
        self._failing = False

    def release(self, size: int) -> None:
        """Room is not needed."""
        self._arriving -= size

    def failed(self, error: OSError) -> None:
        """Writing a file failed: nothing is kept for a while."""
        self.failures += 1
        self._paused_until = self._clock() + PAUSE_S
        if not self._failing:
            _log.warning("nothing is kept in the cache %s for now: %s", self.directory, error.strerror or error)
        self._failing = True

    def room_bytes(self) -> int:
        """Return how many bytes all files may have together: the limit, or what the file system has to spare."""
        status = os.statvfs(self.directory)
        spare = min(status.f_blocks * status.f_frsize // _SPARE_SHARE, _SPARE_BYTES)
        return min(self.limit_bytes, self._bytes + status.f_bavail * status.f_frsize - spare)

    async def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do blocking work in a thread of the cache."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def figures(self) -> dict[str, Any]:
        """Return what ``stats`` shows of it."""
        return {
            "files": len(self._entries),
            "bytes": self._bytes,
            "limit_bytes": self.limit_bytes,
            "evictions": self.evictions,
            "damaged": self.damaged,
            "failures": self.failures,
            "writing": self._clock() >= self._paused_until,
        }

    async def close(self) -> None:
        """Give the place back; the files stay, and a place without files goes."""
        if self._indexing is not None:
            self._indexing.cancel()
            await asyncio.wait({self._indexing})
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        if self._indexed and not self._entries:
            _give_up_place(self.directory)
        for descriptor in (*self._descriptors.values(), self._lock):
            os.close(descriptor)
        self._descriptors.clear()

    def _forget(self, name: str) -> None:
        self._bytes -= self._entries.pop(name, 0)
        descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    async def _unreadable(self, name: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            self.failures += 1
            _log.warning("the cached file %s cannot be read: %s", self.path(name), error.strerror)
        self._forget(name)

    def _keep_open(self, name: str, descriptor: int) -> None:
        if name in self._descriptors or name not in self._entries:
            os.close(descriptor)
            return
        self._descriptors[name] = descriptor
        if len(self._descriptors) > _DESCRIPTORS:
            os.close(self._descriptors.popitem(last=False)[1])

    def _read_at_once(self, name: str, start: int, length: int) -> memoryview | None:
        """Read from the page cache; ``None`` if that does not have it all."""
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            return None
        buffer = bytearray(length)
        try:
            count = os.preadv(descriptor, [buffer], start, os.RWF_NOWAIT)
        except OSError:
            return None
        return memoryview(buffer) if count == length else None

    async def _index(self) -> None:
        try:
            found = await self.run(_list, self.directory)
        except OSError as error:
            _log.warning("the cache %s cannot be listed: %s", self.directory, error.strerror)
            found = []
        for name, size in reversed(found):
            if name not in self._entries:
                self._entries[name] = size
                self._entries.move_to_end(name, last=False)
                self._bytes += size
        self._indexed = True
        if await self.reserve(0):
            self.release(0)


def _take_place(root: Path) -> tuple[Path, int]:
    """Make and lock a directory; return it and the lock's descriptor."""
    for number in range(PLACES):
        directory = root / str(number)
        descriptor = _lock(directory)
        if descriptor is not None:
            return directory, descriptor
    raise OSError(f"{PLACES} mounts use {root} already")


def _lock(directory: Path) -> int | None:
    """Make a directory and lock it; return the lock's descriptor, ``None`` if somebody else has it."""
    while True:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # given up by its last owner meanwhile
            descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(directory / _LOCK)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            os.close(descriptor)


def _give_up_place(directory: Path) -> None:
    """Remove a place without files, and the root if it was the last; its lock is held."""
    for parent, _, files in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):
            if Path(parent) == directory and files == [_LOCK]:
                Path(parent, _LOCK).unlink()
            Path(parent).rmdir()
    with contextlib.suppress(OSError):
        directory.parent.rmdir()


def _list(directory: Path) -> list[tuple[str, int]]:
    """Return (name, bytes) of all files, the least recently used first; delete what was never finished."""
    found = []
    for parent, _, files in os.walk(directory):
        for file in files:
            path = Path(parent, file)
            name = str(path.relative_to(directory))
            if file.endswith(_UNFINISHED):
                _unlink([path])
            elif name != _LOCK:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((max(status.st_atime, status.st_mtime), name, status.st_size))
    return [(name, size) for _, name, size in sorted(found)]


def _read(path: Path, start: int, length: int) -> tuple[int, memoryview]:
    """Return a descriptor of the file, and bytes of it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return descriptor, memoryview(os.pread(descriptor, length, start))
    except BaseException:
        os.close(descriptor)
        raise


def _write(path: Path, data: Buffer) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + _UNFINISHED)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.rename(unfinished, path)
    except BaseException:
        _unlink([unfinished])
        raise
    finally:
        os.close(descriptor)


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
