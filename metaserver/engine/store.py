"""What a store over the network has to offer to become an engine (see remote.py).

A store keeps rows and one **tip**: a version that grows with every commit, and the marks of those who committed last. A
commit says which version it is based on and is made whole if that is still the last one, or not at all. So whatever a
transaction had read, keys and ranges alike, is compared by one number; and as every commit leaves its mark in the same
atomic step, one whose answer was lost can be asked for.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from metaserver.engine.base import Row, Space

#: Who committed last: this many, each with an instance (8 bytes) and the number of its commit (u64).
MARKS: Final = 8
_ID_BYTES: Final = 8
_MARK_BYTES: Final = _ID_BYTES + 8

Writes = Mapping[bytes, bytes | None]


class Lost(Exception):
    """The store did not answer: what was asked for may have been done, or may still be. It can be asked again."""


class Compacted(Exception):
    """The past that was to be read is kept no longer."""


class Tip(NamedTuple):
    """The last commit that a store has."""

    version: int
    marks: bytes


class Moved(Exception):
    """The tip is another one than a commit was based on; nothing was written. ``tip`` is ``None`` if it is not told."""

    def __init__(self, tip: Tip | None) -> None:
        super().__init__("another transaction was committed meanwhile")
        self.tip = tip


class Query(NamedTuple):
    """A range of keys [start, end) to be read, at most ``limit`` rows of it, from its end if ``reverse``."""

    start: bytes
    end: bytes
    limit: int | None = None
    reverse: bool = False

    def covered(self, rows: Sequence[Row]) -> tuple[bytes, bytes]:
        """Return the part of the range that was looked at to find these rows."""
        if self.limit is None or len(rows) < self.limit or not rows:
            return self.start, self.end
        return (rows[-1][0], self.end) if self.reverse else (self.start, rows[-1][0] + b"\0")


@dataclass
class Found:
    """What was read, all of one moment: keys with their values, the rows of ranges, and the tip."""

    tip: Tip
    values: dict[bytes, bytes | None] = field(default_factory=dict)
    ranges: dict[Query, list[Row]] = field(default_factory=dict)


class Past(abc.ABC):
    """The store as it was at one moment."""

    @abc.abstractmethod
    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        """Read. Raises :exc:`Lost`, which ends it, and :exc:`Compacted`."""


class Store(abc.ABC):
    """Rows and a tip on servers elsewhere. Everything raises :exc:`Lost` and EngineError."""

    #: How many keys one commit may write, and their bytes with the values.
    most_writes: int
    most_bytes: int

    @abc.abstractmethod
    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        """Read the last commit that was made before this call, or a later one."""

    @abc.abstractmethod
    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        """Write if the tip has this version; return the new one. Raises :exc:`Moved`, EngineFull, LimitExceeded."""

    @abc.abstractmethod
    def past(self) -> contextlib.AbstractAsyncContextManager[Past]:
        """Hold on to a moment not earlier than this call."""

    @abc.abstractmethod
    async def space(self) -> Space:
        """Return how much room there is."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of all connections."""


def marked(marks: bytes, instance: bytes, number: int) -> bytes:
    """Return the marks of a tip after one more commit."""
    others = b"".join(each for each in _each(marks) if each[:_ID_BYTES] != instance)
    return instance + number.to_bytes(8) + others[: (MARKS - 1) * _MARK_BYTES]


def is_marked(marks: bytes, instance: bytes, number: int) -> bool:
    """Say whether a commit is among those that a tip tells of."""
    return instance + number.to_bytes(8) in _each(marks)


def is_last(marks: bytes, instance: bytes, number: int) -> bool:
    """Say whether it is the very one that made the tip."""
    return marks.startswith(instance + number.to_bytes(8))


def _each(marks: bytes) -> Iterable[bytes]:
    return [marks[at : at + _MARK_BYTES] for at in range(0, len(marks), _MARK_BYTES)]
