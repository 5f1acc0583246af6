"""The slices of large files: laying, cutting, tidying and giving up, against the rules and against a model.

Most tests shrink the chunk to 64 bytes, so that a file of a few hundred bytes has many chunks.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from namespaces import ROOT, Files, new_engine

from metaserver import chunks, keys, wire
from metaserver.engine import Engine
from metaserver.engine.base import MAX_WRITES, Transaction
from metaserver.wire import ErrorCode, InodeFlag, Slice

CHUNK = 64
#: What a byte of a file is in the model: a slice and a position in it, or nothing.
Byte = tuple[int, int] | None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK)


async def commit(fs: Files, ino: int, *slices: Slice, size: int = 0) -> wire.Attributes:
    return (await fs.change(wire.CommitSlices(ino, list(slices), size))).attributes[0]


async def render(fs: Files, ino: int, offset: int = 0, length: int = 2**62) -> list[Byte]:
    """Return what each byte of a range of a file is."""
    content = await fs.call(wire.GetContent(ino, offset, length), wire.Content)
    end = min(offset + length, content.attributes.size)
    seen: list[Byte] = [None] * max(0, end - offset)
    assert content.inline is None or not any(content.inline)
    for s in content.slices:
        for position in range(max(offset, s.offset), min(end, s.offset + s.length)):
            seen[position - offset] = (s.slice_id, s.start + position - s.offset) if s.slice_id else None
    return seen


def of(slice_id: int, start: int, length: int) -> list[Byte]:
    return [(slice_id, start + n) for n in range(length)]


async def test_slice_ids_are_given_once(fs: Files) -> None:
    groups = await asyncio.gather(*(fs.slices(count) for count in (1, 5, 4096)))
    ids = [slice_id for group in groups for slice_id in group]
    assert 0 not in ids
    assert len(set(ids)) == len(ids) == 4102


async def test_commit_and_read(fs: Files) -> None:
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    inode = await commit(fs, ino, Slice(10, 20, a, 5), size=50)
    assert (inode.size, inode.flags & InodeFlag.INLINE) == (50, 0)
    assert (inode.mtime_ns, inode.ctime_ns) == (fs.now, fs.now)
    assert await render(fs, ino) == [None] * 10 + of(a, 5, 20) + [None] * 20
    content = await fs.call(wire.GetContent(ino, 0, 10), wire.Content)
    assert (content.inline, content.slices) == (None, [])
    content = await fs.call(wire.GetContent(ino, 29, 1), wire.Content)
    assert content.slices == [Slice(10, 20, a, 5)]
    assert (await commit(fs, ino, size=10)).size == 50


async def test_size_covers_every_slice(fs: Files) -> None:
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    assert (await commit(fs, ino, Slice(0, 100, a, 0), size=7)).size == 100


async def test_later_slices_lie_over_earlier_ones(fs: Files) -> None:
    ino = await fs.make(b"f")
    a, b = await fs.slices(2)
    await commit(fs, ino, Slice(0, 30, a, 0))
    await commit(fs, ino, Slice(10, 5, b, 0), Slice(12, 2, 0, 0))
    assert await render(fs, ino) == of(a, 0, 10) + of(b, 0, 2) + [None] * 2 + of(b, 4, 1) + of(a, 15, 15)


async def test_slices_are_cut_at_chunks(fs: Files) -> None:
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    edge = chunks.CHUNK_BYTES
    await commit(fs, ino, Slice(edge - 10, 2 * edge, a, 3))
    content = await fs.call(wire.GetContent(ino, 0, 4 * edge), wire.Content)
    assert content.slices == [
        Slice(edge - 10, 10, a, 3),
        Slice(edge, edge, a, 13),
        Slice(2 * edge, edge - 10, a, 13 + edge),
    ]


async def test_leaving_inline(fs: Files) -> None:
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    await fs.change(wire.WriteInline(ino, 0, b"abc"))
    version = (await fs.stat(ino)).version
    whole = [Slice(0, 3, a, 0)]
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(ino, whole, 3))
    await fs.refused(ErrorCode.BUSY, wire.CommitSlices(ino, whole, 3, True, version - 1))
    (inode,) = (await fs.change(wire.CommitSlices(ino, whole, 3, True, version))).attributes
    assert (inode.size, inode.flags & InodeFlag.INLINE) == (3, 0)
    await fs.refused(ErrorCode.TOO_LARGE, wire.WriteInline(ino, 0, b"x"))
    await fs.refused(ErrorCode.BUSY, wire.CommitSlices(ino, whole, 3, True, version))
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(ino, whole, 3, True, inode.version))
    assert await render(fs, ino) == of(a, 0, 3)


async def test_leaving_inline_with_nothing_stored(fs: Files) -> None:
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    await fs.change(wire.SetAttributes(ino, size=100))
    await commit(fs, ino, Slice(50, 10, a, 0))
    assert await render(fs, ino) == [None] * 50 + of(a, 0, 10) + [None] * 40


async def test_commit_refusals(fs: Files) -> None:
    ino = await fs.make(b"f")
    ids = await fs.slices(chunks.MAX_SLICES + 1)
    a = ids[0]
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.CommitSlices(ROOT, [], 0))
    await fs.refused(ErrorCode.NOT_FOUND, wire.CommitSlices(12345, [], 0))
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(ino, [Slice(0, 0, a, 0)], 0))
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(ino, [Slice(0, 2, a, 2**63 - 1)], 0))
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(ino, [Slice(0, 1, ids[-1] + 1, 0)], 0))
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(ino, [Slice(0, 1, 2**63 - 1, 0)], 0))
    await fs.refused(ErrorCode.TOO_LARGE, wire.CommitSlices(ino, [Slice(2**62, 1, a, 0)], 0))
    await fs.refused(ErrorCode.TOO_LARGE, wire.CommitSlices(ino, [Slice(0, 2**50, 0, 0)], 0))
    await fs.refused(ErrorCode.TOO_LARGE, wire.CommitSlices(ino, [], 2**62))
    many = [Slice(n, 1, slice_id, 0) for n, slice_id in enumerate(ids)]
    await fs.refused(ErrorCode.TOO_LARGE, wire.CommitSlices(ino, many, 0))
    far = [Slice(n * chunks.CHUNK_BYTES, 1, a, 0) for n in range(chunks.MAX_CHUNKS + 1)]
    await fs.refused(ErrorCode.TOO_LARGE, wire.CommitSlices(ino, far, 0))


@pytest.mark.usefixtures("small_chunks")
async def test_the_largest_commits_fit(fs: Files) -> None:
    ino = await fs.make(b"f")
    for turn in range(20):
        ids = await fs.slices(chunks.MAX_SLICES)
        slices = [Slice((n * 7 + turn) % (CHUNK * chunks.MAX_CHUNKS), 1, ids[n % len(ids)], n) for n in range(1024)]
        await commit(fs, ino, *slices)
    await fs.check()


@pytest.mark.usefixtures("small_chunks")
async def test_cutting_never_brings_bytes_back(fs: Files) -> None:
    ino = await fs.make(b"f")
    a, b = await fs.slices(2)
    await commit(fs, ino, Slice(0, 300, a, 0))
    await fs.change(wire.SetAttributes(ino, size=100))
    await fs.change(wire.SetAttributes(ino, size=400))
    assert await render(fs, ino) == of(a, 0, 100) + [None] * 300
    await commit(fs, ino, Slice(150, 10, b, 0))
    await fs.sweep()
    assert await render(fs, ino) == of(a, 0, 100) + [None] * 50 + of(b, 0, 10) + [None] * 240
    assert await fs.unused() == []
    await fs.change(wire.SetAttributes(ino, size=64))
    await fs.sweep()
    assert await fs.unused() == [b]


async def test_cutting_to_nothing_makes_it_inline_again(fs: Files) -> None:
    ino = await fs.make(b"f")
    a, b = await fs.slices(2)
    await commit(fs, ino, Slice(0, 300, a, 0))
    (inode,) = (await fs.change(wire.SetAttributes(ino, size=0))).attributes
    assert (inode.size, inode.flags) == (0, InodeFlag.INLINE)
    assert await fs.unused() == [a]
    await fs.change(wire.WriteInline(ino, 0, b"small"))
    assert await fs.read(ino) == b"small"
    await fs.change(wire.SetAttributes(ino, size=0))
    await commit(fs, ino, Slice(0, 10, b, 0))
    assert await render(fs, ino) == of(b, 0, 10)


async def test_unused_slices(fs: Files) -> None:
    ino, other = await fs.make(b"f"), await fs.make(b"g")
    a, b, c = await fs.slices(3)
    await commit(fs, ino, Slice(0, 10, a, 0), Slice(0, 10, b, 0))
    await commit(fs, other, Slice(0, 10, b, 0), Slice(10, 10, c, 0))
    await fs.change(wire.Remove(ROOT, b"f", False))
    assert await fs.unused() == []
    await fs.call(wire.Reap([ino]), wire.Done)
    assert await fs.unused() == [a]
    await fs.refused(ErrorCode.INVALID, wire.CommitSlices(other, [Slice(0, 1, a, 0)], 0))
    await fs.change(wire.SetAttributes(other, size=0))
    assert await fs.unused() == [a, b, c]
    assert (await fs.call(wire.ListSlices(2), wire.SliceIds)).ids == [a, b]
    await fs.call(wire.ForgetSlices([a, c, 999, 2**63 - 1]), wire.Done)
    assert await fs.unused() == [b]
    far = [n * keys.BLOCK_SLICES for n in range(65)]
    await fs.refused(ErrorCode.TOO_LARGE, wire.ForgetSlices(far))
    await fs.call(wire.ForgetSlices([b]), wire.Done)
    assert await fs.unused() == []


async def test_overwritten_slices_become_unused(fs: Files) -> None:
    ino = await fs.make(b"f")
    ids = await fs.slices(100)
    for slice_id in ids:
        await commit(fs, ino, Slice(0, 50, slice_id, 0))
    unused = await fs.unused()
    assert len(unused) >= 80
    assert await render(fs, ino) == of(ids[-1], 0, 50)
    assert ids[-1] not in unused


async def test_random_writes_stay_readable(fs: Files) -> None:
    """A chunk of many pieces: its list is tidied, and takes part after part."""
    ino, seed = await fs.make(b"f"), random.Random(1)
    model: list[Byte] = [None] * 3000
    for slice_id in await fs.slices(60):
        offsets = seed.sample(range(3000), 100)
        await commit(fs, ino, *(Slice(offset, 1, slice_id, n) for n, offset in enumerate(offsets)), size=3000)
        for n, offset in enumerate(offsets):
            model[offset] = slice_id, n
    assert await render(fs, ino) == model
    content = await fs.call(wire.GetContent(ino, 0, 3000), wire.Content)
    assert len(content.slices) < 6000
    await fs.check()


@pytest.mark.usefixtures("small_chunks")
async def test_too_many_slices_to_answer(fs: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    await commit(fs, ino, *(Slice(2 * n, 1, a, 0) for n in range(30)))
    monkeypatch.setattr(chunks, "_MOST_READ", 20)
    await fs.refused(ErrorCode.TOO_LARGE, wire.GetContent(ino, 0, 64))
    assert len((await fs.call(wire.GetContent(ino, 0, 20), wire.Content)).slices) == 10


@pytest.mark.usefixtures("small_chunks")
async def test_deleting_a_huge_file(fs: Files) -> None:
    """Thousands of parts and slices go in bounded transactions, and nothing is left."""
    ino = await fs.make(b"f")
    ids = await fs.slices(150)
    for n, slice_id in enumerate(ids):
        await commit(fs, ino, Slice(n * 3 * CHUNK, 3 * CHUNK, slice_id, 0))
    await fs.change(wire.Remove(ROOT, b"f", False))
    most = _most_writes(fs.engine)
    await fs.call(wire.Reap([ino]), wire.Done)
    await fs.check()
    assert await fs.sweep() > 5
    assert await fs.unused() == ids
    assert max(most) <= MAX_WRITES
    left = await fs.engine.read(lambda s: s.range(*keys.parts(fs.volume.id, ino, 0, keys.LAST_CHUNK)))
    assert left == []


@pytest.mark.usefixtures("small_chunks")
async def test_cutting_a_huge_file(fs: Files) -> None:
    """What a rule has made void stays gone however much is written and cut before it is swept."""
    ino = await fs.make(b"f")
    (a,) = await fs.slices(1)
    for n in range(20):
        await commit(fs, ino, Slice(n * 16 * CHUNK, 16 * CHUNK, a, n * 16 * CHUNK))
    size = 320 * CHUNK
    await fs.change(wire.SetAttributes(ino, size=10 * CHUNK))
    await fs.change(wire.SetAttributes(ino, size=size))
    assert await render(fs, ino) == of(a, 0, 10 * CHUNK) + [None] * (310 * CHUNK)
    await commit(fs, ino, Slice(200 * CHUNK, 2 * CHUNK, a, 0))
    await fs.change(wire.SetAttributes(ino, size=201 * CHUNK))
    await fs.change(wire.SetAttributes(ino, size=size))
    expected = of(a, 0, 10 * CHUNK) + [None] * (190 * CHUNK) + of(a, 0, CHUNK) + [None] * (119 * CHUNK)
    assert await render(fs, ino) == expected
    await fs.check()
    await fs.sweep()
    assert await render(fs, ino) == expected
    await fs.change(wire.SetAttributes(ino, size=0))
    await fs.sweep()
    assert await fs.unused() == [a]


def _most_writes(engine: Engine) -> list[int]:
    """Record how many keys each later transaction writes."""
    most: list[int] = []
    write = engine.write

    async def counted(body: object) -> object:
        def run(txn: Transaction) -> object:
            result = body(txn)  # type: ignore[operator]
            most.append(MAX_WRITES - txn.room)
            return result

        return await write(run)

    engine.write = counted  # type: ignore[assignment,method-assign]
    return most


# The model


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 4), st.integers(0, 9)), max_size=30))
def test_resolve(raw: list[tuple[int, int, int, int]]) -> None:
    slices = [Slice(*fields) for fields in raw]
    expected: dict[int, Byte] = {}
    for s in slices:
        for n in range(s.length):
            expected[s.offset + n] = (s.slice_id, s.start + n) if s.slice_id else None
    pieces = chunks.resolve(slices)
    seen = {p.offset + n: (p.slice_id, p.start + n) for p in pieces for n in range(p.length)}
    assert seen == {position: byte for position, byte in expected.items() if byte is not None}
    assert sum(p.length for p in pieces) == len(seen)
    for one, other in itertools.pairwise(pieces):
        touches = one.offset + one.length == other.offset and one.start + one.length == other.start
        assert one.offset + one.length <= other.offset
        assert not (touches and one.slice_id == other.slice_id)


OFFSET = st.integers(0, 6 * CHUNK)
LAID = st.tuples(OFFSET, st.integers(1, 3 * CHUNK), st.booleans())
STEP = st.one_of(
    st.tuples(st.just("commit"), st.lists(LAID, min_size=1, max_size=6), st.booleans()),
    st.tuples(st.just("size"), OFFSET),
    st.tuples(st.just("sweep")),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(STEP, max_size=25), st.integers(2, 6))
def test_content_model(steps: list[tuple[object, ...]], tidy_at: int) -> None:
    """Any sequence of commits, changes of size and sweeps reads like a list of bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", CHUNK)
        patch.setattr(chunks, "_TIDY_AT", tidy_at)
        patch.setattr(chunks, "_PART_SLICES", 3)
        patch.setattr(chunks, "_CHUNKS_SWEPT", 2)
        asyncio.run(_ContentModel().run(steps))


class _ContentModel:
    def __init__(self) -> None:
        self.bytes: list[Byte] = []
        self.taken: set[int] = set()

    async def run(self, steps: list[tuple[object, ...]]) -> None:
        self.fs = await Files.create(new_engine("memory", Path()))
        self.ino = await self.fs.make(b"f")
        for name, *arguments in steps:
            await getattr(self, f"step_{name}")(*arguments)
            assert await render(self.fs, self.ino) == self.bytes
            assert await render(self.fs, self.ino, 70, 100) == self.bytes[70:170]
            await self.fs.check()
        await self.fs.change(wire.Remove(ROOT, b"f", False))
        await self.fs.call(wire.Reap([self.ino]), wire.Done)
        await self.fs.sweep()
        await self.fs.check()
        assert await self.fs.unused() == sorted(self.taken)

    async def step_commit(self, laid: list[tuple[int, int, bool]], one_slice: bool) -> None:
        """Lay new slices, or pieces of one slice, and holes; what is laid may be used once before."""
        ids = await self.fs.slices(len(laid))
        slices, start = [], 0
        for (offset, length, hole), slice_id in zip(laid, ids, strict=True):
            chosen = 0 if hole else ids[0] if one_slice else slice_id
            slices.append(Slice(offset, length, chosen, 0 if hole else start))
            self._lay(slices[-1])
            start += length
        await commit(self.fs, self.ino, *slices)

    def _lay(self, s: Slice) -> None:
        end = s.offset + s.length
        self.bytes += [None] * (end - len(self.bytes))
        self.bytes[s.offset : end] = of(s.slice_id, s.start, s.length) if s.slice_id else [None] * s.length
        self.taken |= {s.slice_id} - {0}

    async def step_size(self, size: int) -> None:
        await self.fs.change(wire.SetAttributes(self.ino, size=size))
        self.bytes = self.bytes[:size] + [None] * (size - len(self.bytes))

    async def step_sweep(self) -> None:
        await self.fs.sweep()
