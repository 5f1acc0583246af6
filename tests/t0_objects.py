"""The local object store: names, durability in order, failures; reading over slices; deletion of unused objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_file import INO, OneFile, Store, plain_reader

from fuseclient.data.layouts import visible
from fuseclient.data.object_names import Listed, listed
from fuseclient.data.objects import NoSpace, ObjectMissing, ObjectStore, StoreError, object_name, open_store
from fuseclient.data.unused import UnusedObjects
from metaserver import wire


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = open_store(f"file://{tmp_path}/blocks")
    yield store
    store.close()


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_names_are_two_levels_deep_and_sorted_by_id() -> None:
    names = [object_name(each) for each in (0, 1, 1023, 1024, 2**20 - 1, 2**20, 2**40)]
    assert names[0] == "00000/000/000000000000"
    assert names[3] == "00000/001/000000000400"
    assert names == sorted(names)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_names_sort_as_the_ids_do(one: int, other: int) -> None:
    assert (object_name(one) < object_name(other)) == (one < other)
    assert listed(object_name(one), 5, 0.0) == Listed(one, 5, 0.0, False)


@pytest.mark.parametrize("shift", range(20, 64))
def test_names_sort_where_ids_grow_longer(shift: int) -> None:
    ids = [(1 << shift) + step for step in (-(2**20), -1025, -1024, -1, 0, 1, 1024, 2**20)]
    ids = [each for each in ids if 0 <= each < 2**63]
    assert sorted(map(object_name, ids)) == [object_name(each) for each in ids]


async def test_objects_are_listed_by_rising_id(store: ObjectStore) -> None:
    ids = [0, 5, 2**40 - 1, 2**40, 2**40 + 2**20, 2**44, 2**50, 2**63 - 1]
    for slice_id in reversed(ids):
        await store.put(slice_id, b"x")
    assert [each.slice_id async for page in store.list() for each in page] == ids


async def test_an_object_reads_back_in_ranges(store: ObjectStore) -> None:
    data = os.urandom(100_000)
    await store.put(12345, memoryview(data))
    assert await store.read(12345, 0, len(data)) == data
    assert await store.read(12345, 777, 4096) == data[777 : 777 + 4096]
    with pytest.raises(StoreError, match="ends at byte 100000"):
        await store.read(12345, 99_999, 2)
    with pytest.raises(StoreError):
        await store.read(12345, 200_000, 1)
    with pytest.raises(ObjectMissing):
        await store.read(12346, 0, 1)


async def test_deleting_passes_over_what_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    await store.put(1, b"one")
    await store.delete([1, 2])
    with pytest.raises(ObjectMissing):
        await store.read(1, 0, 1)
    assert files_below(tmp_path) == []


async def test_an_object_is_durable_before_put_returns(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    blocks = tmp_path / "blocks"

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        log.append(f"fsync {path.relative_to(blocks)}")

    def link(source: Path, target: Path) -> None:
        log.append(f"link {target.relative_to(blocks)}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    await store.put(1, b"data")
    await store.put(2, b"data")
    assert log == [
        "fsync .",
        "fsync 00000",
        "fsync 00000/000/000000000001.new",
        "link 00000/000/000000000001",
        "fsync 00000/000",
        "fsync 00000/000/000000000002.new",
        "link 00000/000/000000000002",
        "fsync 00000/000",
    ]


async def test_a_full_store_says_so_and_keeps_nothing(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(NoSpace):
        await store.put(1, b"data")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("url", ["gs://bucket", "file://host/dir", "file:dir", "/dir", "s3:///x", ""])
def test_other_urls_are_refused_in_one_line(url: str) -> None:
    with pytest.raises(StoreError, match="file:///directory"):
        open_store(url)


def test_a_store_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(f"file://{tmp_path}/file/blocks")


_slices = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30), st.integers(0, 3), st.integers(0, 9)), max_size=12)


@given(_slices, st.integers(0, 60), st.integers(0, 60))
def test_later_slices_lie_over_earlier_ones(laid: list[tuple[int, int, int, int]], begin: int, length: int) -> None:
    slices = [wire.Slice(*each) for each in laid]
    end = begin + length
    model: dict[int, tuple[int, int]] = {}
    for each in slices:
        for index in range(each.length):
            model[each.offset + index] = (each.slice_id, each.start + index)
    seen: dict[int, tuple[int, int]] = {}
    for piece in visible(slices, begin, end):
        for index in range(piece.length):
            assert piece.offset + index not in seen
            seen[piece.offset + index] = (piece.slice_id, piece.start + index)
    assert seen == {at: where for at, where in model.items() if begin <= at < end and where[0]}


async def test_a_read_asks_again_when_an_object_was_deleted_meanwhile() -> None:
    store = Store()
    server = OneFile(store, 0)
    store.objects[1] = store.objects[2] = b"x" * 100_000
    await server.call(wire.CommitSlices(INO, [wire.Slice(0, 100_000, 1, 0)], 100_000), wire.Changed)

    def overwritten(request: wire.Request) -> None:
        if sum(isinstance(each, wire.GetContent) for each in server.requests) == 2:
            server.slices = [wire.Slice(0, 100_000, 2, 0)]

    del store.objects[1]
    server.before = overwritten
    assert (await plain_reader(server, store).read(INO, 10, 5)).data == b"xxxxx"
    store.objects.clear()
    with pytest.raises(ObjectMissing):
        await plain_reader(server, store).read(INO, 10, 5)


async def test_a_small_file_is_read_whole() -> None:
    server = OneFile(Store(), 100)
    await server.call(wire.WriteInline(INO, 3, b"abc"), wire.Changed)
    await server.call(wire.SetAttributes(INO, size=10), wire.Changed)
    reading = await plain_reader(server, Store()).read(INO, 4, 3)
    assert reading.data == b"bc\0"
    assert reading.content == b"\0\0\0abc\0\0\0\0"
    assert (await plain_reader(server, Store()).read(INO, 100, 3)).data == b""


class Unused:
    """A metaserver's list of unused slices."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    async def call(self, request: Any, reply_type: type[Any]) -> Any:
        if isinstance(request, wire.ListSlices):
            return wire.SliceIds(list(self.ids))
        self.ids = [each for each in self.ids if each not in request.ids]
        return wire.Done()


async def test_unused_objects_are_deleted_a_lease_after_they_were_seen() -> None:
    store, server = Store(), Unused([1, 2])
    store.objects = {1: b"", 2: b"", 3: b""}
    unused = UnusedObjects(server, store, 30.0, lambda: False)
    await unused.round(100.0)
    server.ids.append(3)
    await unused.round(129.9)
    assert set(store.objects) == {1, 2, 3}
    await unused.round(130.0)
    assert set(store.objects) == {3}
    assert server.ids == [3]
    await unused.round(159.9)
    assert store.objects == {}
    assert server.ids == []
