"""How far the worker had to go for each request: to its memory, the disk cache, the metaserver, or the object store.

A request reaches the farthest of these that was asked for its sake, or that it waited for because another request had
asked. What goes on in the background is nobody's. Counts are of this process; everything is of one thread.
"""

from __future__ import annotations

import enum
from contextvars import ContextVar, Token
from typing import Final


class Level(enum.IntEnum):
    """From near to far."""

    MEMORY = 0
    DISK_CACHE = 1
    METASERVER = 2
    STORE = 3


#: The level that the request at hand has reached, in a list that the tasks it starts share with it.
_reached: Final[ContextVar[list[Level] | None]] = ContextVar("reached", default=None)
_counts: Final = [0] * len(Level)


def begin() -> Token[list[Level] | None] | None:
    """A request begins; return what :func:`end` is to be given. ``None``: it is a part of another one."""
    return _reached.set([Level.MEMORY]) if _reached.get() is None else None


def end(token: Token[list[Level] | None] | None) -> None:
    """A request is answered."""
    if token is None:
        return
    reached = _reached.get()
    _reached.reset(token)
    if reached is not None:
        _counts[reached[0]] += 1


def reach(level: Level) -> None:
    """The request at hand, if there is one, has to go so far."""
    reached = _reached.get()
    if reached is not None and level > reached[0]:
        reached[0] = level


def at_once(count: int = 1) -> None:
    """A request, or so many, is answered with what is in memory."""
    _counts[Level.MEMORY] += count


def figures() -> dict[str, int]:
    """Return how many requests reached which level."""
    return {level.name.lower(): _counts[level] for level in Level}
