"""Engines on real servers whose connections are cut, which are killed, and which forget the past."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import databases as database_servers
import pytest
from databases import SERVERS, Databases, Etcd, Proxy, Server

from metaserver.engine import Engine, Snapshot, Transaction, candidate, open_engine
from metaserver.engine.authority import LAPSE_S
from metaserver.engine.remote_authority import RemoteCandidate, boottime_s
from metaserver.engine.session_lock import SessionLock
from metaserver.errors import EngineBusy, EngineUnusable, LimitExceeded

_DEADLINE_S = 30.0


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, databases: Databases) -> Server:
    return databases.server(request.param)


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with database_servers.proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
async def engine(server: Server, proxy: Proxy) -> AsyncIterator[Engine]:
    """An engine behind the proxy."""
    engine = open_engine(server.url(proxy.port))
    yield engine
    await engine.close()


def add(txn: Transaction) -> int:
    value = int(txn.get(b"n") or b"0") + 1
    txn.put(b"n", b"%d" % value)
    return value


def get(snapshot: Snapshot) -> bytes | None:
    return snapshot.get(b"n")


async def test_an_answer_that_is_lost(engine: Engine, proxy: Proxy) -> None:
    """The connection is cut when the answer to a commit comes: it is made once, and its maker learns of it."""
    for number in range(1, 11):
        lost = asyncio.Event()

        def stop(lost: asyncio.Event = lost) -> None:
            proxy.loses_answers = False
            lost.set()

        await engine.read(get)
        proxy.lost, proxy.loses_answers = stop, True
        async with asyncio.timeout(_DEADLINE_S):
            assert await engine.write(add) == number
        assert lost.is_set()
    assert await engine.read(get) == b"10"


async def test_cut_at_any_moment(engine: Engine, proxy: Proxy) -> None:
    """While many write, connections are cut again and again: nothing is lost, and nothing is made twice."""
    done: set[int] = set()

    async def write() -> None:
        for _ in range(100):
            value = await engine.write(add)
            assert value not in done
            done.add(value)

    writers = asyncio.gather(*(write() for _ in range(4)))
    async with asyncio.timeout(_DEADLINE_S):
        for number in range(1, 6):
            while len(done) < 60 * number:  # noqa: ASYNC110 - it is cut in the middle of whatever goes on then
                await asyncio.sleep(0.001)
            proxy.cut()
        await writers
    assert done == set(range(1, 401))
    assert await engine.read(get) == b"400"


async def test_killed_and_started_again(server: Server) -> None:
    """What was acknowledged is there, and whoever waits goes on."""
    engine = open_engine(server.url())
    assert await engine.write(add) == 1
    server.kill()
    waiting = asyncio.create_task(engine.write(add))
    reading = asyncio.create_task(engine.read(get))
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(_DEADLINE_S):
        assert await waiting == 2
        assert await reading in (b"1", b"2")
    await engine.close()


async def test_nobody_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaserver.engine.remote.FIRST_PATIENCE_S", 0.3)
    engine = open_engine(server.url(database_servers.free_ports(1)[0]))
    with pytest.raises(EngineUnusable, match="does not answer"):
        await engine.read(get)
    await engine.close()


@pytest.mark.parametrize("server", ["postgresql", "mysql"], indirect=True)
async def test_looking_who_has_the_authority_does_not_end_it(server: Server) -> None:
    """A standby looks all the time, while it takes over, too, and is interrupted in that when it has done so."""
    url = server.url()
    former, standing = candidate(url, "former"), candidate(url, "next")
    await former.take()
    lock, sessions = standing._lock, []  # type: ignore[attr-defined]
    connect = lock._connect

    async def counted() -> object:
        sessions.append(await connect())
        return sessions[-1]

    lock._connect = counted

    async def look() -> None:
        while True:
            await asyncio.gather(*(standing.holder() for _ in range(5)))

    looking = asyncio.create_task(look())
    former._lock._end()  # type: ignore[attr-defined]  # as a crash does
    former._keeping.cancel()  # type: ignore[attr-defined]
    async with asyncio.timeout(_DEADLINE_S):
        engine = await standing.wait()
        looking.cancel()
        assert await engine.write(add) == 1
        with pytest.raises(EngineBusy):
            await candidate(url, "third").take()
        assert await standing.holder() == "next"
    assert len(sessions) == 1
    await standing.resign()
    await former.resign()


@pytest.mark.parametrize("server", ["postgresql", "mysql"], indirect=True)
async def test_who_stood_by_takes_over_soon_and_not_too_soon(server: Server, proxy: Proxy) -> None:
    """From one that hangs, whose session lapses; and from one that crashes, whose session is over at once."""
    url = server.url()
    former = candidate(url.replace(f":{server.port}", f":{proxy.port}"), "former")
    standing, third = candidate(url, "next"), candidate(url, "third")
    assert isinstance(former, RemoteCandidate)
    assert isinstance(standing, RemoteCandidate)
    assert isinstance(third, RemoteCandidate)
    await former.take()
    waiting = asyncio.create_task(standing.wait())
    proxy.hold()
    held_s = boottime_s()
    async with asyncio.timeout(_DEADLINE_S):
        await waiting
    assert boottime_s() >= former._until
    assert boottime_s() - held_s < 1.5 * LAPSE_S, "it did not wait twice"
    proxy.let_go()

    waiting = asyncio.create_task(third.wait())
    lock = standing._lock
    assert isinstance(lock, SessionLock)
    begun_s = boottime_s()
    async with asyncio.timeout(_DEADLINE_S):
        while boottime_s() < begun_s + LAPSE_S:  # it is looked at all the time, and beats
            assert await standing.holder() == "next"
        assert standing._keeping is not None
        standing._keeping.cancel()
        lock._end()
        await waiting
    assert boottime_s() >= standing._until
    for each in (third, standing, former):
        await each.resign()


@pytest.mark.parametrize("server", ["postgresql", "mysql"], indirect=True)
async def test_who_has_never_looked_waits_as_long_as_the_former_may_rely_on_it(server: Server) -> None:
    url = server.url()
    former, fresh = candidate(url, "former"), candidate(url, "fresh")
    assert isinstance(former, RemoteCandidate)
    await former.take()
    assert former._keeping is not None
    former._keeping.cancel()
    former._lock._end()  # type: ignore[attr-defined]
    async with asyncio.timeout(_DEADLINE_S):
        await fresh.wait()
    assert boottime_s() >= former._until
    await fresh.resign()
    await former.resign()


# etcd alone


@pytest.fixture
def etcd(databases: Databases) -> Etcd:
    server = databases.server("etcd")
    assert isinstance(server, Etcd)
    return server


async def test_another_endpoint_answers(etcd: Etcd) -> None:
    dead = database_servers.free_ports(1)[0]
    url = etcd.url()
    engine = open_engine(url.replace("127.0.0.1", f"127.0.0.1:{dead},127.0.0.1"))
    assert await engine.write(add) == 1
    await engine.close()
    engine = open_engine(url)
    assert await engine.read(get) == b"1"
    await engine.close()


async def test_a_past_that_is_compacted_is_read_anew(etcd: Etcd) -> None:
    """A body that is reading when its revision goes away begins again, at a later one."""
    from aetcd.rpc import rpc_pb2, rpc_pb2_grpc

    engine = open_engine(etcd.url())
    await engine.write(add)
    loop, runs = asyncio.get_running_loop(), []

    async def compact() -> None:
        await engine.write(add)
        store = engine.store  # type: ignore[attr-defined]
        past = await store.call(rpc_pb2_grpc.KVStub, "Range", rpc_pb2.RangeRequest(key=b"x"))
        await store.call(rpc_pb2_grpc.KVStub, "Compact", rpc_pb2.CompactionRequest(revision=past.header.revision))

    def body(snapshot: Snapshot) -> list[bytes | None]:
        runs.append(1)
        before = snapshot.get(b"n")
        if len(runs) == 1:
            asyncio.run_coroutine_threadsafe(compact(), loop).result(_DEADLINE_S)
        return [before, snapshot.get(b"n")]

    assert await engine.scan(body) == [b"2", b"2"]
    assert len(runs) == 2
    await engine.close()


async def test_a_range_of_many_pages(etcd: Etcd) -> None:
    """Pages are of one revision, in either direction and with a limit."""
    engine = open_engine(etcd.url())
    keys = [b"%04d" % number for number in range(600)]
    for at in range(0, 600, 100):
        await engine.write(lambda txn, at=at: [txn.put(key, key) for key in keys[at : at + 100]])  # type: ignore[misc]
    assert [key for key, _ in await engine.read(lambda s: s.range(b"0", b"1"))] == keys
    assert [key for key, _ in await engine.read(lambda s: s.range(b"0", b"1", reverse=True))] == keys[::-1]
    assert [key for key, _ in await engine.read(lambda s: s.range(b"0", b"1", limit=300))] == keys[:300]
    assert await engine.scan(lambda s: s.get_many([*keys, b"none"])) == [*keys, None]
    await engine.close()


async def test_a_server_that_takes_less_than_it_should() -> None:
    """What it refuses is refused whole, as a limit; smaller transactions go on."""
    try:
        server = _Narrow()
    except database_servers.Unavailable as error:
        pytest.skip(str(error))
    try:
        await asyncio.to_thread(server.start)
        engine = open_engine(server.url())

        def write(txn: Transaction, count: int, value: bytes = b"") -> None:
            for number in range(count):
                txn.put(b"%d" % number, value)

        with pytest.raises(LimitExceeded, match="too many operations"):
            await engine.write(lambda txn: write(txn, 30))
        with pytest.raises(LimitExceeded, match="too large"):
            await engine.write(lambda txn: write(txn, 8, bytes(60_000)))
        assert await engine.read(lambda s: s.range(b"0", b"a")) == []
        await engine.write(lambda txn: write(txn, 10))
        assert len(await engine.read(lambda s: s.range(b"0", b"a"))) == 10
        await engine.close()
    finally:
        server.close()


class _Narrow(Etcd):
    def command(self) -> list[str]:
        return [*super().command(), "--max-txn-ops=20", "--max-request-bytes=100000"]
