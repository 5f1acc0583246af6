"""The store of immutable objects, one for each slice, named by the slice's id.

Owns the naming, and durability: when :meth:`ObjectStore.put` has returned, the object survives a power failure. In a
local directory that takes an fsync of the file, of its directory, and of each directory that was made for it, done in
threads of this module; an object appears under its name only when it is whole. Ids are handed out by the metaserver
in rising order and never twice, so neighbours share a directory and nothing is ever overwritten.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import obstore
import obstore.exceptions
import obstore.store

#: The largest object, in bytes.
MAX_OBJECT: Final = 4 * 1024 * 1024
_THREADS: Final = 4
#: Directories known to be durable are remembered up to this many.
_KNOWN_DIRECTORIES: Final = 4096


class StoreError(Exception):
    """The object store failed, or holds less than it should."""


class ObjectMissing(StoreError):
    """There is no object of that id."""


class NoSpace(StoreError):
    """The store is full."""


def object_name(slice_id: int) -> str:
    """Return the path of a slice's object: 1024 to a directory, 1024 of those to a directory above."""
    return f"{slice_id >> 20:05x}/{slice_id >> 10 & 0x3FF:03x}/{slice_id:012x}"


class ObjectStore:
    """Objects in one local directory, which is made when it does not exist."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._reader = obstore.store.LocalStore(prefix=root)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")
        self._durable: set[Path] = {root}

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview) -> None:
        """Store an object; it is durable on return. ``data`` must not change meanwhile.

        Raises :exc:`StoreError`, or :exc:`NoSpace`.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._put, object_name(slice_id), data)
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise kind(f"object {slice_id} cannot be stored: {error}") from error

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        """Return ``length`` bytes of an object from byte ``start`` on.

        Raises :exc:`ObjectMissing`, or :exc:`StoreError` (an object shorter than that, too).
        """
        name = object_name(slice_id)
        try:
            data = memoryview(await obstore.get_range_async(self._reader, name, start=start, length=length))
        except (obstore.exceptions.NotFoundError, FileNotFoundError) as error:
            raise ObjectMissing(f"object {slice_id} is missing") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise StoreError(f"object {slice_id} cannot be read: {error}") from error
        if len(data) != length:
            raise StoreError(f"object {slice_id} ends at byte {start + len(data)}, before {start + length}")
        return data

    async def delete(self, slice_ids: Iterable[int]) -> None:
        """Delete objects; those that are not there are passed over. Raises :exc:`StoreError`."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._delete, [object_name(each) for each in slice_ids])
        except OSError as error:
            raise StoreError(f"objects cannot be deleted: {error}") from error

    def close(self) -> None:
        """End the threads after what they have begun."""
        self._threads.shutdown(wait=True)

    def _put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        path = self._root / name
        self._make_directory(path.parent)
        unfinished = path.with_suffix(".new")
        try:
            _write_durably(unfinished, data)
            os.rename(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)

    def _make_directory(self, directory: Path) -> None:
        if directory in self._durable:
            return
        self._make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)
        if len(self._durable) >= _KNOWN_DIRECTORIES:
            self._durable = {self._root}
        self._durable.add(directory)

    def _delete(self, names: list[str]) -> None:
        for name in names:
            (self._root / name).unlink(missing_ok=True)


def open_store(url: str) -> ObjectStore:
    """Return the store at a ``file:///directory`` URL; raise :exc:`StoreError` with one line for the user."""
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise StoreError(f"{url} is not a store this client knows; it must be file:///directory")
    try:
        return ObjectStore(Path(unquote(parts.path)))
    except OSError as error:
        raise StoreError(f"the store {url} cannot be opened: {error}") from error


def _write_durably(path: Path, data: bytes | bytearray | memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
