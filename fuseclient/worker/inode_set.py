"""A set of inode numbers, at a bit each where they are dense, as numbers handed out in rising order are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_BLOCK_BITS: Final = 1 << 13


class InodeSet:
    """A set of integers from 0 on."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}

    def add(self, ino: int) -> None:
        """Put an inode in."""
        number, bit = divmod(ino, _BLOCK_BITS)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = bytearray(_BLOCK_BITS // 8)
        block[bit >> 3] |= 1 << (bit & 7)

    def take(self) -> InodeSet:
        """Return a set of all that is in, and take it out of this one."""
        taken = InodeSet()
        taken._blocks, self._blocks = self._blocks, {}
        return taken

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
