"""Where a metaserver listens, from its start to its end, and whether it serves there or stands by.

It stands for the authority over its engine (:mod:`metaserver.engine.authority`). While another one has it, clients are
told where that is. When it has the authority itself, it serves what is accepted from then on, and whoever was told
otherwise is cut off, to ask again. When it loses it, all clients are cut off, without an answer to anything, and it
stands by anew: its own doubtful commits are found by those clients at the next authority.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Final

from metaserver import listener, wire
from metaserver.connection import Connection, Limits
from metaserver.engine.authority import ANNOUNCE_S, Candidate
from metaserver.engine.base import Engine
from metaserver.errors import EngineBusy, EngineError
from metaserver.gate import Access, Halves, Unguarded
from metaserver.server import Server
from metaserver.standby import Standby
from metaserver.tls import Tls, Unlocking

_log = logging.getLogger(__name__)

#: Seconds between two looks of a standby at who has the authority.
_LOOK_S: Final = 0.2
#: Seconds for which one that is not to stand by looks: ``bpfuse events`` may have the engine of an embedded volume for
#: a moment. Too short for the holder to be taken for one that hangs.
_ALONE_S: Final = 3.0
#: Seconds before a metaserver that has lost the authority, or could not use it, stands for it again.
_PAUSE_S: Final = 0.5
#: Seconds before connections are accepted again after that has failed.
_AGAIN_S: Final = 0.1
#: Hosts that mean every address of this machine.
_ANY: Final = ("0.0.0.0", "::")


class Front:
    """One metaserver. ``new_candidate`` stands for the authority under the address that clients are told;
    ``new_server`` serves from the engine once that is won.
    """

    def __init__(
        self,
        new_candidate: Callable[[str], Candidate],
        new_server: Callable[[Engine], Server],
        limits: Limits = Limits(),  # noqa: B008 - immutable
        access: Access = Access(),  # noqa: B008
    ) -> None:
        self._new_candidate = new_candidate
        self._new_server = new_server
        self._limits = limits
        self._access = access
        #: Connections until TLS is agreed on.
        self.halves = Halves(limits.half_open)
        self._unguarded = Unguarded(limits.half_open)
        self._sockets: list[socket.socket] = []
        #: Where it listens.
        self.addresses: list[str] = []
        #: Of the term that runs: the candidacy, its end, and the server once it has the authority.
        self._standing: Candidate
        self._lost: asyncio.Event
        self.server: Server | None = None
        self._standby: Standby
        self._told: dict[Connection, None] = {}
        self._listening: list[asyncio.Server] = []
        #: Tasks that accept connections of TLS, and tasks of those until it is agreed on.
        self._accepting: list[asyncio.Task[None]] = []
        self._unlocking: set[asyncio.Task[None]] = set()
        self._terms: asyncio.Task[None] | None = None
        #: Where all metaservers of the engine can be reached, as far as is known; and what finds that out.
        self._group: list[str] = []
        self._announcing: asyncio.Task[None] | None = None

    async def start(self, *addresses: str, advertise: str | None = None, alone: bool = False) -> str:
        """Listen on addresses and return what the first came to be (a TCP port of 0 is chosen by the kernel).

        Clients are told the first that is TCP; ``advertise`` is what they are told instead. ``alone``: raise
        :exc:`EngineBusy` rather than stand by. Raises :exc:`ValueError` for what is not an address,
        :exc:`~metaserver.listener.ListenError` for one that cannot be listened on, and :exc:`EngineUnusable`.
        """
        places = [wire.parse_address(address) for address in addresses]
        may_be_reached = self._access.insecure or self._access.tls is not None
        try:
            for place in places:
                self._sockets.append(listener.listen(place, may_be_reached))
            self.addresses = [listener.address_of(sock) for sock in self._sockets]
            self._advertised = _reachable(self.addresses) if advertise is None else advertise
            await self._begin(alone)
        except BaseException:
            for sock in self._sockets:
                listener.remove_socket(sock)
                sock.close()
            raise
        for place, sock in zip(places, self._sockets, strict=True):
            if self._access.tls is not None and isinstance(place, wire.TcpAddress):
                self._accepting.append(asyncio.create_task(self._accept_tls(sock, self._access.tls)))
            else:
                self._listening.append(await asyncio.get_running_loop().create_server(self._accept, sock=sock))
        if not alone:
            if not self._advertised:
                _log.warning("clients cannot be told of this metaserver: it has no --advertise")
            self._begin_announcing()
        self._terms = asyncio.create_task(self._run(), name="authority")
        return self.addresses[0]

    async def _begin(self, alone: bool) -> None:
        self._stand()
        try:
            await self._lead(await self._take(_ALONE_S if alone else 0.0))
        except EngineBusy:
            if alone:
                raise
            await self._look()
        except BaseException:
            await self._standing.resign()
            raise

    async def _take(self, patience_s: float) -> Engine:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + patience_s
        while True:
            try:
                return await self._standing.take()
            except EngineBusy as error:
                if loop.time() >= deadline_s:
                    raise
                _log.debug("%s; looking again", error)
            await asyncio.sleep(_LOOK_S)

    @property
    def accepts(self) -> bool:
        """Whether clients may come."""
        return bool(self._sockets)

    async def close(self) -> None:
        """Accept nothing more; end in order if this one serves: the next one does at once. Twice does no harm."""
        if not self._sockets or self._terms is None:
            return
        for sock in self._sockets:
            listener.remove_socket(sock)
        for listening in self._listening:
            listening.close()
        for task in self._accepting:
            task.cancel()
        if self._accepting:
            await asyncio.wait(self._accepting)
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        self.halves.close("the metaserver ends")
        self._terms.cancel()
        await asyncio.wait({self._terms})
        self._cut_told("the metaserver ends")
        await self._stop_announcing()
        server, self.server = self.server, None
        if server is not None:
            await server.end()
        await self._standing.resign()

    # Connections

    def _accept(self) -> Connection:
        if self.server is not None:
            return self.server.accept()
        return Connection(self._standby, self._unguarded, self._limits, self._told)

    async def _accept_tls(self, sock: socket.socket, tls: Tls) -> None:
        """Accept connections, until cancelled."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(sock)
            except OSError as error:
                _log.error("a connection cannot be accepted: %s", error)
                await asyncio.sleep(_AGAIN_S)
                continue
            task = asyncio.create_task(self._unlock(Unlocking(accepted, tls.context, self._limits.hello_s)))
            self._unlocking.add(task)
            task.add_done_callback(self._unlocking.discard)

    async def _unlock(self, unlocking: Unlocking) -> None:
        self.halves.enter(unlocking)
        server = self.server
        try:
            connection = await unlocking.run(self._accept)
        finally:
            self.halves.leave(unlocking)
        if connection is not None and self.server is not server:
            connection.cut("it has become, or ceased to be, the authority meanwhile")

    def _cut_told(self, reason: str) -> None:
        for connection in list(self._told):
            connection.cut(reason)

    # Terms

    async def _run(self) -> None:
        while True:
            while self.server is None:
                await self._win()
            await self._lost.wait()
            server, self.server = self.server, None
            if server is not None:
                await server.drop()
            await self._give_up()

    async def _win(self) -> None:
        """Stand by until this one serves, or could not though it had the authority."""
        looking = asyncio.create_task(self._keep_looking())
        try:
            await self._lead(await self._standing.wait())
        except EngineError as error:
            _log.error("the authority cannot be taken: %s", error)
            await self._give_up()
        finally:
            looking.cancel()

    def _stand(self) -> None:
        lost = self._lost = asyncio.Event()
        self._standing = self._new_candidate(self._advertised)
        self._standing.on_lost = lambda why: self._lose(lost, why)
        self._standby = Standby(self._standing)

    async def _lead(self, engine: Engine) -> None:
        lost = self._lost
        server = self._new_server(engine)
        server.metaservers = lambda: self._group
        server.on_fenced(lambda: self._lose(lost, "another metaserver has taken over the engine"))
        try:
            await server.begin()
        except BaseException:
            await server.drop()
            raise
        self.server = server
        _log.info("%s has the authority, epoch %d", self.addresses[0], server.tenure.epoch)
        self._cut_told("this metaserver has the authority now")

    def _lose(self, lost: asyncio.Event, why: str) -> None:
        if not lost.is_set():
            _log.error("the authority is lost: %s", why)
            lost.set()

    async def _give_up(self) -> None:
        """End a term that came to nothing or was lost, and stand again after a while."""
        announces = await self._stop_announcing()
        with contextlib.suppress(EngineError):
            await self._standing.resign()
        self._stand()
        if announces:
            self._begin_announcing()
        await asyncio.sleep(_PAUSE_S)

    # The others

    def _begin_announcing(self) -> None:
        self._announcing = asyncio.create_task(self._announce(), name="announcing")

    async def _stop_announcing(self) -> bool:
        """Be silent; say whether this one was not."""
        announcing, self._announcing = self._announcing, None
        if announcing is None:
            return False
        announcing.cancel()
        await asyncio.wait({announcing})
        return True

    async def _announce(self) -> None:
        """Say that this one is there, again and again, and find out who else is."""
        fails = False
        while True:
            try:
                self._group = sorted(await self._standing.announce())[: wire.MAX_METASERVERS]
                fails = False
            except EngineError as error:
                if not fails:
                    _log.warning("it cannot be found out which metaservers there are: %s", error)
                fails = True
            await asyncio.sleep(ANNOUNCE_S)

    async def _keep_looking(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> None:
        try:
            await self._standby.look()
        except EngineError as error:
            _log.warning("it cannot be found out who has the authority: %s", error)


def _reachable(addresses: list[str]) -> str:
    """Return the first address of TCP, or else the first, as clients may be told it; nothing if it says only "any"."""
    places = [wire.parse_address(address) for address in addresses]
    for place in places:
        if isinstance(place, wire.TcpAddress):
            return "" if place.host in _ANY else str(place)
    return addresses[0]
