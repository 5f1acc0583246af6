"""The write gatherer and the reader against a bytearray; flushing, its errors, and what happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import stat
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_file import INO, OneFile, Store, plain_reader
from served import until

from fuseclient.data.extents import Extents
from fuseclient.data.grants import CREDIT_BYTES, NO_GRANT, RENEW_BYTES, Grant
from fuseclient.data.objects import NoSpace, StoreError
from fuseclient.data.open_file import FLUSH_BYTES, STAGED
from fuseclient.data.uploads import ID_BLOCK, _SliceIds
from fuseclient.data.writer import Writer
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

    def __init__(
        self,
        *,
        limit: int = _LIMIT,
        flush_age_s: float = 3600.0,
        total_bytes: int = 1 << 30,
        is_lazy: bool = False,
        took_over: bool = False,
    ) -> None:
        self.store = Store()
        self.server = OneFile(self.store, limit)
        self.committed: list[wire.Attributes] = []
        self.writer = Writer(
            self.server,
            self.store,
            limit,
            lambda changed: self.committed.append(changed.attributes[0]),
            is_lazy=lambda: is_lazy,
            changes=itertools.count().__next__,
            took_over=took_over,
            flush_age_s=flush_age_s,
            total_bytes=total_bytes,
        )
        self.reader = plain_reader(self.server, self.store)
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
    assert rig.writer.uncommitted_bytes == 0
    assert not rig.writer.is_open(INO)


async def test_a_small_file_is_written_inline_in_one_request() -> None:
    rig = Rig()
    await rig.writer.write(INO, 0, b"hello ")
    await rig.writer.write(INO, 6, b"world")
    assert rig.writer.overlay(rig.server.attributes).size == 11
    closed = await rig.writer.close(INO)
    (written,) = rig.server.requests
    assert isinstance(written, wire.WriteInline)
    assert written == wire.WriteInline(INO, 0, b"hello world", written.written_ns)
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
    assert rig.writer.uncommitted_bytes < (STAGED + 2) * FLUSH_BYTES
    await rig.writer.flush(INO)
    assert sorted(len(data) for data in rig.store.objects.values()) == [1000] + [FLUSH_BYTES] * 10
    assert rig.writer.uncommitted_bytes == 0


async def test_a_writer_waits_when_all_files_hold_too_much() -> None:
    rig = Rig(total_bytes=100)
    await rig.writer.write(INO, 0, b"x" * 100)
    assert rig.writer.uncommitted_bytes == 100
    await rig.writer.write(INO, 100, b"y")
    assert rig.writer.uncommitted_bytes == 1
    assert rig.server.content() == b"x" * 100


async def test_what_has_waited_long_is_flushed() -> None:
    rig = Rig(flush_age_s=0.01)
    await rig.writer.write(INO, 0, b"late")
    await until(lambda: rig.server.content() == b"late")


async def test_what_cannot_be_stored_is_kept_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.store.fail = NoSpace("no store")
    await rig.writer.write(INO, 0, b"x" * 100)
    for _ in range(2):
        with pytest.raises(NoSpace):
            await rig.writer.flush(INO)
    with pytest.raises(NoSpace):
        await rig.read(0, 10)
    with pytest.raises(NoSpace):
        await rig.writer.write(INO, 0, b"refused, for nobody was told of the read's failure but the reader")
    await rig.writer.write(INO, 0, b"y")
    rig.store.fail = None
    await rig.writer.flush(INO)
    assert rig.server.content() == b"y" + b"x" * 99
    assert rig.writer.uncommitted_bytes == 0
    await rig.writer.flush_all()
    assert len(rig.store.objects) == 1
    assert "writing to inode 7 failed: no store" in caplog.text


async def test_a_failure_in_the_background_is_told_once_and_mended_by_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig(flush_age_s=0.01)
    rig.store.fail = StoreError("no store")
    data = bytes(range(256)) * (FLUSH_BYTES // 256)
    await rig.writer.write(INO, 0, data)
    await until(lambda: rig.writer._files[INO].error)
    with pytest.raises(StoreError):
        await rig.writer.write(INO, 5, b"refused")
    rig.store.fail = None
    await until(lambda: rig.server.content() == data)
    await rig.writer.flush(INO)
    await rig.writer.write(INO, 0, b"taken")


async def test_memory_is_bounded_while_the_store_is_full(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig(total_bytes=100)
    rig.store.fail = NoSpace("full")
    await rig.writer.write(INO, 0, b"x" * 100)
    for _ in range(3):
        with pytest.raises(NoSpace):
            await rig.writer.write(INO, 100, b"y")
    assert rig.writer.uncommitted_bytes == 100
    rig.store.fail = None
    await rig.writer.write(INO, 100, b"y")
    await rig.writer.flush(INO)
    assert rig.server.content() == b"x" * 100 + b"y"


async def test_a_cut_gives_up_what_cannot_be_stored_beyond_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig()
    rig.store.fail = NoSpace("full")
    await rig.writer.write(INO, 0, b"x" * 100)
    with pytest.raises(NoSpace):
        async with rig.writer.settled(INO):
            pass
    async with rig.writer.settled(INO, 70):
        rig.writer.cut(INO, 70)
    assert rig.writer.uncommitted_bytes == 70
    assert rig.writer.overlay(rig.server.attributes).size == 70
    async with rig.writer.settled(INO, 0):
        rig.writer.cut(INO, 0)
    assert rig.writer.uncommitted_bytes == 0
    await rig.writer.flush(INO)


async def test_what_is_posted_is_gathered_as_long_as_nothing_stands_in_the_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig(total_bytes=2 * CREDIT_BYTES)
    assert rig.writer.grant(INO + 1) == NO_GRANT
    assert rig.writer.grant(INO) == Grant(CREDIT_BYTES, 0)
    rig.writer.write_posted(INO, 2, memoryview(b"posted"))
    await rig.writer.append(INO, b"appended")
    assert rig.writer.grant(INO) == NO_GRANT
    await rig.writer.flush(INO)
    assert rig.writer.grant(INO) == Grant(CREDIT_BYTES, 0)
    assert bytes(rig.server.content()) == b"\0\0postedappended"
    rig.store.fail = NoSpace("it is full")
    for offset in range(0, 2 * CREDIT_BYTES, FLUSH_BYTES):
        rig.writer.write_posted(INO, offset, memoryview(bytes(FLUSH_BYTES)))
    assert rig.writer.grant(INO) == NO_GRANT
    await until(lambda: "it is full" in caplog.text)
    assert rig.writer.grant(INO) == NO_GRANT
    rig.writer.write_posted(INO, 0, memoryview(b"taken all the same"))
    with pytest.raises(NoSpace):
        await rig.writer.write(INO, 0, b"refused")
    rig.store.fail = None
    await rig.writer.flush(INO)
    assert bytes(rig.server.content()[:18]) == b"taken all the same"
    caplog.clear()


async def test_what_was_posted_is_renewed_as_it_is_taken() -> None:
    rig = Rig(total_bytes=4 * CREDIT_BYTES)
    assert rig.writer.grant(INO).credit == CREDIT_BYTES
    half = memoryview(bytes(RENEW_BYTES // 2 + 1))
    rig.writer.write_posted(INO, 0, half)
    assert rig.writer.renewal(INO) == 0
    rig.writer.write_posted(INO, 0, half)
    assert rig.writer.renewal(INO) == RENEW_BYTES
    assert rig.writer.renewal(INO) == 0
    rig.writer._files[INO].appending = 1
    rig.writer.write_posted(INO, 0, memoryview(bytes(RENEW_BYTES)))
    assert rig.writer.renewal(INO) == 0, "nothing would be granted"
    rig.writer._files[INO].appending = 0
    assert rig.writer.renewal(INO) == RENEW_BYTES


async def test_several_objects_are_on_their_way_and_committed_in_order() -> None:
    rig = Rig()
    rig.store.gate.clear()
    blocks = [bytes([number]) * FLUSH_BYTES for number in range(STAGED)]
    for block in blocks:
        await rig.writer.write(INO, 0, block)
    await until(lambda: rig.store.waiting == STAGED)
    assert rig.server.attributes.size == 0
    rig.store.gate.set()
    await rig.writer.flush(INO)
    assert rig.server.content() == blocks[-1]
    commits = [each for each in rig.server.requests if isinstance(each, wire.CommitSlices)]
    assert len(commits) < STAGED, "what is stored is committed together"
    ids = [each.slice_id for commit in commits for each in commit.slices]
    assert ids == sorted(ids)


async def test_a_writer_waits_for_the_store() -> None:
    rig = Rig()
    rig.store.gate.clear()

    async def write_much() -> None:
        for number in range(3 * STAGED):
            await rig.writer.write(INO, number * FLUSH_BYTES, bytes(FLUSH_BYTES))

    writing = asyncio.create_task(write_much())
    await until(lambda: rig.store.waiting == STAGED)
    assert rig.writer.uncommitted_bytes <= (STAGED + 1) * FLUSH_BYTES
    rig.store.gate.set()
    await writing
    await rig.writer.flush(INO)
    assert rig.server.attributes.size == 3 * STAGED * FLUSH_BYTES
    assert rig.writer.uncommitted_bytes == 0


async def test_nothing_is_kept_of_a_file_that_is_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig()
    rig.server.before = _refuse(wire.ErrorCode.NOT_FOUND)
    await rig.writer.write(INO, 0, b"x")
    with pytest.raises(Refused):
        await rig.writer.flush(INO)
    assert rig.writer.uncommitted_bytes == 0
    rig.server.before = lambda request: None
    await rig.writer.flush(INO)


async def test_a_sync_asks_a_lazy_metaserver_and_tells_of_its_losses() -> None:
    rig = Rig(is_lazy=True)
    await rig.writer.write(INO, 0, b"x")
    await rig.writer.flush(INO)
    assert wire.Sync() not in rig.server.requests
    await rig.writer.sync(INO)
    await rig.writer.sync(None)
    assert rig.server.requests[-2:] == [wire.Sync(), wire.Sync()]
    await rig.writer.write(INO, 0, b"y")
    await rig.writer.flush(INO)
    rig.writer.acknowledged_lost()
    for ino in (INO, None):
        with pytest.raises(StoreError, match="may have lost"):
            await rig.writer.sync(ino)
        await rig.writer.sync(ino)


@pytest.mark.parametrize("is_lazy", [True, False])
async def test_what_the_worker_before_knew_to_be_lost_is_told_by_the_first_sync(is_lazy: bool) -> None:
    rig = Rig(is_lazy=is_lazy, took_over=True)
    with pytest.raises(StoreError, match="may have lost") if is_lazy else contextlib.nullcontext():
        await rig.writer.sync(None)
    await rig.writer.sync(None)


async def test_an_error_of_the_last_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    given_up: list[int] = []
    rig.writer.hooks.when_given_up = given_up.append
    rig.server.before = _refuse(wire.ErrorCode.NO_SPACE)
    await rig.writer.write(INO, 0, b"x")
    assert await rig.writer.close(INO) is None
    assert "data written to inode 7 was lost" in caplog.text
    assert given_up == [INO], "the kernel has the data in its pages still"


async def test_a_lost_reply_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig()

    def lose(request: wire.Request) -> None:
        raise Disconnected("gone")

    rig.server.before = lose
    await rig.writer.write(INO, 0, b"x")
    with pytest.raises(Disconnected):
        await rig.writer.flush(INO)
    assert rig.writer.overlay(rig.server.attributes).size == 1, "it is kept, to be tried again"
    rig.server.before = lambda request: None
    await rig.writer.flush(INO)
    assert rig.server.content() == b"x"


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
    await rig.writer.flush_all()
    assert sorted(rig.store.objects.values()) == [b"theirs", b"x" * 100], "objects of the refused commit stay"


async def test_slice_ids_are_reserved_in_blocks() -> None:
    rig = Rig(limit=0)
    for index in range(ID_BLOCK):
        await rig.writer.write(INO, index, b"x")
        await rig.writer.flush(INO)
    assert [each for each in rig.server.requests if isinstance(each, wire.NewSlices)] == [wire.NewSlices(64)]


async def test_two_writers_close_one_after_the_other() -> None:
    rig = Rig()
    rig.writer.open(rig.server.attributes)
    await rig.writer.write(INO, 0, b"both")
    assert await rig.writer.close(INO) is None
    assert rig.writer.is_open(INO)
    assert rig.server.content() == b"both"
    assert await rig.writer.close(INO) is not None


async def test_no_slice_id_is_taken_twice() -> None:
    class Slow:
        """A metaserver whose replies come one by one, when others have had their turn."""

        next = 1

        async def call(self, request: wire.NewSlices, reply_type: type[wire.SliceIds]) -> wire.SliceIds:
            first, Slow.next = Slow.next, Slow.next + request.count
            for _ in range(first % 7):
                await asyncio.sleep(0)
            return wire.SliceIds(list(range(first, first + request.count)))

    ids = _SliceIds(Slow())  # type: ignore[arg-type]
    taken = await asyncio.gather(*(ids.take(1) for _ in range(5)))
    assert len({each for batch in taken for each in batch}) == 5


async def test_a_sync_does_not_hide_a_loss_of_before_it() -> None:
    """The metaserver is another one when the sync gets there: what the one before acknowledged may be lost."""
    rig = Rig(is_lazy=True)
    await rig.writer.write(INO, 0, b"x")
    await rig.writer.flush(INO)
    rig.server.before = lambda request: rig.writer.acknowledged_lost() if isinstance(request, wire.Sync) else None
    with pytest.raises(StoreError, match="may have lost"):
        await rig.writer.sync(INO)


async def test_attributes_that_pass_by_do_not_make_a_changed_file_known_again() -> None:
    rig = Rig()
    rig.writer.changed_elsewhere(INO)
    rig.writer.overlay(rig.server.attributes)
    assert rig.writer.known(INO) is None
    assert await rig.writer.close(INO) is None, "what is out of date would enter the maps"


async def test_each_writer_is_told_of_what_was_lost() -> None:
    rig = Rig(is_lazy=True)
    rig.writer.open(rig.server.attributes)
    await rig.writer.write(INO, 0, b"lost")
    await rig.writer.flush(INO)
    rig.writer.acknowledged_lost()
    for for_reader in (True, False, False):
        with pytest.raises(StoreError, match="may have lost"):
            await rig.writer.flush(INO, for_reader=for_reader)
    await rig.writer.flush(INO)


async def test_a_reader_takes_no_error_from_the_writers() -> None:
    rig = Rig()
    rig.server.before = _refuse(wire.ErrorCode.NO_SPACE)
    await rig.writer.write(INO, 0, b"x")
    for for_reader in (True, False, True, False):
        with pytest.raises(Refused):
            await rig.writer.flush(INO, for_reader=for_reader)
    rig.server.before = lambda request: None
    await rig.writer.flush(INO)


async def test_a_file_that_is_no_more_is_told_to_each_writer() -> None:
    rig = Rig()
    rig.writer.open(rig.server.attributes)
    rig.server.before = _refuse(wire.ErrorCode.NOT_FOUND)
    await rig.writer.write(INO, 0, b"x")
    await rig.writer.flush_all()  # in the background
    for for_reader in (True, False, False):
        with pytest.raises(Refused):
            await rig.writer.flush(INO, for_reader=for_reader)
    await rig.writer.flush(INO)
    await rig.writer.write(INO, 0, b"y")
    for _ in range(2):
        with pytest.raises(Refused):
            await rig.writer.flush(INO)
    await rig.writer.flush(INO)


def _new(rig: Rig) -> None:
    """Have the rig's file be one that was made by this mount."""
    rig.writer._files.clear()
    rig.writer.open(rig.server.attributes, is_new=True)
    rig.writer.hooks.is_alone = lambda: True


async def test_changes_of_a_new_files_attributes_go_with_its_content() -> None:
    rig = Rig()
    _new(rig)
    await rig.writer.write(INO, 0, b"abc")
    rig.writer._single_writes = 0
    first = rig.writer.defer(wire.SetAttributes(INO, mode=0o600))
    assert first is not None
    assert first.mode == stat.S_IFREG | 0o600
    shown = rig.writer.defer(wire.SetAttributes(INO, mtime_ns=5, uid=7))
    assert shown is not None
    assert (shown.mode, shown.mtime_ns, shown.uid, shown.size) == (stat.S_IFREG | 0o600, 5, 7, 3)
    assert shown.ctime_ns > first.ctime_ns
    assert rig.writer.defer(wire.SetAttributes(INO, size=1)) is None
    await rig.writer.flush(INO)
    (request,) = [each for each in rig.server.requests if isinstance(each, wire.WriteInline)][-1:]
    then = wire.SetAttributes(INO, mode=0o600, uid=7, mtime_ns=5, changed_ns=shown.ctime_ns)
    assert request.then == then or then in rig.server.requests
    assert rig.writer.defer(wire.SetAttributes(INO, mode=0o644)) is None, "it is flushed, and new no more"


async def test_a_write_after_a_time_was_set_sets_it_anew() -> None:
    rig = Rig()
    _new(rig)
    assert rig.writer.defer(wire.SetAttributes(INO, mtime_ns=5, atime_ns=6)) is not None
    await rig.writer.write(INO, 0, b"abc")
    shown = rig.writer.overlay(rig.server.attributes)
    assert shown.mtime_ns > 1_000_000
    assert shown.atime_ns == 6


async def test_changes_that_wait_survive_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    rig = Rig()
    _new(rig)
    assert rig.writer.defer(wire.SetAttributes(INO, mode=0o600)) is not None
    rig.server.before = _refuse(wire.ErrorCode.NO_SPACE)
    with pytest.raises(Refused):
        await rig.writer.flush(INO)
    rig.server.before = lambda request: None
    await rig.writer.flush(INO)
    assert [each.mode for each in rig.server.requests if isinstance(each, wire.SetAttributes)] == [0o600, 0o600]


async def test_small_files_are_written_ahead_while_that_is_right() -> None:
    rig = Rig()
    for _ in range(3):
        _new(rig)
        await rig.writer.write(INO, 0, b"abc")
        await until(lambda: not rig.writer.uncommitted_bytes)
        await rig.writer.flush(INO)
    for _ in range(4):
        _new(rig)
        await rig.writer.write(INO, 0, b"abc")
        await rig.writer.write(INO, 3, b"def")
        await rig.writer.flush(INO)
    before = len(rig.server.requests)
    _new(rig)
    await rig.writer.write(INO, 0, b"abc")
    await asyncio.sleep(0)
    assert len(rig.server.requests) == before, "files are written to twice here"


async def test_a_new_file_is_shown_until_something_is_done_to_it() -> None:
    rig = Rig()
    await rig.writer.close(INO)
    touched: list[wire.Attributes] = []
    rig.writer.hooks.when_touched = touched.append
    made = rig.server.attributes
    assert not rig.writer.show(made), "it is not open"
    rig.writer.open(made, is_new=True)
    assert rig.writer.show(made)
    assert not rig.writer.show(msgspec.structs.replace(made, size=1)), "it is not what is known"
    assert rig.writer.show(made)
    assert rig.writer.write_now(INO, 0, b"abc")
    assert rig.writer.write_now(INO, 3, b"def")
    assert touched == [made]
    assert not rig.writer.show(rig.server.attributes)
    await rig.writer.close(INO)
    rig.writer.open(rig.server.attributes)
    assert not rig.writer.show(rig.server.attributes), "it is not new"


async def test_what_is_settled_can_be_closed_at_once() -> None:
    rig = Rig()
    assert rig.writer.is_settled(INO)
    assert rig.writer.write_now(INO, 0, b"abc")
    assert not rig.writer.is_settled(INO)
    await rig.writer.flush(INO)
    assert rig.writer.is_settled(INO)
    closed = rig.writer.close_settled(INO)
    assert closed is not None
    assert closed.attributes.size == 3
    assert rig.writer.count == 0
