"""Volumes that are dumped from one engine and loaded into another."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import namespaces
import pytest
from databases import SERVERS, Databases
from namespaces import DIRECTORY, Files

from metaserver import dump, keys, wire
from metaserver.dump import BadDump
from metaserver.engine import Engine, open_engine
from metaserver.errors import Refused
from metaserver.fsck.run import Interrupted
from metaserver.namespace import list_volumes, open_volume

NUMBER = 60


def quiet(what: str, done: int, total: int) -> None:
    """Take no note of progress."""


async def filled(engine: Engine, name: str = "tests") -> Files:
    """A volume with something of every kind."""
    files = await Files.create(engine, name)
    directory = await files.mkdir(b"directory")
    for number in range(NUMBER):
        ino = await files.make(b"file%d" % number, parent=directory)
        await files.change(wire.WriteInline(ino, 0, b"%d" % number * 1000))
        await files.change(wire.SetXattr(ino, b"user.x", b"%d" % number))
    await files.make(b"link", 0o120777, target=b"somewhere")
    large = await files.make(b"large")
    (slice_id,) = await files.slices(1)
    await files.change(wire.CommitSlices(large, [wire.Slice(0, 100_000, slice_id, 0)], 100_000, False))
    await files.make(b"orphan")
    await files.change(wire.Remove(namespaces.ROOT, b"orphan", False))
    return files


async def content(engine: Engine, name: str) -> list[tuple[bytes, bytes]]:
    """Return a volume's rows, their keys without its number."""

    def body(snapshot: object) -> list[tuple[bytes, bytes]]:
        volume = open_volume(snapshot, name)  # type: ignore[arg-type]
        return [(key[5:], value) for key, value in snapshot.range(*keys.volume_range(volume.id))]  # type: ignore[attr-defined]

    return await engine.read(body)


@pytest.mark.parametrize("kind", ["lmdb", *SERVERS])
async def test_there_and_back(databases: Databases, tmp_path: Path, kind: str) -> None:
    """From LMDB to each engine and from there to another LMDB: the same rows, under another number and name."""
    first, last = namespaces.new_engine("lmdb", tmp_path / "first"), namespaces.new_engine("lmdb", tmp_path / "last")
    middle = open_engine(databases.url(kind, tmp_path / "middle"))
    await Files.create(middle, "another")
    files = await filled(first)
    before = await content(first, "tests")
    volume, dumped = await dump.dump(first, "", tmp_path / "one", quiet)
    assert sum(dumped.rows.values()) == len(before)
    loaded, trailer = await dump.load(middle, "", tmp_path / "one", quiet)
    assert trailer == dumped
    assert (loaded.name, loaded.store, loaded.identity) == (volume.name, volume.store, volume.identity)
    assert await content(middle, "tests") == before
    await Files(middle, loaded).check()
    _, again = await dump.dump(middle, "tests", tmp_path / "two", quiet)
    assert again == dumped
    with pytest.raises(Refused, match="has a volume 'tests' already"):
        await dump.load(middle, "", tmp_path / "two", quiet)
    await dump.load(last, "renamed", tmp_path / "two", quiet)
    assert await content(last, "renamed") == before
    assert (tmp_path / "two").stat().st_mode & 0o777 == 0o600
    del files
    for engine in (first, middle, last):
        await engine.close()


async def test_what_is_not_whole_leaves_nothing(tmp_path: Path) -> None:
    """A dump that is cut off or damaged anywhere, or that is interrupted: no volume, no row, and no file."""
    engine = namespaces.new_engine("lmdb", tmp_path / "engine")
    files = await filled(engine)
    await dump.dump(engine, "", tmp_path / "good", quiet)
    good = (tmp_path / "good").read_bytes()
    target = namespaces.new_engine("remote", tmp_path)
    bad = tmp_path / "bad"
    for damaged in (
        b"", good[:5], good[:200], good[:-1], good[:-40], b"x" + good[1:],
        good[: len(good) // 2] + b"\xff\xff" + good[len(good) // 2 + 2 :],
    ):  # fmt: skip
        bad.write_bytes(damaged)
        with pytest.raises(BadDump):
            await dump.load(target, "", bad, quiet)

    def stop(what: str, done: int, total: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        await dump.load(target, "", tmp_path / "good", stop)
    assert await target.read(list_volumes) == []
    assert await target.read(lambda snapshot: snapshot.range(b"\1", b"\2")) == []
    for number in range(300):
        await files.make(b"long-%0200d" % number)
        if number % 3 == 0:
            ino = await files.make(b"filled-%d" % number)
            await files.change(wire.WriteInline(ino, 0, bytes(range(256)) * 16))
    with pytest.raises(Interrupted):
        await dump.dump(engine, "", tmp_path / "stopped", stop)
    with pytest.raises(FileExistsError):
        await dump.dump(engine, "", tmp_path / "good", quiet)
    assert sorted(os.listdir(tmp_path)) == ["bad", "engine", "good"]
    await engine.close()
    await target.close()


async def test_a_dump_is_of_one_moment(databases: Databases, tmp_path: Path) -> None:
    """While a volume changes, on an engine that lets others read."""
    url = databases.url("etcd", tmp_path)
    engine, reader = open_engine(url), open_engine(url)
    files = await Files.create(engine)
    ended = asyncio.Event()

    async def change() -> None:
        number = 0
        while not ended.is_set():
            directory = await files.make(b"d%d" % number, DIRECTORY)
            await files.make(b"f", parent=directory)
            number += 1

    changing = asyncio.create_task(change())
    try:
        while await reader.read(lambda s: len(s.range(*keys.volume_range(files.volume.id)))) < 20:
            pass
        for number in range(5):
            await dump.dump(reader, "", tmp_path / f"{number}", quiet)
    finally:
        ended.set()
        await changing
    for number in range(5):
        target = namespaces.new_engine("remote", tmp_path)
        volume, _ = await dump.load(target, "", tmp_path / f"{number}", quiet)
        await Files(target, volume).check()
        await target.close()
    await engine.close()
    await reader.close()


async def test_which_volume(tmp_path: Path) -> None:
    engine = namespaces.new_engine("lmdb", tmp_path / "engine")
    with pytest.raises(Refused, match="there is no volume"):
        await dump.dump(engine, "", tmp_path / "file", quiet)
    await Files.create(engine, "one")
    await Files.create(engine, "two")
    with pytest.raises(Refused, match=r"say which volume .*: one, two"):
        await dump.dump(engine, "", tmp_path / "file", quiet)
    await dump.dump(engine, "two", tmp_path / "file", quiet)
    await engine.close()
