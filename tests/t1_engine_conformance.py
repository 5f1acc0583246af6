"""What every storage engine must do: the same tests for all of them."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from databases import SERVERS, Databases
from namespaces import new_engine

from metaserver.engine import Engine, Snapshot, Transaction, candidate, open_engine
from metaserver.engine.base import MAX_KEY, MAX_TRANSACTION, MAX_VALUE, MAX_WRITES
from metaserver.engine.location import parse
from metaserver.errors import Conflict, EngineBusy, EngineClosed, EngineUnusable, LimitExceeded

Rows = list[tuple[bytes, bytes]]


ENGINES = ["memory", "lmdb", *SERVERS]


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> str:
    """The URL of a fresh engine of each kind."""
    return databases.url(request.param, tmp_path / "engine")


@pytest.fixture
async def engine(url: str) -> AsyncIterator[Engine]:
    engine = open_engine(url)
    yield engine
    await engine.close()


@pytest.fixture
async def other(engine: Engine, url: str) -> AsyncIterator[Engine]:
    """The same store as another process sees it, where there can be another one: else the engine itself."""
    if url.startswith(("memory:", "lmdb:")):
        yield engine
        return
    other = open_engine(url)
    yield other
    await other.close()


@pytest.fixture
async def lmdb(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = new_engine("lmdb", tmp_path / "engine")
    yield engine
    await engine.close()


async def put(engine: Engine, **values: bytes) -> None:
    def body(txn: Transaction) -> None:
        for key, value in values.items():
            txn.put(key.encode(), value)

    await engine.write(body)


async def rows(engine: Engine, start: bytes = b"a", end: bytes = b"z") -> Rows:
    return await engine.read(lambda snapshot: snapshot.range(start, end))


async def test_get_and_range(engine: Engine) -> None:
    await put(engine, b=b"2", a=b"1", d=b"", c=b"3")

    def body(view: Snapshot) -> list[object]:
        return [
            view.get(b"a"),
            view.get(b"d"),
            view.get(b"e"),
            view.range(b"b", b"d"),
            view.range(b"b", b"z", limit=2),
            view.range(b"a", b"d", reverse=True),
            view.range(b"a", b"d", limit=1, reverse=True),
            view.range(b"a", b"z", limit=1, reverse=True),
            view.range(b"a", b"z", limit=0),
            view.range(b"x", b"z"),
            view.range(b"x", b"z", reverse=True),
            view.range(b"A", b"B", reverse=True),
        ]

    b, c = (b"b", b"2"), (b"c", b"3")
    expected = [b"1", b"", None, [b, c], [b, c], [c, b, (b"a", b"1")], [c], [(b"d", b"")], [], [], [], []]
    assert await engine.read(body) == expected
    assert await engine.write(body) == expected


async def test_a_transaction_sees_its_own_writes(engine: Engine) -> None:
    await put(engine, a=b"1", b=b"2", c=b"3")

    def body(txn: Transaction) -> tuple[Rows, bytes | None, bytes | None, Rows]:
        txn.put(b"bb", b"new")
        txn.put(b"c", b"")
        txn.delete(b"a")
        txn.delete(b"not there")
        return txn.range(b"a", b"z"), txn.get(b"a"), txn.get(b"c"), txn.range(b"a", b"z", limit=1, reverse=True)

    expected = [(b"b", b"2"), (b"bb", b"new"), (b"c", b"")]
    assert await engine.write(body) == (expected, None, b"", [(b"c", b"")])
    assert await rows(engine) == expected


async def test_delete_then_put(engine: Engine) -> None:
    await put(engine, a=b"1")

    def body(txn: Transaction) -> None:
        txn.delete(b"a")
        txn.put(b"a", b"2")
        txn.put(b"b", b"3")
        txn.delete(b"b")

    await engine.write(body)
    assert await rows(engine) == [(b"a", b"2")]


async def test_an_exception_aborts(engine: Engine) -> None:
    def body(txn: Transaction) -> None:
        txn.put(b"a", b"1")
        raise KeyError("mine")

    def missing(snapshot: Snapshot) -> bytes:
        raise KeyError(snapshot.get(b"a"))

    with pytest.raises(KeyError, match="mine"):
        await engine.write(body)
    assert await rows(engine) == []
    with pytest.raises(KeyError):
        await engine.read(missing)


async def test_one_failing_body_does_not_touch_the_others(engine: Engine) -> None:
    def write(number: int) -> None:
        def body(txn: Transaction) -> None:
            txn.put(b"key%d" % number, b"")
            if number % 2:
                raise ValueError(number)

        tasks.append(asyncio.create_task(engine.write(body)))

    tasks: list[asyncio.Task[None]] = []
    for number in range(10):
        write(number)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, ValueError) for result in results] == [bool(n % 2) for n in range(10)]
    assert [key for key, _ in await rows(engine)] == [b"key%d" % n for n in range(0, 10, 2)]


async def test_no_lost_update(engine: Engine, other: Engine) -> None:
    def add(txn: Transaction) -> None:
        txn.put(b"n", b"%d" % (int(txn.get(b"n") or b"0") + 1))

    await asyncio.gather(*(each.write(add) for each in (engine, other) for _ in range(10)))
    assert await rows(engine) == [(b"n", b"20")]


async def test_write_skew(engine: Engine, other: Engine) -> None:
    """Of two doctors on call, each may leave if the other stays."""
    await put(engine, a=b"on", b=b"on")

    def leave(txn: Transaction, who: bytes) -> None:
        if txn.get(b"a") == txn.get(b"b") == b"on":
            txn.put(who, b"off")

    both = zip((engine, other), (b"a", b"b"), strict=True)
    await asyncio.gather(*(each.write(functools.partial(leave, who=who)) for each, who in both))
    assert sorted(value for _, value in await rows(engine)) == [b"off", b"on"]


async def test_phantom_insert(engine: Engine, other: Engine) -> None:
    """Each inserts only if the range is empty."""

    def insert(txn: Transaction, key: bytes) -> bool:
        empty = not txn.range(b"m", b"n", limit=1)
        if empty:
            txn.put(key, b"")
        return empty

    each = zip((engine, other, engine), (b"m1", b"m2", b"m3"), strict=True)
    done = await asyncio.gather(*(one.write(functools.partial(insert, key=key)) for one, key in each))
    assert sorted(done) == [False, False, True]
    assert len(await rows(engine)) == 1


async def test_phantom_delete(engine: Engine, other: Engine) -> None:
    """Each deletes its own key only if the range has two: one must be left."""
    await put(engine, m1=b"", m2=b"")

    def delete(txn: Transaction, key: bytes) -> None:
        if len(txn.range(b"m", b"n")) == 2:
            txn.delete(key)

    both = zip((engine, other), (b"m1", b"m2"), strict=True)
    await asyncio.gather(*(each.write(functools.partial(delete, key=key)) for each, key in both))
    assert len(await rows(engine)) == 1


async def test_phantom_behind_a_limit(engine: Engine, other: Engine) -> None:
    """A limited range is as far as it was read: what is inserted before its last key conflicts, at either end."""
    await put(engine, m3=b"", m5=b"")

    def prepend(txn: Transaction, key: bytes, reverse: bool) -> None:
        (found,) = txn.range(b"m", b"n", limit=1, reverse=reverse)
        txn.put(key, found[0])

    async def run(keys: tuple[bytes, bytes], reverse: bool) -> set[bytes]:
        bodies = [functools.partial(prepend, key=key, reverse=reverse) for key in keys]
        await asyncio.gather(engine.write(bodies[0]), other.write(bodies[1]))
        return {value for key, value in await rows(engine) if key in keys}

    assert await run((b"m1", b"m2"), False) in ({b"m3", b"m1"}, {b"m3", b"m2"})
    assert await run((b"m7", b"m8"), True) in ({b"m5", b"m7"}, {b"m5", b"m8"})


async def test_a_snapshot_does_not_move(engine: Engine, other: Engine) -> None:
    """Two keys always written together are never seen apart."""
    await put(engine, a=b"0", b=b"0")

    def write(txn: Transaction, value: bytes) -> None:
        txn.put(b"a", value)
        txn.put(b"b", value)

    def read(snapshot: Snapshot) -> tuple[bytes | None, bytes | None, Rows]:
        return snapshot.get(b"a"), snapshot.get(b"b"), snapshot.range(b"a", b"z")

    async def reader() -> None:
        for _ in range(50):
            for look in (engine.read, engine.scan):
                a, b, found = await look(read)
                assert a == b
                assert [value for _, value in found] == [a, b]

    async def writer() -> None:
        for number in range(50):
            await (other if number % 2 else engine).write(functools.partial(write, value=b"%d" % number))

    await asyncio.gather(reader(), writer(), reader())


async def test_a_read_sees_what_was_committed_before_it(engine: Engine, other: Engine) -> None:
    for number in range(20):
        value = b"%d" % number
        await put(engine, a=value)
        for look in (engine.read, other.read, other.scan):
            assert await look(lambda snapshot: snapshot.get(b"a")) == value


def _put_all(txn: Transaction, count: int, value: bytes) -> None:
    for number in range(count):
        txn.put(b"k%d" % number, value)


OVERSIZE: dict[str, Callable[[Transaction], object]] = {
    "key": lambda txn: txn.put(b"k" * (MAX_KEY + 1), b""),
    "deleted key": lambda txn: txn.delete(b"k" * (MAX_KEY + 1)),
    "empty key": lambda txn: txn.put(b"", b""),
    "value": lambda txn: txn.put(b"k", bytes(MAX_VALUE + 1)),
    "writes": lambda txn: _put_all(txn, MAX_WRITES, b""),
    "bytes": lambda txn: _put_all(txn, MAX_TRANSACTION // MAX_VALUE + 1, bytes(MAX_VALUE)),
}


@pytest.mark.parametrize("what", OVERSIZE)
async def test_too_large_is_refused_whole(engine: Engine, what: str) -> None:
    def body(txn: Transaction) -> None:
        txn.put(b"first", b"1")
        OVERSIZE[what](txn)

    with pytest.raises(LimitExceeded):
        await engine.write(body)
    assert await rows(engine) == []


async def test_the_largest_fits(engine: Engine) -> None:
    def body(txn: Transaction) -> int:
        txn.put(b"k" * MAX_KEY, bytes(MAX_VALUE))
        for number in range(MAX_WRITES - 1):
            txn.put(b"%d" % number, b"x")
            txn.put(b"%d" % number, b"y")
        return txn.room

    assert await engine.write(body) == 0
    assert await engine.read(lambda snapshot: snapshot.get(b"k" * MAX_KEY)) == bytes(MAX_VALUE)
    assert await engine.read(lambda snapshot: snapshot.get(b"98")) == b"y"


async def test_a_conflict_is_retried(engine: Engine) -> None:
    runs = 0

    def body(txn: Transaction) -> None:
        nonlocal runs
        runs += 1
        txn.put(b"a", b"%d" % runs)
        if runs < 3:
            raise Conflict("made up")

    await engine.write(body)
    assert runs == 3
    assert await rows(engine) == [(b"a", b"3")]


async def test_a_conflict_without_end_is_raised(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaserver.engine.base._LONGEST_PAUSE", 0.0001)

    def body(txn: Transaction) -> None:
        txn.put(b"a", b"1")
        raise Conflict("made up")

    with pytest.raises(Conflict):
        await engine.write(body)
    assert await rows(engine) == []


async def test_a_cancelled_caller_harms_nobody(engine: Engine) -> None:
    task = asyncio.create_task(engine.write(lambda txn: txn.put(b"a", b"1")))
    other = asyncio.create_task(engine.write(lambda txn: txn.put(b"b", b"1")))
    await asyncio.sleep(0)
    task.cancel()
    await other
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (b"b", b"1") in await rows(engine)


async def test_space(engine: Engine) -> None:
    space = await engine.read(lambda snapshot: snapshot.space())
    assert 0 < space.free <= space.total


async def test_closed(engine: Engine) -> None:
    await engine.close()
    await engine.close()
    with pytest.raises(EngineClosed):
        await engine.read(lambda snapshot: snapshot.get(b"a"))
    with pytest.raises(EngineClosed):
        await engine.write(lambda txn: txn.put(b"a", b""))


# LMDB alone


async def test_what_was_accepted_is_done_before_the_close(lmdb: Engine, tmp_path: Path) -> None:
    tasks = [asyncio.create_task(put(lmdb, **{f"k{n}": b""})) for n in range(5)]
    await asyncio.sleep(0)
    await lmdb.close()
    await asyncio.gather(*tasks)
    again = new_engine("lmdb", tmp_path / "engine")
    assert len(await rows(again)) == 5
    await again.close()


_KILLED = """
import asyncio, os, signal, sys
from metaserver.engine import open_engine

async def main():
    engine = open_engine(sys.argv[1])
    await asyncio.gather(*(engine.write(lambda txn, n=n: txn.put(b"k%d" % n, b"v")) for n in range(50)))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_commits_outlive_a_kill(tmp_path: Path) -> None:
    url = f"lmdb://{tmp_path}/engine"
    root = Path(__file__).parent.parent
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", _KILLED, url], cwd=root, capture_output=True, timeout=60, check=False
    )
    assert child.returncode == -9, child.stderr.decode()
    engine = open_engine(url)
    assert len(await rows(engine)) == 50
    await engine.close()


async def test_writers_share_a_commit(lmdb: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    writer = lmdb._writer  # type: ignore[attr-defined]
    process = writer._process

    def counted(jobs: list[object]) -> None:
        batches.append(len(jobs))
        process(jobs)

    monkeypatch.setattr(writer, "_process", counted)
    await asyncio.gather(*(put(lmdb, **{f"k{n}": b""}) for n in range(100)))
    assert sum(batches) == 100
    assert len(batches) <= 20


async def test_reads_that_are_refused_leave_nothing_behind(lmdb: Engine) -> None:
    """LMDB has places for 126 readers, and an exception that is kept keeps what the body saw."""

    def fails(snapshot: Snapshot) -> None:
        snapshot.get(b"key")
        raise ValueError("of the body")

    errors = []
    for _ in range(300):
        with pytest.raises(ValueError, match="of the body") as caught:
            await lmdb.read(fails)
        errors.append(caught.value)
    assert await lmdb.read(lambda snapshot: snapshot.get(b"key")) is None


async def test_only_one_process_has_the_directory(lmdb: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineBusy, match="in use by another metaserver"):
        open_engine(f"lmdb://{tmp_path}/engine")
    await lmdb.close()
    again = open_engine(f"lmdb://{tmp_path}/engine")
    await again.close()


@pytest.mark.parametrize(
    "address",
    [
        "lmdb://host/dir",
        "lmdb:dir",
        "nothing",
        "lmdb:///proc/none/x",
        "lmdb:///x?map_size=1",
        "lmdb:///x?size=1",
        "etcd://x",
        "etcd:///p",
        "etcd://x:99999/p",
        "etcd://x,,y/p",
        "etcd://x/p?quota=1",
        "etcd://x/p?ca=/none",
    ],
)
def test_unusable_urls(address: str) -> None:
    for way in (open_engine, functools.partial(candidate, address="")):
        if way is open_engine or "proc" not in address:
            with pytest.raises(EngineUnusable):
                way(address)


SECRET = "a-secret-that-nobody-may-see"


@pytest.mark.parametrize("address", [f"etcd://me:{SECRET}@x/p", f"etcd://me@x/p?password={SECRET}"])
def test_a_password_in_a_url_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(EngineUnusable, match="BPFUSE_ENGINE_PASSWORD") as caught:
        open_engine(address)
    assert SECRET not in str(caught.value)


def test_where_a_password_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("etcd://me@x/p").password() is None
    monkeypatch.setenv("BPFUSE_ENGINE_PASSWORD", "from the environment")
    assert parse("etcd://me@x/p").password() == "from the environment"
    (tmp_path / "password").write_text("from a file\n")
    (tmp_path / "password").chmod(0o600)
    location = parse(f"etcd://me@x/p?password_file={tmp_path}/password")
    assert location.password() == "from a file"
    assert "from" not in repr(location)


def test_secrets_that_others_can_read_are_refused(tmp_path: Path) -> None:
    for option in ("password_file", "ca=x&cert=x&key"):
        path = tmp_path / "secret"
        path.write_text(SECRET)
        for scheme in ("postgresql://me@x/d", "mysql://me@x/d"):
            path.chmod(0o640)
            with pytest.raises(EngineUnusable, match="chmod 600"):
                open_engine(f"{scheme}?{option}={path}")
    path.write_bytes(b"\xff")
    path.chmod(0o600)
    with pytest.raises(EngineUnusable, match="UTF-8"):
        open_engine(f"postgresql://me@x/d?password_file={path}")
    with pytest.raises(EngineUnusable, match="a certificate needs its key, and ca"):
        open_engine("etcd://x/p?cert=y&key=z")


def test_a_foreign_file_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(8192))
    with pytest.raises(EngineUnusable):
        open_engine(f"lmdb://{tmp_path}")
    (tmp_path / "data.mdb").unlink()
    asyncio.run(open_engine(f"lmdb://{tmp_path}").close())
