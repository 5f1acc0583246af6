"""Objects as files of a local directory. An object is durable when :meth:`LocalBackend.create` has returned.

That takes an fsync of the file, of its directory, and of each directory that was made for it, done in threads of this
module. Many objects are made at once, and their directory is the same one: whoever syncs it does so for all that were
linked before. An object appears under its name only when it is whole, and never in another's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from fuseclient.data.object_format import Buffer
from fuseclient.data.object_names import OWNER, UNFINISHED, Listed, listed, object_name
from fuseclient.data.store_errors import NoSpace, ObjectExists, ObjectMissing, StoreError

_T = TypeVar("_T")

#: Directories known to be durable are remembered up to this many.
_KNOWN_DIRECTORIES: Final = 4096
_LISTED_AT_ONCE: Final = 1024
#: Bytes of an object from which on it is not left in the page cache.
_LARGE: Final = 1024 * 1024


class LocalBackend:
    """A directory, which is made when it does not exist; raises OSError for that."""

    def __init__(self, root: Path, threads: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._writers = ThreadPoolExecutor(threads, thread_name_prefix="objects")
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="objects-read")
        self._durable: set[Path] = {root}
        self._syncs: dict[Path, _Sync] = {}
        self._lock = threading.Lock()

    def where(self, slice_id: int) -> str:
        """Return an object's place, for messages."""
        return str(self._root / object_name(slice_id))

    async def create(self, slice_id: int, parts: Callable[[], Sequence[Buffer]]) -> None:
        """Store an object whose bytes ``parts`` gives, in a thread. Raises ObjectExists, NoSpace, StoreError."""
        await self._run(self._writers, lambda: self._create(object_name(slice_id), parts()))

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        """Return bytes of an object, fewer at its end. Raises ObjectMissing, StoreError."""
        path = self._root / object_name(slice_id)
        return await self._run(self._readers, lambda: memoryview(_read(path, start, length)))

    async def delete(self, slice_ids: Iterable[int]) -> None:
        """Delete objects, unfinished ones included; those that are not there are passed over. Raises StoreError."""
        names = [object_name(each) for each in slice_ids]
        await self._run(self._writers, lambda: self._delete(names))

    async def list(self) -> AsyncIterator[Sequence[Listed]]:
        """Yield all objects by rising id, some at a time. Raises StoreError."""
        walk = self._walk()
        while page := await self._run(self._readers, lambda: _take(walk, _LISTED_AT_ONCE)):
            yield page

    async def owner(self) -> bytes:
        """Return what :meth:`set_owner` was given last. Raises ObjectMissing, StoreError."""
        return await self._run(self._readers, (self._root / OWNER).read_bytes)

    async def set_owner(self, text: bytes) -> None:
        """Keep a short text beside the objects, durably. Raises NoSpace, StoreError."""
        await self._run(self._writers, lambda: self._set_owner(text))

    def close(self) -> None:
        """End the threads after what they have begun."""
        self._writers.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except FileExistsError as error:
            raise ObjectExists(str(error)) from error
        except FileNotFoundError as error:
            raise ObjectMissing("it is missing") from error
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise kind(error.strerror or str(error)) from error

    def _create(self, name: str, parts: Sequence[Buffer]) -> None:
        path = self._root / name
        self._make_directory(path.parent)
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            _write_durably(unfinished, parts)
            os.link(unfinished, path)
        except FileNotFoundError:
            self._forget_directories()
            raise OSError(errno.EIO, "the store's directory is gone") from None
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
        self._sync_entry(path.parent)

    def _make_directory(self, directory: Path) -> None:
        if directory in self._durable:
            return
        if not self._root.is_dir():
            raise OSError(errno.EIO, "the store's directory is gone")
        self._make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)
        with self._lock:
            if len(self._durable) >= _KNOWN_DIRECTORIES:
                self._durable = {self._root}
            self._durable.add(directory)

    def _set_owner(self, text: bytes) -> None:
        unfinished = self._root / (OWNER + UNFINISHED)
        _write_durably(unfinished, [text])
        unfinished.replace(self._root / OWNER)
        _sync_directory(self._root)

    def _forget_directories(self) -> None:
        with self._lock:
            self._durable = {self._root}

    def _sync_entry(self, directory: Path) -> None:
        """Return when an entry that was just made in a directory is durable."""
        with self._lock:
            if len(self._syncs) >= _KNOWN_DIRECTORIES:
                self._syncs = {}
            sync = self._syncs.setdefault(directory, _Sync(directory))
        sync.sync()

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            (self._root / name).unlink(missing_ok=True)
            (self._root / (name + UNFINISHED)).unlink(missing_ok=True)

    def _walk(self) -> Iterator[Listed]:
        for high in _subdirectories(self._root):
            for low in _subdirectories(Path(high.path)):
                entries = sorted(os.scandir(low), key=lambda entry: entry.name)
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # finished or deleted meanwhile
                    found = listed(f"{high.name}/{low.name}/{entry.name}", status.st_size, status.st_mtime)
                    if found is not None:
                        yield found


class _Sync:
    """The syncing of one directory: those who come while one is under way share the next."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._done = 0

    def sync(self) -> None:
        """Return when all that was done in the directory before this call is durable."""
        mine = next(self._tickets)
        with self._lock:
            if self._done >= mine:
                return
            latest = next(self._tickets)
            _sync_directory(self._directory)
            self._done = latest


def _take(walk: Iterator[Listed], count: int) -> list[Listed]:
    return [each for each, _ in zip(walk, range(count), strict=False)]


def _subdirectories(directory: Path) -> list[os.DirEntry[str]]:
    return sorted((entry for entry in os.scandir(directory) if entry.is_dir()), key=lambda entry: entry.name)


def _read(path: Path, start: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, length, start)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, parts: Sequence[Buffer]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        if sum(len(part) for part in parts) >= _LARGE:
            # The mount that writes keeps these bytes in its own pages; a second copy takes as much memory, and time.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
