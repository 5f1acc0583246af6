"""Large files that lie whole in the disk cache, byte for byte, so that the kernel can read them there by itself.

A file is put together in the background when as much of it has been read as it has bytes. All that is known of it
stands in its name::

    whole/INO.VERSION.SIZE.LAYOUT.CONTENT       in hexadecimal; the last two are XXH3-128

Slices are immutable, so a file whose layout has the same digest has the same content, and one of the same version has,
too. The content's digest is compared when the file is used for the first time since the start: at once if its time of
modification is not the one it was given, which any write changes, and otherwise while it is in use already. What fails
is dropped, and read from the store again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash

from fuseclient.data.disk_cache import DiskCache
from fuseclient.data.layouts import CHUNK_BYTES, Layouts
from fuseclient.data.reader import Reader
from fuseclient.data.store_errors import StoreError
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Smaller files are not worth a file of their own.
LEAST_BYTES: Final = 1 << 20
#: A file may take this part of the cache.
_SHARE: Final = 2
_STEP: Final = 4 << 20
#: Files read in part that are remembered, and files that wait to be put together.
_TALLIES: Final = 4096
_WAITING: Final = 64
#: The time of modification that all have, in ns since 1970.
_MARK_NS: Final = 271_828_182_845_904_523
_NAME: Final = re.compile(r"whole/([0-9a-f]+)\.([0-9a-f]+)\.([0-9a-f]+)\.([0-9a-f]{32})\.([0-9a-f]{32})")
_PIECE: Final = struct.Struct("<4Q")


class _Changed(Exception):
    """The file changed while it was read."""


@dataclass
class WholeFile:
    """One file, and what its name says of it. ``version`` is the newest for which that is known to hold."""

    name: str
    ino: int
    version: int
    size: int
    layout: str
    content: str
    verified: bool = False


def ino_of(name: str) -> int | None:
    """Return the inode whose content a file of the disk cache holds; ``None``: it is something else."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1], 16)


class WholeFiles:
    """The files of one disk cache. ``spoilt`` is told of one that was in use and has been found damaged."""

    def __init__(self, disk: DiskCache, layouts: Layouts, reader: Reader, is_written: Callable[[int], bool]) -> None:
        self._disk = disk
        self._layouts = layouts
        self._reader = reader
        self._is_written = is_written
        self._files: dict[int, WholeFile] = {}
        #: Bytes read of each file by whoever reads it.
        self._tallies: OrderedDict[int, int] = OrderedDict()
        self._waiting: OrderedDict[int, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker: asyncio.Task[None] | None = None
        #: One file is put together at a time.
        self._assembly = asyncio.Lock()
        self.spoilt: Callable[[int], Awaitable[None]] | None = None
        self._assembled = self._given_up = self._verified = 0

    def start(self) -> None:
        """Find what there is, in the background."""
        self._start(self._find(), "whole files")

    def read(self, attributes: wire.Attributes, count: int) -> None:
        """Somebody has read ``count`` bytes of a file."""
        ino = attributes.ino
        if attributes.size < LEAST_BYTES or ino in self._files or ino in self._waiting:
            return
        tally = self._tallies[ino] = self._tallies.get(ino, 0) + count
        self._tallies.move_to_end(ino)
        if tally >= attributes.size:
            del self._tallies[ino]
            self._want(ino)
        elif len(self._tallies) > _TALLIES:
            self._tallies.popitem(last=False)

    async def current(self, attributes: wire.Attributes) -> WholeFile | None:
        """Return the file that holds the whole content of an inode as it is, if there is one."""
        file = self._files.get(attributes.ino)
        if file is None or not await self._is_current(file, attributes) or not await self._is_sound(file):
            return None
        self._disk.touch(file.name)
        return file

    async def put_together(self, attributes: wire.Attributes) -> bool:
        """Have the whole content of an inode as it is here, now; say whether it is. Raises as the reader does."""
        if await self.current(attributes) is None:
            try:
                await self._assemble(attributes.ino)
            except _Changed as error:
                _log.debug("inode %d is not put together: %s", attributes.ino, error)
        return attributes.ino in self._files

    async def forget(self, ino: int) -> None:
        """Give up the file of an inode, if there is one."""
        file = self._files.get(ino)
        if file is not None:
            await self.drop(file)

    async def drop(self, file: WholeFile, *, damaged: bool = False) -> None:
        """Give up a file; whoever has it open, or has another link to it, keeps it."""
        if self._files.get(file.ino) is file:
            del self._files[file.ino]
        await self._disk.drop(file.name, damaged=damaged)

    async def layout_digest(self, attributes: wire.Attributes) -> str | None:
        """Return the digest of a file's layout; ``None`` if the file is no more of this version, or is inline."""
        digest = xxhash.xxh3_128(b"%d" % attributes.size)
        for number in range(-(-attributes.size // CHUNK_BYTES)):
            layout = await self._layouts.chunk(attributes.ino, number)
            if layout.attributes.version != attributes.version or layout.inline is not None:
                return None
            digest.update(b"".join(_PIECE.pack(*piece) for piece in layout.pieces))
        return digest.hexdigest()

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows."""
        return {
            "files": len(self._files),
            "assembled": self._assembled,
            "given_up": self._given_up,
            "verified": self._verified,
            "waiting": len(self._waiting),
        }

    async def close(self) -> None:
        """Stop what runs in the background."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _find(self) -> None:
        await self._disk.indexed()
        for name in self._disk.names("whole/"):
            match = _NAME.fullmatch(name)
            if match is None:
                await self._disk.drop(name)
                continue
            numbers = [int(part, 16) for part in match.groups()[:3]]
            file = WholeFile(name, numbers[0], numbers[1], numbers[2], match[4], match[5])
            other = self._files.get(file.ino)
            if other is None or other.version < file.version:
                self._files[file.ino], file = file, other or file
            if other is not None:
                await self._disk.drop(file.name)

    # Is it right?

    async def _is_current(self, file: WholeFile, attributes: wire.Attributes) -> bool:
        if file.version == attributes.version:
            return True
        if file.size == attributes.size and await self.layout_digest(attributes) == file.layout:
            file.version = attributes.version
            return True
        if file.version < attributes.version:
            await self.drop(file)
        return False

    async def _is_sound(self, file: WholeFile) -> bool:
        """Say whether a file can be used; one that may be damaged is verified before, others meanwhile."""
        try:
            status = os.stat(self._disk.path(file.name))
        except OSError:
            await self.drop(file)
            return False
        if status.st_size != file.size or status.st_mtime_ns != _MARK_NS:
            return await self._verify(file)
        if not file.verified:
            file.verified = True
            self._start(self._verify_in_use(file), f"verify {file.name}")
        return True

    async def _verify(self, file: WholeFile) -> bool:
        path = self._disk.path(file.name)
        try:
            good = await self._disk.run(_digest, path) == file.content
            if good:
                await self._disk.run(_mark, path)
        except OSError:
            good = False
        self._verified += 1
        file.verified = good
        if not good:
            await self.drop(file, damaged=True)
        return good

    async def _verify_in_use(self, file: WholeFile) -> None:
        if not await self._verify(file) and self.spoilt is not None:
            await self.spoilt(file.ino)

    # Putting together

    def _want(self, ino: int) -> None:
        if len(self._waiting) >= _WAITING:
            return
        self._waiting[ino] = None
        if self._worker is None:
            self._worker = self._start(self._work(), "put files together")

    async def _work(self) -> None:
        """Put together one file after the other."""
        try:
            while self._waiting:
                ino = next(iter(self._waiting))
                try:
                    await self._assemble(ino)
                except (_Changed, Refused, Disconnected, StoreError) as error:
                    self._given_up += 1
                    _log.debug("inode %d is not put together: %s", ino, error)
                finally:
                    self._waiting.pop(ino, None)
        finally:
            self._worker = None

    async def _assemble(self, ino: int) -> None:
        async with self._assembly:
            await self._assemble_one(ino)

    async def _assemble_one(self, ino: int) -> None:
        attributes = (await self._reader.read(ino, 0, 1)).attributes
        layout = None if self._is_written(ino) else await self.layout_digest(attributes)
        if layout is None or attributes.size > self._disk.limit_bytes // _SHARE:
            raise _Changed("it is being written, or is too large")
        if not await self._disk.reserve(attributes.size):
            raise _Changed("there is no room for it")
        path = self._disk.path(f"whole/{ino:012x}.new")
        try:
            content = await self._copy(attributes, path)
            name = f"whole/{ino:012x}.{attributes.version:x}.{attributes.size:x}.{layout}.{content}"
            await self._disk.run(os.rename, path, self._disk.path(name))
        except BaseException as error:
            self._disk.release(attributes.size)
            await self._disk.run(_remove, path)
            if isinstance(error, OSError):
                self._disk.failed(error)
                raise _Changed(error.strerror) from error
            raise
        self._disk.added(name, attributes.size)
        self._assembled += 1
        self._files[ino] = WholeFile(name, ino, attributes.version, attributes.size, layout, content, verified=True)

    async def _copy(self, attributes: wire.Attributes, path: Path) -> str:
        """Write the content to a file; return its digest. Raises OSError and :exc:`_Changed`."""
        digest = xxhash.xxh3_128()
        descriptor = await self._disk.run(_create, path)
        try:
            for offset in range(0, attributes.size, _STEP):
                reading = await self._reader.read(attributes.ino, offset, _STEP)
                whole = len(reading.data) == min(_STEP, attributes.size - offset)
                if not whole or reading.attributes.version != attributes.version or self._is_written(attributes.ino):
                    raise _Changed("it changes")
                await self._disk.run(_append, descriptor, reading.data, digest)
            await self._disk.run(_mark, descriptor)
        finally:
            os.close(descriptor)
        return digest.hexdigest()

    def _start(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _create(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _append(descriptor: int, data: bytes, digest: xxhash.xxh3_128) -> None:
    rest = memoryview(data)
    digest.update(rest)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _mark(path: Path | int) -> None:
    """Set the time of modification that says that nobody has written to a file since."""
    os.utime(path, ns=(os.stat(path).st_atime_ns, _MARK_NS))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_STEP)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
