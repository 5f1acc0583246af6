"""File handles. They say all there is to know, so a worker can use those that an earlier worker gave out.

bit 63      given out by the BPF program (``BPFUSE_FH_KERNEL_BIT``); then bits 62-48 are its serial number
bit 62      open for writing
bits 61-56  generation of the worker that gave it out, modulo 64
bit 55      0; set by the channel in a WRITE to the end of the file (``BPFUSE_FH_APPENDS_BIT``)
bits 54-48  serial number: tells handles of one inode apart, of which the last is given to all that are left
bits 47-0   inode
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

_KERNEL: Final = 1 << 63
_WRITING: Final = 1 << 62
_GENERATION_SHIFT: Final = 56
#: Of a WRITE.
APPENDS: Final = 1 << 55
GENERATIONS: Final = 64
_SERIAL_SHIFT: Final = 48
_INO: Final = (1 << 48) - 1
#: The highest serial number: handles that have it may not be the only ones.
SHARED: Final = 127


class Handle(NamedTuple):
    """A handle, taken apart. ``kernel``: the BPF program gave it out, and counts it."""

    ino: int
    writing: bool
    generation: int
    kernel: bool


def encode(ino: int, *, writing: bool, generation: int, serial: int = 0) -> int:
    """Return a handle of this worker."""
    return _WRITING * writing | generation % GENERATIONS << _GENERATION_SHIFT | serial << _SERIAL_SHIFT | ino


def decode(fh: int) -> Handle:
    """Take a handle apart."""
    if fh & _KERNEL:
        return Handle(fh & _INO, False, 0, True)
    return Handle(fh & _INO, bool(fh & _WRITING), fh >> _GENERATION_SHIFT & GENERATIONS - 1, False)


class Serials:
    """The serial numbers of the handles that a worker has given out and that are not released."""

    def __init__(self) -> None:
        #: By inode, how many handles have each number.
        self._used: dict[int, Counter[int]] = {}

    def take(self, ino: int) -> int:
        """Return the lowest number that no handle of an inode has, or :data:`SHARED`."""
        used = self._used.setdefault(ino, Counter())
        serial = next((each for each in range(SHARED) if not used[each]), SHARED)
        used[serial] += 1
        return serial

    def give_back(self, fh: int) -> None:
        """A handle of this worker is released."""
        ino, serial = fh & _INO, fh >> _SERIAL_SHIFT & SHARED
        used = self._used.get(ino, Counter())
        used[serial] -= 1
        if used[serial] <= 0:
            del used[serial]
        if not used:
            self._used.pop(ino, None)

    def in_use(self, fh: int) -> bool:
        """Whether another handle that is not released is the same as this one, which is."""
        return self._used.get(fh & _INO, Counter())[fh >> _SERIAL_SHIFT & SHARED] > 0
