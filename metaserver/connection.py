"""One client's connection: frames in, requests started, replies out, and the limits that keep a client in its place.

* The first frame is a Hello and comes in time, or the connection ends. Nothing else is looked at until it is known who
  the client is (see gate.py).
* At most ``in_flight`` requests of a connection run at once, and ``identity_in_flight`` of all those of one identity.
  What a client sends beyond that stays in its socket.
* Who has no session and asks for nothing is cut off after ``idle_s``.
* Replies are not buffered without end: while the client does not take them no request is started and no page of a
  stream is read, and after ``stall_s`` of that it is cut off.
* Breaks go out as they come, whatever else is waiting, and acknowledgements and returned leases are taken in as they
  come: none of these is a request.
* A frame that is not of the protocol ends the connection, with a Failure of id 0 that says why. No other connection
  is touched by it.

Everything runs on the event loop's thread. A request once started runs to its end even if its client is gone: a
change that is committed must reach the feed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final, NamedTuple, Protocol, cast

from metaserver import wire
from metaserver.errors import Conflict, EngineClosed, EngineFull, EngineUnavailable, Fenced, Refused, Unknown
from metaserver.gate import Account, Gate, Unguarded
from metaserver.identities import Shown
from metaserver.sessions import Session

_log = logging.getLogger(__name__)


#: What a client is told when the engine could not do it; nothing was committed, unless that is unknown.
_ENGINE_CODES: Final[dict[type[Exception], wire.ErrorCode]] = {
    EngineFull: wire.ErrorCode.NO_SPACE,
    Conflict: wire.ErrorCode.BUSY,
    EngineClosed: wire.ErrorCode.BUSY,
    EngineUnavailable: wire.ErrorCode.INTERNAL,
    Fenced: wire.ErrorCode.STALE_SESSION,
    Unknown: wire.ErrorCode.INTERNAL,
}


class Limits(NamedTuple):
    """What a client may take. Times are in seconds."""

    hello_s: float = 5.0
    stall_s: float = 30.0
    in_flight: int = 128
    #: Directory fetches that may run at once, of those in flight.
    streams: int = 4
    connections: int = 4096
    #: Connections that have not said yet who they are.
    half_open: int = 1024
    #: Connections, requests at once, and sessions of one identity.
    identity_connections: int = 256
    identity_in_flight: int = 1024
    identity_sessions: int = 256
    #: Seconds that a connection without a session may ask for nothing.
    idle_s: float = 120.0
    #: Bytes of replies that may wait for a client before it counts as slow.
    unsent_bytes: int = 1024 * 1024


class Caller:
    """Who is at the other end: the session that was opened on this connection, if any.

    ``push`` sends a frame over the connection; the session has it while it is bound.
    """

    #: Whose connection it is. Set before anything is asked for.
    account: Account

    def __init__(self, push: Callable[[bytes], None]) -> None:
        self._session: Session | None = None
        self._push = push
        self._told_by: Callable[[bytes], None] = push
        self.incarnation = 0

    def must_be_free(self) -> None:
        """Raise :exc:`Refused` (INVALID) if a live session is bound to this connection."""
        if self._session is not None and self._session.is_live and self._session.incarnation == self.incarnation:
            raise Refused(wire.ErrorCode.INVALID, "a session is open on this connection already")

    def bind(self, session: Session) -> None:
        """The session belongs to this connection now, and to no earlier one; it gets the breaks that it missed."""
        self._session = session
        self.incarnation = session.incarnation
        guard, push = session.guard, self._push
        if guard is not None:
            push = lambda frame: self._push(guard.frame_outward(frame))  # noqa: E731
        session.push = self._told_by = push
        for breaking in session.pending.values():
            push(breaking.frame)

    def gone(self) -> None:
        """The connection is lost."""
        if self._session is not None and self._session.push == self._told_by:
            self._session.push = None

    def bound(self) -> Session | None:
        """Return the session if it belongs to this connection, whether its lease has run out or not."""
        session = self._session
        return session if session is not None and session.incarnation == self.incarnation else None

    def must_be_admin(self) -> None:
        """Raise :exc:`Refused` (ACCESS_DENIED) unless the client may make volumes and identities."""
        if not self.account.identity.admin:
            raise Refused(wire.ErrorCode.ACCESS_DENIED, "the identity is not the one of an administrator")

    def must_see(self, volume: str) -> None:
        """Raise :exc:`Refused` (NO_SUCH_VOLUME) if the client's identity has no part in a volume."""
        volumes = self.account.identity.volumes
        if volumes is not None and volume not in volumes:
            raise Refused(wire.ErrorCode.NO_SUCH_VOLUME, f"there is no volume {volume!r}")

    def session(self) -> Session:
        """Return the live session; raise :exc:`Refused`: INVALID if none was opened, else STALE_SESSION."""
        if self._session is None:
            raise Refused(wire.ErrorCode.INVALID, "no session is open on this connection")
        self._session.check()
        if self._session.incarnation != self.incarnation:
            raise Refused(wire.ErrorCode.STALE_SESSION, "the session was resumed on another connection")
        return self._session


class Answer(NamedTuple):
    """A reply, and the break of number 0 that is to be sent before it, if any."""

    reply: wire.Reply
    notice: wire.Break | None = None


class Service(Protocol):
    """What answers the requests. An answer is to be sent in the turn of the loop in which it is returned."""

    def welcome(self) -> wire.Welcome: ...

    async def answer(self, caller: Caller, frame: wire.Frame) -> Answer: ...

    def pages(self, caller: Caller, request: wire.FetchDirectory) -> AsyncIterator[Answer]: ...

    def events(self, caller: Caller, request: wire.FollowEvents) -> AsyncGenerator[wire.EventPage, None]: ...

    def acknowledge(self, caller: Caller, request: wire.Acknowledge) -> None: ...

    def returned(self, caller: Caller, request: wire.ReturnLeases) -> None: ...


class _Gone(Exception):
    """The client is gone and nobody waits for the rest of its stream."""


class Connection(asyncio.Protocol):
    """The protocol object of one accepted socket; ``connections`` holds all those of its server."""

    def __init__(
        self, service: Service, gate: Gate | Unguarded, limits: Limits, connections: dict[Connection, None]
    ) -> None:
        self._service = service
        self._gate = gate
        self._limits = limits
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._splitter = wire.FrameSplitter(wire.MAX_HELLO)
        self._caller = Caller(self._push)
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams = asyncio.Semaphore(limits.streams)
        self._followers: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None
        self._account: Account | None = None
        #: It is being found out who the client is.
        self._deciding: asyncio.Task[None] | None = None
        #: When the certificate ends that was shown, in seconds since 1970; 0: never.
        self._until_s = 0.0
        self._active_s = 0.0
        self._closing = False
        self._stopping = False
        self._reading = True
        self._timer: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the client has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.unsent_bytes)
        self._connections[self] = None
        self._gate.halves.enter(self)
        if self._closing:
            return
        wire.keep_alive(self._transport)
        self._cut_after(self._limits.hello_s, "no handshake came in time")

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._transport = None
        self._gate.halves.leave(self)
        if self._deciding is not None:
            self._deciding.cancel()
        if self._account is not None:
            self._gate.closed(self._account, self)
            self._account.waiting.pop(self._pump, None)
        self._caller.gone()
        self._stop_timer()
        self._writable.set()
        self._end_followers()
        self._release()

    def data_received(self, data: bytes) -> None:
        if not self._closing:
            self._splitter.feed(data)
            self._pump()

    def pause_writing(self) -> None:
        self._writable.clear()
        self._cut_after(self._limits.stall_s, "it does not take its replies")

    def resume_writing(self) -> None:
        self._writable.set()
        if not self._closing:
            self._stop_timer()
            self._pump()

    # Requests

    def _pump(self) -> None:
        """Start the requests that are here, as many as may run."""
        try:
            while self._may_start() and (body := self._splitter.next_body()) is not None:
                self._received(wire.decode_frame(body))
        except wire.Malformed as error:
            _log.warning("%s: %s", self, error)
            self._give_up(0, wire.ErrorCode.MALFORMED, str(error))
        self._read_if(self._may_start())

    def _may_start(self) -> bool:
        if self._stopping:
            return not self._closing
        if self._closing or self._deciding is not None or not self._writable.is_set():
            return False
        return len(self._tasks) < self._limits.in_flight and self._has_room()

    def _has_room(self) -> bool:
        """Whether the identity may have another request under way; if not, this connection goes on when it may."""
        account = self._account
        if account is None or not account.is_named or account.in_flight < self._limits.identity_in_flight:
            return True
        account.waiting[self._pump] = None
        return False

    def _received(self, frame: wire.Frame) -> None:
        account = self._account
        if account is None:
            self._greet(frame.id, frame.request)
            return
        if isinstance(frame.request, wire.Acknowledge):
            self._service.acknowledge(self._caller, frame.request)
        elif isinstance(frame.request, wire.ReturnLeases):
            self._service.returned(self._caller, frame.request)
        if self._stopping or isinstance(frame.request, wire.Acknowledge | wire.ReturnLeases):
            return
        account.in_flight += 1
        task = self._loop.create_task(self._run(frame))
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        if isinstance(frame.request, wire.FollowEvents):
            self._followers.add(task)
            task.add_done_callback(self._followers.discard)

    def _greet(self, request_id: int, request: wire.Request) -> None:
        if not isinstance(request, wire.Hello):
            raise wire.Malformed("the first frame is not a Hello")
        if request.version != wire.PROTOCOL_VERSION:
            message = f"protocol version {request.version}; this metaserver speaks {wire.PROTOCOL_VERSION}"
            self._give_up(request_id, wire.ErrorCode.UNSUPPORTED, message)
            return
        assert self._transport is not None
        shown = self._gate.shown(self._transport, request.token)
        if shown is not None:
            self._until_s = shown[1]
            self._deciding = self._loop.create_task(self._decide(request_id, self._transport, shown[0]))
            return
        try:
            self._admit(request_id, self._gate.without_identity(self._transport))
        except Refused as refused:
            self._turn_away(request_id, refused)

    async def _decide(self, request_id: int, transport: asyncio.Transport, shown: Shown) -> None:
        """Find out who a client is; the time for the handshake still runs."""
        try:
            account = await self._gate.with_identity(transport, shown)
            self._deciding = None
            self._admit(request_id, account)
            self._pump()
        except Refused as refused:
            self._turn_away(request_id, refused)
        except tuple(_ENGINE_CODES) as error:
            _log.error("%s: %s", self, error)
            self._give_up(request_id, _ENGINE_CODES[type(error)], str(error))
        except Exception:
            _log.exception("%s: finding out who it is failed", self)
            self._give_up(request_id, wire.ErrorCode.INTERNAL, "an internal error, see the metaserver's log")

    def _admit(self, request_id: int, account: Account) -> None:
        limits = self._limits
        if self._closing:
            return
        has_many = account.is_named and len(account.connections) >= limits.identity_connections
        if has_many or self._gate.admitted >= limits.connections:
            raise Refused(wire.ErrorCode.BUSY, "there are too many connections")
        self._gate.halves.leave(self)
        self._gate.opened(account, self)
        self._account = self._caller.account = account
        self._active_s = self._loop.time()
        self._stop_timer()
        self._splitter.limit = wire.MAX_REQUEST
        self._send(request_id, self._service.welcome())

    def _turn_away(self, request_id: int, refused: Refused) -> None:
        _log.warning("%s is turned away: %s", self, refused)
        self._give_up(request_id, refused.code, refused.message)

    async def _run(self, frame: wire.Frame) -> None:
        """Answer one request: the place where every exception ends."""
        request_id, request = frame.id, frame.request
        try:
            if isinstance(request, wire.FetchDirectory):
                await self._fetch(request_id, request)
            elif isinstance(request, wire.FollowEvents):
                await self._follow(request_id, request)
            else:
                self._answer(request_id, await self._service.answer(self._caller, frame))
        except _Gone:
            pass
        except Refused as refused:
            self._send(request_id, failure(refused.code, refused.message))
        except tuple(_ENGINE_CODES) as error:
            _log.error("%s: %s: %s", self, type(request).__name__, error)
            self._send(request_id, failure(_ENGINE_CODES[type(error)], str(error)))
        except Exception:
            _log.exception("%s: %s failed", self, type(request).__name__)
            self._send(request_id, failure(wire.ErrorCode.INTERNAL, "an internal error, see the metaserver's log"))

    async def _fetch(self, request_id: int, request: wire.FetchDirectory) -> None:
        async with self._streams:
            async for page in self._service.pages(self._caller, request):
                self._answer(request_id, page)
                await self._taken()

    async def _follow(self, request_id: int, request: wire.FollowEvents) -> None:
        """Stream events, to the end or until the connection's; unlike a change it may be broken off at any time."""
        if len(self._followers) > 1:
            raise Refused(wire.ErrorCode.BUSY, "events are followed on this connection already")
        async with contextlib.aclosing(self._service.events(self._caller, request)) as pages:
            async for page in pages:
                self._send(request_id, page)
                await self._taken()

    async def _taken(self) -> None:
        """Wait until the client is not behind with what it was sent; raise :exc:`_Gone`."""
        await self._writable.wait()
        if self._closing:
            raise _Gone

    def _end_followers(self) -> None:
        for task in self._followers:
            task.cancel()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._active_s = self._loop.time()
        if self._account is not None:
            self._account.finished()
        if not self._closing:
            self._pump()
        self._release()

    def _release(self) -> None:
        if self._transport is None and not self._tasks:
            self._connections.pop(self, None)
            self._ended.set()

    # Replies and the end

    def _answer(self, request_id: int, answer: Answer) -> None:
        if answer.notice is not None:
            self._send(0, answer.notice)
        self._send(request_id, answer.reply)

    def _push(self, frame: bytes) -> None:
        if not self._closing and self._transport is not None:
            self._transport.write(frame)

    def _send(self, request_id: int, reply: wire.Reply) -> None:
        if self._closing or self._transport is None:
            return
        frame = wire.encode_reply(request_id, reply)
        if len(frame) > wire.HEADER_BYTES + wire.MAX_REPLY:
            _log.error("%s: a %s of %d bytes is over the limit", self, type(reply).__name__, len(frame))
            frame = wire.encode_reply(request_id, failure(wire.ErrorCode.INTERNAL, "the reply is too large"))
        self._transport.write(frame)

    def _give_up(self, request_id: int, code: wire.ErrorCode, message: str) -> None:
        """Say why and close, as soon as the client has taken it."""
        self._send(request_id, failure(code, message))
        self._close()

    def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._writable.set()
        if self._transport is not None:
            self._transport.close()
        self._cut_after(self._limits.stall_s, "it does not take its last reply")

    def cut(self, reason: str) -> None:
        """End the connection now; what was not sent is lost."""
        _log.warning("%s is cut off: %s", self, reason)
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def end_overdue(self, now_s: float) -> None:
        """End the connection if it is idle, or what it has shown has ended; ``now_s`` is the time since 1970."""
        if self._account is None or self._closing:
            return
        if self._until_s and now_s >= self._until_s:
            self.cut("its certificate has expired")
        elif not self._tasks and self._loop.time() - self._active_s > self._limits.idle_s:
            session = self._caller.bound()
            if session is None or not session.is_live:
                self.cut("it is idle")

    def abandon(self, reason: str) -> None:
        """End the connection, and the requests that wait for others, without an answer: the server ends."""
        self.cut(reason)
        for task in self._tasks:
            task.cancel()

    def _cut_after(self, delay_s: float, reason: str) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(delay_s, self.cut, reason)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _read_if(self, wanted: bool) -> None:
        if self._transport is None or self._transport.is_closing() or wanted == self._reading:
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    async def stop(self) -> None:
        """Start nothing more, and return when what runs was answered.

        Acknowledgements are taken meanwhile, because what runs on other connections may wait for them. Requests that
        come are dropped: their client sends them again, over its next connection.
        """
        self._stopping = True
        self._end_followers()
        self._pump()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def shut(self) -> None:
        """Close the connection as soon as the client has taken its replies; return when it is closed."""
        self._close()
        await self._ended.wait()

    def __str__(self) -> str:
        peer = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"client {peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "local client"


def failure(code: wire.ErrorCode, message: str) -> wire.Failure:
    """Return a Failure whose message is short enough for the wire."""
    return wire.Failure(code, message[:1000])
