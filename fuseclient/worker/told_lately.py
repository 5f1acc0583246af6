"""Files that the kernel has just been told of, in the reply to a lookup, and may be about to open.

Between that reply and the OPEN another mount may replace the file. Who is asked whether it has it open says yes, so
that the file lives on for the OPEN. The kernel would look again, but only once: where a file is replaced all the time,
as a lock or a checkpoint is, the next one would be gone, too, and the program told ESTALE.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

#: Seconds from a lookup to its OPEN; what comes later is answered ESTALE, and looked up again.
WITHIN_S: Final = 0.2
_MOST: Final = 4096


class ToldLately:
    """Inodes by when they were told, in seconds of ``clock``. Bounded: who looks up so many at a time opens few."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: OrderedDict[int, float] = OrderedDict()

    def add(self, ino: int) -> None:
        """The kernel is told of a file."""
        self._told[ino] = self._clock() + WITHIN_S
        self._told.move_to_end(ino)
        if len(self._told) > _MOST:
            self._told.popitem(last=False)

    def __contains__(self, ino: int) -> bool:
        return self._told.get(ino, 0.0) > self._clock()
