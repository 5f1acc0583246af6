"""A metaserver while it has the authority over its engine: its sessions, its connections and its janitor.

Where it listens, and what is there before and after, is :mod:`metaserver.front`'s. The engine is the caller's: it is
opened before and closed after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from metaserver import fencing, recovery
from metaserver.coherence import Coherence
from metaserver.connection import Connection, Limits
from metaserver.engine.base import Engine
from metaserver.fenced_engine import FencedEngine
from metaserver.fencing import Tenure
from metaserver.gate import Access, Gate
from metaserver.grace import Grace
from metaserver.janitor import Janitor
from metaserver.service import Service
from metaserver.sessions import FEED_CHANGES, Sessions

#: Seconds that requests in progress get to end when the server is closed, and then their replies to be taken.
_CLOSE_S: Final = 2.0
#: Seconds that the orphans of ended sessions get to be deleted then.
_SETTLE_S: Final = 1.0
#: Versions of the change feed begin with the server's epoch.
_EPOCH_SHIFT: Final = 32
#: Seconds between two looks for connections that are idle, and identities that have expired.
_WATCH_S: Final = 1.0


def boottime_ns() -> int:
    """Return the time since boot in nanoseconds; unlike the monotonic clock it counts suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Server:
    """One run of a metaserver. ``lease_s`` is the length of the leases it gives, in seconds (0.1 to 3600).

    ``grace`` False: no client of an earlier run can be alive but the one that will connect (see grace.py). Without
    ``janitor`` nothing is cleared up, and sessions end only when they are in the way. The clock is in nanoseconds and
    must count suspend.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lease_s: float = 30.0,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        access: Access = Access(),  # noqa: B008
        feed_changes: int = FEED_CHANGES,
        grace: bool = True,
        janitor: bool = True,
        clock: Callable[[], int] = boottime_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self.tenure = Tenure()
        self._engine = FencedEngine(engine, self.tenure)
        self._grace = grace
        self.sessions = Sessions(int(lease_s * 1000) * 1_000_000, clock, feed_changes)
        self.janitor = Janitor(self._engine, self.sessions, wall)
        self.coherence = self.janitor.coherence = Coherence(self.sessions, self.janitor.evict)
        self.connections: dict[Connection, None] = {}
        self.gate = Gate(self._engine, access, limits.half_open, wall)
        self._service = Service(
            self._engine, self.tenure, self.sessions, self.coherence, self.janitor, self.gate, limits, wall
        )
        self._limits = limits
        self._wall = wall
        self._has_janitor = janitor
        #: The janitor's, and the one that ends what is overdue.
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def metaservers(self) -> Callable[[], list[str]]:
        """Returns where the metaservers of the engine are, as clients are told."""
        return self._service.metaservers

    @metaservers.setter
    def metaservers(self, metaservers: Callable[[], list[str]]) -> None:
        self._service.metaservers = metaservers

    def on_fenced(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called, on the event loop, each time that another server is found to have taken over."""
        self._engine.on_fenced = callback

    async def begin(self) -> None:
        """Take the engine over; connections may be accepted then. What an earlier run left is cleared up meanwhile."""
        await self.take_over()
        self._tasks.append(asyncio.create_task(self._watch(), name="watch"))
        if self._has_janitor:
            self._tasks.append(asyncio.create_task(self.janitor.run(), name="janitor"))

    async def _watch(self) -> None:
        """End what has expired and what is idle, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            self.gate.end_expired()
            now_s = self._wall() / 1e9
            for connection in list(self.connections):
                connection.end_overdue(now_s)

    async def take_over(self) -> None:
        """Take the engine over from any earlier server, and begin the grace of its sessions."""
        await self._engine.take_over()
        self._service.may_have_lost = await recovery.prepare(self._engine)
        self.sessions.first_version = self.tenure.epoch << _EPOCH_SHIFT
        earlier = await self._engine.read(fencing.list_sessions)
        grace = Grace(earlier, self.sessions.clock, lambda record: self.janitor.end_record(record.id), wait=self._grace)
        self._service.grace = self.janitor.grace = grace

    def accept(self) -> Connection:
        """Return the protocol object of a connection that was just made."""
        return Connection(self._service, self.gate, self._limits, self.connections)

    async def end(self) -> None:
        """Answer what is in progress, close every connection, and leave the engine as one that ends in order does.

        No connection may be accepted any more.
        """
        if self._has_janitor:
            await self.janitor.settle(_SETTLE_S)
        await self._stop_tasks()
        self.gate.halves.close("the server is closing")
        stopped = await _all_within(_CLOSE_S, [connection.stop() for connection in self.connections])
        if not stopped or not await _all_within(_CLOSE_S, [connection.shut() for connection in self.connections]):
            await self._cut("the server is closing")
        await recovery.finish(self._engine)

    async def drop(self) -> None:
        """End at once, and answer nothing more: the authority is another's."""
        await self._cut("another metaserver has the authority")
        await self._stop_tasks()

    async def _cut(self, reason: str) -> None:
        cut = list(self.connections)
        for connection in cut:
            connection.abandon(reason)
        await asyncio.gather(*(connection.shut() for connection in cut))

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _all_within(delay_s: float, works: list[Coroutine[Any, Any, None]]) -> bool:
    """Do all of these; say whether they ended in time. Those that did not end when their connections are cut off."""
    tasks = [asyncio.create_task(work) for work in works]
    return not tasks or not (await asyncio.wait(tasks, timeout=delay_s))[1]
