"""What each request means: which volume and session it concerns, and which verb of the namespace answers it.

Reads run on the engine's snapshot, writes in its transactions. A write looks at its session's deadline again inside
the transaction, because it may have waited there: what a client sent before its lease ran out is not committed after.
A committed change is in the volume's feed before its reply goes out.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from metaserver import namespace, wire
from metaserver.connection import Caller
from metaserver.engine.base import Engine, Transaction
from metaserver.errors import Refused, Unknown
from metaserver.janitor import Janitor
from metaserver.namespace import Context
from metaserver.sessions import Sessions

_SOFTWARE: Final = "bpfuse-metaserver"


class Service:
    """The requests of all connections of one server."""

    def __init__(self, engine: Engine, sessions: Sessions, janitor: Janitor) -> None:
        self._engine = engine
        self._sessions = sessions
        self._janitor = janitor
        self._losses = engine.losses
        self._welcome = wire.Welcome(wire.PROTOCOL_VERSION, _SOFTWARE, secrets.randbits(63))

    def welcome(self) -> wire.Welcome:
        """Return the answer to a Hello; its epoch is this run's own."""
        return self._welcome

    async def answer(self, caller: Caller, request: wire.Request) -> wire.Reply:
        """Answer any request but a Hello or a FetchDirectory; raise :exc:`~metaserver.errors.Refused`."""
        self._notice_losses()
        if (verb := namespace.READS.get(type(request))) is not None:
            reply: wire.Reply = await self._read(caller, verb, request)
            return reply
        if (change := namespace.WRITES.get(type(request))) is not None:
            return await self._write(caller, change, request)
        if isinstance(request, wire.Renew):
            return self._sessions.renew(caller.session(), request.seen)
        if isinstance(request, wire.Sync):
            return await self._sync(caller)
        if isinstance(request, wire.OpenSession):
            return await self._open_session(caller, request)
        if isinstance(request, wire.CloseSession):
            return self._close_session(caller)
        if isinstance(request, wire.CreateVolume):
            return await self._create_volume(request)
        raise Refused(wire.ErrorCode.INVALID, f"a {type(request).__name__} has no place here")

    async def pages(self, caller: Caller, request: wire.FetchDirectory) -> AsyncIterator[wire.DirectoryPage]:
        """Yield the pages of a directory fetch, all of one snapshot."""
        pages: list[wire.DirectoryPage] = await self._read(caller, namespace.READS[wire.FetchDirectory], request)
        pages.reverse()
        while pages:
            yield pages.pop()

    async def _read(self, caller: Caller, verb: Callable[..., Any], request: wire.Request) -> Any:
        session = caller.session()
        context = Context(session.volume, session.id, time.time_ns())
        return await self._engine.read(lambda snapshot: verb(snapshot, context, request))

    async def _write(self, caller: Caller, verb: Callable[..., Any], request: wire.Request) -> wire.Reply:
        session, author = caller.session(), caller.incarnation
        context = Context(session.volume, session.id, time.time_ns())

        def body(txn: Transaction) -> wire.Reply:
            session.check()
            reply: wire.Reply = verb(txn, context, request)
            return reply

        try:
            reply = await self._engine.write(body, lazy=getattr(request, "lazy", False))
        except Unknown:
            self._sessions.feed(session.volume).forget_all()
            raise
        self._sessions.committed(session.volume, author, request, reply)
        self._janitor.changed(session.volume)
        return reply

    def _notice_losses(self) -> None:
        if self._losses != self._engine.losses:
            self._losses = self._engine.losses
            self._sessions.forget_everything()

    async def _sync(self, caller: Caller) -> wire.Done:
        session = caller.session()
        try:
            await self._engine.sync()
        finally:
            lost, session.losses = session.losses != self._engine.losses, self._engine.losses
        if lost:
            raise Refused(wire.ErrorCode.INTERNAL, "changes that were acknowledged could not be made durable")
        return wire.Done()

    async def _open_session(self, caller: Caller, request: wire.OpenSession) -> wire.SessionOpened:
        volume = await self._engine.read(lambda snapshot: namespace.open_volume(snapshot, request.volume))
        caller.must_be_free()
        session, resumed = self._sessions.open(volume, request.client, request.resume)
        caller.bind(session)
        if not resumed:
            session.losses = self._engine.losses
        return wire.SessionOpened(
            session.id,
            self._sessions.lease_ns // 1_000_000,
            self._sessions.feed(volume).version,
            volume.store,
            volume.inline_limit,
            resumed,
            volume.identity,
            self._engine.is_lazy,
        )

    def _close_session(self, caller: Caller) -> wire.Done:
        session = caller.session()
        self._sessions.end(session)
        self._janitor.ended(session)
        return wire.Done()

    async def _create_volume(self, request: wire.CreateVolume) -> wire.Done:
        await self._engine.write(lambda txn: namespace.create_volume(txn, request, time.time_ns()))
        await self._engine.sync()
        return wire.Done()
