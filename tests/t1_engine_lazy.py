"""Writes that are acknowledged before they are durable: seen at once, durable in time, lost aloud or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from served import FILE, Client, Metaserver, serving, until

from fuseclient.worker.rpc import Refused
from metaserver import wire
from metaserver.engine import Transaction, open_engine
from metaserver.engine import lmdb as lmdb_engine
from metaserver.engine.lmdb import LmdbEngine
from metaserver.errors import EngineFull, EngineUnusable, Unknown


@pytest.fixture
async def lazy(tmp_path: Path) -> AsyncIterator[LmdbEngine]:
    engine = LmdbEngine(str(tmp_path / "engine"), lazy=True)
    yield engine
    await engine.close()


async def put(engine: Any, key: bytes, value: bytes = b"x", lazy: bool = False) -> None:
    await engine.write(lambda txn: txn.put(key, value), lazy=lazy)


async def get(engine: Any, key: bytes) -> bytes | None:
    value: bytes | None = await engine.read(lambda snapshot: snapshot.get(key))
    return value


async def test_a_lazy_write_is_seen_at_once(lazy: LmdbEngine) -> None:
    for number in range(200):
        await put(lazy, b"%d" % number, b"value %d" % number)
        assert await get(lazy, b"%d" % number) == b"value %d" % number
    rows = await lazy.read(lambda snapshot: snapshot.range(b"0", b"z"))
    assert len(rows) == 200


async def test_it_is_committed_in_time(lazy: LmdbEngine) -> None:
    await put(lazy, b"key")
    await until(lambda: not lazy._acknowledged)
    assert await get(lazy, b"key") == b"x"


async def test_an_exception_of_a_body_undoes_that_body_only(lazy: LmdbEngine) -> None:
    def fails(txn: Transaction) -> None:
        txn.put(b"bad", b"x")
        raise ValueError("of the body")

    await put(lazy, b"good")
    with pytest.raises(ValueError, match="of the body"):
        await lazy.write(fails)
    await lazy.sync()
    assert (await get(lazy, b"good"), await get(lazy, b"bad")) == (b"x", None)


_CRASH = """
import asyncio, os, sys
from metaserver.engine import open_engine

async def main():
    engine = open_engine(sys.argv[1], sys.argv[2])
    put = lambda key, lazy: engine.write(lambda txn: txn.put(key, b"x"), lazy=lazy)
    await put(b"first", True)
    await engine.sync()
    await put(b"second", True)
    await put(b"third", False)
    await put(b"fourth", True)
    os._exit(9)

asyncio.run(main())
"""


def crash(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-c", _CRASH, *arguments], check=False).returncode


@pytest.mark.parametrize(
    ("durability", "kept"), [("commit", {b"first", b"second", b"third"}), ("interval", {b"first"})]
)
async def test_a_crash_undoes_what_was_not_synced_at_most(tmp_path: Path, durability: str, kept: set[bytes]) -> None:
    url = f"lmdb://{tmp_path}/engine"
    assert crash(url, durability) == 9
    engine = open_engine(url)
    found = {key for key in (b"first", b"second", b"third", b"fourth") if await get(engine, key)}
    await engine.close()
    assert found >= kept
    assert sorted(found) == [b"first", b"fourth", b"second", b"third"][: len(found)] or found == kept


class Failing:
    """A transaction that cannot be committed."""

    def __init__(self, txn: lmdb.Transaction) -> None:
        self._txn = txn

    def commit(self) -> None:
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)


async def test_a_failed_commit_is_counted_and_told_by_the_sync(
    lazy: LmdbEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lmdb_engine, "INTERVAL_S", 3600.0)
    await put(lazy, b"before")
    await lazy.sync()
    await put(lazy, b"lost")
    lazy._log.close()  # so that only a commit makes it durable
    real = lazy._outer
    assert real is not None
    lazy._outer = Failing(real)  # type: ignore[assignment]
    with pytest.raises((EngineFull, Unknown)):
        await lazy.sync()
    monkeypatch.undo()
    assert lazy.losses == 1
    assert (await get(lazy, b"before"), await get(lazy, b"lost")) == (b"x", None)
    await put(lazy, b"after")
    await lazy.sync()
    assert "1 transactions that were acknowledged just before are lost" in caplog.text


async def test_a_session_is_told_of_losses_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, "memory://") as metaserver:
        client, other = await metaserver.client(), await metaserver.client()
        told: list[wire.Break] = []
        other.connection.on_break(told.append)
        await sync(client)
        monkeypatch.setattr(type(metaserver.engine), "losses", 1)
        with pytest.raises(Refused) as refused:
            await sync(client)
        assert refused.value.code is wire.ErrorCode.INTERNAL
        await sync(client)
        await other.connection.call(wire.GetStatistics(), wire.Statistics)
        assert any(each.everything for each in told), "nobody knows what was undone"
        late = await metaserver.client()
        await sync(late)


async def sync(client: Client) -> None:
    await client.connection.call(wire.Sync(), wire.Done)


async def test_numbers_are_not_given_out_twice_after_a_crash(tmp_path: Path) -> None:
    async with serving(tmp_path, "lmdb") as metaserver:
        client = await metaserver.client()
        ended = await numbers(client)
        await again(metaserver, clean=True)
        after = await numbers(await metaserver.client())
        assert 0 < after[1] - ended[1] < 10
        await again(metaserver, clean=False)
        crashed = await numbers(await metaserver.client())
        assert crashed[0] - after[0] > 1 << 16
        assert crashed[1] - after[1] > 1 << 24


async def again(metaserver: Metaserver, *, clean: bool) -> None:
    """Stop the server and start another one; if not ``clean``, as if it had been killed."""
    metaserver.abort_clients()
    await metaserver.stop()
    if not clean:
        await metaserver.engine.write(lambda txn: txn.put(b"\0u", b""))
    await metaserver.start()


async def numbers(client: Client) -> tuple[int, int]:
    ids = await client.connection.call(wire.NewSlices(1), wire.SliceIds)
    made = await client.make(b"file %d" % ids.ids[0], FILE)
    await client.connection.call(wire.CloseSession(), wire.Done)
    return made.ino, ids.ids[0]


async def test_a_full_map_can_be_emptied(tmp_path: Path) -> None:
    engine = open_engine(f"lmdb://{tmp_path}/engine?map_size={1 << 20}")
    count = 0

    async def fill() -> None:
        nonlocal count
        for number in range(1000):
            await put(engine, b"%04d" % number, bytes(3000))
            count += 1

    with pytest.raises(EngineFull):
        await fill()
    assert 50 < count < 300
    await put(engine, b"0000", bytes(3000))
    for number in range(count):
        await engine.write(lambda txn, number=number: txn.delete(b"%04d" % number))  # type: ignore[misc]
    await put(engine, b"again", bytes(3000))
    assert await get(engine, b"again") == bytes(3000)
    await engine.close()


@pytest.mark.parametrize("query", ["map_size=1", "map_size=x", "map=1", "map_size=99999999999999999"])
def test_other_options_are_refused(tmp_path: Path, query: str) -> None:
    with pytest.raises(EngineUnusable, match="map_size"):
        open_engine(f"lmdb://{tmp_path}/engine?{query}")
