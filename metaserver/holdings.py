"""What each session may have in its caches: the directories whose names, and the inodes, that it was told of.

A key is an inode, or the names in a directory (present and absent ones alike). Held keys are bits of small bitmaps,
one for each session and block of neighbouring inodes, found by block: so it takes a few bits a file to know who is to
be told of a change, and no more time than there are holders in the block. Nobody tracks which directory a file is in:
a hard link needs no care.

A holder is what one session holds from one drop of everything to the next; the count of its bitmaps is bounded by the
caller, who has the session drop everything when there are too many.

Everything is called on the event loop's thread but :meth:`Holdings.is_held`, which the engine's thread calls. It only
reads, in steps that the interpreter does not interrupt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_BLOCK_BITS: Final = 2048
#: The bits of a bitmap that are inodes; the others are names.
_INODES: Final = int.from_bytes(b"\x55" * (_BLOCK_BITS // 8))


class Holder:
    """What one session holds. ``owner`` is compared by identity only."""

    __slots__ = ("blocks", "everything", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        #: The blocks in which it has a bitmap.
        self.blocks: set[int] = set()
        #: It is not known what it holds: anything.
        self.everything = False


def inode_key(ino: int) -> int:
    """Return the key of an inode: its attributes, content and extended attributes."""
    return ino << 1


def names_key(directory: int) -> int:
    """Return the key of the names in a directory."""
    return directory << 1 | 1


class Holdings:
    """The holders of one volume's keys."""

    def __init__(self) -> None:
        self._blocks: dict[int, dict[Holder, bytearray]] = {}
        #: Those of which it is not known what they hold.
        self._everything: dict[Holder, None] = {}
        #: Bitmaps of all holders.
        self.bitmaps = 0

    def hold(self, holder: Holder, keys: Iterable[int]) -> None:
        """The holder holds these keys from now on."""
        number, bitmap = -1, bytearray()
        for key in keys:
            block, bit = divmod(key, _BLOCK_BITS)
            if block != number:
                number, bitmap = block, self._bitmap(block, holder)
            bitmap[bit >> 3] |= 1 << (bit & 7)

    def _bitmap(self, block: int, holder: Holder) -> bytearray:
        holders = self._blocks.setdefault(block, {})
        bitmap = holders.get(holder)
        if bitmap is None:
            bitmap = holders[holder] = bytearray(_BLOCK_BITS // 8)
            holder.blocks.add(block)
            self.bitmaps += 1
        return bitmap

    def hold_everything(self, holder: Holder) -> None:
        """It is not known what the holder holds."""
        holder.everything = True
        self._everything[holder] = None

    def is_held(self, key: int, owner: object) -> bool:
        """Whether anybody but ``owner`` holds a key. Any thread may call it."""
        if any(holder.owner is not owner for holder in list(self._everything)):
            return True
        holders = self._blocks.get(key // _BLOCK_BITS)
        if not holders:
            return False
        index, mask = key % _BLOCK_BITS >> 3, 1 << (key & 7)
        return any(bitmap[index] & mask and holder.owner is not owner for holder, bitmap in list(holders.items()))

    def holders(self, key: int, owner: object) -> list[Holder]:
        """Return those who hold a key, ``owner`` left out."""
        index, mask = key % _BLOCK_BITS >> 3, 1 << (key & 7)
        found = dict.fromkeys(self._everything)
        for holder, bitmap in self._blocks.get(key // _BLOCK_BITS, {}).items():
            if bitmap[index] & mask:
                found[holder] = None
        return [holder for holder in found if holder.owner is not owner]

    def release(self, holder: Holder, keys: Iterable[int]) -> None:
        """The holder has dropped these keys."""
        touched: dict[int, bytearray] = {}
        for key in keys:
            block = key // _BLOCK_BITS
            bitmap = self._blocks.get(block, {}).get(holder)
            if bitmap is not None:
                bitmap[key % _BLOCK_BITS >> 3] &= ~(1 << (key & 7))
                touched[block] = bitmap
        for block, bitmap in touched.items():
            if not any(bitmap):
                holder.blocks.discard(block)
                self._discard(block, holder)

    def _discard(self, block: int, holder: Holder) -> None:
        """Forget a bitmap."""
        holders = self._blocks[block]
        del holders[holder]
        self.bitmaps -= 1
        if not holders:
            del self._blocks[block]

    def count(self, holder: Holder) -> tuple[int, int]:
        """Return how many directories' names, and how many inodes, a holder holds as far as is known."""
        names = inodes = 0
        for block in holder.blocks:
            bits = int.from_bytes(self._blocks[block][holder], "little")
            inodes += (bits & _INODES).bit_count()
            names += (bits & ~_INODES).bit_count()
        return names, inodes

    def drop(self, holder: Holder) -> None:
        """The holder holds nothing any more."""
        self._everything.pop(holder, None)
        holder.everything = False
        for block in holder.blocks:
            self._discard(block, holder)
        holder.blocks = set()
