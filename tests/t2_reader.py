"""The reader between a metaserver and a store that count: layouts asked for once, dropped in time; reading ahead."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from one_file import INO, OneFile, Store
from served import until

from fuseclient.data.cached_objects import CachedObjects
from fuseclient.data.layouts import CHUNK_BYTES, Layouts
from fuseclient.data.object_format import Codec, Header, encode, parse_header
from fuseclient.data.read_ahead import BEGIN_BYTES, WINDOW_BYTES
from fuseclient.data.reader import Reader
from fuseclient.data.store_errors import ObjectDamaged, ObjectMissing, StoreError
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.rpc import Refused
from metaserver import wire

OBJECT = 1 << 20


class CountingStore(Store):
    """A store that counts, with whole objects; reads wait while ``reading`` is clear."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []
        self.wholes: list[int] = []
        self.at_once = self.most = 0
        self.reading = asyncio.Event()
        self.reading.set()

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        self.reads.append(slice_id)
        await self._wait()
        return await super().read(slice_id, start, length)

    async def whole(self, slice_id: int) -> tuple[Header, memoryview]:
        self.wholes.append(slice_id)
        await self._wait()
        if slice_id not in self.objects:
            raise ObjectMissing(f"object {slice_id} is missing")
        stored = memoryview(b"".join(encode(slice_id, self.objects[slice_id], Codec.NONE)))
        return parse_header(slice_id, stored), stored

    async def _wait(self) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.reading.wait()
        await asyncio.sleep(0)
        self.at_once -= 1


class Rig:
    """A reader of one file of ``size`` bytes in objects of 1 MiB, with caches of the real feeder."""

    def __init__(self, size: int) -> None:
        self.store = CountingStore()
        self.server = OneFile(self.store, 0)
        self.left_s = 30.0
        self.feeder = Feeder(_NoMaps(), lambda ino: False)
        self.layouts = Layouts(self.server, self.feeder, lambda: self.left_s)
        self.feeder.on_drop = self.layouts.drop
        self.objects = CachedObjects(self.store, None)
        self.reader = Reader(self.layouts, self.objects)
        self.content = random.Random(size).randbytes(OBJECT) * (size // OBJECT)
        self.server.inline = None
        for number in range(size // OBJECT):
            self.store.objects[number + 1] = self.content[number * OBJECT : (number + 1) * OBJECT]
            self.server.slices.append(wire.Slice(number * OBJECT, OBJECT, number + 1, 0))
        self.server.touch(size=size)

    @property
    def asked(self) -> int:
        return sum(isinstance(each, wire.GetContent) for each in self.server.requests)

    async def read(self, offset: int, length: int) -> bytes:
        return (await self.reader.read(INO, offset, length)).data


class _NoMaps:
    """A kernel cache that forgets."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: None


async def test_the_metaserver_is_asked_once_a_chunk() -> None:
    rig = Rig(2 * CHUNK_BYTES)
    places = [random.Random(n).randrange(2 * CHUNK_BYTES - 5000) for n in range(100)]
    parts = await asyncio.gather(*(rig.read(place, 5000) for place in places))
    assert parts == [rig.content[place : place + 5000] for place in places]
    assert rig.asked == 2


async def test_a_read_goes_on_in_the_next_chunk_and_ends_with_the_file() -> None:
    rig = Rig(2 * CHUNK_BYTES)
    assert await rig.read(CHUNK_BYTES - 3, 10) == rig.content[CHUNK_BYTES - 3 : CHUNK_BYTES + 7]
    assert await rig.read(2 * CHUNK_BYTES - 3, 10) == rig.content[-3:]
    assert await rig.read(2 * CHUNK_BYTES, 10) == b""
    assert await rig.read(5 * CHUNK_BYTES, 10) == b""


async def test_a_dropped_inode_is_asked_for_again() -> None:
    rig = Rig(4 * OBJECT)
    await rig.read(0, 100_000)
    rig.server.slices.append(wire.Slice(0, OBJECT, 2, 0))
    rig.server.touch()
    rig.feeder.drop_inode(INO)
    assert await rig.read(0, 100_000) == rig.content[OBJECT : OBJECT + 100_000]
    rig.feeder.drop_everything()
    await rig.read(0, 100_000)
    await rig.read(OBJECT, 100_000)
    assert rig.asked == 3


async def test_an_answer_overtaken_by_a_drop_is_not_kept() -> None:
    rig = Rig(4 * OBJECT)

    def overtake(request: wire.Request) -> None:
        rig.server.before = lambda request: None
        rig.feeder.drop_inode(INO)

    rig.server.before = overtake
    await rig.read(0, 100_000)
    await rig.read(0, 100_000)
    await rig.read(0, 100_000)
    assert rig.asked == 2


async def test_nothing_kept_is_used_without_a_lease() -> None:
    rig = Rig(4 * OBJECT)
    rig.left_s = 0.0
    for _ in range(3):
        await rig.read(OBJECT, 100_000)
    assert rig.asked == 3


async def test_a_chunk_of_too_many_slices_is_read_by_ranges() -> None:
    rig = Rig(4 * OBJECT)

    def refuse(request: Any) -> None:
        if isinstance(request, wire.GetContent) and request.length > OBJECT:
            raise Refused(wire.ErrorCode.TOO_LARGE, "too many slices")

    rig.server.before = refuse
    assert await rig.read(OBJECT + 5, 300_000) == rig.content[OBJECT + 5 : OBJECT + 300_005]
    assert await rig.read(5, 3) == rig.content[5:8]


async def test_holes_are_zeros() -> None:
    rig = Rig(4 * OBJECT)
    del rig.server.slices[1]
    rig.server.slices.append(wire.Slice(10, 5, 0, 0))
    expected = bytearray(rig.content)
    expected[OBJECT : 2 * OBJECT] = bytes(OBJECT)
    expected[10:15] = bytes(5)
    assert await rig.read(0, 3 * OBJECT) == bytes(expected[: 3 * OBJECT])
    assert await rig.read(OBJECT, OBJECT) == bytes(OBJECT)


async def test_pieces_are_fetched_at_once() -> None:
    rig = Rig(8 * OBJECT)
    rig.store.reading.clear()
    reading = asyncio.create_task(rig.read(0, 8 * OBJECT))
    await until(lambda: rig.store.at_once >= 8)
    rig.store.reading.set()
    assert await reading == rig.content


async def test_a_missing_object_is_an_error_that_names_it() -> None:
    rig = Rig(4 * OBJECT)
    del rig.store.objects[3]
    with pytest.raises(StoreError, match="object 3"):
        await rig.read(2 * OBJECT + 1, 1000)
    assert await rig.read(OBJECT, 1000) == rig.content[OBJECT : OBJECT + 1000]


async def test_a_damaged_object_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(4 * OBJECT)

    async def damaged(slice_id: int, start: int, length: int) -> memoryview:
        raise ObjectDamaged(f"object {slice_id} is damaged")

    monkeypatch.setattr(rig.store, "read", damaged)
    with pytest.raises(ObjectDamaged, match="object 1"):
        await rig.read(0, 100_000)


async def test_a_sequential_reader_finds_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(64 * OBJECT)
    for offset in range(0, 4 * OBJECT, 128 * 1024):
        await rig.read(offset, 128 * 1024)
    await until(lambda: len(rig.store.wholes) >= 8)
    rig.store.reads.clear()
    before = len(rig.store.wholes)
    assert await rig.read(4 * OBJECT, OBJECT) == rig.content[4 * OBJECT : 5 * OBJECT]
    assert rig.store.reads == []
    await rig.reader.close()
    assert len(rig.store.wholes) == len(set(rig.store.wholes))
    assert before * OBJECT <= 5 * OBJECT + WINDOW_BYTES


async def test_reads_a_little_out_of_order_are_sequential() -> None:
    rig = Rig(16 * OBJECT)
    step = 128 * 1024
    order = [n ^ 1 for n in range(16)]
    for number in order:
        await rig.read(number * step, step)
    await until(lambda: rig.store.wholes)
    await rig.reader.close()


async def test_a_random_reader_fetches_what_it_asks_for() -> None:
    rig = Rig(32 * OBJECT)
    for n in range(100):
        await rig.read(random.Random(n).randrange(8) * 4 * OBJECT, 4096)
    assert rig.store.wholes == []
    assert len(rig.store.reads) == 100


async def test_reading_ahead_stops_when_the_file_is_closed() -> None:
    rig = Rig(64 * OBJECT)
    await rig.read(0, OBJECT)
    rig.store.reading.clear()
    rest = asyncio.create_task(rig.read(OBJECT, 2 * OBJECT))
    await until(lambda: rig.store.wholes)
    rig.reader.closed(INO)
    rig.store.reading.set()
    await rest
    await until(lambda: not rig.reader.figures()["read_ahead"]["running"])
    assert len(rig.store.wholes) <= 4
    assert BEGIN_BYTES < OBJECT


async def test_reading_ahead_of_what_fails_tells_nobody() -> None:
    rig = Rig(8 * OBJECT)
    del rig.store.objects[5]
    for offset in range(0, 4 * OBJECT, 256 * 1024):
        await rig.read(offset, 256 * 1024)
    await until(lambda: 5 in rig.store.wholes)
    await until(lambda: not rig.reader.figures()["read_ahead"]["running"])
    with pytest.raises(ObjectMissing):
        await rig.read(4 * OBJECT, 10)
