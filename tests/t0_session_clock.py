"""Leases by a clock in the test's hand: deadlines, renewal, expiry, resumption and the change feed, on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import messages
import pytest

from fuseclient.worker import rpc
from fuseclient.worker.session import _SOFTWARE, MARGIN_NS, Session, Slots, client_deadline
from metaserver import sessions as server_side
from metaserver import wire
from metaserver.errors import Refused
from metaserver.sessions import Change, Feed, Sessions
from metaserver.volumes import Volume

S = 1_000_000_000
LEASE = 30 * S
VOLUME = Volume(1, "volume", 65536, "file:///blocks")
OTHER = Volume(2, "other", 65536, "file:///blocks")


class Clock:
    """A clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000 * S

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> Sessions:
    return Sessions(LEASE, clock, feed_changes=8)


# The metaserver's side


def test_a_session_lives_for_a_lease(table: Sessions, clock: Clock) -> None:
    session = table.open(VOLUME, "client")
    assert len(session.id) == 16
    clock.now += LEASE - 1
    session.check()
    clock.now += 1
    with pytest.raises(Refused) as refused:
        session.check()
    assert refused.value.code is wire.ErrorCode.STALE_SESSION


def test_a_renewal_extends_the_lease_from_its_answer(table: Sessions, clock: Clock) -> None:
    session = table.open(VOLUME, "client")
    clock.now += LEASE - 1
    assert table.renew(session, 0, table.clock()) == wire.Renewed(30_000, 0, [], [], False)
    clock.now += LEASE - 1
    session.check()


def test_a_late_renewal_is_refused(table: Sessions, clock: Clock) -> None:
    session = table.open(VOLUME, "client")
    clock.now += LEASE
    with pytest.raises(Refused, match="run out"):
        table.renew(session, 0, table.clock())
    assert table.expired() == [session]
    table.end(session)
    assert table.expired() == []


def test_only_expired_sessions_are_told(table: Sessions, clock: Clock) -> None:
    first = table.open(VOLUME, "first")
    clock.now += S
    second = table.open(VOLUME, "second")
    clock.now += LEASE - S
    assert table.expired() == [first]
    assert table.all() == [first, second]


def test_an_ended_session_is_refused_at_once(table: Sessions) -> None:
    session = table.open(VOLUME, "client")
    table.end(session)
    with pytest.raises(Refused):
        session.check()
    assert table.resume(VOLUME, session.id) is None


def test_resuming_does_not_extend_the_lease(table: Sessions, clock: Clock) -> None:
    session = table.open(VOLUME, "client")
    first = session.incarnation
    clock.now += LEASE - 1
    assert table.resume(VOLUME, session.id) is session
    assert session.incarnation > first
    clock.now += 1
    with pytest.raises(Refused):
        session.check()


@pytest.mark.parametrize("volume", [VOLUME, OTHER])
def test_what_cannot_be_resumed(table: Sessions, clock: Clock, volume: Volume) -> None:
    session = table.open(VOLUME, "client")
    if volume is VOLUME:
        clock.now += LEASE
    assert table.resume(volume, session.id) is None
    assert table.resume(VOLUME, b"x" * 16) is None
    assert table.resume(VOLUME, None) is None


def test_there_is_a_most_of_sessions(table: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "MAX_SESSIONS", 2)
    kept = table.open(VOLUME, "client")
    table.open(VOLUME, "client")
    with pytest.raises(Refused) as refused:
        table.open(VOLUME, "client")
    assert refused.value.code is wire.ErrorCode.BUSY
    assert table.resume(VOLUME, kept.id) is kept


# The change feed


def _change(author: int, number: int) -> Change:
    return Change(author, ((1, b"%d" % number),), (1, number))


def test_a_feed_tells_what_some_did() -> None:
    feed = Feed()
    for number in range(10, 14):
        feed.append(_change(number % 2, number))
    assert feed.since(0, {1}) == ([(1, b"13"), (1, b"11")], [1, 13, 11])
    assert feed.since(2, {0}) == ([(1, b"12")], [1, 12])
    assert feed.since(4, {1}) == ([], [])


def test_a_feed_that_does_not_reach_back_says_so() -> None:
    feed = Feed(3)
    for number in range(5):
        feed.append(_change(1, number))
    assert feed.since(1, {1}) is None
    assert feed.since(2, {1}) is not None
    assert feed.since(6, {1}) is None, "a version of another run"
    feed.forget_all()
    assert feed.since(5, {1}) is None
    assert feed.since(feed.version, {1}) == ([], [])


@pytest.mark.parametrize("change", [
    Change(99, tuple((1, b"%d" % number) for number in range(server_side.RENEWED_ITEMS + 1)), ()),
    Change(99, tuple((1, b"x" * 250 + b"%05d" % number) for number in range(5000)), ()),
])  # fmt: skip
def test_too_many_changes_for_a_frame_are_everything(table: Sessions, change: Change) -> None:
    session = table.open(VOLUME, "client")
    table.resume(VOLUME, session.id)
    session.earlier.add(99)
    table.feed(VOLUME).append(change)
    assert table.renew(session, 0, table.clock()) == wire.Renewed(30_000, 1, [], [], True)


def test_the_largest_list_fits_a_frame() -> None:
    names = [(2**48 - 1, b"x" * 249 + b"%05d" % number) for number in range(server_side.RENEWED_BYTES // 280)]
    feed = Feed()
    feed.append(Change(99, tuple(names), ()))
    assert feed.since(0, {99}) is not None
    assert len(wire.encode(1, wire.Renewed(30_000, 1, names, [], False))) < wire.MAX_REPLY


def test_own_changes_are_told_after_a_resumption_only(table: Sessions) -> None:
    session = table.open(VOLUME, "client")
    table.committed(VOLUME, session.incarnation, [(1, b"name")], [7])
    table.committed(VOLUME, 99, [(1, b"another's")], [8])
    assert table.renew(session, 0, table.clock()).names == []
    table.resume(VOLUME, session.id)
    renewed = table.renew(session, 0, table.clock())
    assert (renewed.names, renewed.inodes) == ([(1, b"name")], [7])
    assert table.renew(session, 0, table.clock()).names == [], "once"


def test_feeds_of_volumes_are_apart(table: Sessions) -> None:
    one = table.open(VOLUME, "client")
    table.committed(OTHER, one.incarnation, [], [7])
    table.resume(VOLUME, one.id)
    assert table.renew(one, 0, table.clock()) == wire.Renewed(30_000, 0, [], [], False)


def test_a_new_worker_of_a_reclaimed_session_is_told_everything(table: Sessions) -> None:
    old, new = table.reclaim(b"a" * 16, VOLUME, "client"), table.reclaim(b"b" * 16, VOLUME, "client")
    assert not table.renew(old, 5, table.clock()).everything, "it knows what it has, and asks for what it lost"
    assert table.renew(new, 0, table.clock()).everything
    assert not table.renew(new, 0, table.clock()).everything


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (wire.MakeNode(1, b"a", 0, 0, 0), ((1, b"a"),)),
        (wire.Link(2, 1, b"a"), ((1, b"a"),)),
        (wire.Remove(1, b"a", False), ((1, b"a"),)),
        (wire.Rename(1, b"a", 2, b"b"), ((1, b"a"), (2, b"b"))),
        (wire.SetAttributes(1), ()),
    ],
)
def test_which_names_a_request_changes(request_: wire.Request, names: tuple[tuple[int, bytes], ...]) -> None:
    assert server_side.changed_names(request_) == names


# The client's side

SESSION_A, SESSION_B = b"a" * 16, b"b" * 16


class FakeConnection:
    """A connection whose replies the test makes; calls are kept with the time they were made."""

    def __init__(self, answer: Callable[[wire.Request], Any], welcome: wire.Welcome) -> None:
        self.answer = answer
        self.welcome = welcome
        self.place = "tcp:127.0.0.1:1"
        self.calls: list[wire.Request] = []
        #: Slot and sequence of each change.
        self.changes: list[tuple[int, int]] = []
        self.lost = False
        self._callbacks: list[Callable[[], object]] = []

    def on_break(self, callback: Callable[[wire.Break], object]) -> None:
        self.told = callback

    async def change(self, request: wire.Request, reply_type: type, slot: int, sequence: int) -> Any:
        self.changes.append((slot, sequence))
        return await self.call(request, reply_type)

    async def call(self, request: wire.Request, reply_type: type) -> Any:
        if self.lost:
            raise rpc.NotSent("lost")
        self.calls.append(request)
        reply = self.answer(request)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, asyncio.Future):
            reply = await reply
        assert isinstance(reply, reply_type)
        return reply

    async def stream(self, request: wire.FetchDirectory) -> AsyncGenerator[Any, None]:
        for page in self.answer(request):
            if isinstance(page, Exception):
                raise page
            yield page

    def abort(self, reason: str = "") -> None:
        if not self.lost:
            self.lost = True
            for callback in self._callbacks:
                callback()

    def when_lost(self, callback: Callable[[], object]) -> None:
        self._callbacks.append(callback)


class Metaserver:
    """Stands in for the metaserver: what it answers can be replaced, and it counts connections."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.live: set[bytes] = set()
        self.next = [SESSION_A, SESSION_B]
        self.renewed = wire.Renewed(30_000, 5, [], [], False)
        self.connections: list[FakeConnection] = []
        self.refuse_connections = False
        self.override: Callable[[wire.Request], Any] = lambda request: None
        self.epoch = 1
        #: How long a reply takes.
        self.delay_ns = 0

    async def connect(self, address: str) -> rpc.Connection:
        if self.refuse_connections:
            raise rpc.Disconnected(f"nobody at {address}")
        connection = FakeConnection(self.answer, wire.Welcome(wire.PROTOCOL_VERSION, "test", self.epoch))
        self.connections.append(connection)
        return cast(rpc.Connection, connection)

    def answer(self, request: wire.Request) -> Any:
        self.clock.now += self.delay_ns
        if (special := self.override(request)) is not None:
            return special
        if isinstance(request, wire.OpenSession):
            resumed = request.resume in self.live
            session = cast(bytes, request.resume) if resumed else self.next.pop(0)
            self.live.add(session)
            return wire.SessionOpened(session, 30_000, 3, "file:///blocks", 65536, resumed)
        if isinstance(request, wire.CloseSession):
            return wire.Done()
        if not self.live:
            return rpc.Refused(wire.ErrorCode.STALE_SESSION, "gone")
        if isinstance(request, wire.Renew):
            return self.renewed
        return wire.Found(messages.ATTRIBUTES)


class Mount:
    """A session of the client and what it told."""

    def __init__(self, clock: Clock, resume: bytes | None = None) -> None:
        self.clock = clock
        self.server = Metaserver(clock)
        self.told: list[Any] = []
        self.news = asyncio.Event()
        self.fail_changes = False
        self.session = Session(
            "unix:/none",
            "volume",
            client="test",
            on_changes=self._changes,
            on_renewed=lambda deadline: self._tell(deadline),
            on_lost=lambda: self._tell("lost"),
            on_restarted=lambda: self._tell("restarted"),
            resume=resume,
            clock=clock,
            connect=self.server.connect,
        )

    def _changes(self, renewed: wire.Renewed) -> None:
        if self.fail_changes:
            self.fail_changes = False
            raise RuntimeError("cannot drop")
        self._tell(renewed)

    def _tell(self, what: Any) -> None:
        self.told.append((what, self.session.deadline_ns))
        self.news.set()

    async def until(self, count: int) -> list[Any]:
        """Wait until that many things were told, and return them without the deadlines at the time."""
        async with asyncio.timeout(5):
            while len(self.told) < count:
                self.news.clear()
                await self.news.wait()
        return [what for what, _ in self.told]


def test_the_client_stops_before_the_metaserver() -> None:
    assert client_deadline(7, 30_000) == 7 + 30 * S - MARGIN_NS
    assert client_deadline(7, 100) == 7 + 90_000_000


async def test_the_deadline_counts_from_sending(clock: Clock) -> None:
    mount = Mount(clock)
    sent = clock.now
    mount.server.delay_ns = 4 * S
    await mount.session.open()
    assert mount.session.deadline_ns == sent + 30 * S - MARGIN_NS
    assert mount.session.id == SESSION_A
    assert await mount.until(1) == [mount.session.deadline_ns]
    sent = clock.now
    mount.session.renew_now()
    await mount.until(2)
    assert mount.session.deadline_ns == sent + 30 * S - MARGIN_NS
    await mount.session.close()
    assert mount.session.deadline_ns == 0


async def test_changes_are_told_before_the_deadline_moves(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    first = mount.session.deadline_ns
    renewed = mount.server.renewed = wire.Renewed(30_000, 9, [(1, b"a")], [2], False)
    clock.now += S
    mount.session.renew_now()
    await mount.until(3)
    assert mount.told[1:] == [(renewed, first), (first + S, first + S)]
    mount.session.renew_now()
    await mount.until(5)
    assert [call for call in mount.server.connections[0].calls if isinstance(call, wire.Renew)] == [
        wire.Renew(3),
        wire.Renew(9),
    ]
    await mount.session.close()


async def test_changes_that_could_not_be_dropped_do_not_move_the_deadline(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    mount = Mount(clock)
    await mount.session.open()
    first = mount.session.deadline_ns
    mount.server.renewed = wire.Renewed(30_000, 9, [(1, b"a")], [2], False)
    mount.fail_changes = True
    clock.now += S
    mount.session.renew_now()
    await mount.until(3)
    assert mount.told[1] == (mount.server.renewed, first), "told again before any new deadline"
    assert len(mount.server.connections) == 2
    assert "cannot drop" in caplog.text
    await mount.session.close()


async def test_a_lost_connection_is_resumed(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    mount.server.connections[0].abort()
    assert await mount.session.call(wire.GetAttributes(1), wire.Found) == wire.Found(messages.ATTRIBUTES)
    assert mount.server.connections[1].calls[:2] == [
        wire.OpenSession("volume", "test", SESSION_A, [], _SOFTWARE),
        wire.Renew(3),
    ]
    assert "lost" not in await mount.until(2)
    assert mount.session.id == SESSION_A
    await mount.session.close()


async def test_another_run_of_the_metaserver_is_told(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    mount.server.epoch = 2
    for connection in range(2):
        mount.server.connections[connection].abort()
        await mount.session.call(wire.GetAttributes(1), wire.Found)
    assert [what for what, _ in mount.told].count("restarted") == 1
    await mount.session.close()


async def test_scenario_11_after_ten_minutes_of_suspend_the_session_is_gone(clock: Clock) -> None:
    """The clock counts suspend: no change is sent under the old session, which the metaserver has ended meanwhile."""
    mount = Mount(clock)
    await mount.session.open()
    clock.now += 600 * S
    mount.server.live.clear()
    await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    assert wire.Link not in map(type, mount.server.connections[0].calls)
    assert mount.told[1] == ("lost", 0)
    assert mount.session.id == SESSION_B
    await mount.session.close()


async def test_a_session_that_is_gone_is_told_before_the_next_begins(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    mount.server.live.clear()
    clock.now += 60 * S
    await mount.session.call(wire.GetAttributes(1), wire.Found)
    assert [what for what, _ in mount.told][1:] == ["lost", mount.session.deadline_ns]
    assert mount.told[1] == ("lost", 0)
    assert mount.session.id == SESSION_B
    await mount.session.close()


@pytest.mark.parametrize("known", [True, False])
async def test_the_session_of_an_earlier_worker(clock: Clock, known: bool) -> None:
    mount = Mount(clock, resume=SESSION_A)
    mount.server.next = [SESSION_B]
    if known:
        mount.server.live.add(SESSION_A)
    mount.server.renewed = wire.Renewed(30_000, 5, [], [7], False)
    opened = await mount.session.open()
    assert opened.resumed is known
    assert (mount.session.deadline_ns == 0) is known, "the renewal may have to wait for the caller"
    assert await mount.until(2) == [mount.server.renewed if known else "lost", mount.session.deadline_ns]
    if known:
        assert mount.server.connections[0].calls[1] == wire.Renew(0), "the history of the whole run is asked for"
    await mount.session.close()


async def test_changes_wait_for_a_lease(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    clock.now = mount.session.deadline_ns
    await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    assert [type(call) for call in mount.server.connections[0].calls] == [wire.OpenSession, wire.Renew, wire.Link]
    await mount.session.close()


async def test_reads_do_not_wait_for_a_lease_that_waits_for_them(clock: Clock) -> None:
    """A session is resumed; its renewal waits for an acknowledgement, and that for a page that is being read."""
    mount = Mount(clock)
    await mount.session.open()
    read = asyncio.get_running_loop().create_future()
    mount.server.override = lambda request: read if isinstance(request, wire.Renew) else None
    mount.server.connections[0].abort()
    await mount.session.call(wire.GetAttributes(1), wire.Found)
    changing = asyncio.create_task(mount.session.call(wire.Link(2, 1, b"a"), wire.Found))
    await asyncio.sleep(0)
    assert not changing.done()
    read.set_result(mount.server.renewed)
    await changing
    assert len(mount.server.connections) == 2
    await mount.session.close()


async def test_a_read_after_the_lease_has_it_renewed_at_once(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    clock.now = mount.session.deadline_ns
    await mount.session.call(wire.GetAttributes(1), wire.Found)
    assert (await mount.until(2))[1] > clock.now
    await mount.session.close()


async def test_calls_give_up_after_a_lease(clock: Clock) -> None:
    mount = Mount(clock)
    mount.server.override = lambda request: (
        wire.SessionOpened(SESSION_A, 100, 3, "", 0, False) if isinstance(request, wire.OpenSession) else None
    )
    await mount.session.open()
    mount.server.refuse_connections = True
    mount.server.connections[0].abort()
    with pytest.raises(rpc.Disconnected, match=r"for 0\.1 s"):
        await mount.session.call(wire.GetAttributes(1), wire.Found)
    await mount.session.close()


async def test_closing_ends_the_calls_that_wait(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    mount.server.refuse_connections = True
    mount.server.connections[0].abort()
    waiting = asyncio.create_task(mount.session.call(wire.GetAttributes(1), wire.Found))
    await asyncio.sleep(0)
    await mount.session.close()
    for call in (waiting, mount.session.call(wire.GetAttributes(1), wire.Found)):
        with pytest.raises(rpc.NotSent, match="closed"):
            await call


def _fail_once(kind: type, error: Exception) -> Callable[[wire.Request], Any]:
    errors = [error]
    return lambda request: errors.pop() if isinstance(request, kind) and errors else None


async def test_what_is_repeated(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    mount.server.override = _fail_once(wire.Lookup, rpc.Disconnected("cut"))
    await mount.session.call(wire.Lookup(1, b"a"), wire.Found)
    mount.server.override = _fail_once(wire.Link, rpc.Disconnected("cut"))
    await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    mount.server.override = _fail_once(wire.Link, rpc.NotSent("cut"))
    await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    once, again, other, another = mount.server.connections[0].changes
    assert once == again
    assert other == another
    assert other == (once[0], once[1] + 1)
    mount.server.override = _fail_once(wire.Lookup, rpc.Refused(wire.ErrorCode.NOT_FOUND, "a"))
    with pytest.raises(rpc.Refused) as refused:
        await mount.session.call(wire.Lookup(1, b"a"), wire.Found)
    assert refused.value.code is wire.ErrorCode.NOT_FOUND
    await mount.session.close()


async def test_a_change_is_not_repeated_under_another_session(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()

    def lose(request: wire.Request) -> Any:
        if not isinstance(request, wire.Link):
            return None
        mount.server.live.clear()
        mount.server.connections[-1].abort()
        return rpc.Disconnected("cut")

    mount.server.override = lose
    with pytest.raises(rpc.Disconnected, match="the session was lost"):
        await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    assert mount.session.id == SESSION_B
    await mount.session.close()


async def test_no_number_is_used_by_two_workers(clock: Clock) -> None:
    first, last = Slots(clock(), 2), 0
    for _ in range(5):
        async with first.taken() as one, first.taken() as two:
            assert one[0] != two[0]
            last = max(one[1], two[1])
    clock.now += S
    async with Slots(clock(), 2).taken() as (_, sequence):
        assert sequence > last


async def test_a_change_refused_as_stale_is_not_repeated_and_the_session_is_mended(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    mount.server.live.clear()
    mount.server.override = _fail_once(wire.Link, rpc.Refused(wire.ErrorCode.STALE_SESSION, "late"))
    with pytest.raises(rpc.Refused) as refused:
        await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    assert refused.value.code is wire.ErrorCode.STALE_SESSION
    await mount.session.call(wire.Link(2, 1, b"a"), wire.Found)
    assert mount.session.id == SESSION_B
    await mount.session.close()


async def test_a_stream_is_repeated_before_its_first_page_only(clock: Clock) -> None:
    mount = Mount(clock)
    await mount.session.open()
    page = next(reply for reply in messages.REPLIES if isinstance(reply, wire.DirectoryPage))
    answers: list[list[Any]] = [[rpc.Disconnected("cut")], [page], [page, rpc.Disconnected("cut")]]
    mount.server.override = lambda request: answers.pop(0) if isinstance(request, wire.FetchDirectory) else None
    fetch = wire.FetchDirectory(1, 0, 100, 0, 0)
    assert [page async for page in mount.session.stream(fetch)] == [page]
    with pytest.raises(rpc.Disconnected, match="cut"):
        [page async for page in mount.session.stream(fetch)]
    await mount.session.close()


async def test_opening_reports_what_is_wrong(clock: Clock) -> None:
    mount = Mount(clock)
    mount.server.override = lambda request: rpc.Refused(wire.ErrorCode.NO_SUCH_VOLUME, "none")
    with pytest.raises(rpc.Refused):
        await mount.session.open()
    assert mount.server.connections[0].lost
    mount.server.refuse_connections = True
    with pytest.raises(rpc.Disconnected):
        await mount.session.open()
