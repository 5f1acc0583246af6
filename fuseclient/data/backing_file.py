"""A file that the kernel reads, and maps, in place of a file of the mount: what is done to it in threads.

As long as nobody writes it is one of the whole files of the disk cache, under a second name. Before its first change it
becomes this mount's own, and from then on it is kept equal to what the file of the mount holds. Somebody who maps it
to write changes it by himself; that shows in its time of modification, which is compared around each change made here,
and what he changed in the checksums of its blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

#: What is compared and carried over of a file that somebody else has changed, in bytes.
BLOCK: Final = 1 << 20


@dataclass
class BackingFile:
    """One file, at ``path``. All methods block, and raise OSError."""

    path: Path
    #: The time of modification after the last change made here; 0: not known.
    mtime_ns: int = 0
    #: Somebody else has changed it since :meth:`differing`.
    is_foreign: bool = False
    #: Of each block as it is known to others; ``None`` where it was changed here.
    sums: list[int | None] = field(default_factory=list)

    def measure(self) -> None:
        """Take the file as it is for what is known to others."""
        self.mtime_ns = os.stat(self.path).st_mtime_ns
        self.sums = [xxhash.xxh3_64_intdigest(block) for block in self._blocks()]
        self.is_foreign = False

    def patch(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        with _opened(self.path, os.O_WRONLY) as descriptor:
            self._note(descriptor)
            rest = memoryview(data)
            at = offset
            while rest:
                count = os.pwrite(descriptor, rest, at)
                rest, at = rest[count:], at + count
            self.mtime_ns = os.fstat(descriptor).st_mtime_ns
        self._forget(offset, offset + len(data))

    def resize(self, size: int) -> None:
        """Cut the file, or make it longer."""
        with _opened(self.path, os.O_WRONLY) as descriptor:
            self._note(descriptor)
            os.ftruncate(descriptor, size)
            self.mtime_ns = os.fstat(descriptor).st_mtime_ns
        blocks = -(-size // BLOCK)
        self.sums = (self.sums + [None] * (blocks - len(self.sums)))[:blocks]
        self._forget(max(0, size - 1), size)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer at the end."""
        with _opened(self.path, os.O_RDONLY) as descriptor:
            return os.pread(descriptor, length, offset)

    def replace(self, offset: int, data: bytes) -> None:
        """Write bytes if they differ from what is there."""
        if self.read(offset, len(data)) != data:
            self.patch(offset, data)

    def changed_by_others(self) -> bool:
        """Say whether somebody else has changed it."""
        return self.is_foreign or os.stat(self.path).st_mtime_ns != self.mtime_ns

    def settle(self) -> None:
        """Begin to look at what others changed: what they do from now on is noticed again."""
        with _opened(self.path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
            self.mtime_ns = os.fstat(descriptor).st_mtime_ns
        self.is_foreign = False

    def differing(self, first: int, *, changed_here: bool) -> tuple[int, bytes] | None:
        """Return (number, bytes) of the next block from ``first`` on that others do not know; they do then.

        Blocks that were changed here, and may have been by somebody else, count if ``changed_here`` says so.
        """
        for number, block in self._numbered(first):
            known = self.sums[number] if number < len(self.sums) else None
            now = xxhash.xxh3_64_intdigest(block)
            if known == now or (known is None and not changed_here):
                continue
            self.sums += [None] * (number + 1 - len(self.sums))
            self.sums[number] = now
            return number, block
        return None

    def is_written(self) -> bool:
        """Say whether anybody has it open, or mapped, to write."""
        with _opened(self.path, os.O_RDONLY) as descriptor:
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except OSError as error:
                return error.errno == errno.EAGAIN
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return False

    def _note(self, descriptor: int) -> None:
        self.is_foreign = self.is_foreign or os.fstat(descriptor).st_mtime_ns != self.mtime_ns

    def _forget(self, begin: int, end: int) -> None:
        blocks = -(-end // BLOCK)
        self.sums += [None] * (blocks - len(self.sums))
        for number in range(begin // BLOCK, blocks):
            self.sums[number] = None

    def _blocks(self) -> Iterator[bytes]:
        return (block for _, block in self._numbered(0))

    def _numbered(self, first: int) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb", buffering=0) as file:
            file.seek(first * BLOCK)
            while block := file.read(BLOCK):
                yield first, block
                first += 1


class _opened:
    """A context in which a file is open."""

    def __init__(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
