"""The time after a start in which the sessions of earlier runs may still use what they cached, and may come back.

Until every one of them has come back or was ended, or one full lease has passed, nothing is changed: what they hold is
not known. One that comes back counts as holding anything. Those that have not come back by then are ended, durably and
before the first change, and cannot come back after: not to this run of the server, nor to the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from metaserver.fencing import SessionRecord
from metaserver.volumes import Volume

_log = logging.getLogger(__name__)


class Grace:
    """The grace of one run. ``end_record`` ends a session that did not come back, durably.

    ``wait`` False: changes do not wait, because nobody but one client, whose session it is, can have used the engine.
    """

    def __init__(
        self,
        earlier: Iterable[SessionRecord],
        clock: Callable[[], int],
        end_record: Callable[[SessionRecord], Awaitable[None]],
        *,
        wait: bool,
    ) -> None:
        self._missing = {record.id: record for record in earlier}
        self._clock = clock
        self._end_record = end_record
        self._until_ns = clock() + max((record.lease_ns for record in self._missing.values()), default=0)
        self._closed = asyncio.Event()
        self._free = asyncio.Event()
        self._ending = asyncio.Lock()
        if not wait or not self._missing:
            self._free.set()
        self._close_if_complete()
        if self._missing:
            _log.info("%d sessions of an earlier run may come back", len(self._missing))

    @property
    def is_over(self) -> bool:
        """Whether no session can come back any more."""
        return self._closed.is_set() and not self._missing

    @property
    def may_change(self) -> bool:
        """Whether a change may be made now; if not, see :meth:`over`."""
        return self._free.is_set()

    def misses_one_alone(self, volume: int) -> bool:
        """Whether a session of a volume may come back that is to tell what it kept to itself."""
        return any(record.alone and record.volume == volume for record in self._missing.values())

    @property
    def left_ns(self) -> int:
        """Nanoseconds until changes are made without those who are missing; 0: they wait for nobody."""
        return 0 if self._free.is_set() else max(0, self._until_ns - self._clock())

    def records(self, volume: Volume | None) -> list[SessionRecord]:
        """Return the sessions that have not come back: of one volume, or of all."""
        return [each for each in self._missing.values() if volume is None or each.volume == volume.id]

    def missing(self, session: bytes) -> SessionRecord | None:
        """Return the record of a session that may come back now."""
        return None if self._closed.is_set() or self._clock() >= self._until_ns else self._missing.get(session)

    def came_back(self, session: bytes) -> None:
        """A session has come back."""
        self._missing.pop(session, None)
        self._close_if_complete()

    def _close_if_complete(self) -> None:
        if not self._missing:
            self._closed.set()
            self._free.set()

    async def over(self) -> None:
        """Return when a change may be made: when the grace has passed or nobody is missing."""
        while not self._free.is_set():
            left_s = (self._until_ns - self._clock()) / 1e9
            if left_s <= 0:
                await self.close()
                return
            try:
                async with asyncio.timeout(left_s):
                    await self._free.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """End those who are missing if their time has passed."""
        async with self._ending:
            if self._clock() < self._until_ns:
                return
            self._closed.set()
            for record in list(self._missing.values()):
                await self._end_record(record)
                del self._missing[record.id]
            self._free.set()
