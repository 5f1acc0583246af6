"""The disk cache: its limit and order, restarts, two mounts, faults of its directory; objects read through it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseclient.data import disk_cache
from fuseclient.data.cached_objects import CachedObjects
from fuseclient.data.disk_cache import DiskCache
from fuseclient.data.object_format import Codec, Header, encode, parse_header
from fuseclient.data.objects import ObjectStore, open_store
from fuseclient.data.store_errors import ObjectDamaged, ObjectMissing, StoreError


@contextlib.asynccontextmanager
async def opened(root: Path, limit: int = 1 << 30, **more: Any) -> AsyncIterator[DiskCache]:
    cache = DiskCache(root, limit, **more)
    cache.start()
    await cache.indexed()
    try:
        yield cache
    finally:
        await cache.close()


async def text(cache: DiskCache, name: str, start: int, length: int) -> bytes | None:
    """Return bytes of a file, if it is there."""
    data = await cache.read(name, start, length)
    return None if data is None else bytes(data)


def files_of(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


async def test_what_is_put_is_read_in_parts(tmp_path: Path) -> None:
    async with opened(tmp_path / "c") as cache:
        assert await cache.put("a/b", b"0123456789")
        for _ in range(2):  # from a thread, then from the page cache
            assert await text(cache, "a/b", 3, 4) == b"3456"
        assert await text(cache, "a/b", 8, 10) == b"89"
        assert await cache.read("nothing", 0, 1) is None


async def test_only_its_owner_sees_into_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "c") as cache:
        await cache.put("a/b", b"x")
        assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(cache.path("a/b").stat().st_mode) == 0o600


async def test_it_survives_a_restart_and_removes_what_was_never_finished(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        await cache.put("a", b"kept")
        cache.path("b.new").write_bytes(b"half")
    async with opened(tmp_path) as cache:
        assert cache.bytes == 4
        assert await text(cache, "a", 0, 9) == b"kept"
        assert files_of(tmp_path) == {"0/a": b"kept"}


async def test_a_name_is_found_before_the_directory_is_listed(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        await cache.put("a", b"kept")
    cache = DiskCache(tmp_path, 100)
    assert await text(cache, "a", 0, 9) == b"kept"
    assert await cache.read("b", 0, 9) is None
    await cache.close()


async def test_two_mounts_have_places_of_their_own_and_an_empty_one_goes(tmp_path: Path) -> None:
    async with opened(tmp_path / "c") as first, opened(tmp_path / "c") as second:
        assert first.directory != second.directory
        await second.put("a", b"x")
        assert await first.read("a", 0, 1) is None
    assert files_of(tmp_path) == {"c/1/a": b"x"}
    async with opened(tmp_path / "c") as cache:
        assert cache.directory.name == "0"
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


async def test_a_damaged_file_is_counted_and_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        await cache.put("a", b"x")
        await cache.drop("a", damaged=True)
        assert (cache.figures()["damaged"], cache.bytes, files_of(tmp_path)) == (1, 0, {})


async def test_a_file_that_was_deleted_is_not_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as cache:
        await cache.put("a", b"x")
        cache.path("a").unlink()
        assert await cache.read("a", 0, 1) is None
        assert cache.bytes == 0


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(1, 60)),
        st.tuples(st.just("read"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(_steps)
def test_the_limit_holds_and_the_least_recently_used_go(steps: list[tuple[str, int, int]]) -> None:
    limit = 100

    async def run(root: Path) -> None:
        model: dict[str, int] = {}  # in the order of their use
        cache = DiskCache(root, limit)
        cache.start()
        await cache.indexed()
        for what, number, size in steps:
            name = f"{number}"
            if what == "put":
                await cache.put(name, bytes([number]) * size)
                if name not in model:
                    while sum(model.values()) + size > limit:
                        del model[next(iter(model))]
                    model[name] = size
            elif what == "read":
                data = await text(cache, name, 0, limit)
                assert data == (bytes([number]) * model[name] if name in model else None)
                if name in model:
                    model[name] = model.pop(name)
            elif what == "drop":
                await cache.drop(name)
                model.pop(name, None)
            else:
                await cache.close()
                cache = DiskCache(root, limit)
                cache.start()
                await cache.indexed()
                assert sorted(cache.names("")) == sorted(model)
                model = {name: model[name] for name in cache.names("")}  # times are not as fine as the order was
            assert cache.bytes == sum(model.values()) <= limit
        assert {path.rpartition("/")[2]: len(data) for path, data in files_of(root).items()} == model
        await cache.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


async def test_what_must_not_go_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, 10) as cache:
        cache.may_evict = lambda name: name != "a"
        assert await cache.put("a", b"12345")
        assert await cache.put("b", b"12345")
        assert await cache.put("c", b"12345")
        assert cache.names("") == ["a", "c"]
        assert not await cache.put("d", b"123456")
        assert not await cache.put("e", b"x" * 11)


async def test_without_space_nothing_is_kept_for_a_while_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    full = True
    write = disk_cache._write

    def failing(path: Path, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(disk_cache, "_write", failing)
    async with opened(tmp_path, clock=lambda: now[0]) as cache:
        for _ in range(3):
            assert not await cache.put("a", b"x")
            now[0] += disk_cache.PAUSE_S
        assert not await cache.put("a", b"x")
        assert not await cache.put("b", b"x")
        assert (cache.failures, cache.figures()["writing"]) == (4, False)
        assert len(caplog.records) == 1
        assert "No space left" in caplog.text
        full = False
        now[0] += disk_cache.PAUSE_S
        assert await cache.put("a", b"x")
        assert cache.bytes == 1


async def test_a_nearly_full_file_system_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(path: Path) -> os.statvfs_result:
        return os.statvfs_result((1, 1, 1000, 0, 100 - sum(map(len, files_of(tmp_path).values())), 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", status)
    async with opened(tmp_path) as cache:
        for number in range(5):
            assert await cache.put(str(number), b"x" * 20)
        assert cache.names("") == ["3", "4"]  # 1000 / 20 are spared of the 100 that are free


# Objects


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = open_store(f"file://{tmp_path}/blocks")
    yield store
    store.close()


class Counting:
    """A store that counts, and holds up fetches while ``gate`` is clear."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.reads = self.wholes = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        self.reads += 1
        return await self.store.read(slice_id, start, length)

    async def whole(self, slice_id: int) -> tuple[Header, memoryview]:
        self.wholes += 1
        await self.gate.wait()
        return await self.store.whole(slice_id)


DATA = os.urandom(200_000)


async def test_an_object_is_fetched_once_by_many(tmp_path: Path, store: ObjectStore) -> None:
    await store.put(7, DATA)
    counting = Counting(store)
    async with opened(tmp_path / "c") as disk:
        objects = CachedObjects(counting, disk)
        counting.gate.clear()
        reads = [asyncio.create_task(objects.read(7, n * 1000, 500)) for n in range(20)]
        await asyncio.sleep(0)
        reads[0].cancel()  # whoever gives up does not stop the others
        counting.gate.set()
        results = await asyncio.gather(*reads[1:])
        assert [bytes(each) for each in results] == [DATA[n * 1000 : n * 1000 + 500] for n in range(1, 20)]
        assert (counting.wholes, counting.reads) == (1, 0)
        await objects.close()


@pytest.mark.parametrize("codec", list(Codec))
async def test_objects_are_read_from_the_disk_after_a_restart(tmp_path: Path, store: ObjectStore, codec: Codec) -> None:
    data = DATA[:100_000] + bytes(100_000)
    (tmp_path / "packed").mkdir()
    packed = open_store(f"file://{tmp_path}/packed?compression={codec.name.lower()}")
    await packed.put(7, data)
    for fetched in (1, 0):
        counting = Counting(packed)
        async with opened(tmp_path / "c") as disk:
            objects = CachedObjects(counting, disk, memory_bytes=0)
            assert await objects.read(7, 65_000, 100_000) == data[65_000:165_000]
            await objects.close()
        assert counting.wholes == fetched
    packed.close()


@pytest.mark.parametrize("damage", ["header", "block", "cut", "empty", "other"])
async def test_a_damaged_cache_file_is_read_again_from_the_store(
    tmp_path: Path, store: ObjectStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    await store.put(7, DATA)
    counting = Counting(store)
    async with opened(tmp_path / "c") as disk:
        objects = CachedObjects(counting, disk)
        await objects.read(7, 0, 1)
        await objects.close()
        path = disk.path(disk.names("objects/")[0])
        stored = bytearray(path.read_bytes())
        if damage == "other":
            stored = bytearray(b"".join(encode(8, DATA, Codec.NONE)))
        elif damage in ("cut", "empty"):
            del stored[100_000 if damage == "cut" else 0 :]
        else:
            stored[20 if damage == "header" else -5] ^= 1
        path.write_bytes(stored)
        objects = CachedObjects(counting, disk)
        assert await objects.read(7, 0, len(DATA)) == DATA
        await objects.close()
        assert (counting.wholes, disk.damaged) == (2, 1)
        assert str(path) in caplog.text
        assert parse_header(7, memoryview(path.read_bytes())).length == len(DATA)


async def test_errors_of_the_store_are_the_reader_s(tmp_path: Path, store: ObjectStore) -> None:
    await store.put(7, DATA)
    async with opened(tmp_path / "c") as disk:
        objects = CachedObjects(store, disk)
        with pytest.raises(ObjectMissing, match="object 9"):
            await objects.read(9, 0, 1)
        with pytest.raises(ObjectDamaged, match="object 7 ends"):
            await objects.read(7, 199_999, 2)
        path = next((tmp_path / "blocks").rglob("*07"))
        path.write_bytes(path.read_bytes()[:-1])
        other = CachedObjects(store, None)
        with pytest.raises(StoreError, match="object 7"):
            await other.read(7, 199_000, 1000)
        await objects.prefetch(9)
        await objects.close()


async def test_memory_is_bounded(store: ObjectStore) -> None:
    for number in range(1, 6):
        await store.put(number, DATA)
    objects = CachedObjects(store, None, memory_bytes=450_000)
    for number in range(1, 6):
        await objects.prefetch(number)
    assert objects.figures()["memory_bytes"] <= 450_000
    assert await objects.read(5, 10, 10) == DATA[10:20]
    assert objects.figures()["memory_hits"] == 1
    await objects.close()


async def test_reads_go_on_when_nothing_can_be_kept(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_cache, "_write", failing)
    for number in range(3):
        await store.put(number, DATA)
    with caplog.at_level(logging.WARNING):
        async with opened(tmp_path / "c") as disk:
            objects = CachedObjects(store, disk, memory_bytes=0)
            for number in (0, 1, 2, 0, 1, 2):
                assert await objects.read(number, 5, 5) == DATA[5:10]
            await objects.close()
    assert len(caplog.records) == 1
