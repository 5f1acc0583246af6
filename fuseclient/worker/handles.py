"""File handles. They say all there is to know, so a worker can use those that an earlier worker gave out.

bit 63      given out by the BPF program (``BPFUSE_FH_KERNEL_BIT``); the bits between are 0
bit 62      open for writing
bits 61-52  generation of the worker that gave it out, modulo 1024
bits 47-0   inode
"""

from __future__ import annotations

from typing import Final, NamedTuple

_KERNEL: Final = 1 << 63
_WRITING: Final = 1 << 62
_GENERATION_SHIFT: Final = 52
GENERATIONS: Final = 1024
_INO: Final = (1 << 48) - 1


class Handle(NamedTuple):
    """A handle, taken apart. ``kernel``: the BPF program gave it out, and counts it."""

    ino: int
    writing: bool
    generation: int
    kernel: bool


def encode(ino: int, *, writing: bool, generation: int) -> int:
    """Return a handle of this worker."""
    return _WRITING * writing | generation % GENERATIONS << _GENERATION_SHIFT | ino


def decode(fh: int) -> Handle:
    """Take a handle apart."""
    return Handle(fh & _INO, bool(fh & _WRITING), fh >> _GENERATION_SHIFT & GENERATIONS - 1, bool(fh & _KERNEL))
