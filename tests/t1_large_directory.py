"""A directory of a million entries is read by windows, each at the cost of its own size; and a file of 65,000 links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path

import pytest
from namespaces import ROOT, SESSION, Files, new_engine

from bench import large_directory
from metaserver import wire
from metaserver.engine.base import Row, Snapshot, Space, Transaction
from metaserver.errors import Refused
from metaserver.namespace import READS, WRITES, Context, Volume
from metaserver.wire import ErrorCode

ENTRIES = 1_000_000
#: Rows that a fetch may read beside four for each entry that it may return.
FEW = 8


class Counted(Snapshot):
    """A snapshot that counts the rows which are read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.rows = 0

    def get(self, key: bytes) -> bytes | None:
        self.rows += 1
        return self._snapshot.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        rows = self._snapshot.range(start, end, limit, reverse)
        self.rows += len(rows)
        return rows

    def space(self) -> Space:
        return self._snapshot.space()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Volume, int]:
    """The engine's directory, its volume, and the inode of the large directory."""
    path = tmp_path_factory.mktemp("large") / "engine"

    async def make() -> tuple[Path, Volume, int]:
        engine = new_engine("lmdb", path)
        volume = (await Files.create(engine)).volume
        await engine.close()
        return path, volume, await large_directory.make(path, volume.name, ENTRIES)

    return asyncio.run(make())


@pytest.fixture
async def many(made: tuple[Path, Volume, int]) -> AsyncIterator[tuple[Files, int]]:
    path, volume, parent = made
    engine = new_engine("lmdb", path)
    yield Files(engine, volume), parent
    await engine.close()


async def fetch(many: tuple[Files, int], limit: int, **more: object) -> list[wire.DirectoryEntry]:
    """Fetch a window; no more rows than a window has may be read, and no page may be larger than a frame takes."""
    files, parent = many
    request = wire.FetchDirectory(parent, limit=limit, data_limit=4096, data_budget=2**20, **more)  # type: ignore[arg-type]

    def counted(snapshot: Snapshot) -> tuple[list[wire.DirectoryPage], int]:
        view = Counted(snapshot)
        return READS[wire.FetchDirectory](view, Context(files.volume, SESSION, 1), request), view.rows

    pages, rows = await files.engine.read(counted)
    entries = [entry for page in pages for entry in page.entries]
    assert len(entries) <= limit
    assert rows <= 4 * limit + FEW
    assert all(len(wire.encode(1, page)) < 2 * wire.PAGE_BYTES for page in pages)
    assert pages[-1].complete == (bool(entries) and entries[-1].name == large_directory.name_of(ENTRIES - 1))
    return entries


def numbers(entries: Iterable[wire.DirectoryEntry]) -> list[int]:
    return [int(entry.name.removeprefix(b"entry")) for entry in entries]


async def test_any_part_of_it_costs_what_it_holds(many: tuple[Files, int]) -> None:
    first = await fetch(many, 1000, cookie=0)
    assert numbers(first) == list(range(1000))
    base = first[0].cookie
    for start in (1, 4096, ENTRIES // 2, ENTRIES - 1000, ENTRIES - 1):
        found = await fetch(many, 1000, cookie=base + start - 1)
        assert numbers(found) == list(range(start, min(start + 1000, ENTRIES)))
    for number in (5, ENTRIES // 3, ENTRIES - 1):
        found = await fetch(many, 1000, cookie=0, around=large_directory.name_of(number))
        assert number in numbers(found)


async def test_it_is_read_to_the_end_by_its_cookies(many: tuple[Files, int]) -> None:
    """Nothing twice, nothing left out, while entries go that were not reached yet and others come."""
    files, parent = many
    cookie, seen = 0, 0
    while entries := await fetch(many, wire.MAX_FETCH, cookie=cookie):
        assert numbers(entries) == list(range(seen, seen + len(entries)))
        cookie, seen = entries[-1].cookie, seen + len(entries)
        if seen == ENTRIES:
            break
    assert seen == ENTRIES
    gone, come = large_directory.name_of(ENTRIES // 2), b"entry%07d" % ENTRIES
    await files.change(wire.Remove(parent, gone, False))
    await files.change(wire.MakeNode(parent, come, 0o100644, 0, 0))
    found = await files.fetch(parent, entries[-2].cookie)
    assert [entry.name for entry in found[0].entries] == [large_directory.name_of(ENTRIES - 1), come]
    assert await files.find(come, parent)
    with pytest.raises(Refused) as refusal:
        await files.find(gone, parent)
    assert refusal.value.code is ErrorCode.NOT_FOUND


async def test_as_many_links_as_ext4_allows() -> None:
    engine = new_engine("memory", Path())
    files = await Files.create(engine)
    ino = await files.make(b"file")

    def link(first: int, txn: Transaction) -> None:
        for number in range(first, min(first + 20, 65_000)):
            WRITES[wire.Link](txn, Context(files.volume, SESSION, 1), wire.Link(ino, ROOT, b"%d" % number))

    for first in range(1, 65_000, 20):
        await engine.write(partial(link, first))
    assert (await files.stat(ino)).nlink == 65_000
    with pytest.raises(Refused) as refusal:
        await files.change(wire.Link(ino, ROOT, b"one more"))
    assert refusal.value.code is ErrorCode.TOO_MANY_LINKS
    await files.change(wire.Remove(ROOT, b"7", False))
    await files.change(wire.Link(ino, ROOT, b"one more"))
    assert (await files.stat(ino)).nlink == 65_000
    await engine.close()
