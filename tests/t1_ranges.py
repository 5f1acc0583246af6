"""Zeros, copies and the search for data in files, and files without a name, against the rules and against a model."""

from __future__ import annotations

import asyncio
import itertools
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from namespaces import FILE, INLINE_LIMIT, ROOT, SESSION, Files, new_engine

from metaserver import chunks, keys, wire
from metaserver.inodes import MAX_SIZE
from metaserver.wire import ErrorCode, InodeFlag, Slice

CHUNK = 64
#: What a byte of a file is in the model: a slice and a position in it, a value, or nothing.
Byte = tuple[int, int] | int | None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK)


async def make(fs: Files, name: bytes, *slices: Slice, size: int = 0) -> int:
    """Make a sliced file."""
    ino = await fs.make(name)
    await fs.change(wire.CommitSlices(ino, list(slices), size))
    return ino


async def render(fs: Files, ino: int, offset: int = 0, length: int = 2**62) -> list[Byte]:
    """Return what each byte of a range of a file is."""
    content = await fs.call(wire.GetContent(ino, offset, length), wire.Content)
    end = min(offset + length, content.attributes.size)
    seen: list[Byte] = [None] * max(0, end - offset)
    if content.inline is not None:
        seen[: len(content.inline)] = [byte or None for byte in content.inline]
    for s in content.slices:
        for position in range(max(offset, s.offset), min(end, s.offset + s.length)):
            seen[position - offset] = (s.slice_id, s.start + position - s.offset) if s.slice_id else None
    return seen


async def allocate(fs: Files, ino: int, offset: int, length: int, *, keep: bool = False, zero: bool = False) -> int:
    """Send as many requests as it takes; return how many."""
    for count in itertools.count(1):
        changed = await fs.change(wire.Allocate(ino, offset, length, keep, zero))
        assert 0 < changed.done <= length
        offset, length = offset + changed.done, length - changed.done
        if not length:
            return count
    raise AssertionError


async def copy(fs: Files, source: int, at: int, ino: int, offset: int, length: int) -> tuple[int, int]:
    """Send as many requests as it takes; return how many, and how many bytes were copied."""
    done = 0
    for count in itertools.count(1):
        changed = await fs.change(wire.CopyRange(source, at + done, ino, offset + done, length - done))
        done += changed.done
        if not changed.done or done >= length:
            return count, done
    raise AssertionError


async def find(fs: Files, ino: int, offset: int, *, hole: bool) -> int | None:
    """Look as often as it takes."""
    while True:
        sought = await fs.call(wire.Seek(ino, offset, hole), wire.Sought)
        if not sought.further:
            return sought.offset
        assert sought.offset is not None
        assert sought.offset > offset
        offset = sought.offset


def of(slice_id: int, start: int, length: int) -> list[Byte]:
    return [(slice_id, start + n) for n in range(length)]


# Zeros


async def test_the_size_covers_what_is_allocated(fs: Files) -> None:
    ino = await fs.make(b"f")
    await fs.change(wire.WriteInline(ino, 0, b"abc"))
    (kept,) = (await fs.change(wire.Allocate(ino, 0, 100, True, False))).attributes
    assert (kept.size, kept.mtime_ns, kept.ctime_ns) == (3, fs.now, fs.now)
    changed = await fs.change(wire.Allocate(ino, 50, 10**12, False, False))
    assert (changed.attributes[0].size, changed.done) == (10**12 + 50, 10**12)
    assert changed.attributes[0].flags & InodeFlag.INLINE
    assert (await fs.change(wire.Allocate(ino, 0, 10, False, False))).attributes[0].size == 10**12 + 50
    content = await fs.call(wire.GetContent(ino, 0, 100), wire.Content)
    assert content.inline == b"abc"


@pytest.mark.parametrize(
    ("start", "length", "keep", "expected"),
    [
        (2, 3, True, b"ab\0\0\0fgh"),
        (2, 6, True, b"ab\0\0\0\0\0\0"),
        (2, 20, True, b"ab\0\0\0\0\0\0"),
        (2, 8, False, b"ab" + bytes(8)),
        (0, 8, False, bytes(8)),
        (10, 5, True, b"abcdefgh"),
        (10, 5, False, b"abcdefgh" + bytes(7)),
    ],
)
async def test_zeros_in_an_inline_file(fs: Files, start: int, length: int, keep: bool, expected: bytes) -> None:
    ino = await fs.make(b"f")
    await fs.change(wire.WriteInline(ino, 0, b"abcdefgh"))
    await allocate(fs, ino, start, length, keep=keep, zero=True)
    assert await fs.read(ino) == expected


async def test_zeros_release_slices(fs: Files) -> None:
    a, b = await fs.slices(2)
    half = chunks.CHUNK_BYTES // 2
    ino = await make(fs, b"f", Slice(0, half, a, 0), Slice(half, half, b, 0))
    await allocate(fs, ino, 0, half + 1, keep=True, zero=True)
    assert await fs.unused() == [a]
    assert await find(fs, ino, 0, hole=False) == half + 1
    await allocate(fs, ino, half, 2**40, keep=True, zero=True)
    assert await fs.unused() == [a, b]
    assert (await fs.stat(ino)).size == 2 * half


@pytest.mark.usefixtures("small_chunks")
async def test_zeros_over_many_chunks(fs: Files) -> None:
    (a,) = await fs.slices(1)
    ino = await make(fs, b"f", Slice(0, 10 * CHUNK, a, 0), size=10**9)
    for first in range(10, 40, 10):
        await fs.change(wire.CommitSlices(ino, [Slice(first * 1000 * CHUNK, 10 * CHUNK, a, first * CHUNK)], 0))
    assert 2 <= await allocate(fs, ino, 3, 10**9, zero=True) <= 5
    assert (await fs.stat(ino)).size == 10**9 + 3
    assert await find(fs, ino, 0, hole=True) == 3
    assert await find(fs, ino, 3, hole=False) is None


async def test_allocate_refusals(fs: Files) -> None:
    ino = await fs.make(b"f")
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.Allocate(ROOT, 0, 1, False, False))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Allocate(12345, 0, 1, False, True))
    await fs.refused(ErrorCode.INVALID, wire.Allocate(ino, 0, 0, False, True))
    for keep in (False, True):
        await fs.refused(ErrorCode.TOO_LARGE, wire.Allocate(ino, MAX_SIZE, 1, keep, True))
        await fs.refused(ErrorCode.TOO_LARGE, wire.Allocate(ino, 2**63 - 1, 2**63 - 1, keep, False))


# Copies


async def test_a_copy_shares_slices(fs: Files) -> None:
    a, b = await fs.slices(2)
    source = await make(fs, b"f", Slice(0, 100, a, 0), Slice(50, 10, b, 7), size=200)
    ino = await fs.make(b"g")
    assert await copy(fs, source, 40, ino, 1000, 500) == (2, 160)
    copied = await fs.stat(ino)
    assert (copied.size, copied.flags & InodeFlag.INLINE, copied.mtime_ns) == (1160, 0, fs.now - 2)
    seen = await render(fs, ino)
    assert seen[1000:] == of(a, 40, 10) + of(b, 7, 10) + of(a, 60, 40) + [None] * 100
    assert seen[:1000] == [None] * 1000
    await fs.change(wire.Remove(ROOT, b"f", False))
    await fs.call(wire.Reap([source]), wire.Done)
    await fs.sweep()
    assert await fs.unused() == []
    await fs.change(wire.SetAttributes(ino, size=0))
    await fs.sweep()
    assert await fs.unused() == [a, b]


async def test_a_copy_lies_over_what_was_there(fs: Files) -> None:
    a, b = await fs.slices(2)
    source = await make(fs, b"f", Slice(10, 10, a, 0), size=30)
    ino = await make(fs, b"g", Slice(0, 100, b, 0))
    assert await copy(fs, source, 0, ino, 20, 30) == (1, 30)
    assert await render(fs, ino) == of(b, 0, 20) + [None] * 10 + of(a, 0, 10) + [None] * 10 + of(b, 50, 50)


async def test_a_copy_within_one_file(fs: Files) -> None:
    (a,) = await fs.slices(1)
    ino = await make(fs, b"f", Slice(0, 100, a, 0))
    await fs.refused(ErrorCode.INVALID, wire.CopyRange(ino, 0, ino, 20, 50))
    await fs.refused(ErrorCode.INVALID, wire.CopyRange(ino, 20, ino, 0, 50))
    assert await copy(fs, ino, 0, ino, 100, 50) == (1, 50)
    assert await copy(fs, ino, 140, ino, 0, 30) == (2, 10)
    assert await render(fs, ino) == of(a, 40, 10) + of(a, 10, 90) + of(a, 0, 50)


async def test_copies_of_inline_files(fs: Files) -> None:
    source, ino = await fs.make(b"f"), await fs.make(b"g")
    await fs.change(wire.WriteInline(source, 0, b"abcdefgh"))
    await fs.change(wire.SetAttributes(source, size=20))
    assert await copy(fs, source, 2, ino, 3, 4) == (1, 4)
    assert await fs.read(ino) == b"\0\0\0cdef"
    await fs.change(wire.WriteInline(ino, 0, b"x" * 30))
    assert await copy(fs, source, 6, ino, 1, 10) == (1, 10)
    assert await fs.read(ino) == b"xgh" + bytes(8) + b"x" * 19
    assert await copy(fs, source, 10, ino, 25, 10) == (1, 10)
    assert await fs.read(ino) == b"xgh" + bytes(8) + b"x" * 14 + bytes(10)
    assert await copy(fs, source, 19, ino, INLINE_LIMIT * 10, 1) == (1, 1)
    assert (await fs.stat(ino)).size == INLINE_LIMIT * 10 + 1


async def test_what_a_copy_cannot_share(fs: Files) -> None:
    (a,) = await fs.slices(1)
    inline, sliced = await fs.make(b"i"), await make(fs, b"s", Slice(0, 100, a, 0))
    await fs.change(wire.WriteInline(inline, 0, b"abc"))
    await fs.change(wire.SetAttributes(inline, size=10))
    await fs.refused(ErrorCode.UNSUPPORTED, wire.CopyRange(inline, 0, sliced, 0, 3))
    await fs.refused(ErrorCode.UNSUPPORTED, wire.CopyRange(sliced, 0, inline, 0, 3))
    await fs.refused(ErrorCode.UNSUPPORTED, wire.CopyRange(inline, 0, await fs.make(b"e"), INLINE_LIMIT - 2, 3))
    assert await copy(fs, inline, 3, sliced, 10, 7) == (1, 7)
    assert await render(fs, sliced) == of(a, 0, 10) + [None] * 7 + of(a, 17, 83)


async def test_copies_that_copy_nothing(fs: Files) -> None:
    source, ino = await fs.make(b"f"), await fs.make(b"g")
    before = await fs.stat(ino)
    for offset in (0, 100):
        changed = await fs.change(wire.CopyRange(source, offset, ino, 0, 10))
        assert changed == wire.Changed([before])
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.CopyRange(ROOT, 0, ino, 0, 1))
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.CopyRange(ino, 0, ROOT, 0, 1))
    await fs.refused(ErrorCode.NOT_FOUND, wire.CopyRange(12345, 0, ino, 0, 1))
    await fs.change(wire.SetAttributes(source, size=100))
    await fs.refused(ErrorCode.TOO_LARGE, wire.CopyRange(source, 0, ino, MAX_SIZE - 1, 10))


@pytest.mark.usefixtures("small_chunks")
async def test_a_copy_of_a_large_file(fs: Files) -> None:
    """More slices and chunks than one transaction takes, at offsets that do not fit the chunks, with a large hole."""
    source = await make(fs, b"f")
    ids = await fs.slices(100)
    for n, slice_id in enumerate(ids):
        offset = n * (CHUNK - 5) + (10**9 if n >= 50 else 0)
        await fs.change(wire.CommitSlices(source, [Slice(offset, CHUNK - 5, slice_id, n)], 0))
    size = (await fs.stat(source)).size
    ino = await fs.make(b"g")
    count, done = await copy(fs, source, 3, ino, 30, 2**40)
    assert done == size - 3
    assert 4 < count < 20
    for middle in (0, 10**9 + 2900):
        assert await render(fs, ino, middle + 30, 3100) == await render(fs, source, middle + 3, 3100)
    assert await find(fs, ino, 3100, hole=False) == 10**9 + 50 * (CHUNK - 5) + 27


@pytest.mark.usefixtures("small_chunks")
async def test_the_largest_copies_fit(fs: Files) -> None:
    """As many pieces, slices and chunks as there may be, over chunks as full, again and again."""
    span = CHUNK * chunks.MAX_CHUNKS
    source, ino = await make(fs, b"f"), await make(fs, b"g")
    for turn in range(6):
        for each in (source, ino):
            ids = await fs.slices(chunks.MAX_SLICES)
            slices = [Slice((n * 7 + turn) % span, 1, ids[n % len(ids)], n) for n in range(1024)]
            await fs.change(wire.CommitSlices(each, slices, 0))
        expected = await render(fs, source)
        assert (await copy(fs, source, 0, ino, turn * 5, span))[1] == len(expected)
        assert await render(fs, ino, turn * 5, span) == expected
    await fs.check()


# The search for data and holes


async def test_seek_in_an_inline_file(fs: Files) -> None:
    ino = await fs.make(b"f")
    assert await find(fs, ino, 0, hole=True) is None
    assert await find(fs, ino, 0, hole=False) is None
    await fs.change(wire.WriteInline(ino, 0, b"abc"))
    assert [await find(fs, ino, n, hole=True) for n in range(4)] == [3, 3, 3, None]
    assert [await find(fs, ino, n, hole=False) for n in range(4)] == [0, 1, 2, None]
    await fs.change(wire.SetAttributes(ino, size=100))
    assert [await find(fs, ino, n, hole=True) for n in (0, 3, 99, 100)] == [3, 3, 99, None]
    assert [await find(fs, ino, n, hole=False) for n in (2, 3, 99)] == [2, None, None]
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.Seek(ROOT, 0, True))


@pytest.mark.usefixtures("small_chunks")
async def test_seek_far(fs: Files) -> None:
    (a,) = await fs.slices(1)
    ino = await make(fs, b"f", size=10**9)
    assert await find(fs, ino, 0, hole=False) is None
    for first in range(0, 160, 10):
        await fs.change(wire.CommitSlices(ino, [Slice(first * CHUNK, 10 * CHUNK, a, 0)], 0))
    assert await find(fs, ino, 1, hole=True) == 160 * CHUNK
    await fs.change(wire.CommitSlices(ino, [Slice(10**8, 1, a, 0)], 0))
    assert await find(fs, ino, 160 * CHUNK, hole=False) == 10**8
    for first in range(0, 160, 10):
        await fs.change(wire.CommitSlices(ino, [Slice(first * CHUNK, 10 * CHUNK, 0, 0)], 0))
    assert await find(fs, ino, 0, hole=False) == 10**8


# Files without a name


async def test_a_nameless_file_gets_a_name(fs: Files) -> None:
    directory = await fs.mkdir(b"d")
    before = await fs.stat(directory)
    (made,) = (await fs.change(wire.MakeTemporary(directory, FILE, 10, 20))).attributes
    assert (made.mode, made.nlink, made.uid, made.gid, made.size) == (FILE, 0, 10, 20, 0)
    assert await fs.stat(directory) == before
    await fs.check()
    await fs.change(wire.WriteInline(made.ino, 0, b"text"))
    await fs.change(wire.Link(made.ino, directory, b"name"))
    named = await fs.stat(made.ino)
    assert (named.nlink, named.flags) == (1, InodeFlag.INLINE)
    await fs.call(wire.Reap([made.ino]), wire.Done)
    assert await fs.find(b"name", directory) == made.ino
    assert await fs.read(made.ino) == b"text"
    await fs.change(wire.Remove(directory, b"name", False))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Link(made.ino, directory, b"again"))


async def test_a_nameless_file_goes_with_its_session(fs: Files) -> None:
    one = (await fs.change(wire.MakeTemporary(ROOT, FILE, 0, 0))).attributes[0].ino
    other = (await fs.change(wire.MakeTemporary(ROOT, FILE, 0, 0), b"another session!")).attributes[0].ino
    await fs.refused(ErrorCode.NOT_FOUND, wire.Link(other, ROOT, b"name"))
    await fs.call(wire.Reap([one, other]), wire.Done)
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(one))
    assert (await fs.stat(other)).nlink == 0
    rows = await fs.engine.read(lambda snapshot: snapshot.range(*keys.orphans(fs.volume.id, SESSION)))
    assert rows == []


async def test_nameless_files_inherit_the_group(fs: Files) -> None:
    directory = await fs.make(b"d", stat.S_IFDIR | 0o2755, gid=77)
    (made,) = (await fs.change(wire.MakeTemporary(directory, FILE, 10, 20))).attributes
    assert (made.mode, made.gid) == (FILE, 77)
    file = await fs.make(b"f")
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.MakeTemporary(file, FILE, 0, 0))
    await fs.refused(ErrorCode.INVALID, wire.MakeTemporary(ROOT, stat.S_IFDIR | 0o755, 0, 0))
    await fs.change(wire.Remove(ROOT, b"d", True))
    await fs.refused(ErrorCode.NOT_FOUND, wire.MakeTemporary(directory, FILE, 0, 0))


# The model

OFFSET = st.integers(0, 6 * CHUNK)
LENGTH = st.integers(1, 4 * CHUNK)
WHICH = st.integers(0, 1)
STEP = st.one_of(
    st.tuples(st.just("commit"), WHICH, OFFSET, LENGTH),
    st.tuples(st.just("allocate"), WHICH, OFFSET, LENGTH, st.booleans(), st.booleans()),
    st.tuples(st.just("copy"), WHICH, OFFSET, WHICH, OFFSET, LENGTH),
    st.tuples(st.just("size"), WHICH, OFFSET),
    st.tuples(st.just("sweep")),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(STEP, max_size=25), st.integers(2, 6))
def test_ranges_model(steps: list[tuple[object, ...]], tidy_at: int) -> None:
    """Any sequence of commits, zeros, copies and changes of size in two files reads like two lists of bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", CHUNK)
        patch.setattr(chunks, "MAX_CHUNKS", 4)
        patch.setattr(chunks, "MAX_SLICES", 3)
        patch.setattr(chunks, "_TIDY_AT", tidy_at)
        patch.setattr(chunks, "_PART_SLICES", 3)
        patch.setattr(chunks, "_CHUNKS_SEEN", 3)
        patch.setattr(chunks, "_PIECES_SEEN", 5)
        asyncio.run(_RangesModel().run(steps))


class _RangesModel:
    def __init__(self) -> None:
        self.bytes: tuple[list[Byte], list[Byte]] = ([], [])

    async def run(self, steps: list[tuple[object, ...]]) -> None:
        self.fs = await Files.create(new_engine("memory", Path()))
        self.inos = [await self.fs.make(name) for name in (b"f", b"g")]
        for name, *arguments in steps:
            await getattr(self, f"step_{name}")(*arguments)
            for ino, expected in zip(self.inos, self.bytes, strict=True):
                assert await render(self.fs, ino) == expected
            await self.fs.check()
        for ino, expected in zip(self.inos, self.bytes, strict=True):
            await self._check_search(ino, expected)

    async def _check_search(self, ino: int, expected: list[Byte]) -> None:
        """Where data and holes are said to be is where they are."""
        for offset in range(0, len(expected) + 1, 7):
            rest = range(offset, len(expected))
            data = next((n for n in rest if expected[n] is not None), None)
            hole = next((n for n in rest if expected[n] is None), len(expected) if rest else None)
            assert await find(self.fs, ino, offset, hole=False) == data
            assert await find(self.fs, ino, offset, hole=True) == hole

    def _lay(self, which: int, offset: int, laid: list[Byte]) -> None:
        file = self.bytes[which]
        file += [None] * (offset + len(laid) - len(file))
        file[offset : offset + len(laid)] = laid

    async def step_commit(self, which: int, offset: int, length: int) -> None:
        (slice_id,) = await self.fs.slices(1)
        length = min(length, 3 * CHUNK)
        await self.fs.change(wire.CommitSlices(self.inos[which], [Slice(offset, length, slice_id, 0)], 0))
        self._lay(which, offset, of(slice_id, 0, length))

    async def step_allocate(self, which: int, offset: int, length: int, keep: bool, zero: bool) -> None:
        await allocate(self.fs, self.inos[which], offset, length, keep=keep, zero=zero)
        file, end = self.bytes[which], offset + length
        if zero:
            inside = max(0, min(end, len(file)) - offset)
            file[offset : offset + inside] = [None] * inside
        if not keep:
            file += [None] * (end - len(file))

    async def step_copy(self, source: int, at: int, which: int, offset: int, length: int) -> None:
        """As the kernel does, ask for no more than there is: a copy behind a file's own end would have more there."""
        copied = self.bytes[source][at : at + length]
        if source == which and abs(at - offset) < len(copied):
            return
        length = len(copied) if source == which else length
        assert (await copy(self.fs, self.inos[source], at, self.inos[which], offset, length))[1] == len(copied)
        if copied:
            self._lay(which, offset, list(copied))

    async def step_size(self, which: int, size: int) -> None:
        await self.fs.change(wire.SetAttributes(self.inos[which], size=size))
        file = self.bytes[which]
        file[:] = file[:size] + [None] * (size - len(file))

    async def step_sweep(self) -> None:
        await self.fs.sweep()
