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
from collections.abc import Callable
from typing import Final

from metaserver import listener, wire
from metaserver.connection import Connection, Limits
from metaserver.engine.authority import Candidate
from metaserver.engine.base import Engine
from metaserver.errors import EngineBusy, EngineError
from metaserver.server import Server
from metaserver.standby import Standby

_log = logging.getLogger(__name__)

#: Seconds between two looks of a standby at who has the authority.
_LOOK_S: Final = 0.2
#: Seconds before a metaserver that has lost the authority, or could not use it, stands for it again.
_PAUSE_S: Final = 0.5
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
    ) -> None:
        self._new_candidate = new_candidate
        self._new_server = new_server
        self._limits = limits
        #: Of the term that runs: the candidacy, its end, and the server once it has the authority.
        self._standing: Candidate
        self._lost: asyncio.Event
        self.server: Server | None = None
        self._standby: Standby
        self._told: set[Connection] = set()
        self._listening: asyncio.Server | None = None
        self._terms: asyncio.Task[None] | None = None

    async def start(
        self, address: str, *, advertise: str | None = None, insecure: bool = False, alone: bool = False
    ) -> str:
        """Listen on an address and return the one it came to be (a TCP port of 0 is chosen by the kernel).

        ``advertise`` is what clients are told instead. ``alone``: raise :exc:`EngineBusy` rather than stand by. Raises
        :exc:`ValueError` for what is not an address, :exc:`~metaserver.listener.ListenError` for one that cannot be
        listened on, and :exc:`EngineUnusable`.
        """
        self._socket = listener.listen(wire.parse_address(address), insecure)
        address = self._address = listener.address_of(self._socket)
        self._advertised = _reachable(address) if advertise is None else advertise
        try:
            await self._begin(alone)
        except BaseException:
            listener.remove_socket(self._socket)
            self._socket.close()
            raise
        self._listening = await asyncio.get_running_loop().create_server(self._accept, sock=self._socket)
        self._terms = asyncio.create_task(self._run(), name="authority")
        return address

    async def _begin(self, alone: bool) -> None:
        self._stand()
        try:
            await self._lead(await self._standing.take())
        except EngineBusy:
            if alone:
                raise
            await self._look()
        except BaseException:
            await self._standing.resign()
            raise

    @property
    def accepts(self) -> bool:
        """Whether clients may come."""
        return self._listening is not None

    async def close(self) -> None:
        """Accept nothing more; end in order if this one serves: the next one does at once. Twice does no harm."""
        if self._listening is None or self._terms is None:
            return
        listener.remove_socket(self._socket)
        self._listening.close()
        self._listening = None
        self._terms.cancel()
        await asyncio.wait({self._terms})
        self._cut_told("the metaserver ends")
        server, self.server = self.server, None
        if server is not None:
            await server.end()
        await self._standing.resign()

    # Connections

    def _accept(self) -> Connection:
        if self.server is not None:
            return self.server.accept()
        return Connection(self._standby, self._limits, self._told)

    def _cut_told(self, reason: str) -> None:
        for connection in list(self._told):
            connection.cut(reason)

    # Terms

    async def _run(self) -> None:
        while True:
            if self.server is None:
                await self._win()
            await self._lost.wait()
            server, self.server = self.server, None
            if server is not None:
                await server.drop()
            await self._give_up()

    async def _win(self) -> None:
        """Stand by until this one serves."""
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
        server.on_fenced(lambda: self._lose(lost, "another metaserver has taken over the engine"))
        try:
            await server.begin()
        except BaseException:
            await server.drop()
            raise
        self.server = server
        _log.info("%s has the authority, epoch %d", self._address, server.tenure.epoch)
        self._cut_told("this metaserver has the authority now")

    def _lose(self, lost: asyncio.Event, why: str) -> None:
        if not lost.is_set():
            _log.error("the authority is lost: %s", why)
            lost.set()

    async def _give_up(self) -> None:
        """End a term that came to nothing or was lost, and stand again after a while."""
        with contextlib.suppress(EngineError):
            await self._standing.resign()
        self._stand()
        await asyncio.sleep(_PAUSE_S)

    async def _keep_looking(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> None:
        try:
            await self._standby.look()
        except EngineError as error:
            _log.warning("it cannot be found out who has the authority: %s", error)


def _reachable(address: str) -> str:
    """Return the address of a socket as clients may be told it; nothing if it says only "any"."""
    place = wire.parse_address(address)
    return "" if isinstance(place, wire.TcpAddress) and place.host in _ANY else address
