"""One connection to a metaserver: requests out, replies matched to them by id.

Everything runs on the event loop's thread. Many calls can be in flight; their replies come in any order. A connection
is used once: when it is lost, for whatever reason, every call in flight raises :exc:`Disconnected` and so does every
later one. Reconnecting, sessions and retries are :mod:`fuseclient.worker.session`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final, TypeVar, cast

from fuseclient.credentials import Credentials, Unusable, is_loopback
from metaserver import wire

_log = logging.getLogger(__name__)

_SOFTWARE: Final = "bpfuse"
#: Seconds that connecting and the handshake may take together.
CONNECT_TIMEOUT_S: Final = 5.0

_Reply = TypeVar("_Reply", bound=wire.Reply)
_Page = TypeVar("_Page", wire.DirectoryPage, wire.EventPage)


class Refused(Exception):
    """The metaserver answered that it will not do this; ``code`` says why.

    Nothing was changed, unless the code is INTERNAL: then a change may or may not have been made.
    """

    def __init__(self, code: wire.ErrorCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


class Disconnected(ConnectionError):
    """There is no connection, or it was lost before the reply came: a change may or may not have been made."""


class NotSent(Disconnected):
    """The connection was lost before the request was sent: nothing was changed."""


async def connect(address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Connection:
    """Connect to "unix:/path" or "tcp:host:port" and shake hands; a query says how (see credentials.py).

    Raises :exc:`Disconnected` when there is no answer in time or it is not to be believed, :exc:`Refused` (UNSUPPORTED)
    when the metaserver speaks another version of the protocol, NOT_AUTHENTICATED when it does not know the client, and
    :exc:`ValueError` when ``address`` is not an address.
    """
    place, _, query = address.partition("?")
    target, credentials = wire.parse_address(place), Credentials.parse(query)
    try:
        async with asyncio.timeout(timeout_s):
            return await _connect(target, credentials)
    except TimeoutError:
        raise Disconnected(f"{place} does not answer within {timeout_s:g} s") from None
    except Disconnected:
        raise
    except Unusable as error:
        raise Disconnected(str(error)) from None
    except OSError as error:
        raise Disconnected(f"cannot connect to {place}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not to be believed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS was not agreed on: {error.reason or error}"
    return error.strerror or str(error)


async def _connect(target: wire.UnixAddress | wire.TcpAddress, credentials: Credentials) -> Connection:
    protocol = await _open(target, credentials)
    connection = Connection(protocol, str(target))
    try:
        hello = wire.Hello(wire.PROTOCOL_VERSION, _SOFTWARE, credentials.read_token())
        connection.welcome = await connection.call(hello, wire.Welcome)
    except BaseException:
        connection.abort()
        raise
    return connection


async def _open(target: wire.UnixAddress | wire.TcpAddress, credentials: Credentials) -> _Protocol:
    loop = asyncio.get_running_loop()
    if isinstance(target, wire.UnixAddress):
        _, protocol = await loop.create_unix_connection(_Protocol, target.path)
        return protocol
    if credentials.needs_tls(target.host):
        context = await asyncio.to_thread(credentials.context)
        _, protocol = await loop.create_connection(_Protocol, target.host, target.port, ssl=context)
        return protocol
    transport, protocol = await loop.create_connection(_Protocol, target.host, target.port)
    if credentials.token is not None and not is_loopback(str(transport.get_extra_info("peername")[0])):
        transport.abort()
        raise Disconnected(f"{target.host} is another machine: a token is not sent there in plaintext")
    return protocol


class Connection:
    """A connection on which the handshake is done. Made by :func:`connect`."""

    #: What the metaserver said of itself in the handshake.
    welcome: wire.Welcome

    def __init__(self, protocol: _Protocol, place: str) -> None:
        self._protocol = protocol
        #: The address that it was made to.
        self.place = place

    @property
    def lost(self) -> bool:
        """Whether the connection can carry no more calls."""
        return self._protocol.lost is not None

    async def call(self, request: wire.Request, reply_type: type[_Reply]) -> _Reply:
        """Send a request and return its reply.

        Raises :exc:`Refused`, or :exc:`Disconnected` when the connection is, or is lost before the reply.
        """
        return await self.change(request, reply_type, 0, 0)

    async def change(self, request: wire.Request, reply_type: type[_Reply], slot: int, sequence: int) -> _Reply:
        """Send a request whose outcome the metaserver is to keep under these numbers; as :meth:`call` otherwise."""
        await self._protocol.writable()
        future: asyncio.Future[wire.Reply] = self._protocol.loop.create_future()
        request_id = self._protocol.send(request, future, slot, sequence)
        try:
            reply = await future
        finally:
            self._protocol.forget(request_id)
        return self._checked(reply, reply_type)

    def stream(self, request: wire.FetchDirectory) -> AsyncGenerator[wire.DirectoryPage, None]:
        """Send a directory fetch and yield its pages as they come; raises as :meth:`call` does."""
        return self._pages(request, wire.DirectoryPage)

    async def follow(self, request: wire.FollowEvents) -> AsyncGenerator[wire.EventPage, None]:
        """Ask for events and yield their pages as they come; raises as :meth:`call` does.

        Nothing is read from the connection while the caller has a page: it is to have no other use meanwhile.
        """
        async with contextlib.aclosing(self._pages(request, wire.EventPage)) as pages:
            async for page in pages:
                self._protocol.read_on(False)
                yield page
                self._protocol.read_on(True)

    async def _pages(self, request: wire.Request, kind: type[_Page]) -> AsyncGenerator[_Page, None]:
        await self._protocol.writable()
        queue: asyncio.Queue[wire.Reply | Disconnected] = asyncio.Queue()
        request_id = self._protocol.send(request, queue)
        try:
            last = False
            while not last:
                page = self._checked(await queue.get(), kind)
                last = page.last
                yield page
        finally:
            self._protocol.forget(request_id)

    def _checked(self, reply: wire.Reply | Disconnected, reply_type: type[_Reply]) -> _Reply:
        if isinstance(reply, reply_type):
            return reply
        if isinstance(reply, Disconnected):
            raise reply
        if isinstance(reply, wire.Failure):
            raise Refused(reply.code, reply.message)
        self._protocol.fail(f"a reply of type {type(reply).__name__} where {reply_type.__name__} belongs")
        raise cast(Disconnected, self._protocol.lost)

    def abort(self, reason: str = "given up by this side") -> None:
        """End the connection now. Every call in flight raises :exc:`Disconnected` with ``reason``."""
        self._protocol.fail(reason)

    def on_break(self, callback: Callable[[wire.Break], object]) -> None:
        """Hand breaks to ``callback``, which sees to :meth:`acknowledge`; without it they are acknowledged at once.

        It is called as soon as a break is read, before the waiter of any reply that came later goes on.
        """
        self._protocol.on_break = callback

    def on_lock_settled(self, callback: Callable[[wire.LockSettled], object]) -> None:
        """Hand to ``callback``, as they come, the outcomes of requests for locks that were answered WAITING."""
        self._protocol.on_lock_settled = callback

    def acknowledge(self, number: int, still_open: Sequence[int] = ()) -> None:
        """Tell the metaserver that all a break told has left every cache, and what is open here. Waits for nothing."""
        self._protocol.acknowledge(number, still_open)

    async def writable(self) -> None:
        """Return when the metaserver takes what was sent before, or the connection is lost."""
        await self._protocol.writable()

    def return_leases(self, directories: list[int], inodes: list[int]) -> bool:
        """Tell the metaserver what is in no cache any more; say whether it was sent. Waits for nothing."""
        return self._protocol.tell(wire.ReturnLeases(directories, inodes))

    def when_lost(self, callback: Callable[[], object]) -> None:
        """Call back, on the event loop, once the connection is closed."""
        self._protocol.closed.add_done_callback(lambda _: callback())


class _Protocol(asyncio.Protocol):
    """Frames in and out. ``_waiting`` holds what each request in flight waits on, by its id."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self.loop.create_future()
        #: Why the connection is of no use any more.
        self.lost: Disconnected | None = None
        self._transport: asyncio.Transport | None = None
        self._splitter = wire.FrameSplitter(wire.MAX_REPLY)
        self._waiting: dict[int, asyncio.Future[wire.Reply] | asyncio.Queue[wire.Reply | Disconnected]] = {}
        self._last_id = 0
        self.on_break: Callable[[wire.Break], object] = lambda told: self.acknowledge(told.number)
        self.on_lock_settled: Callable[[wire.LockSettled], object] = lambda settled: None
        self._resumed: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        wire.keep_alive(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(str(error) if error else "closed by the metaserver")
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            return
        self._splitter.feed(data)
        try:
            while self.lost is None and (body := self._splitter.next_body()) is not None:
                self._deliver(*wire.decode_reply(body))
        except wire.Malformed as error:
            _log.error("the metaserver sent a malformed frame: %s", error)
            self.fail(str(error))

    def _deliver(self, request_id: int, reply: wire.Reply) -> None:
        """Hand a reply to its waiter. A call that was given up has none; an id of 0 concerns the whole connection."""
        waiter = self._waiting.get(request_id)
        if isinstance(waiter, asyncio.Queue):
            waiter.put_nowait(reply)
        elif waiter is not None:
            if not waiter.done():
                waiter.set_result(reply)
        elif request_id == 0 and isinstance(reply, wire.Break):
            self.on_break(reply)
        elif request_id == 0 and isinstance(reply, wire.LockSettled):
            self.on_lock_settled(reply)
        elif request_id == 0 and isinstance(reply, wire.Failure):
            self.fail(f"the metaserver gave up the connection: {reply.message}")
        elif not 0 < request_id <= self._last_id:
            raise wire.Malformed(f"a reply to request {request_id}, which was never sent")

    def acknowledge(self, number: int, still_open: Sequence[int] = ()) -> None:
        """Send an acknowledgement, unless the connection is lost or nobody waits for it."""
        if number:
            self.tell(wire.Acknowledge(number, list(still_open)))

    def tell(self, message: wire.Acknowledge | wire.ReturnLeases) -> bool:
        """Send what has no reply; say whether the connection was there to take it."""
        if self.lost is not None or self._transport is None:
            return False
        self._transport.write(wire.encode(0, message))
        return True

    def send(
        self,
        request: wire.Request,
        waiter: asyncio.Future[wire.Reply] | asyncio.Queue[wire.Reply | Disconnected],
        slot: int = 0,
        sequence: int = 0,
    ) -> int:
        """Send a request whose replies go to ``waiter``, and return its id."""
        if self.lost is not None or self._transport is None:
            raise NotSent(str(self.lost))
        self._last_id += 1
        self._waiting[self._last_id] = waiter
        frame = wire.encode_change(self._last_id, request, slot, sequence) if sequence else None
        self._transport.write(frame or wire.encode(self._last_id, request))
        return self._last_id

    def forget(self, request_id: int) -> None:
        """Let go of a request that is answered, or whose caller is gone."""
        self._waiting.pop(request_id, None)

    def fail(self, reason: str) -> None:
        """Give the connection up: whoever waits raises :exc:`Disconnected`. Does nothing the second time."""
        if self.lost is not None:
            return
        self.lost = Disconnected(reason)
        if self._transport is not None:
            self._transport.abort()
        self.resume_writing()
        for waiter in self._waiting.values():
            if isinstance(waiter, asyncio.Queue):
                waiter.put_nowait(Disconnected(reason))
            elif not waiter.done():
                waiter.set_exception(Disconnected(reason))

    def read_on(self, wanted: bool) -> None:
        """Read from the connection, or do not."""
        if self._transport is None or self.lost is not None:
            return
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._resumed = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        self._resumed = None

    async def writable(self) -> None:
        """Wait until the metaserver takes what was sent before."""
        while self._resumed is not None:
            await asyncio.shield(self._resumed)
