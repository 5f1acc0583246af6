"""A running metaserver: its listening sockets, its connections and its janitor.

The engine is the caller's: it is opened before and closed after.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from metaserver import fencing, listener, recovery, wire
from metaserver.coherence import Coherence
from metaserver.connection import Connection, Limits
from metaserver.engine.base import Engine
from metaserver.fencing import Tenure
from metaserver.gate import Access, Gate
from metaserver.grace import Grace
from metaserver.janitor import Janitor
from metaserver.service import Service
from metaserver.sessions import FEED_CHANGES, Sessions
from metaserver.tls import Unlocking

#: Seconds that requests in progress get to end when the server is closed.
_CLOSE_S: Final = 5.0
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
    """A metaserver. ``lease_s`` is the length of the leases it gives, in seconds (0.1 to 3600).

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
        self._engine = engine
        self._grace = grace
        self.tenure = Tenure()
        self.sessions = Sessions(int(lease_s * 1000) * 1_000_000, clock, feed_changes)
        self.janitor = Janitor(engine, self.sessions, self.tenure, wall)
        self.coherence = self.janitor.coherence = Coherence(self.sessions, self.janitor.evict)
        self.connections: set[Connection] = set()
        self.gate = Gate(engine, access, limits.half_open, wall)
        self._service = Service(
            engine, self.tenure, self.sessions, self.coherence, self.janitor, self.gate, limits, wall
        )
        self._limits = limits
        self._access = access
        self._wall = wall
        self._has_janitor = janitor
        self._sockets: list[socket.socket] = []
        self._listening: list[asyncio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *addresses: str) -> list[str]:
        """Listen on addresses and return those they came to be (a TCP port of 0 is chosen by the kernel).

        What an earlier run left is cleared up in the background. Raises :exc:`ValueError` for what is not an address
        and :exc:`~metaserver.listener.ListenError` for one that cannot be listened on.
        """
        may_be_reached = self._access.insecure or self._access.tls is not None
        places = [wire.parse_address(address) for address in addresses]
        for place in places:
            self._sockets.append(listener.listen(place, may_be_reached))
        await self.take_over()
        for place, sock in zip(places, self._sockets, strict=True):
            accept = self.accept if isinstance(place, wire.UnixAddress) else self.accept_tcp
            self._listening.append(await asyncio.get_running_loop().create_server(accept, sock=sock))
        self._tasks.append(asyncio.create_task(self._watch(), name="watch"))
        if self._has_janitor:
            self._tasks.append(asyncio.create_task(self.janitor.run(), name="janitor"))
        return [listener.address_of(sock) for sock in self._sockets]

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
        return Connection(self._service, self.gate, self._limits, self.connections)

    def accept_tcp(self) -> asyncio.Protocol:
        """The same, of one over TCP, which begins with TLS if the metaserver has a certificate."""
        tls = self._access.tls
        if tls is None:
            return self.accept()
        unlocking = Unlocking(tls.context, self.accept, self._limits.hello_s, self.gate.leave)
        self.gate.enter(unlocking)
        return unlocking

    async def _watch(self) -> None:
        """End what has expired and what is idle, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            self.gate.end_expired()
            now_s = self._wall() / 1e9
            for connection in list(self.connections):
                connection.end_overdue(now_s)

    async def close(self) -> None:
        """Accept nothing more, answer what is in progress, close every connection and remove the socket's file.

        A second call does nothing.
        """
        if not any(listening.is_serving() for listening in self._listening):
            return
        for sock, listening in zip(self._sockets, self._listening, strict=True):
            listener.remove_socket(sock)
            listening.close()
        if self._has_janitor:
            await self.janitor.settle(_SETTLE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.gate.close()
        ends = [asyncio.create_task(connection.shut()) for connection in self.connections]
        if ends and (late := (await asyncio.wait(ends, timeout=_CLOSE_S))[1]):
            for connection in list(self.connections):
                connection.abandon()
            await asyncio.wait(late)
        await recovery.finish(self._engine, self.tenure)
