"""The bytes written to one file and not yet sent anywhere: sorted extents that neither overlap nor touch.

Pure and synchronous. A sequential writer grows one extent in place; a write that touches several extents joins them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Extents:
    """A sparse buffer of file content."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[bytearray] = []
        #: Bytes held.
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, bytearray]]:
        """Yield (offset, bytes) of every extent, by rising offset."""
        return zip(self._starts, self._buffers, strict=True)

    @property
    def end(self) -> int:
        """The offset behind the last byte held; 0 when nothing is."""
        return self._starts[-1] + len(self._buffers[-1]) if self._starts else 0

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Lay ``data`` over what is held."""
        if not data:
            return
        if self._starts and offset == self._starts[-1] + len(self._buffers[-1]):
            self._buffers[-1] += data  # what a sequential writer does
            self.bytes += len(data)
            return
        first, behind = self._touching(offset, offset + len(data))
        if first == behind:
            self._starts.insert(first, offset)
            self._buffers.insert(first, bytearray(data))
            self.bytes += len(data)
        else:
            self._join(first, behind, offset, data)

    def take_units(self, unit: int) -> Extents:
        """Take out the leading multiple of ``unit`` bytes of each extent that is so long; everything if none is."""
        taken = Extents()
        if all(len(buffer) < unit for buffer in self._buffers):
            taken._starts, taken._buffers, taken.bytes = self._starts, self._buffers, self.bytes
            self._starts, self._buffers, self.bytes = [], [], 0
            return taken
        for index in range(len(self._starts) - 1, -1, -1):
            buffer = self._buffers[index]
            whole = len(buffer) // unit * unit
            if whole == len(buffer):
                taken._starts.insert(0, self._starts.pop(index))
                taken._buffers.insert(0, self._buffers.pop(index))
                taken.bytes += whole
                self.bytes -= whole
            elif whole:
                taken.write(self._starts[index], memoryview(buffer)[:whole])
                self._cut_front(index, whole)
        return taken

    def _cut_front(self, index: int, count: int) -> None:
        self._starts[index] += count
        self._buffers[index] = self._buffers[index][count:]
        self.bytes -= count
        if not self._buffers[index]:
            del self._starts[index], self._buffers[index]

    def overlaps(self, offset: int, length: int) -> bool:
        """Say whether any byte of [offset, offset + length) is held."""
        behind = bisect_left(self._starts, offset + length)
        return behind > 0 and length > 0 and self._end(behind - 1) > offset

    def _end(self, index: int) -> int:
        return self._starts[index] + len(self._buffers[index])

    def _touching(self, offset: int, end: int) -> tuple[int, int]:
        """Return the range of indices of the extents that overlap or touch [offset, end)."""
        behind = bisect_right(self._starts, end)
        first = bisect_right(self._starts, offset)
        if first and self._end(first - 1) >= offset:
            first -= 1
        return first, behind

    def _join(self, first: int, behind: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        before = sum(len(buffer) for buffer in self._buffers[first:behind])
        end = offset + len(data)
        last = self._buffers[behind - 1]
        tail = last[end - self._starts[behind - 1] :] if self._end(behind - 1) > end else b""
        start, buffer = self._starts[first], self._buffers[first]
        if start <= offset:
            if behind - first > 1:
                del buffer[offset - start :]
                buffer += data
                buffer += tail
            else:
                buffer[offset - start : offset - start + len(data)] = data
        else:
            start, buffer = offset, bytearray(data)
            buffer += tail
        self._starts[first:behind] = [start]
        self._buffers[first:behind] = [buffer]
        self.bytes += len(buffer) - before
