"""Sorting of more records than fit into memory: sorted runs in a temporary file, merged when they are read."""

from __future__ import annotations

import heapq
import struct
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

#: Records that are sorted at once, and bytes that are read of each run at once.
RUN_RECORDS: Final = 250_000
_READ_BYTES: Final = 64 * 1024


class Sorter:
    """Records of ``width`` numbers (u64) each: added in any order, read in ascending order any number of times.

    ``limit`` is the number of records that are held in memory. Nothing may be added while it is read.
    """

    def __init__(self, width: int, limit: int = RUN_RECORDS) -> None:
        self._record = struct.Struct(f">{width}Q")
        self._limit = limit
        self._held: list[bytes] = []
        self._file = tempfile.TemporaryFile(prefix="bpfuse-sort-")  # noqa: SIM115 - lives as long as this object
        #: Where each run begins and ends in the file, in bytes.
        self._runs: list[tuple[int, int]] = []

    def add(self, *numbers: int) -> None:
        self._held.append(self._record.pack(*numbers))
        if len(self._held) >= self._limit:
            self._spill()

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        self._held.sort()
        runs = [self._run(begin, end) for begin, end in self._runs]
        merged = heapq.merge(*runs, self._held) if runs else iter(self._held)
        return map(self._record.unpack, merged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def _spill(self) -> None:
        self._held.sort()
        begin = self._file.seek(0, 2)
        self._file.write(b"".join(self._held))
        self._runs.append((begin, self._file.tell()))
        self._held = []

    def _run(self, begin: int, end: int) -> Iterator[bytes]:
        size = self._record.size
        step = max(1, _READ_BYTES // size) * size
        for position in range(begin, end, step):
            self._file.seek(position)
            piece = self._file.read(min(step, end - position))
            for at in range(0, len(piece), size):
                yield piece[at : at + size]


class Groups:
    """A sorter's records by their first number, which is asked for in ascending order."""

    def __init__(self, sorter: Sorter) -> None:
        self._records = iter(sorter)
        self._next = next(self._records, None)

    @property
    def number(self) -> int | None:
        """The first number of the next records; ``None`` after the last."""
        return self._next[0] if self._next is not None else None

    def take(self, number: int) -> list[tuple[int, ...]]:
        """Return the rest of each record that begins with ``number``; those before it are passed over."""
        found = []
        while self._next is not None and self._next[0] <= number:
            if self._next[0] == number:
                found.append(self._next[1:])
            self._next = next(self._records, None)
        return found
