"""Compaction over a real metaserver: the content stays, writes and cuts made meanwhile win, garbage goes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from one_file import Store
from served import Client, serving, until

from fuseclient.data.compaction import ENOUGH, Compactor
from fuseclient.data.layouts import visible
from fuseclient.data.objects import StoreError
from fuseclient.data.uploads import CHUNK
from fuseclient.data.writer import Writer
from fuseclient.worker.rpc import Connection, Disconnected, Refused
from metaserver import wire


class Busy(Store):
    """A store that does something once, when it is read."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        data = await super().read(slice_id, start, length)
        action, self.meanwhile = self.meanwhile, None
        if action is not None:
            await action()
        return data


class Rig:
    """One file of a real metaserver, a model of its content, and who writes and compacts it."""

    def __init__(self, client: Client, ino: int) -> None:
        self.client = client
        self.ino = ino
        self.store = Busy()
        self.writer = Writer(client.connection, self.store, 0, lambda changed: None)
        self.compactor = Compactor(client.connection, self.store, rate=1e12, pause_s=0.0)
        self.writer.hooks.when_laid = self.compactor.laid
        self.model = bytearray()

    async def write(self, offset: int, data: bytes) -> None:
        await self.writer.write(self.ino, offset, data)
        await self.writer.flush(self.ino)
        self.model.extend(bytes(max(0, offset - len(self.model))))
        self.model[offset : offset + len(data)] = data

    async def cut(self, size: int) -> None:
        async with self.writer.settled(self.ino, size):
            await self.client.change(wire.SetAttributes(self.ino, size=size))
        self.writer.changed_elsewhere(self.ino)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    async def slices(self, chunk: int = 0) -> list[wire.Slice]:
        content = await self.client.connection.call(wire.GetContent(self.ino, chunk * CHUNK, CHUNK), wire.Content)
        return content.slices

    async def content(self) -> bytes:
        size = (await self.client.attributes(self.ino)).size
        found = await self.client.connection.call(wire.GetContent(self.ino, 0, size), wire.Content)
        data = bytearray(size)
        for piece in visible(found.slices, 0, size):
            read = await self.store.read(piece.slice_id, piece.start, piece.length)
            data[piece.offset : piece.offset + piece.length] = read
        return bytes(data)

    async def collect(self) -> None:
        """Delete the objects that went out of use."""
        unused = (await self.client.connection.call(wire.ListSlices(4096), wire.SliceIds)).ids
        await self.store.delete(unused)
        await self.client.connection.call(wire.ForgetSlices(unused), wire.Done)

    async def has_objects(self, count: int) -> bool:
        """Collect; the metaserver's janitor releases by and by what one transaction has no room for."""
        await self.collect()
        return len(self.store.objects) == count


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path, "memory://") as metaserver:
        client = await metaserver.client()
        made = await client.make(b"file")
        rig = Rig(client, made.ino)
        rig.writer.open(made)
        yield rig


async def scribble(rig: Rig, seed: int, count: int = 60, span: int = 40_000) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        await rig.write(rng.randrange(span), rng.randbytes(rng.randrange(1, 3000)))


async def test_many_small_slices_become_few(rig: Rig) -> None:
    await scribble(rig, 1)
    before = await rig.slices()
    attributes = await rig.client.attributes(rig.ino)
    assert await rig.compactor.compact(rig.ino, 0) > 0
    after = await rig.slices()
    assert len(after) < len(before) / 2
    assert len({each.slice_id for each in after}) == 1 < len({each.slice_id for each in before}) / 8
    assert await rig.client.attributes(rig.ino) == attributes, "a version tells of new content, and there is none"
    await until(lambda: rig.has_objects(1))
    assert await rig.content() == rig.model
    assert await rig.compactor.compact(rig.ino, 0) == 0, "there is nothing to gain"
    assert rig.compactor.figures()["chunks"] == 1


async def test_writes_made_meanwhile_win(rig: Rig) -> None:
    await scribble(rig, 2)

    async def meanwhile() -> None:
        await rig.write(100, b"later" * 100)
        await rig.write(50_000, b"beyond the old end")

    rig.store.meanwhile = meanwhile
    assert await rig.compactor.compact(rig.ino, 0) > 0
    await rig.collect()
    assert await rig.content() == rig.model
    assert rig.model[100:105] == b"later"


@pytest.mark.parametrize("size", [0, 10_000, 90_000])
async def test_a_cut_made_meanwhile_wins(rig: Rig, size: int) -> None:
    await scribble(rig, 3)

    async def meanwhile() -> None:
        await rig.cut(size)
        await rig.write(20_000, b"after the cut")

    rig.store.meanwhile = meanwhile
    with contextlib.suppress(Refused):
        await rig.compactor.compact(rig.ino, 0)
    await rig.collect()
    assert await rig.content() == rig.model


async def test_two_compactions_at_once_do_no_harm(rig: Rig) -> None:
    await scribble(rig, 4)
    other = Compactor(rig.client.connection, rig.store)

    async def meanwhile() -> None:
        assert await other.compact(rig.ino, 0) > 0

    rig.store.meanwhile = meanwhile
    with pytest.raises(Refused) as refused:
        await rig.compactor.compact(rig.ino, 0)
    assert refused.value.code is wire.ErrorCode.BUSY
    await rig.compactor._uploads.settle()
    await until(lambda: rig.has_objects(1))
    assert await rig.content() == rig.model


async def test_holes_stay_holes_and_chunks_apart(rig: Rig) -> None:
    for number in range(40):
        await rig.write(CHUNK - 100_000 + number * 5000, bytes([number + 1]) * 3000)
    for chunk in (0, 1):
        await rig.compactor.compact(rig.ino, chunk)
    laid = [*await rig.slices(0), *await rig.slices(1)]
    assert sum(each.length for each in laid) == 40 * 3000
    assert len({each.slice_id for each in laid}) == 2
    await rig.collect()
    size = len(rig.model)
    assert (await rig.content())[CHUNK - 200_000 : size] == rig.model[CHUNK - 200_000 :]


async def test_a_store_that_fails_leaves_everything_as_it_was(rig: Rig) -> None:
    await scribble(rig, 5)
    before = await rig.slices()
    rig.store.fail = StoreError("no store")
    with pytest.raises(StoreError):
        await rig.compactor.compact(rig.ino, 0)
    assert await rig.slices() == before
    rig.store.fail = None
    assert await rig.compactor.compact(rig.ino, 0) > 0
    assert await rig.content() == rig.model


async def test_it_works_in_the_background(rig: Rig) -> None:
    task = asyncio.create_task(rig.compactor.run())
    await scribble(rig, 6, count=ENOUGH * 4)
    await until(lambda: rig.compactor.figures()["chunks"] >= 1 and not rig.compactor.figures()["waiting"])
    task.cancel()
    await asyncio.wait({task})
    assert await rig.content() == rig.model


class LosesAnswers:
    """A connection on which compactions are made, and their answers lost."""

    def __init__(self, connection: Connection, instead: BaseException) -> None:
        self._connection = connection
        self._instead = instead

    async def call(self, request: wire.Request, reply_type: type[Any]) -> Any:
        reply = await self._connection.call(request, reply_type)
        if isinstance(request, wire.CompactSlices):
            raise self._instead
        return reply


@pytest.mark.parametrize(
    "instead",
    [asyncio.CancelledError(), Disconnected("cut off"), Refused(wire.ErrorCode.INTERNAL, "who knows")],
    ids=["cancelled", "cut off", "unknown"],
)
async def test_objects_that_may_be_in_use_stay(rig: Rig, instead: BaseException) -> None:
    await scribble(rig, 7)
    compactor = Compactor(LosesAnswers(rig.client.connection, instead), rig.store)
    with pytest.raises(type(instead)):
        await compactor.compact(rig.ino, 0)
    await compactor._uploads.settle()
    assert len(await rig.slices()) < 60, "it was made"
    assert await rig.content() == rig.model


@pytest.mark.parametrize("seed", range(8))
async def test_random_histories(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        await scribble(rig, rng.randrange(1 << 30), count=rng.randrange(1, 40))
        if rng.random() < 0.4:
            await rig.cut(rng.randrange(60_000))
        if rng.random() < 0.5:

            async def meanwhile() -> None:
                await rig.write(rng.randrange(50_000), rng.randbytes(2000))
                if rng.random() < 0.5:
                    await rig.cut(rng.randrange(60_000))

            rig.store.meanwhile = meanwhile
        with contextlib.suppress(Refused):
            await rig.compactor.compact(rig.ino, 0)
        rig.store.meanwhile = None
        await rig.compactor._uploads.settle()
        await rig.collect()
        assert await rig.content() == rig.model
