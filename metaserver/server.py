"""A running metaserver: its listening socket, its connections and its janitor.

The engine is the caller's: it is opened before and closed after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from metaserver import fencing, listener, recovery, wire
from metaserver.coherence import Coherence
from metaserver.connection import Connection, Limits
from metaserver.engine.base import Engine
from metaserver.fencing import Tenure
from metaserver.grace import Grace
from metaserver.janitor import Janitor
from metaserver.service import Service
from metaserver.sessions import FEED_CHANGES, Sessions

#: Seconds that requests in progress get to end when the server is closed.
_CLOSE_S: Final = 5.0
#: Seconds that the orphans of ended sessions get to be deleted then.
_SETTLE_S: Final = 1.0
#: Versions of the change feed begin with the server's epoch.
_EPOCH_SHIFT: Final = 32


def boottime_ns() -> int:
    """Return the time since boot in nanoseconds; unlike the monotonic clock it counts suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Server:
    """A metaserver on one address. ``lease_s`` is the length of the leases it gives, in seconds (0.1 to 3600).

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
        feed_changes: int = FEED_CHANGES,
        grace: bool = True,
        janitor: bool = True,
        clock: Callable[[], int] = boottime_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._engine = engine
        self._grace = grace
        self.tenure = Tenure()
        self.sessions = Sessions(int(lease_s * 1000) * 1_000_000, clock, feed_changes)
        self.janitor = Janitor(engine, self.sessions, self.tenure, wall)
        self.coherence = self.janitor.coherence = Coherence(self.sessions, self.janitor.evict)
        self.connections: set[Connection] = set()
        self._service = Service(engine, self.tenure, self.sessions, self.coherence, self.janitor, wall)
        self._limits = limits
        self._has_janitor = janitor
        self._listening: asyncio.Server | None = None
        self._cleaning: asyncio.Task[None] | None = None

    async def start(self, address: str, *, insecure: bool = False) -> str:
        """Listen on an address and return the one it came to be (a TCP port of 0 is chosen by the kernel).

        What an earlier run left is cleared up in the background. Raises :exc:`ValueError` for what is not an address
        and :exc:`~metaserver.listener.ListenError` for one that cannot be listened on.
        """
        sock = listener.listen(wire.parse_address(address), insecure)
        self._socket = sock
        await self.take_over()
        self._listening = await asyncio.get_running_loop().create_server(self.accept, sock=sock)
        if self._has_janitor:
            self._cleaning = asyncio.create_task(self.janitor.run(), name="janitor")
        return listener.address_of(sock)

    async def take_over(self) -> None:
        """Take the engine over from any earlier server, and begin the grace of its sessions."""
        await self.tenure.begin(self._engine)
        self._service.may_have_lost = await recovery.prepare(self._engine)
        self.sessions.first_version = self.tenure.epoch << _EPOCH_SHIFT
        earlier = await self._engine.read(fencing.list_sessions)
        grace = Grace(earlier, self.sessions.clock, lambda record: self.janitor.end_record(record.id), wait=self._grace)
        self._service.grace = self.janitor.grace = grace

    def accept(self) -> Connection:
        """Return the protocol object of a connection that was just made."""
        return Connection(self._service, self._limits, self.connections)

    async def close(self) -> None:
        """Accept nothing more, answer what is in progress, close every connection and remove the socket's file.

        A second call does nothing.
        """
        if self._listening is None or not self._listening.is_serving():
            return
        listener.remove_socket(self._socket)
        self._listening.close()
        if self._cleaning is not None:
            await self.janitor.settle(_SETTLE_S)
            self._cleaning.cancel()
            await asyncio.wait({self._cleaning})
        ends = [asyncio.create_task(connection.shut()) for connection in self.connections]
        if ends and (late := (await asyncio.wait(ends, timeout=_CLOSE_S))[1]):
            for connection in list(self.connections):
                connection.abandon()
            await asyncio.wait(late)
        await recovery.finish(self._engine, self.tenure)
