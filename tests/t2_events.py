"""The log of changes and the streams of it: order, resumption, what is forgotten, and what a crash may not show."""

from __future__ import annotations

import asyncio
import contextlib
import random
import stat
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest
from served import DIRECTORY, FILE, VOLUME, Client, Metaserver, serving, until

from fuseclient.worker import rpc
from metaserver import events, janitor, namespace, wire
from metaserver.connection import Limits
from metaserver.engine import lmdb as lmdb_engine
from metaserver.wire import ErrorCode, Event, Operation

ENGINES = ["memory://", "lmdb"]


@pytest.fixture(params=ENGINES)
async def metaserver(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Metaserver]:
    monkeypatch.setattr(janitor, "FORGET_S", 0)
    async with serving(tmp_path, request.param) as metaserver:
        yield metaserver


async def refused(call: Awaitable[Any]) -> ErrorCode:
    with pytest.raises(rpc.Refused) as caught:
        await call
    return caught.value.code


async def told(metaserver: Metaserver, since: int | None = 0, volume: str = VOLUME) -> list[Event]:
    """All events up to now."""
    connection = await metaserver.connect()
    pages = [page async for page in connection.follow(wire.FollowEvents(volume, since, False))]
    assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
    connection.abort()
    return [event for page in pages for event in page.events]


class Follower:
    """Someone who follows a volume, on a connection of their own, and comes back when it breaks off."""

    def __init__(self, metaserver: Metaserver, since: int | None) -> None:
        self.events: list[Event] = []
        self.version = since
        self.connections = 0
        self._metaserver = metaserver
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(rpc.Disconnected):
                connection = await rpc.connect(self._metaserver.address)
                try:
                    await self._follow(connection)
                finally:
                    connection.abort()
            await asyncio.sleep(0.01)

    async def _follow(self, connection: rpc.Connection) -> None:
        stream = connection.follow(wire.FollowEvents(VOLUME, self.version, True))
        heard = False
        async with contextlib.aclosing(stream):
            async for page in stream:
                self.connections += not heard
                heard = True
                self.events += page.events
                self.version = page.version

    async def has(self, version: int) -> None:
        """Wait until it was told of this version."""
        await until(lambda: self._task.done() or (self.version or 0) >= version)
        assert not self._task.done(), self._task.exception()

    async def listens(self) -> None:
        await until(lambda: self.connections)

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


@contextlib.asynccontextmanager
async def following(metaserver: Metaserver, since: int | None = 0) -> AsyncIterator[Follower]:
    follower = Follower(metaserver, since)
    try:
        yield follower
    finally:
        await follower.end()


class Replica:
    """The tree, rebuilt from nothing but events."""

    def __init__(self) -> None:
        self.names: dict[tuple[int, bytes], int] = {}
        self.sizes: dict[int, int] = {}

    def take(self, event: Event) -> None:
        here, there = (event.parent, event.name), (event.new_parent, event.new_name)
        if event.operation in (Operation.UNLINK, Operation.RMDIR):
            assert self.names.pop(here) == event.ino
        elif event.operation is Operation.RENAME:
            assert self.names.pop(here) == event.ino
            assert self.names.get(there, 0) == event.other
            self.names[there] = event.ino
        elif event.operation is Operation.EXCHANGE:
            assert (self.names[here], self.names[there]) == (event.ino, event.other)
            self.names[here], self.names[there] = event.other, event.ino
        elif event.parent:
            assert here not in self.names
            self.names[here] = event.ino
        if event.kind == stat.S_IFREG:
            self.sizes[event.ino] = event.size

    @classmethod
    def of(cls, told: list[Event]) -> Replica:
        replica = cls()
        assert [event.version for event in told] == list(range(1, len(told) + 1)), "a gap, or out of order"
        for event in told:
            replica.take(event)
        return replica


async def listing(client: Client, directory: int = wire.ROOT_INO) -> dict[tuple[int, bytes], wire.Attributes]:
    """Every entry below a directory."""
    found: dict[tuple[int, bytes], wire.Attributes] = {}
    async for page in client.connection.stream(wire.FetchDirectory(directory, 0, 4096, 0, 0)):
        for entry in page.entries:
            found[directory, entry.name] = entry.attributes
            if stat.S_ISDIR(entry.attributes.mode):
                found |= await listing(client, entry.attributes.ino)
    return found


async def assert_same_tree(client: Client, replica: Replica) -> None:
    real = await listing(client)
    assert replica.names == {place: each.ino for place, each in real.items()}
    files = {each.ino: each.size for each in real.values() if stat.S_ISREG(each.mode)}
    assert {ino: replica.sizes[ino] for ino in files} == files


# What is told


async def test_every_operation_is_told(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    change = client.change
    d = (await client.make(b"d", DIRECTORY)).ino
    f = (await client.make(b"f", parent=d)).ino
    g = (await client.make(b"g")).ino
    s = (await client.make(b"s", 0o120777, target=b"target")).ino
    p = (await client.make(b"p", 0o010600)).ino
    await change(wire.Link(f, 1, b"l"))
    await change(wire.WriteInline(f, 0, b"data"))
    await change(wire.SetAttributes(f, mode=0o600))
    await change(wire.SetAttributes(f, size=2))
    await change(wire.SetXattr(f, b"user.a", b"1"))
    await change(wire.Rename(d, b"f", 1, b"g"))
    await change(wire.Rename(1, b"g", 1, b"s", exchange=True))
    await change(wire.Remove(1, b"p", False))
    await change(wire.Remove(1, b"d", True))
    found = await told(metaserver)
    assert [(e.operation, e.ino, e.size, e.parent, e.name, e.new_parent, e.new_name, e.other) for e in found] == [
        (Operation.MKDIR, d, 0, 1, b"d", 0, b"", 0),
        (Operation.CREATE, f, 0, d, b"f", 0, b"", 0),
        (Operation.CREATE, g, 0, 1, b"g", 0, b"", 0),
        (Operation.SYMLINK, s, 6, 1, b"s", 0, b"", 0),
        (Operation.MKNOD, p, 0, 1, b"p", 0, b"", 0),
        (Operation.LINK, f, 0, 1, b"l", 0, b"", 0),
        (Operation.CONTENT, f, 4, 0, b"", 0, b"", 0),
        (Operation.ATTRIBUTES, f, 4, 0, b"", 0, b"", 0),
        (Operation.CONTENT, f, 2, 0, b"", 0, b"", 0),
        (Operation.XATTR, f, 2, 0, b"", 0, b"", 0),
        (Operation.RENAME, f, 2, d, b"f", 1, b"g", g),
        (Operation.EXCHANGE, f, 2, 1, b"g", 1, b"s", s),
        (Operation.UNLINK, p, 0, 1, b"p", 0, b"", 0),
        (Operation.RMDIR, d, 0, 1, b"d", 0, b"", 0),
    ]
    assert {event.client for event in found} == {"test"}
    assert [event.kind for event in found[:5]] == [0o040000, 0o100000, 0o100000, 0o120000, 0o010000]
    assert all(event.time_ns > 0 for event in found)


async def test_what_changes_nothing_is_not_told(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    f = await client.make(b"f")
    await client.change(wire.Link(f.ino, 1, b"g"))
    before = await told(metaserver)
    assert await refused(client.make(b"f")) is ErrorCode.EXISTS
    await client.change(wire.Rename(1, b"f", 1, b"g"))
    await client.change(wire.WriteInline(f.ino, 0, b""))
    await client.connection.call(wire.NewSlices(1), wire.SliceIds)
    nameless = (await client.change(wire.MakeTemporary(1, 0o100600, 0, 0))).attributes[0].ino
    assert await told(metaserver) == before
    await client.change(wire.Link(nameless, 1, b"named"))
    assert [(event.operation, event.ino) for event in (await told(metaserver))[2:]] == [(Operation.LINK, nameless)]


async def test_names_that_a_client_has_removed_are_told_each(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    f = await client.make(b"f")
    await client.change(wire.Link(f.ino, 1, b"g"))
    await client.change(wire.RemoveNames([wire.RemovedName(1, b"f", f.ino, 1), wire.RemovedName(1, b"g", f.ino, 2)]))
    events = (await told(metaserver))[2:]
    assert [(event.version, event.operation, event.parent, event.name) for event in events] == [
        (3, Operation.UNLINK, 1, b"f"),
        (4, Operation.UNLINK, 1, b"g"),
    ]
    assert {event.ino for event in events} == {f.ino}


async def test_a_change_that_is_sent_again_is_told_once(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    request = wire.MakeNode(1, b"once", FILE, 0, 0)
    first = await client.connection.change(request, wire.Changed, 3, 1)
    assert await client.connection.change(request, wire.Changed, 3, 1) == first
    assert len(await told(metaserver)) == 1


async def test_volumes_have_each_their_own(metaserver: Metaserver) -> None:
    one, other = await metaserver.client(), await metaserver.client("other")
    await one.make(b"a")
    await other.make(b"b")
    await other.make(b"c")
    assert [event.name for event in await told(metaserver)] == [b"a"]
    assert [(event.version, event.name) for event in await told(metaserver, 0, "other")] == [(1, b"b"), (2, b"c")]


# Order


async def _work(client: Client, rng: random.Random, steps: int, directories: list[int], inodes: list[int]) -> None:
    """Random changes of names and sizes; those that are refused change nothing."""
    names = [b"n%d" % number for number in range(6)]
    for _ in range(steps):
        here, there = rng.choice(directories), rng.choice(directories)
        name, new_name, ino = rng.choice(names), rng.choice(names), rng.choice(inodes or [1])
        requests: list[wire.Request] = [
            wire.MakeNode(here, name, FILE, 0, 0),
            wire.MakeNode(here, name, DIRECTORY, 0, 0),
            wire.Remove(here, name, rng.random() < 0.5),
            wire.Rename(here, name, there, new_name),
            wire.Rename(here, name, there, new_name, exchange=True),
            wire.Link(ino, here, name),
            wire.WriteInline(ino, rng.randrange(9), b"x" * rng.randrange(9)),
            wire.SetAttributes(ino, size=rng.randrange(20)),
        ]
        with contextlib.suppress(rpc.Refused):
            changed = await client.change(rng.choice(requests))
            subject = changed.attributes[0]
            (directories if stat.S_ISDIR(subject.mode) else inodes).append(subject.ino)


@pytest.mark.parametrize("seed", range(4))
async def test_the_tree_can_be_rebuilt_from_the_events(metaserver: Metaserver, seed: int) -> None:
    rng = random.Random(seed)
    client = await metaserver.client()
    await _work(client, rng, 250, [1], [])
    found = await told(metaserver)
    assert len(found) > 50
    await assert_same_tree(client, Replica.of(found))


async def test_the_order_is_that_of_the_commits(metaserver: Metaserver) -> None:
    clients = [await metaserver.client() for _ in range(6)]
    directories, inodes = [1], list[int]()
    async with following(metaserver) as follower:
        await asyncio.gather(
            *(_work(each, random.Random(n), 60, directories, inodes) for n, each in enumerate(clients))
        )
        found = await told(metaserver)
        await follower.has(len(found))
        assert follower.events == found
        await assert_same_tree(clients[0], Replica.of(found))


# Resumption


async def test_it_can_be_resumed_after_every_event(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    for number in range(5):
        await client.make(b"%d" % number)
    found = await told(metaserver)
    for version in range(1, 6):
        assert await told(metaserver, version) == found[version:]
    assert await told(metaserver, None) == []


async def test_from_now(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    await client.make(b"before")
    async with following(metaserver, None) as follower:
        await follower.listens()
        await client.make(b"after")
        await follower.has(2)
        assert [event.name for event in follower.events] == [b"after"]


async def test_cut_connections_and_restarts_lose_nothing(metaserver: Metaserver) -> None:
    metaserver.options["grace"] = False
    first = await metaserver.client()
    await first.connection.call(wire.CloseSession(), wire.Done)
    async with following(metaserver) as follower:
        for turn in range(4):
            client = await metaserver.client()
            await _work(client, random.Random(turn), 40, [1], [])
            await until(lambda turn=turn: follower.connections > turn)  # type: ignore[misc]
            await client.connection.call(wire.CloseSession(), wire.Done)
            if turn % 2:
                metaserver.drop_connections()
            else:
                await metaserver.stop()
                await metaserver.start()
        client = await metaserver.client()
        found = await told(metaserver)
        await follower.has(len(found))
        assert follower.events == found
        assert follower.connections >= 4
        await assert_same_tree(client, Replica.of(follower.events))


async def test_pages_of_a_long_log(metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAGE_EVENTS", 7)
    client = await metaserver.client()
    for number in range(20):
        await client.make(b"%d" % number)
    assert [event.version for event in await told(metaserver)] == list(range(1, 21))
    async with following(metaserver) as follower:
        await follower.has(20)
        assert len(follower.events) == 20


# What is forgotten


async def _volume_of_ten(metaserver: Metaserver, seconds: int = 3600) -> Client:
    connection = await metaserver.connect()
    await connection.call(wire.CreateVolume(VOLUME, "file:///blocks", 65536, 10, seconds), wire.Done)
    return await metaserver.client()


async def test_old_events_are_forgotten_by_number(metaserver: Metaserver) -> None:
    client = await _volume_of_ten(metaserver)
    for number in range(250):
        await client.make(b"%d" % number)

    async def are_few() -> bool:
        return len(await told(metaserver)) == 10

    await until(are_few)
    assert [event.version for event in await told(metaserver)] == list(range(241, 251))
    assert [event.version for event in await told(metaserver, 240)] == list(range(241, 251))
    for since in (1, 100, 239, 251, 2**63 - 1):
        assert await refused(told(metaserver, since)) is ErrorCode.EVENTS_GONE
    assert await told(metaserver, 250) == []


async def test_old_events_are_forgotten_by_age(metaserver: Metaserver) -> None:
    client = await _volume_of_ten(metaserver, seconds=1)
    await client.make(b"a")

    async def are_none() -> bool:
        return not await told(metaserver)

    await until(are_none)
    assert await refused(told(metaserver, 7)) is ErrorCode.EVENTS_GONE
    await client.make(b"b")
    assert [event.version for event in await told(metaserver, 1)] == [2]


async def test_a_follower_that_comes_too_late_is_told_so(
    metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PAGE_EVENTS", 5)
    client = await _volume_of_ten(metaserver)
    for number in range(7):
        await client.make(b"%d" % number)
    volume = await metaserver.engine.read(lambda snapshot: namespace.open_volume(snapshot, VOLUME))
    connected = next(iter(metaserver.server.connections))
    slow = metaserver.server._service.events(connected._caller, wire.FollowEvents(VOLUME, 0, True))
    assert [event.version for event in (await anext(slow)).events] == [1, 2, 3, 4, 5]
    for number in range(30):
        await client.make(b"more-%d" % number)
    await until(lambda: metaserver.engine.read_durable(lambda s: events.start_of(s, volume, 0) > 5))
    with pytest.raises(Exception, match="event 6 is not kept any more: the oldest is"):
        await anext(slow)


# What is not durable yet


async def test_what_a_crash_may_undo_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_engine, "LAZY_S", 3600.0)
    async with serving(tmp_path, "lmdb") as metaserver:
        client = await metaserver.client()
        async with following(metaserver) as follower:
            await follower.listens()
            await client.make(b"lazy", lazy=True)
            volume = await metaserver.engine.read(lambda snapshot: namespace.open_volume(snapshot, VOLUME))
            assert await metaserver.engine.read(lambda snapshot: events.last_version(snapshot, volume)) == 1
            for _ in range(20):
                assert await metaserver.engine.read_durable(lambda s: events.last_version(s, volume)) == 0
                await client.attributes()
            assert follower.events == []
            await client.connection.call(wire.Sync(), wire.Done)
            await follower.has(1)
            assert [event.name for event in follower.events] == [b"lazy"]


async def test_a_commit_that_was_put_off_wakes_followers_when_it_is_made(tmp_path: Path) -> None:
    async with serving(tmp_path, "lmdb") as metaserver:
        client = await metaserver.client()
        async with following(metaserver) as follower:
            await follower.listens()
            for number in range(3):
                await client.make(b"%d" % number, lazy=True)
                await follower.has(number + 1)


# Those who misbehave


async def test_one_live_stream_a_connection(metaserver: Metaserver) -> None:
    await metaserver.client()
    raw = await metaserver.raw(greeted=True)
    raw.send(wire.encode(2, wire.FollowEvents(VOLUME, 0, True)))
    assert isinstance((await raw.receive())[1], wire.EventPage)
    raw.send(wire.encode(3, wire.FollowEvents(VOLUME, 0, True)))
    number, reply = await raw.receive()
    assert number == 3
    assert isinstance(reply, wire.Failure)
    assert reply.code is ErrorCode.BUSY


@pytest.mark.parametrize("since", [-1, 2**63, "0", 1.5, b"", []])
async def test_a_position_that_is_none(metaserver: Metaserver, since: Any) -> None:
    raw = await metaserver.raw(greeted=True)
    raw.send(wire.encode(2, wire.FollowEvents(VOLUME, since, True)))
    (last,) = await raw.until_closed()
    assert isinstance(last, wire.Failure)
    assert last.code is ErrorCode.MALFORMED


async def test_a_volume_that_is_none(metaserver: Metaserver) -> None:
    assert await refused(told(metaserver, 0, "none")) is ErrorCode.NO_SUCH_VOLUME


async def test_who_reads_too_slowly_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAGE_EVENTS", 50)
    async with serving(tmp_path, limits=Limits(stall_s=0.2, unsent_bytes=4096)) as metaserver:
        client = await metaserver.client()
        for number in range(3000):
            await client.make(b"%0250d" % number)
        raw = await metaserver.raw(greeted=True)
        raw.send(wire.encode(2, wire.FollowEvents(VOLUME, 0, True)))
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        server = metaserver.server
        most = 0

        def is_cut() -> bool:
            nonlocal most
            most = max([most, *(connection.unsent_bytes for connection in server.connections)])
            return len(server.connections) == 1

        await until(is_cut)
        assert 0 < most < 100_000, "more than a page is kept for a client that does not read"
        await client.make(b"others are served")


async def test_a_follower_that_has_gone_leaves_nothing(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    followers = metaserver.server._service._followers
    async with following(metaserver) as follower:
        await follower.listens()
        assert followers._count == 1
    await until(lambda: followers._count == 0)
    await client.make(b"a")


async def test_followers_do_not_hold_up_the_end(metaserver: Metaserver) -> None:
    await metaserver.client()
    async with following(metaserver) as follower:
        await follower.listens()
        async with asyncio.timeout(3):
            await metaserver.stop()
        await metaserver.start()
