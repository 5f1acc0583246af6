"""The locks of a mount's programs, in memory that outlives the worker: the channel keeps it, and hands it to each.

A record for each locked range. A worker that dies between two changes of it leaves a record too many, never one too
few: new ones are written before those that they replace are given up. What was under way then is sent again by the
kernel, and brings the rest in order.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_RECORD: Final = struct.Struct("=QqQQQII")
_USED: Final = 1
_EXCLUSIVE: Final = 2
_FLOCK: Final = 4
_LOST: Final = 8
#: The most ranges of one mount: as many as the metaserver lets a session have.
CAPACITY: Final = 8192
STORE_BYTES: Final = CAPACITY * _RECORD.size


class Key(NamedTuple):
    """Whose locks of which file: those of one key never conflict."""

    ino: int
    flock: bool
    owner: int


class Held(NamedTuple):
    """A locked range, ``end`` included. ``fh``: the handle that it was locked through last."""

    key: Key
    start: int
    end: int
    exclusive: bool
    pid: int
    fh: int


def make_store() -> int:
    """Return a descriptor of an empty store."""
    descriptor = os.memfd_create("bpfuse-locks", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, STORE_BYTES)
    return descriptor


class LockStore:
    """The records, of which one worker at a time changes any. Without a descriptor they end with this object."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._map = mmap.mmap(-1 if descriptor is None else descriptor, STORE_BYTES)
        used = {slot for slot in range(CAPACITY) if self._flags(slot) & _USED}
        self._free = [slot for slot in reversed(range(CAPACITY)) if slot not in used]
        self._slots: dict[Key, list[int]] = {}
        for slot in sorted(used):
            self._slots.setdefault(self._read(slot)[0].key, []).append(slot)

    def _flags(self, slot: int) -> int:
        return int.from_bytes(self._map[(slot + 1) * _RECORD.size - 4 : (slot + 1) * _RECORD.size], "little")

    def _read(self, slot: int) -> tuple[Held, bool]:
        ino, owner, start, end, fh, pid, flags = _RECORD.unpack_from(self._map, slot * _RECORD.size)
        key = Key(ino, bool(flags & _FLOCK), owner)
        return Held(key, start, end, bool(flags & _EXCLUSIVE), pid, fh), bool(flags & _LOST)

    def records(self) -> Iterator[tuple[Held, bool]]:
        """Yield what is held, and whether it is lost."""
        for slots in self._slots.values():
            yield from map(self._read, slots)

    def has_room(self, count: int) -> bool:
        """Whether so many ranges can be put more."""
        return len(self._free) >= count

    def replace(self, key: Key, held: list[Held], *, lost: bool = False) -> None:
        """Have these be all the ranges of a key. There must be room for them beside the old ones."""
        before, after = self._slots.pop(key, []), []
        for each in held:
            slot = self._free.pop()
            flags = _USED | _EXCLUSIVE * each.exclusive | _FLOCK * key.flock | _LOST * lost
            _RECORD.pack_into(
                self._map, slot * _RECORD.size, key.ino, key.owner, each.start, each.end, each.fh, each.pid, flags
            )
            after.append(slot)
        for slot in before:
            self._map[slot * _RECORD.size : (slot + 1) * _RECORD.size] = bytes(_RECORD.size)
            self._free.append(slot)
        if after:
            self._slots[key] = after

    def close(self) -> None:
        """Unmap it; the records stay."""
        self._map.close()
