"""A set of inode numbers, at a bit each where they are dense, as numbers handed out in rising order are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

_BLOCK_BITS: Final = 1 << 13
_BLOCK_BYTES: Final = _BLOCK_BITS // 8


class InodeSet:
    """A set of integers from 0 on. What is added is added to ``also``, too."""

    def __init__(self, inos: Iterable[int] = (), *, also: InodeSet | None = None) -> None:
        self._blocks: dict[int, bytearray] = {}
        self._also = also
        for ino in inos:
            self.add(ino)

    def add(self, ino: int) -> None:
        """Put an inode in."""
        if self._also is not None:
            self._also.add(ino)
        number, bit = divmod(ino, _BLOCK_BITS)
        self._block(number)[bit >> 3] |= 1 << (bit & 7)

    def _block(self, number: int) -> bytearray:
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = bytearray(_BLOCK_BYTES)
        return block

    def add_all(self, inos: Sequence[int]) -> None:
        """Put inodes in: of neighbours, many at a time."""
        if self._also is not None:
            self._also.add_all(inos)
        number, block = -1, bytearray()
        for ino in inos:
            if ino // _BLOCK_BITS != number:
                number = ino // _BLOCK_BITS
                block = self._block(number)
            block[(ino % _BLOCK_BITS) >> 3] |= 1 << (ino & 7)

    def take(self) -> InodeSet:
        """Return a set of all that is in, and take it out of this one."""
        taken = InodeSet()
        taken._blocks, self._blocks = self._blocks, {}
        return taken

    def update(self, other: InodeSet) -> None:
        """Put in all that is in another set."""
        for number, theirs in other._blocks.items():
            mine = self._blocks.get(number)
            both = _number(theirs) | (_number(mine) if mine is not None else 0)
            self._blocks[number] = bytearray(both.to_bytes(_BLOCK_BYTES, "little"))

    def subtract(self, other: InodeSet) -> None:
        """Take out all that is in another set."""
        for number in self._blocks.keys() & other._blocks.keys():
            left = _number(self._blocks[number]) & ~_number(other._blocks[number])
            if left:
                self._blocks[number] = bytearray(left.to_bytes(_BLOCK_BYTES, "little"))
            else:
                del self._blocks[number]

    def discard(self, ino: int) -> None:
        """Take an inode out, if it is in."""
        number, bit = divmod(ino, _BLOCK_BITS)
        block = self._blocks.get(number)
        if block is not None:
            block[bit >> 3] &= ~(1 << (bit & 7))

    def __bool__(self) -> bool:
        return any(map(any, self._blocks.values()))

    def __len__(self) -> int:
        return sum(_number(block).bit_count() for block in self._blocks.values())

    def __contains__(self, ino: int) -> bool:
        number, bit = divmod(ino, _BLOCK_BITS)
        block = self._blocks.get(number)
        return block is not None and bool(block[bit >> 3] >> (bit & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        for number, block in self._blocks.items():
            for index, byte in enumerate(block):
                for bit in range(8) if byte else ():
                    if byte >> bit & 1:
                        yield number * _BLOCK_BITS + index * 8 + bit


def _number(block: bytearray) -> int:
    return int.from_bytes(block, "little")
