"""The mount's session with the metaserver: its lease, its reconnection, and which calls may be repeated.

The lease is what makes caches right, so the order of things is the point of this module:

* the deadline is (time the renewal was *sent*) + lease - margin, on CLOCK_BOOTTIME, which counts suspend: the client
  always stops before the metaserver does;
* what others changed is handed to ``on_changes`` before the deadline moves; if that fails, it does not move;
* a break is handed to ``on_break`` as it comes, and acknowledged when that says so; nothing here waits for it, and
  the metaserver moves the lease only past breaks that were acknowledged;
* a session that could not be resumed is gone: ``on_lost`` is called, in which all that is cached must be dropped,
  before the new session's deadline is announced;
* over each connection ``on_connected`` tells what the metaserver must know before the lease is renewed (locks), and
  ``check_change`` may refuse a change when it is about to be sent, for what happened since it was asked for;
* a session that is resumed at another run of the metaserver goes on, but what that had acknowledged lazily may be lost,
  unless its engine puts nothing off: ``on_restarted`` is called.

One task renews and reconnects. Calls run in their callers' tasks. Reads wait while the session is open on no
connection, and not for the lease, because a lease may have to wait for them: the kernel holds the pages that it reads,
and the acknowledgement of a break, without which there is no lease, waits for these. Changes wait for the lease, too.
A change has a slot of the session and a sequence number in it, under which the metaserver keeps its outcome: so it is
sent again when its reply was lost, and made once. No more calls are under way than the metaserver takes in at once,
and changes, which may wait for others' acknowledgements, leave room for all the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from importlib import metadata
from typing import Final, TypeVar

from fuseclient.levels import Level, reach
from fuseclient.worker import finding, rpc
from fuseclient.worker.known import Known
from fuseclient.worker.rpc import Connection, Disconnected, NotSent, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply", bound=wire.Reply)

_SOFTWARE: Final = f"bpfuse {metadata.version('bpfuse')}"
#: What is kept of a lease for the time between the last check and the use of an answer, in nanoseconds, at most.
MARGIN_NS: Final = 1_000_000_000
#: Seconds between attempts to reconnect: the first and the longest pause.
_BACKOFF_S: Final = (0.02, 1.0)
#: Seconds that the opening of the first session may take: it waits for one lease, of 30 s as a rule, if the only other
#: client is gone without a farewell.
_FIRST_S: Final = 45.0
#: Seconds that calls wait beyond a lease if there are several metaservers: one takes over from another that hangs.
_TAKEOVER_S: Final = 10.0
#: Seconds that the farewell may take.
_CLOSE_S: Final = 1.0

#: Other calls than changes that are under way at once.
_CALLS: Final = 64

#: Requests that do no harm when they are done twice.
_REPEATABLE: Final = (
    wire.Lookup, wire.FetchDirectory, wire.GetAttributes, wire.ReadLink, wire.GetXattr, wire.ListXattrs,
    wire.GetContent, wire.GetStatistics, wire.ListSlices, wire.InspectSlices, wire.Seek, wire.NewSlices, wire.Reap,
    wire.ForgetSlices, wire.Sync, wire.OpenFile, wire.ClosedForWriting, wire.TestLock, wire.SetLock, wire.CancelLock,
    wire.ReserveInodes,
)  # fmt: skip


def boottime_ns() -> int:
    """Return the time since boot, suspend included, in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def client_deadline(sent_ns: int, lease_ms: int) -> int:
    """Return until when a client may rely on a lease that it asked for at ``sent_ns``."""
    lease_ns = lease_ms * 1_000_000
    return sent_ns + lease_ns - min(lease_ns // 10, MARGIN_NS)


#: Acknowledges a break, and tells which inodes are open.
Acknowledge = Callable[[Sequence[int]], None]


def _acknowledge_at_once(told: wire.Break, acknowledge: Acknowledge) -> None:
    """What a session without caches does with a break."""
    acknowledge(())


async def _do_nothing(connection: Connection, resumed: bool) -> None:
    """What is to be done with a connection before its lease is renewed, of a session that holds nothing."""


class Slots:
    """The slots of a session, and the last sequence number of each, to begin with ``last``.

    Numbers are never used for two changes: an earlier worker's, which had the same session, began at an earlier time.
    """

    def __init__(self, last: int, count: int = wire.SLOTS) -> None:
        self._free = list(range(count))
        self._sequences = [last] * count
        self._room = asyncio.Semaphore(count)

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncGenerator[tuple[int, int], None]:
        """A slot for one change, with its sequence number."""
        async with self._room:
            slot = self._free.pop()
            self._sequences[slot] += 1
            try:
                yield slot, self._sequences[slot]
            finally:
                self._free.append(slot)


class Session:
    """A session on one volume, kept alive until :meth:`close`.

    The callbacks are plain functions on the event loop's thread. ``resume`` is the id of the session of the worker
    before this one; if it is resumed, ``on_changes`` tells of everything that changed since the metaserver's start.
    ``writing`` says which inodes are open for writing, whenever the session is opened. ``known``: those at ``address``
    and more.
    """

    #: The lease's end on CLOCK_BOOTTIME; 0 while there is none.
    deadline_ns: int = 0
    #: No other client sees the volume.
    alone: bool = False
    #: What the metaserver said when the session was opened or last resumed.
    opened: wire.SessionOpened

    def __init__(
        self,
        address: str,
        volume: str,
        *,
        client: str,
        on_changes: Callable[[wire.Renewed], object],
        on_renewed: Callable[[int], object],
        on_lost: Callable[[], object],
        on_break: Callable[[wire.Break, Acknowledge], object] = _acknowledge_at_once,
        on_restarted: Callable[[], object] = lambda: None,
        writing: Callable[[], list[int]] = list,
        on_connected: Callable[[Connection, bool], Awaitable[object]] = _do_nothing,
        check_change: Callable[[wire.Request], object] = lambda request: None,
        resume: bytes | None = None,
        known: Known | None = None,
        clock: Callable[[], int] = boottime_ns,
        connect: Callable[[str], Awaitable[Connection]] = finding.connect,
    ) -> None:
        self.id = resume
        #: Where the metaserver may be.
        self.known = known or Known(address)
        self._volume = volume
        #: Random; names it for certain.
        self._volume_id: bytes | None = None
        self._client = client
        self._on_changes = on_changes
        self._on_renewed = on_renewed
        self._on_lost = on_lost
        self._on_break = on_break
        self._on_restarted = on_restarted
        self._writing = writing
        self._on_connected = on_connected
        self._check_change = check_change
        self._calls = asyncio.Semaphore(_CALLS)
        self._slots = Slots(clock())
        self._clock = clock
        self._connect = connect
        self._seen = 0
        #: Of the metaserver's run that the session was opened or resumed at.
        self._epoch: int | None = None
        #: Changes of this client that were acknowledged.
        self.changes = 0
        self._lease_s = 0.0
        self._connection: Connection | None = None
        #: Set while there is a connection that the session is open on, as far as is known.
        self._bound = asyncio.Event()
        #: Set while there is a lease, too.
        self._ready = asyncio.Event()
        #: Set to make the keeping task act now.
        self._poked = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def open(self) -> wire.SessionOpened:
        """Connect, open or resume the session, and keep it from now on.

        Raises :exc:`Refused` (NO_SUCH_VOLUME, UNSUPPORTED, BUSY), :exc:`Disconnected`, or :exc:`ValueError` for what
        is not an address. There is no retry here. A session that is resumed has no lease yet: what its renewal waits
        for may wait for the caller.
        """
        await self._enter(is_first=True)
        if self.opened.resumed:
            self.renew_now()
        self._keeping = asyncio.create_task(self._keep(), name="session")
        return self.opened

    async def close(self, *, farewell: bool = True) -> None:
        """End the session at the metaserver too, if it can be reached. Orphans of this session are reaped then.

        Without a ``farewell`` it ends there when its lease does: something may go on to answer under it until then.
        Calls that wait, and later ones, raise :exc:`NotSent`.
        """
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        self.deadline_ns = 0
        connection, self._connection = self._connection, None
        self._bound.set()  # those who wait learn that nothing will come
        self._ready.set()
        if connection is not None and farewell:
            with contextlib.suppress(Disconnected, Refused, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await connection.call(wire.CloseSession(), wire.Done)
        if connection is not None:
            connection.abort("the session is closed")

    async def call(self, request: wire.Request, reply_type: type[_Reply]) -> _Reply:
        """Send a request and return its reply.

        Waits for a connection, and a change for a lease, for at most a lease's length and what a takeover may take,
        then raises :exc:`Disconnected`.
        A change whose reply was lost is sent again; if its session is lost meanwhile :exc:`Disconnected` is raised too,
        and the change may or may not have been made. Raises :exc:`Refused` as the metaserver does; STALE_SESSION comes
        through only for a change that was under way when the session was lost, and was not made.
        """
        reach(Level.METASERVER)
        if isinstance(request, _REPEATABLE):
            async with self._calls:
                return await self._repeatable(request, reply_type)
        async with self._slots.taken() as (slot, sequence):
            return await self._change(request, reply_type, slot, sequence)

    async def _change(self, request: wire.Request, reply_type: type[_Reply], slot: int, sequence: int) -> _Reply:
        lost: Disconnected | None = None
        stale: Refused | None = None
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._patience_s
        session = self.id
        while True:
            connection = await self._usable(give_up, self._ready)
            if lost is not None and session != self.id:
                raise Disconnected("the session was lost while a change was under way") from lost
            if stale is not None and session != self.id:
                raise stale
            self._check_change(request)
            session = self.id
            try:
                reply = await connection.change(request, reply_type, slot, sequence)
                self.changes += reply_type is wire.Changed
                return reply
            except NotSent as error:
                if loop.time() >= give_up:
                    raise lost or error from error
            except Disconnected as error:
                lost, give_up = error, loop.time() + self._patience_s
            except Refused as error:
                if error.code is not wire.ErrorCode.STALE_SESSION or loop.time() >= give_up:
                    raise
                # Another metaserver has taken over, perhaps, at which the session lives on.
                stale = error
                if connection is self._connection:
                    self._mend()

    async def _repeatable(self, request: wire.Request, reply_type: type[_Reply]) -> _Reply:
        give_up = asyncio.get_running_loop().time() + self._patience_s
        while True:
            connection = await self._usable(give_up, self._bound)
            try:
                return await connection.call(request, reply_type)
            except (Disconnected, Refused) as error:
                if not self._may_repeat(error, connection, give_up):
                    raise

    async def stream(self, request: wire.FetchDirectory) -> AsyncGenerator[wire.DirectoryPage, None]:
        """Yield the pages of a directory fetch. Raises as :meth:`call` does; not repeated after the first page."""
        reach(Level.METASERVER)
        give_up = asyncio.get_running_loop().time() + self._patience_s
        begun = False
        while True:
            connection = await self._usable(give_up, self._bound)
            try:
                async with contextlib.aclosing(connection.stream(request)) as pages:
                    async for page in pages:
                        begun = True
                        yield page
                return
            except (Disconnected, Refused) as error:
                if begun or not self._may_repeat(error, connection, give_up):
                    raise

    @property
    def lease_s(self) -> float:
        """The length of the lease, as it was given last, in seconds."""
        return self._lease_s

    async def may_tell(self) -> bool:
        """Wait until the metaserver takes what was sent before; say whether the session is open on a connection."""
        connection = self._connection
        if connection is None or not self._bound.is_set():
            return False
        await connection.writable()
        return not connection.lost

    def return_leases(self, directories: list[int], inodes: list[int]) -> bool:
        """Give back the leases on the names in these directories and on these inodes; say whether that was sent.

        The caller has none of them in any cache, and no call that began before may bring any there.
        """
        connection = self._connection
        return connection is not None and self._bound.is_set() and connection.return_leases(directories, inodes)

    def renew_now(self) -> None:
        """Make the keeping task renew, or reconnect, without waiting for its time."""
        self._poked.set()

    # Calls

    @property
    def _patience_s(self) -> float:
        """Seconds that a call waits for a connection."""
        return self._lease_s + _TAKEOVER_S * ("," in self.known.address)

    def _usable_now(self, awaited: asyncio.Event) -> Connection | None:
        connection = self._connection
        if not awaited.is_set() or connection is None or connection.lost:
            return None
        if self._clock() < self.deadline_ns:
            return connection
        self._poked.set()
        return connection if awaited is self._bound else None

    async def _usable(self, give_up: float, awaited: asyncio.Event) -> Connection:
        while (connection := self._usable_now(awaited)) is None:
            if self._keeping is None or self._keeping.done():
                raise NotSent("the session is closed")
            awaited.clear()
            self._poked.set()
            try:
                async with asyncio.timeout_at(give_up):
                    await awaited.wait()
            except TimeoutError:
                raise NotSent(f"no connection to {self.known.address} for {self._patience_s:g} s") from None
        return connection

    def _mend(self) -> None:
        self._bound.clear()
        self._ready.clear()
        self._poked.set()

    def _bind(self, connection: Connection) -> None:
        self._connection = connection
        self._bound.set()

    def _may_repeat(self, error: Exception, connection: Connection, give_up: float) -> bool:
        """Say whether a read that failed is to be sent again, and get the session mended if it was that."""
        if isinstance(error, Refused):
            if error.code is not wire.ErrorCode.STALE_SESSION:
                return False
            if connection is self._connection:
                self._mend()
        return asyncio.get_running_loop().time() < give_up

    # The lease

    async def _enter(self, *, is_first: bool = False) -> None:
        """Connect and open or resume the session; renew it, if it is not the first time."""
        connection = await self._connect(self.known.address)
        try:
            async with asyncio.timeout(_FIRST_S if is_first else rpc.CONNECT_TIMEOUT_S):
                resumed = await self._open(connection)
                if resumed and not is_first:
                    await self._renew(connection)
        except TimeoutError:
            connection.abort("no reply in time")
            raise Disconnected(f"{connection.place} does not answer") from None
        except BaseException:
            connection.abort()
            raise
        connection.when_lost(lambda: self._lost(connection))
        self._poked.clear()
        self._ready.set()

    def _lost(self, connection: Connection) -> None:
        if connection is self._connection:
            self._poked.set()

    async def _open(self, connection: Connection) -> bool:
        """Open the session on a connection; say whether it was resumed."""
        joined = asyncio.Event()
        connection.on_break(lambda told: self._told(connection, joined, told))
        if connection.welcome.server_epoch < (self._epoch or 0):
            raise Disconnected(f"{connection.place}: a metaserver that had the authority before")
        sent_ns = self._clock()
        request = wire.OpenSession(self._volume, self._client, self.id, self._writing(), _SOFTWARE)
        opened = await connection.call(request, wire.SessionOpened)
        if self._volume_id not in (None, opened.volume):
            raise Disconnected(f"{connection.place}: another volume of the same name")
        self._volume_id = opened.volume
        self.known.learn(connection.place, connection.welcome.metaservers)
        self.alone = opened.alone and not joined.is_set()
        if not opened.resumed:
            self._replace(opened)
        elif self._epoch not in (None, connection.welcome.server_epoch) and opened.puts_off:
            self._on_restarted()
        await self._on_connected(connection, opened.resumed)
        if not opened.resumed:
            self._grant(sent_ns, opened.lease_ms)
        self._lease_s = opened.lease_ms / 1000
        self.opened, self._epoch = opened, connection.welcome.server_epoch
        self._bind(connection)
        if joined.is_set():
            self._ready.set()
        return opened.resumed

    def _told(self, connection: Connection, joined: asyncio.Event, told: wire.Break) -> None:
        """A break has come. What waits while a client is alone is to be committed even before the lease is renewed,
        because the metaserver renews it only then; it has not run out."""
        if told.joined:
            joined.set()
            self.alone = False
            if connection is self._connection:
                self._ready.set()
        self._on_break(told, lambda still_open: connection.acknowledge(told.number, still_open))

    def _replace(self, opened: wire.SessionOpened) -> None:
        """Take a new session; if there was another, all that was cached under it is void."""
        self.deadline_ns = 0
        if self.id is not None:
            _log.warning("the session on %s was lost; caches are dropped", self._volume)
            self._on_lost()
        self.id = opened.session
        self._seen = opened.version

    async def _renew(self, connection: Connection) -> None:
        sent_ns = self._clock()
        renewed = await connection.call(wire.Renew(self._seen), wire.Renewed)
        if renewed.names or renewed.inodes or renewed.everything:
            self._on_changes(renewed)
        self._seen = renewed.version
        self.known.learn(connection.place, renewed.metaservers)
        self._grant(sent_ns, renewed.lease_ms)

    def _grant(self, sent_ns: int, lease_ms: int) -> None:
        self._lease_s = lease_ms / 1000
        self.deadline_ns = client_deadline(sent_ns, lease_ms)
        self._on_renewed(self.deadline_ns)

    # The keeping task

    async def _keep(self) -> None:
        while True:
            try:
                await self._renew_until_lost()
            except (Disconnected, Refused) as error:
                _log.warning("the session on %s: %s", self._volume, error)
            except Exception:
                _log.exception("renewing the session on %s failed", self._volume)
            self._bound.clear()
            self._ready.clear()
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.abort("the session is opened again")
            await self._reconnect()

    async def _renew_until_lost(self) -> None:
        while (connection := self._connection) is not None and not connection.lost:
            await self._until_due()
            try:
                async with asyncio.timeout(self._lease_s / 3):
                    await self._renew(connection)
            except TimeoutError:
                raise Disconnected("a renewal was not answered in time") from None
            self._bound.set()
            self._ready.set()

    async def _until_due(self) -> None:
        """Wait for a third of the lease, or until :meth:`renew_now`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._lease_s / 3):
                await self._poked.wait()
        self._poked.clear()

    async def _reconnect(self) -> None:
        pause_s = _BACKOFF_S[0]
        while True:
            try:
                await self._enter()
                return
            except (Disconnected, Refused) as error:
                _log.warning("cannot open the session on %s: %s", self._volume, error)
            except Exception:
                _log.exception("opening the session on %s failed", self._volume)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, _BACKOFF_S[1])
