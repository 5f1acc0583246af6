"""LMDB's log: what was acknowledged is there after a crash, in whole changes, in their order, and once only."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import until

from metaserver.engine import lmdb as lmdb_engine
from metaserver.engine import lmdb_log
from metaserver.engine.lmdb import LmdbEngine
from metaserver.engine.lmdb_log import CommitLog
from metaserver.errors import EngineError, Unknown

BLOCK = 4096


@pytest.fixture(autouse=True)
def no_commits_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_engine, "LAZY_S", 3600.0)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[LmdbEngine]:
    opened = await ready(tmp_path / "engine")
    yield opened
    await opened.close()


async def ready(directory: Path) -> LmdbEngine:
    """Open an engine whose log is laid, which its thread does after the first commit."""
    opened = LmdbEngine(str(directory))
    await put(opened, b"begin")
    await opened.scan(lambda snapshot: None)
    await opened.sync()
    await until(lambda: opened._outer is not None)
    return opened


async def put(engine: LmdbEngine, key: bytes, value: bytes = b"x", lazy: bool = False) -> None:
    await engine.write(lambda txn: txn.put(key, value), lazy=lazy)


async def keys(engine: LmdbEngine) -> list[bytes]:
    return [key for key, _ in await engine.read(lambda snapshot: snapshot.range(b"\0", b"\xff"))]


def in_lmdb(directory: Path) -> list[bytes]:
    """Return the keys that LMDB's file has by itself."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(directory / "data.mdb", copy)
        with lmdb.open(copy, readonly=True, lock=False) as env, env.begin() as txn:
            return [key for key, _ in txn.cursor()]


def crashed(directory: Path, tmp_path: Path, damage: Callable[[Path], None] = lambda log: None) -> Path:
    """Return a copy of the engine's files as they are now, with what is not in them lost."""
    image = tmp_path / "image"
    shutil.rmtree(image, ignore_errors=True)
    image.mkdir(mode=0o700)
    for name in ("data.mdb", "log"):
        shutil.copy(directory / name, image / name)
    damage(image / "log")
    return image


async def after_crash(engine: LmdbEngine, tmp_path: Path, damage: Callable[[Path], None] = lambda log: None) -> Any:
    again = LmdbEngine(str(crashed(Path(engine._directory), tmp_path, damage)))
    found = await keys(again)
    await again.close()
    return found


async def test_the_log_alone_keeps_what_was_acknowledged(engine: LmdbEngine, tmp_path: Path) -> None:
    await put(engine, b"lazy", lazy=True)
    await put(engine, b"one")
    await put(engine, b"two")
    await put(engine, b"late", lazy=True)
    assert await keys(engine) == [b"begin", b"late", b"lazy", b"one", b"two"]
    assert in_lmdb(tmp_path / "engine") == [b"begin"], "LMDB has committed, and the log was not tried"
    assert await after_crash(engine, tmp_path) == [b"begin", b"lazy", b"one", b"two"]
    assert in_lmdb(tmp_path / "image") == [b"begin", b"lazy", b"one", b"two"]


async def test_what_lmdb_has_is_not_done_again(engine: LmdbEngine, tmp_path: Path) -> None:
    await put(engine, b"gone")
    await put(engine, b"kept")
    await engine.scan(lambda snapshot: None)
    await engine.write(lambda txn: txn.delete(b"gone"))
    assert await after_crash(engine, tmp_path) == [b"begin", b"kept"]
    await engine.scan(lambda snapshot: None)
    assert await after_crash(engine, tmp_path) == [b"begin", b"kept"]


async def test_a_record_that_is_not_whole_ends_the_log(engine: LmdbEngine, tmp_path: Path) -> None:
    """As the last record can be, if the machine ended while it was written."""
    for number in range(3):
        await put(engine, b"%d" % number, b"v" * BLOCK)

    def cut(offset: int) -> Callable[[Path], None]:
        def damage(log: Path) -> None:
            with log.open("r+b") as file:
                file.seek(offset)
                file.write(bytes(BLOCK))

        return damage

    expected = [b"begin", b"0", b"1", b"2"]
    for block in range(6):
        found = await after_crash(engine, tmp_path, cut(block * BLOCK))
        assert found == sorted(expected[: 1 + block // 2])
    assert await after_crash(engine, tmp_path, lambda log: log.unlink()) == [b"begin"]
    assert await after_crash(engine, tmp_path, lambda log: os.truncate(log, 100)) == [b"begin"]
    assert await after_crash(engine, tmp_path) == sorted(expected)


def test_lengths_in_the_log_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for size in (2**32 - 1, 4 * 1024 * 1024):
        path.write_bytes(lmdb_log._HEADER.pack(lmdb_log._MAGIC, 7, 0, size).ljust(BLOCK, b"\0"))
        assert not list(CommitLog(str(path)).records(7))


async def test_a_full_log_and_large_changes_are_committed(engine: LmdbEngine, tmp_path: Path) -> None:
    large = 0
    for number in range(150):
        size = 60_000 if number % 50 else 100
        await put(engine, b"%03d" % number, bytes(size))
        large += size
        assert engine._log._end <= 4 * 1024 * 1024
    assert large > 8 * 1024 * 1024
    assert len(in_lmdb(tmp_path / "engine")) > 100
    assert len(await after_crash(engine, tmp_path)) == 151

    def much(txn: Any) -> None:
        for number in range(10):
            txn.put(b"much %d" % number, bytes(60_000))

    await engine.write(much)
    assert b"much 9" in in_lmdb(tmp_path / "engine")


class Failing:
    """A transaction that cannot be committed."""

    def __init__(self, txn: lmdb.Transaction) -> None:
        self._txn = txn

    def commit(self) -> None:
        raise lmdb.DiskError("mdb_txn_commit: Input/output error")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)


async def test_a_failed_commit_loses_nothing_of_the_log(engine: LmdbEngine, tmp_path: Path) -> None:
    await put(engine, b"logged")
    await put(engine, b"lazy", lazy=True)
    engine._outer = Failing(engine._outer)  # type: ignore[assignment, arg-type]
    with pytest.raises(EngineError):
        await engine.scan(lambda snapshot: None)
    assert engine.losses == 1
    assert await keys(engine) == [b"begin", b"logged"]
    await put(engine, b"after")
    assert await after_crash(engine, tmp_path) == [b"after", b"begin", b"logged"]
    await engine.scan(lambda snapshot: None)
    assert in_lmdb(tmp_path / "engine") == [b"after", b"begin", b"logged"]


async def test_without_its_log_it_commits(
    engine: LmdbEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    await put(engine, b"before")
    monkeypatch.setattr(lmdb_log, "_write", fails)
    await put(engine, b"failed")
    assert in_lmdb(tmp_path / "engine") == [b"before", b"begin", b"failed"]
    assert "the log cannot be written" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(lmdb_engine, "LAZY_S", 3600.0)
    await put(engine, b"next")
    assert b"next" not in in_lmdb(tmp_path / "engine"), "it was not laid again"
    assert await after_crash(engine, tmp_path) == [b"before", b"begin", b"failed", b"next"]


async def test_where_neither_log_nor_commit_works_the_outcome_is_unknown(
    engine: LmdbEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes_and_fails(descriptor: int, data: bytes, offset: int) -> None:
        real(descriptor, data, offset)
        raise OSError(5, "Input/output error")

    real = lmdb_log._write
    monkeypatch.setattr(lmdb_log, "_write", writes_and_fails)
    engine._outer = Failing(engine._outer)  # type: ignore[assignment, arg-type]
    with pytest.raises(Unknown):
        await put(engine, b"perhaps")
    assert await keys(engine) == [b"begin"]
    await put(engine, b"sure")
    assert await keys(engine) == [b"begin", b"sure"]


async def test_what_is_read_as_durable_is(engine: LmdbEngine, tmp_path: Path) -> None:
    await put(engine, b"logged")
    told = asyncio.Event()
    engine.watch(told.set)
    await put(engine, b"lazy", lazy=True)
    assert not told.is_set()
    found = await engine.read_durable(lambda snapshot: snapshot.range(b"\0", b"\xff"))
    assert {key for key, _ in found} <= set(in_lmdb(tmp_path / "engine"))
    assert b"logged" in [key for key, _ in found]
    told.clear()
    await put(engine, b"news")
    await asyncio.wait_for(told.wait(), 10)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads that have written the log's records."""

    def write(descriptor: int, data: bytes, offset: int) -> None:
        threads.append(threading.get_ident())
        real(descriptor, data, offset)

    threads: list[int] = []
    real = lmdb_log._write
    monkeypatch.setattr(lmdb_log, "_write", write)
    return threads


async def test_a_turn_of_the_loop_is_one_record(
    engine: LmdbEngine, tmp_path: Path, records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_engine, "_QUICK_S", 3600.0)
    await put(engine, b"first")
    records.clear()
    await asyncio.gather(*(put(engine, b"%d" % number) for number in range(5)))
    assert records == [threading.get_ident()]
    assert await after_crash(engine, tmp_path) == [b"0", b"1", b"2", b"3", b"4", b"begin", b"first"]


async def test_the_loop_does_not_wait_for_a_slow_device(
    engine: LmdbEngine, tmp_path: Path, records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_engine, "_QUICK_S", 0.0)
    await put(engine, b"first")
    records.clear()
    await put(engine, b"second")
    assert len(records) == 1
    assert threading.get_ident() not in records
    assert await after_crash(engine, tmp_path) == [b"begin", b"first", b"second"]


async def test_what_was_seen_is_durable_before_who_saw_it_is_answered(
    engine: LmdbEngine, records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused() -> int:
        with pytest.raises(KeyError):
            await engine.write(refuse)
        return len(records)

    def refuse(txn: Any) -> None:
        if txn.get(b"made") is not None:
            raise KeyError

    monkeypatch.setattr(lmdb_engine, "_QUICK_S", 3600.0)
    await put(engine, b"first")
    records.clear()
    _, before = await asyncio.gather(put(engine, b"made"), refused())
    assert before == 1


async def test_the_log_is_left_to_a_writer_that_has_something_to_do(
    engine: LmdbEngine, tmp_path: Path, records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_engine, "_QUICK_S", 3600.0)
    await put(engine, b"first")
    records.clear()
    await asyncio.gather(put(engine, b"second"), engine.scan(lambda snapshot: None))
    assert threading.get_ident() not in records
    assert in_lmdb(tmp_path / "engine") == [b"begin", b"first", b"second"]


async def test_who_waits_for_the_end_of_the_turn_learns_that_a_commit_failed_before(
    engine: LmdbEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    await put(engine, b"first")
    monkeypatch.setattr(lmdb_log, "_write", fails)
    engine._outer = Failing(engine._outer)  # type: ignore[assignment, arg-type]
    done = await asyncio.gather(
        put(engine, b"lost"), engine.scan(lambda snapshot: None), put(engine, b"later"), return_exceptions=True
    )
    assert isinstance(done[0], Unknown | EngineError)
    assert b"lost" not in await keys(engine)


async def test_a_close_makes_durable_what_is_waited_for(engine: LmdbEngine, tmp_path: Path) -> None:
    await put(engine, b"first")
    await asyncio.gather(put(engine, b"last"), engine.close())
    assert in_lmdb(tmp_path / "engine") == [b"begin", b"first", b"last"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("delete"), st.integers(0, 9), st.booleans()),
        st.tuples(st.sampled_from(["sync", "commit", "crash"]), st.just(0), st.just(False)),
    ),
    max_size=30,
)


@given(steps=STEPS)
def test_any_history_ends_as_one_of_its_moments_since_it_was_durable(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bool]]
) -> None:
    directory = tmp_path_factory.mktemp("history")
    asyncio.run(play(directory, steps))
    shutil.rmtree(directory)


async def play(directory: Path, steps: list[tuple[str, int, bool]]) -> None:
    place = directory / "engine"
    engine = await ready(place)
    state = {b"begin": b"x"}
    #: What a crash may leave: every state since the last one that was durable.
    moments = [dict(state)]
    for count, (kind, number, lazy) in enumerate(steps):
        key, value = b"key %d" % number, b"%d" % count
        if kind == "put":
            state[key] = value
            await put(engine, key, value, lazy)
        elif kind == "delete":
            state.pop(key, None)
            await engine.write(lambda txn, key=key: txn.delete(key), lazy=lazy)  # type: ignore[misc]
        elif kind == "sync":
            await engine.sync()
        elif kind == "commit":
            await engine.scan(lambda snapshot: None)
        else:
            image = crashed(place, directory)
            await engine.close()
            shutil.rmtree(place)
            image.rename(place)
            engine = LmdbEngine(str(place))
            found = dict(await engine.read(lambda snapshot: snapshot.range(b"\0", b"\xff")))
            assert found in moments
            state = found
        assert dict(await engine.read(lambda snapshot: snapshot.range(b"\0", b"\xff"))) == state
        durable = kind in ("sync", "commit", "crash") or not lazy
        moments = [dict(state)] if durable else [*moments, dict(state)]
    await engine.close()
