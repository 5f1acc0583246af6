"""The write gatherer and the reader against a bytearray; flushing, its errors, and what happens meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_file import INO, OneFile, Store
from served import until

from fuseclient.data import writer as writer_module
from fuseclient.data.extents import Extents
from fuseclient.data.objects import StoreError
from fuseclient.data.reader import Reader
from fuseclient.data.writer import FLUSH_BYTES, Writer
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_LIMIT = 64
_SPAN = 400

_offsets = st.integers(0, _SPAN)
_data = st.binary(min_size=1, max_size=90)


def _over(model: bytearray, offset: int, data: bytes) -> None:
    if len(model) < offset:
        model.extend(bytes(offset - len(model)))
    model[offset : offset + len(data)] = data


class Rig:
    """A writer with the doubles around it, and its file open once."""

    def __init__(self, *, limit: int = _LIMIT, flush_age_s: float = 3600.0, total_bytes: int = 1 << 30) -> None:
        self.store = Store()
        self.server = OneFile(self.store, limit)
        self.committed: list[wire.Attributes] = []
        self.writer = Writer(
            self.server,
            self.store,
            limit,
            lambda changed: self.committed.append(changed.attributes[0]),
            flush_age_s=flush_age_s,
            total_bytes=total_bytes,
        )
        self.reader = Reader(self.server, self.store)
        self.writer.open(self.server.attributes)

    async def read(self, offset: int, length: int) -> bytes:
        await self.writer.before_read(INO, offset, length)
        return (await self.reader.read(INO, offset, length)).data


@given(st.lists(st.tuples(_offsets, _data), max_size=30), _offsets, st.integers(0, 60))
def test_extents_hold_exactly_what_was_written(writes: list[tuple[int, bytes]], offset: int, length: int) -> None:
    extents, model, held = Extents(), bytearray(_SPAN + 100), [False] * (_SPAN + 100)
    for start, data in writes:
        extents.write(start, data)
        model[start : start + len(data)] = data
        held[start : start + len(data)] = [True] * len(data)
    seen = [False] * len(held)
    previous = -1
    for start, buffer in extents:
        assert start > previous, "extents touch"
        previous = start + len(buffer)
        assert buffer == model[start:previous]
        seen[start:previous] = [True] * len(buffer)
    assert seen == held
    assert extents.bytes == sum(held)
    assert extents.end == max((start + len(data) for start, data in writes), default=0)
    assert extents.overlaps(offset, length) == any(held[offset : offset + length])


@given(st.lists(st.tuples(_offsets, _data), max_size=20), st.integers(1, 60))
def test_units_are_taken_from_the_front(writes: list[tuple[int, bytes]], unit: int) -> None:
    extents, whole = Extents(), Extents()
    for offset, data in writes:
        extents.write(offset, data)
        whole.write(offset, data)
    taken = extents.take_units(unit)
    if extents:
        assert all(len(buffer) % unit == 0 for _, buffer in taken)
        assert all(len(buffer) < unit for _, buffer in extents)
    assert taken.bytes + extents.bytes == whole.bytes
    for offset, buffer in taken:
        assert not extents.overlaps(offset, len(buffer))
        extents.write(offset, buffer)
    assert list(extents) == list(whole)


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _offsets, _data),
        st.tuples(st.just("read"), _offsets, st.integers(1, 120)),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
        st.tuples(st.just("extend"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("touch"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(_steps)
def test_a_file_is_what_was_written_to_it(steps: list[tuple[str, int, bytes | int]]) -> None:
    asyncio.run(_follow(steps))


async def _follow(steps: list[tuple[str, int, bytes | int]]) -> None:
    rig, model = Rig(), bytearray()
    for what, offset, argument in steps:
        if isinstance(argument, bytes):
            await rig.writer.write(INO, offset, argument)
            _over(model, offset, argument)
        elif what == "read":
            assert await rig.read(offset, argument) == model[offset : offset + argument]
        elif what == "flush":
            await rig.writer.flush(INO)
            assert rig.server.content() == model
        elif what == "extend":
            async with rig.writer.settled(INO):
                await rig.server.call(wire.SetAttributes(INO, size=len(model) + offset), wire.Changed)
            model.extend(bytes(offset))
        else:
            rig.server.touch()
            rig.writer.changed_elsewhere(INO)
        assert rig.writer.overlay(rig.server.attributes).size == len(model)
    closed = await rig.writer.close(INO)
    assert rig.server.content() == model
    assert closed is None or closed.content is None or closed.content == model
    assert rig.writer.bytes == 0
    assert not rig.writer.is_open(INO)


async def test_a_small_file_is_written_inline_in_one_request() -> None:
    rig = Rig()
    await rig.writer.write(INO, 0, b"hello ")
    await rig.writer.write(INO, 6, b"world")
    assert rig.writer.overlay(rig.server.attributes).size == 11
    closed = await rig.writer.close(INO)
    assert rig.server.requests == [wire.WriteInline(INO, 0, b"hello world")]
    assert closed is not None
    assert closed.content == b"hello world"
    assert closed.attributes == rig.committed[-1]


async def test_extents_that_lie_apart_share_an_object() -> None:
    rig = Rig()
    for offset in range(0, 1000, 100):
        await rig.writer.write(INO, offset, b"x" * 10)
    await rig.writer.flush(INO)
    assert len(rig.store.objects) == 1
    assert len(rig.server.slices) == 10


async def test_one_commit_touches_few_chunks() -> None:
    rig = Rig()
    for chunk in range(40):
        await rig.writer.write(INO, chunk << 26, b"x")
    await rig.writer.flush(INO)
    commits = [each for each in rig.server.requests if isinstance(each, wire.CommitSlices)]
    assert [len(each.slices) for each in commits] == [16, 16, 8]
    assert rig.server.attributes.size == (39 << 26) + 1


async def test_a_large_write_is_flushed_in_the_background_in_whole_objects() -> None:
    rig = Rig()
    rig.store.gate.clear()
    block = bytes(range(256)) * 1024
    for index in range(FLUSH_BYTES // len(block)):
        await rig.writer.write(INO, index * len(block), block)
    await until(lambda: rig.store.waiting == 1)
    await rig.writer.write(INO, FLUSH_BYTES, b"more")
    assert rig.writer.overlay(rig.server.attributes).size == FLUSH_BYTES + 4
    rig.store.gate.set()
    await rig.writer.flush(INO)
    assert sorted(len(data) for data in rig.store.objects.values()) == [4, FLUSH_BYTES]
    assert await rig.read(FLUSH_BYTES - 4, 100) == block[-4:] + b"more"


async def test_a_sequential_writer_makes_whole_objects() -> None:
    rig = Rig()
    size = 10 * FLUSH_BYTES + 1000
    block = bytes(100_000)
    for offset in range(0, size, len(block)):
        await rig.writer.write(INO, offset, block[: size - offset])
    assert rig.writer.bytes < 3 * FLUSH_BYTES
    await rig.writer.flush(INO)
    assert sorted(len(data) for data in rig.store.objects.values()) == [1000] + [FLUSH_BYTES] * 10
    assert rig.writer.bytes == 0


async def test_a_writer_waits_when_all_files_hold_too_much() -> None:
    rig = Rig(total_bytes=100)
    await rig.writer.write(INO, 0, b"x" * 100)
    assert rig.writer.bytes == 100
    await rig.writer.write(INO, 100, b"y")
    assert rig.writer.bytes == 0
    assert rig.server.content() == b"x" * 100 + b"y"


async def test_what_has_waited_long_is_flushed() -> None:
    rig = Rig(flush_age_s=0.01)
    await rig.writer.write(INO, 0, b"late")
    await until(lambda: rig.server.content() == b"late")


@pytest.mark.parametrize("report", ["flush", "write"])
async def test_an_error_is_reported_once_and_never_lost(report: str, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.store.fail = StoreError("no store")
    await rig.writer.write(INO, 0, b"x" * 100)
    with pytest.raises(StoreError):
        await rig.read(0, 10)
    with pytest.raises(StoreError):
        await (rig.writer.flush(INO) if report == "flush" else rig.writer.write(INO, 0, b"y"))
    rig.store.fail = None
    await rig.writer.flush(INO)
    await rig.writer.write(INO, 0, b"z" * 100)
    await rig.writer.flush(INO)
    assert rig.server.content() == b"z" * 100
    assert "writing to inode 7 failed: no store" in caplog.text


async def test_an_error_of_the_last_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.server.before = _refuse(wire.ErrorCode.NO_SPACE)
    await rig.writer.write(INO, 0, b"x")
    assert await rig.writer.close(INO) is None
    assert "data written to inode 7 was lost" in caplog.text


async def test_a_lost_reply_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig()

    def lose(request: wire.Request) -> None:
        raise Disconnected("gone")

    rig.server.before = lose
    await rig.writer.write(INO, 0, b"x")
    with pytest.raises(Disconnected):
        await rig.writer.flush(INO)
    assert rig.writer.overlay(rig.server.attributes).size == 0


def _refuse(code: wire.ErrorCode) -> Callable[[Any], None]:
    def before(request: wire.Request) -> None:
        if not isinstance(request, wire.GetAttributes):
            raise Refused(code, "the test says so")

    return before


async def test_a_file_that_others_made_large_is_not_written_inline() -> None:
    rig = Rig()
    await rig.writer.write(INO, 5, b"abc")
    rig.store.objects[1000] = b"e" * 500
    await rig.server.call(wire.CommitSlices(INO, [wire.Slice(0, 500, 1000, 0)], 500), wire.Changed)
    await rig.writer.flush(INO)
    assert rig.server.content() == b"eeeee" + b"abc" + b"e" * 492


async def test_others_inline_writes_survive_the_change_to_slices() -> None:
    rig = Rig()
    raced: list[wire.Request] = []

    def race(request: wire.Request) -> None:
        if isinstance(request, wire.CommitSlices) and not raced:
            raced.append(request)
            rig.server.WriteInline(wire.WriteInline(INO, 0, b"theirs"))

    rig.server.before = race
    await rig.writer.write(INO, 50, b"x" * 100)
    await rig.writer.flush(INO)
    assert rig.server.content() == b"theirs".ljust(50, b"\0") + b"x" * 100
    assert len(rig.store.objects) == 1, "objects of the refused commit stay"


async def test_slice_ids_are_reserved_in_blocks() -> None:
    rig = Rig(limit=0)
    for index in range(writer_module.ID_BLOCK):
        await rig.writer.write(INO, index, b"x")
        await rig.writer.flush(INO)
    assert [each for each in rig.server.requests if isinstance(each, wire.NewSlices)] == [wire.NewSlices(64)]


async def test_flushes_at_once_take_different_slice_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "ID_BLOCK", 1)
    rig = Rig(limit=0)
    await rig.writer.write(INO, 0, b"slices")
    await rig.writer.flush(INO)
    rig.writer.open(msgspec.structs.replace(rig.server.attributes, ino=INO + 1))
    for ino in (INO, INO + 1):
        await rig.writer.write(ino, 0, b"data")
    await asyncio.gather(rig.writer.flush(INO), rig.writer.flush(INO + 1))
    assert sorted(rig.store.objects) == [1, 2, 3]


async def test_two_writers_close_one_after_the_other() -> None:
    rig = Rig()
    rig.writer.open(rig.server.attributes)
    await rig.writer.write(INO, 0, b"both")
    assert await rig.writer.close(INO) is None
    assert rig.writer.is_open(INO)
    assert rig.server.content() == b"both"
    assert await rig.writer.close(INO) is not None
