"""The check of a volume: every kind of damage is planted in the engine, found, repaired, and gone on a second look.

And the other way round: what random work leaves behind is never called damage.
"""

from __future__ import annotations

import asyncio
import random
import re
import stat
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant
from namespaces import DIRECTORY, FILE, ROOT, SESSION, SYMLINK, Files, new_engine
from t1_namespace_model import PHASES, Namespace

from metaserver import chunks, events, gc, keys, wire
from metaserver.engine import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.fsck import run, sorting
from metaserver.fsck.findings import Finding, Kind
from metaserver.fsck.sorting import Groups, Sorter
from metaserver.namespace import WRITES, Context, reap_session
from metaserver.records import Entry, Inode, Shard, pack_listed, pack_number, pack_slices
from metaserver.wire import InodeFlag, Slice


@pytest.fixture(autouse=True)
def stored_bytes_are_not_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a figure for programs that look for holes, and are right again with the next change."""
    monkeypatch.setattr(Files, "counts_stored", False)


@pytest.fixture(params=["memory", "lmdb"])
async def fs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Files]:
    engine = new_engine(request.param, tmp_path / "engine")
    yield await Files.create(engine)
    await engine.close()


class Heard(run.Listener):
    """What a check said. ``lost`` are the objects that the store is said to have lost: (id, whether damaged)."""

    def __init__(self, lost: list[tuple[int, int]] | None = None, last: int = 0) -> None:
        self.found: list[Finding] = []
        self.repaired: list[bool] = []
        self.needed: list[tuple[int, int]] = []
        self._lost = lost or []
        self._last = last

    @property
    def kinds(self) -> list[Kind]:
        return [finding.kind for finding in self.found]

    def progress(self, what: str, done: int, total: int) -> None:
        assert what
        assert done >= 0 <= total

    def finding(self, finding: Finding, repaired: bool) -> None:
        self.found.append(finding)
        self.repaired.append(repaired)

    def slices(self, needed: list[tuple[int, int]]) -> None:
        self.needed += needed

    def losses(self) -> tuple[list[tuple[int, int]], int]:
        return self._lost, self._last


async def check(fs: Files, *, repair: bool = False, heard: Heard | None = None) -> Heard:
    """Check a volume with its store, and return what was said."""
    heard = heard or Heard()
    one = run.Check(fs.engine, fs.volume, heard, threading.Event(), repair=repair)
    await one.run(store=True)
    assert one.found == len(heard.found)
    assert one.repaired == sum(heard.repaired)
    return heard


async def assert_clean(fs: Files) -> None:
    heard = await check(fs)
    assert [(finding.kind, finding.where, finding.what) for finding in heard.found] == []


async def edit(fs: Files, change: Callable[[Transaction], None]) -> None:
    await fs.engine.write(change)


async def put_inode(fs: Files, ino: int, **fields: Any) -> None:
    """Overwrite fields of an inode's record, and nothing else."""

    def change(txn: Transaction) -> None:
        key = keys.inode(fs.volume.id, ino)
        inode = Inode.unpack(ino, txn.get(key) or b"")
        for name, value in fields.items():
            setattr(inode, name, value)
        txn.put(key, inode.pack())

    await edit(fs, change)


async def put(fs: Files, key: bytes, value: bytes) -> None:
    await edit(fs, lambda txn: txn.put(key, value))


async def delete(fs: Files, *planted: bytes) -> None:
    def change(txn: Transaction) -> None:
        for key in planted:
            txn.delete(key)

    await edit(fs, change)


class Tree:
    """A small volume with one of each: /d/e/f (inline), /d/big (slices), /link, /d/twice = /twice, /fifo, xattrs."""

    @classmethod
    async def make(cls, fs: Files) -> Tree:
        tree = cls()
        tree.d = await fs.mkdir(b"d")
        tree.e = await fs.mkdir(b"e", tree.d)
        tree.f = await fs.make(b"f", FILE, tree.e)
        await fs.change(wire.WriteInline(tree.f, 0, b"content"))
        await fs.change(wire.SetXattr(tree.f, b"user.a", b"value"))
        tree.big = await fs.make(b"big", FILE, tree.d)
        tree.a, tree.b, tree.spare = await fs.slices(3)
        far = chunks.CHUNK_BYTES
        slices = [Slice(0, 5000, tree.a, 0), Slice(far - 10, 20, tree.b, 100)]
        await fs.change(wire.CommitSlices(tree.big, slices, 0))
        tree.link = await fs.make(b"link", SYMLINK, target=b"d/e/f")
        tree.twice = await fs.make(b"twice")
        await fs.change(wire.Link(tree.twice, tree.d, b"twice"))
        tree.fifo = await fs.make(b"fifo", stat.S_IFIFO | 0o600)
        return tree

    d: int
    e: int
    f: int
    big: int
    link: int
    twice: int
    fifo: int
    a: int
    b: int
    spare: int


@pytest.fixture
async def tree(fs: Files) -> Tree:
    tree = await Tree.make(fs)
    await assert_clean(fs)
    return tree


async def entry_of(fs: Files, directory: int, name: bytes) -> Entry:
    value = await fs.engine.read(lambda snapshot: snapshot.get(keys.entry(fs.volume.id, directory, name)))
    assert value is not None
    return Entry.unpack(value)


async def lost_and_found(fs: Files) -> list[bytes]:
    return await fs.names(await fs.find(b"lost+found"))


# Damage: what is planted, what is found of it (at least), and what is to be seen after the repair


async def nothing(fs: Files, tree: Tree) -> None:
    """Nothing more to see than that the volume is clean."""


def plant(
    *kinds: Kind, after: Callable[[Files, Tree], Awaitable[None]] = nothing
) -> Callable[[Callable[[Files, Tree], Awaitable[None]]], Callable[[Files, Tree], Awaitable[None]]]:
    def note(planting: Callable[[Files, Tree], Awaitable[None]]) -> Callable[[Files, Tree], Awaitable[None]]:
        PLANTINGS[planting.__name__] = (planting, kinds, after)
        return planting

    return note


PLANTINGS: dict[str, tuple[Callable[[Files, Tree], Awaitable[None]], tuple[Kind, ...], Any]] = {}


@plant(Kind.STRAY_KEY)
async def a_key_of_no_known_kind(fs: Files, tree: Tree) -> None:
    start, _ = keys.volume_range(fs.volume.id)
    for letter in (b"\0", b"a", b"j", b"z", b"\xff"):
        await put(fs, start + letter + b"what", b"is this")


@plant(Kind.STRAY_KEY)
async def keys_of_a_wrong_form(fs: Files, tree: Tree) -> None:
    for letter in keys.KINDS:
        base = keys.kind_range(fs.volume.id, bytes((letter,)))[0]
        await put(fs, base + b"short", b"?")
        await put(fs, base + bytes(8), b"?")
        await put(fs, base + b"\xff" * 60, b"")


async def _f_is_lost_and_found(fs: Files, tree: Tree) -> None:
    assert await lost_and_found(fs) == [b"#%d" % tree.f]
    assert await fs.read(tree.f) == b"content"


@plant(Kind.STRAY_KEY, Kind.STRAY_LISTING, Kind.INODE_WITHOUT_ENTRY, after=_f_is_lost_and_found)
async def an_entry_that_cannot_be_read(fs: Files, tree: Tree) -> None:
    await put(fs, keys.entry(fs.volume.id, tree.e, b"f"), b"?")


async def _is_readable(fs: Files, tree: Tree) -> None:
    assert await fs.find(b"f", tree.e) == tree.f
    assert await fs.read(tree.f) == b"content"
    inode = await fs.stat(tree.f)
    assert (inode.mode, inode.uid, inode.nlink) == (stat.S_IFREG | 0o600, 0, 1)
    assert (await fs.call(wire.GetXattr(tree.f, b"user.a"), wire.XattrIs)).value == b"value"


@plant(Kind.STRAY_KEY, Kind.ENTRY_WITHOUT_INODE, after=_is_readable)
async def an_inode_that_cannot_be_read(fs: Files, tree: Tree) -> None:
    await put(fs, keys.inode(fs.volume.id, tree.f), b"?" * 10)


@plant(Kind.ENTRY_WITHOUT_INODE, after=_is_readable)
async def an_inode_gone_that_has_content(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.inode(fs.volume.id, tree.f))


async def _fifo_is_gone(fs: Files, tree: Tree) -> None:
    assert b"fifo" not in await fs.names()


@plant(Kind.ENTRY_WITHOUT_INODE, after=_fifo_is_gone)
async def an_inode_gone_without_content(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.inode(fs.volume.id, tree.fifo))


@plant(Kind.ENTRY_WITHOUT_INODE, Kind.WRONG_COUNTER)
async def an_inode_gone_that_has_slices(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.inode(fs.volume.id, tree.big))


async def _e_is_whole(fs: Files, tree: Tree) -> None:
    assert await fs.find(b"e", tree.d) == tree.e
    assert await fs.find(b"f", tree.e) == tree.f


@plant(Kind.ENTRY_WITHOUT_INODE, after=_e_is_whole)
async def a_directorys_inode_gone(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.inode(fs.volume.id, tree.e))


@plant(Kind.ENTRY_WITHOUT_INODE, after=_e_is_whole)
async def the_roots_inode_gone(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.inode(fs.volume.id, ROOT))


@plant(Kind.CONTENT_WITHOUT_INODE, Kind.INODE_WITHOUT_ENTRY, after=_f_is_lost_and_found)
async def a_file_gone_but_for_its_content(fs: Files, tree: Tree) -> None:
    cookie = (await entry_of(fs, tree.e, b"f")).cookie
    volume = fs.volume.id
    await delete(fs, keys.inode(volume, tree.f), keys.entry(volume, tree.e, b"f"), keys.listing(volume, tree.e, cookie))


@plant(Kind.INODE_WITHOUT_ENTRY, after=_f_is_lost_and_found)
async def an_entry_gone(fs: Files, tree: Tree) -> None:
    cookie = (await entry_of(fs, tree.e, b"f")).cookie
    await delete(fs, keys.entry(fs.volume.id, tree.e, b"f"), keys.listing(fs.volume.id, tree.e, cookie))


@plant(Kind.INODE_WITHOUT_ENTRY, Kind.STRAY_LISTING, after=_f_is_lost_and_found)
async def an_entry_gone_from_where_it_is_found(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.entry(fs.volume.id, tree.e, b"f"))


async def _e_is_lost_and_found(fs: Files, tree: Tree) -> None:
    assert await lost_and_found(fs) == [b"#%d" % tree.e]
    assert await fs.find(b"f", tree.e) == tree.f
    assert (await fs.stat(ROOT)).nlink == 4


@plant(Kind.INODE_WITHOUT_ENTRY, Kind.WRONG_NLINK, after=_e_is_lost_and_found)
async def a_directorys_entry_gone(fs: Files, tree: Tree) -> None:
    cookie = (await entry_of(fs, tree.d, b"e")).cookie
    await delete(fs, keys.entry(fs.volume.id, tree.d, b"e"), keys.listing(fs.volume.id, tree.d, cookie))


@plant(Kind.INODE_WITHOUT_ENTRY, Kind.WRONG_NLINK, after=_e_is_lost_and_found)
async def a_removed_directory_that_has_entries(fs: Files, tree: Tree) -> None:
    await a_directorys_entry_gone(fs, tree)
    await put_inode(fs, tree.e, nlink=0)


@plant(Kind.INODE_WITHOUT_ENTRY)
async def lost_and_found_that_is_a_file(fs: Files, tree: Tree) -> None:
    await fs.make(b"lost+found")
    await an_entry_gone(fs, tree)


async def _fifo_is_deleted(fs: Files, tree: Tree) -> None:
    with pytest.raises(Refused):
        await fs.stat(tree.fifo)


@plant(Kind.LEAKED_INODE, after=_fifo_is_deleted)
async def an_unlinked_inode_that_nobody_keeps(fs: Files, tree: Tree) -> None:
    await fs.change(wire.Remove(ROOT, b"fifo", False))
    await delete(fs, keys.orphan(fs.volume.id, SESSION, tree.fifo))


async def _big_is_deleted(fs: Files, tree: Tree) -> None:
    with pytest.raises(Refused):
        await fs.stat(tree.big)
    assert await fs.unused() == [tree.a, tree.b]


@plant(Kind.ORPHAN, after=_big_is_deleted)
async def an_orphan_of_an_ended_session(fs: Files, tree: Tree) -> None:
    await fs.change(wire.Remove(tree.d, b"big", False))


@plant(Kind.ORPHAN)
async def a_nameless_file_of_an_ended_session(fs: Files, tree: Tree) -> None:
    await fs.change(wire.MakeTemporary(ROOT, FILE, 0, 0))


@plant(Kind.STRAY_ORPHAN)
async def orphans_records_that_are_wrong(fs: Files, tree: Tree) -> None:
    for ino in (tree.f, tree.e, 123_456):
        await put(fs, keys.orphan(fs.volume.id, SESSION, ino), b"")


@plant(Kind.WRONG_NLINK)
async def links_counted_wrong(fs: Files, tree: Tree) -> None:
    for ino, nlink in ((tree.twice, 1), (tree.f, 7), (tree.d, 2), (tree.e, 0), (ROOT, 9), (tree.fifo, 0)):
        await put_inode(fs, ino, nlink=nlink)


@plant(Kind.WRONG_PARENT)
async def parents_that_are_wrong(fs: Files, tree: Tree) -> None:
    await put_inode(fs, tree.e, parent=ROOT)
    await put_inode(fs, tree.d, parent=777)
    await put_inode(fs, ROOT, parent=tree.d)
    await put_inode(fs, tree.f, parent=ROOT)


async def _f_and_e_are_as_before(fs: Files, tree: Tree) -> None:
    assert await fs.find(b"e", tree.d) == tree.e
    assert await fs.names() == [b"d", b"link", b"twice", b"fifo"]


@plant(Kind.DIRECTORY_LINKED, after=_f_and_e_are_as_before)
async def directories_with_two_places(fs: Files, tree: Tree) -> None:
    for ino, name in ((tree.e, b"again"), (ROOT, b"top")):
        version = (await fs.stat(ROOT)).version + 1
        await put(fs, keys.entry(fs.volume.id, ROOT, name), Entry(ino, version).pack())
        await put(fs, keys.listing(fs.volume.id, ROOT, version), pack_listed(ino, name))
        await put_inode(fs, ROOT, version=version)


async def _loop_is_lost_and_found(fs: Files, tree: Tree) -> None:
    assert await lost_and_found(fs) == [b"#%d" % min(tree.d, tree.e)]
    assert await fs.find(b"f", tree.e) == tree.f


@plant(Kind.DIRECTORY_LOOP, after=_loop_is_lost_and_found)
async def a_loop_of_directories(fs: Files, tree: Tree) -> None:
    """The entry of /d goes into /d/e."""
    entry = await entry_of(fs, ROOT, b"d")
    volume = fs.volume.id
    cookie = (await fs.stat(tree.e)).version + 1
    await delete(fs, keys.entry(volume, ROOT, b"d"), keys.listing(volume, ROOT, entry.cookie))
    await put(fs, keys.entry(volume, tree.e, b"d"), Entry(tree.d, cookie).pack())
    await put(fs, keys.listing(volume, tree.e, cookie), pack_listed(tree.d, b"d"))
    await put_inode(fs, tree.d, parent=tree.e)
    await put_inode(fs, tree.e, version=cookie, nlink=3)
    await put_inode(fs, ROOT, nlink=2)


@plant(Kind.WRONG_LISTING, after=_f_and_e_are_as_before)
async def an_entry_that_the_listing_lacks(fs: Files, tree: Tree) -> None:
    cookie = (await entry_of(fs, tree.d, b"e")).cookie
    await delete(fs, keys.listing(fs.volume.id, tree.d, cookie))


@plant(Kind.WRONG_LISTING, after=_f_and_e_are_as_before)
async def a_listing_that_says_otherwise(fs: Files, tree: Tree) -> None:
    cookie = (await entry_of(fs, tree.d, b"e")).cookie
    await put(fs, keys.listing(fs.volume.id, tree.d, cookie), pack_listed(tree.f, b"e"))


@plant(Kind.WRONG_LISTING)
async def two_entries_in_one_place_of_the_listing(fs: Files, tree: Tree) -> None:
    cookie = (await entry_of(fs, tree.d, b"e")).cookie
    await put(fs, keys.entry(fs.volume.id, tree.d, b"twice"), Entry(tree.twice, cookie).pack())


@plant(Kind.STRAY_LISTING, after=_f_and_e_are_as_before)
async def rows_of_listings_without_entries(fs: Files, tree: Tree) -> None:
    await put(fs, keys.listing(fs.volume.id, ROOT, 1000), pack_listed(tree.f, b"ghost"))
    await put(fs, keys.listing(fs.volume.id, tree.e, 2**40), pack_listed(tree.f, b"f"))
    await put(fs, keys.listing(fs.volume.id, 654_321, 5), pack_listed(tree.f, b"f"))


@plant(Kind.STRAY_KEY)
async def entries_of_what_is_no_directory(fs: Files, tree: Tree) -> None:
    await put(fs, keys.entry(fs.volume.id, tree.f, b"x"), Entry(tree.fifo, 1).pack())
    await put(fs, keys.listing(fs.volume.id, tree.f, 1), pack_listed(tree.fifo, b"x"))


@plant(Kind.WRONG_VERSION)
async def inodes_older_than_what_they_hold(fs: Files, tree: Tree) -> None:
    for ino in (ROOT, tree.d, tree.big):
        await put_inode(fs, ino, version=1)


async def _sizes_are_right(fs: Files, tree: Tree) -> None:
    sizes = [(await fs.stat(ino)).size for ino in (tree.f, tree.big, tree.link, tree.d, tree.fifo)]
    assert sizes == [7, chunks.CHUNK_BYTES + 10, 5, 0, 0]


@plant(Kind.WRONG_SIZE, Kind.WRONG_COUNTER, after=_sizes_are_right)
async def sizes_that_do_not_fit(fs: Files, tree: Tree) -> None:
    for ino, size in ((tree.f, 3), (tree.big, 4999), (tree.link, 4), (tree.d, 1), (tree.fifo, 2**62)):
        await put_inode(fs, ino, size=size)


@plant(Kind.WRONG_SIZE)
async def a_size_that_no_file_has(fs: Files, tree: Tree) -> None:
    await put_inode(fs, tree.f, size=2**60)


async def _content_is_as_before(fs: Files, tree: Tree) -> None:
    assert await fs.read(tree.f) == b"content"
    found = await fs.call(wire.GetContent(tree.big, 0, 2**40), wire.Content)
    assert [s.slice_id for s in found.slices] == [tree.a, tree.b, tree.b]


@plant(Kind.WRONG_INLINE_FLAG, after=_content_is_as_before)
async def inline_flags_that_are_wrong(fs: Files, tree: Tree) -> None:
    await put_inode(fs, tree.f, flags=InodeFlag.HAS_XATTRS)
    await put_inode(fs, tree.big, flags=InodeFlag.INLINE)
    await put_inode(fs, tree.fifo, flags=InodeFlag.INLINE)


@plant(Kind.WRONG_XATTR_FLAG)
async def xattr_flags_that_are_wrong(fs: Files, tree: Tree) -> None:
    await put_inode(fs, tree.f, flags=InodeFlag.INLINE)
    await put_inode(fs, tree.d, flags=InodeFlag.HAS_XATTRS)


@plant(Kind.STRAY_CONTENT, after=_content_is_as_before)
async def content_that_the_inode_cannot_have(fs: Files, tree: Tree) -> None:
    volume = fs.volume.id
    await put(fs, keys.content(volume, tree.big), b"both")
    await put(fs, keys.content(volume, tree.fifo), b"content")
    await put(fs, keys.xattr(volume, 777_777, b"user.a"), b"value")
    for ino in (tree.f, tree.fifo, tree.link):
        await put(fs, keys.part(volume, ino, 0, 1, 0), b"\0" + pack_slices([Slice(0, 1, tree.a, 0)]))
    await put(fs, keys.references(volume, tree.a), pack_number(4))


async def _link_leads_nowhere(fs: Files, tree: Tree) -> None:
    target = (await fs.call(wire.ReadLink(tree.link), wire.TargetIs)).target
    assert (await fs.stat(tree.link)).size == len(target)


@plant(Kind.LOST_TARGET, after=_link_leads_nowhere)
async def a_symlink_without_target(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.content(fs.volume.id, tree.link))


@plant(Kind.STRAY_KEY)
async def a_part_that_cannot_be_read(fs: Files, tree: Tree) -> None:
    await put(fs, keys.part(fs.volume.id, tree.big, 0, 1, 9), b"\0" * 20)


@plant(Kind.WRONG_REFERENCES)
async def references_counted_wrong(fs: Files, tree: Tree) -> None:
    await put(fs, keys.references(fs.volume.id, tree.a), pack_number(5))
    await delete(fs, keys.references(fs.volume.id, tree.b))


async def _spare_is_unused(fs: Files, tree: Tree) -> None:
    assert await fs.unused() == [tree.spare]


@plant(Kind.LEAKED_SLICE, after=_spare_is_unused)
async def a_slice_that_nothing_uses(fs: Files, tree: Tree) -> None:
    await put(fs, keys.references(fs.volume.id, tree.spare), pack_number(1))


async def _none_is_unused(fs: Files, tree: Tree) -> None:
    assert await fs.unused() == []


@plant(Kind.DOOMED_SLICE, after=_none_is_unused)
async def a_slice_in_use_that_may_be_deleted(fs: Files, tree: Tree) -> None:
    bitmap = 1 << tree.a | 1 << tree.b
    await put(fs, keys.unused(fs.volume.id, tree.a), bitmap.to_bytes(keys.BLOCK_SLICES // 8))


async def _numbers_are_new(fs: Files, tree: Tree) -> None:
    assert min(await fs.slices(2)) > tree.b
    figures = await fs.call(wire.GetStatistics(), wire.Statistics)
    assert (figures.inodes, figures.bytes) == (8, 7 + chunks.CHUNK_BYTES + 10)


@plant(Kind.WRONG_COUNTER, after=_numbers_are_new)
async def counters_that_drifted(fs: Files, tree: Tree) -> None:
    shard = keys.shard_of(tree.f)
    await put(fs, keys.shard(fs.volume.id, shard), Shard(1, 77, -5).pack())
    await put(fs, keys.shard(fs.volume.id, (shard + 1) % keys.SHARDS), Shard(999, -3, 5).pack())
    await put(fs, keys.next_slice(fs.volume.id), pack_number(tree.b))


@plant(Kind.WRONG_COUNTER, after=_numbers_are_new)
async def counters_gone(fs: Files, tree: Tree) -> None:
    await delete(fs, keys.next_slice(fs.volume.id), *(keys.shard(fs.volume.id, n) for n in range(keys.SHARDS)))


# Events


async def _tell(fs: Files, count: int) -> None:
    """Log so many changes."""
    for number in range(count):
        request = wire.MakeNode(ROOT, b"told-%d" % number, FILE, 0, 0)

        def body(txn: Transaction, request: wire.MakeNode = request) -> None:
            context = Context(fs.volume, SESSION, fs.now)
            events.record(txn, context, "test", request, WRITES[wire.MakeNode](txn, context, request))

        await fs.engine.write(body)


async def _versions(fs: Files) -> list[int]:
    """The versions of all events that can be followed, from the oldest on."""

    def body(snapshot: Snapshot) -> list[int]:
        start = events.start_of(snapshot, fs.volume, 0)
        return [event.version for event in events.events_after(snapshot, fs.volume, start)]

    return await fs.engine.read(body)


def _are_kept(*versions: int) -> Callable[[Files, Tree], Awaitable[None]]:
    async def after(fs: Files, tree: Tree) -> None:
        assert await _versions(fs) == list(versions)

    return after


@plant(Kind.EVENTS_BROKEN, after=_are_kept(4, 5, 6, 7))
async def an_event_gone(fs: Files, tree: Tree) -> None:
    await _tell(fs, 6)
    await delete(fs, keys.event(fs.volume.id, 3))


@plant(Kind.EVENTS_BROKEN, after=_are_kept(7))
async def the_last_event_gone(fs: Files, tree: Tree) -> None:
    await _tell(fs, 6)
    await delete(fs, keys.event(fs.volume.id, 6))


@plant(Kind.EVENTS_BROKEN, after=_are_kept(301))
async def many_events_before_a_gap(fs: Files, tree: Tree) -> None:
    await _tell(fs, 300)
    await delete(fs, keys.event(fs.volume.id, 3), keys.event(fs.volume.id, 300))


@plant(Kind.WRONG_COUNTER, after=_are_kept(1, 2, 3, 4, 5, 6))
async def events_that_are_not_counted(fs: Files, tree: Tree) -> None:
    await _tell(fs, 5)
    await put(fs, keys.last_event(fs.volume.id), pack_number(2))


@plant(Kind.STRAY_KEY, Kind.EVENTS_BROKEN, after=_are_kept(3, 4))
async def an_event_of_a_wrong_form(fs: Files, tree: Tree) -> None:
    await _tell(fs, 3)
    await put(fs, keys.event(fs.volume.id, 2), b"nonsense")
    await put(fs, keys.kept_events(fs.volume.id), b"nonsense")


@pytest.mark.parametrize("name", PLANTINGS)
async def test_what_is_planted_is_found_and_repaired(fs: Files, tree: Tree, name: str) -> None:
    planting, kinds, after = PLANTINGS[name]
    await planting(fs, tree)
    before = await _everything(fs)
    heard = await check(fs)
    assert set(kinds) & set(heard.kinds), heard.kinds
    assert not any(heard.repaired)
    assert await _everything(fs) == before, "a check without repair has changed something"
    repaired = await check(fs, repair=True)
    assert set(kinds) <= set(repaired.kinds), repaired.kinds
    assert all(repaired.repaired)
    await assert_clean(fs)
    assert (await check(fs, repair=True)).found == []
    await fs.sweep()
    await _end_sessions(fs)
    await fs.check()
    await after(fs, tree)


async def test_all_at_once(fs: Files, tree: Tree) -> None:
    """Damage upon damage: whatever becomes of it, the end is a clean volume."""
    for planting, _, _ in PLANTINGS.values():
        try:
            await planting(fs, tree)
        except (Refused, AssertionError, struct.error):  # an earlier one has taken away what this one needs
            continue
    assert len(set((await check(fs)).kinds)) > 10
    await check(fs, repair=True)
    await assert_clean(fs)
    await _end_sessions(fs)
    await fs.check()


async def _everything(fs: Files) -> list[tuple[bytes, bytes]]:
    return await fs.engine.read(lambda snapshot: snapshot.range(*keys.volume_range(fs.volume.id)))


async def _end_sessions(fs: Files) -> None:
    while await fs.engine.write(lambda txn: reap_session(txn, fs.volume, SESSION)):
        pass
    await fs.sweep()


# Lost objects


async def test_a_lost_object_becomes_a_hole(fs: Files, tree: Tree) -> None:
    """Neither what lies below shows, nor is what lies above touched."""
    (late,) = await fs.slices(1)
    await fs.change(wire.CommitSlices(tree.big, [Slice(1000, 10, tree.b, 100), Slice(990, 10, late, 0)], 0))
    lost = [(tree.b, 1), (late, 0), (999, 0)]
    heard = await check(fs, heard=Heard(lost))
    assert heard.needed == [(tree.a, 5000), (tree.b, 120), (late, 10)]
    assert heard.kinds == [Kind.MISSING_OBJECT, Kind.DAMAGED_OBJECT]
    assert [finding.where for finding in heard.found] == ["/d/big", "/d/big"]
    assert "990-999" in heard.found[0].what
    assert "1000-1009" in heard.found[0].what
    before = (await fs.stat(tree.big)).version
    repaired = await check(fs, repair=True, heard=Heard(lost))
    assert repaired.repaired == [True, True]
    await assert_clean(fs)
    found = await fs.call(wire.GetContent(tree.big, 0, 2**40), wire.Content)
    holes = [(s.offset, s.length) for s in found.slices if not s.slice_id]
    assert sorted(holes) == [(990, 10), (1000, 10), (chunks.CHUNK_BYTES - 10, 10), (chunks.CHUNK_BYTES, 10)]
    assert [s.slice_id for s in found.slices if s.slice_id] == [tree.a]
    assert found.attributes.version > before
    assert await fs.unused() == [tree.b, late]
    await fs.check()


async def test_what_is_lost_of_given_up_content_is_no_loss(fs: Files, tree: Tree) -> None:
    await fs.change(wire.SetAttributes(tree.big, size=0))
    assert (await check(fs, heard=Heard([(tree.a, 0), (tree.b, 0)]))).found == []
    assert (await check(fs)).needed == [(tree.a, -1), (tree.b, -1)]


async def test_a_large_chunk_gives_up_its_bytes_in_several_transactions(
    fs: Files, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = await fs.make(b"pieces")
    lost = await fs.slices(30)
    monkeypatch.setattr(chunks, "_TIDY_AT", 10**9)
    monkeypatch.setattr(chunks, "_TIDY_PARTS", 10**9)
    for turn in range(60):
        slices = [Slice((turn * 100 + n) * 2, 1, lost[(turn + n) % 30], n) for n in range(100)]
        await fs.change(wire.CommitSlices(ino, slices, 0))
    heard = await check(fs, repair=True, heard=Heard([(each, 0) for each in lost]))
    assert heard.repaired == [True]
    await assert_clean(fs)
    await fs.check()
    assert await fs.unused() == lost


async def test_an_object_that_was_never_given_out_raises_the_counter(fs: Files, tree: Tree) -> None:
    assert (await check(fs, heard=Heard(last=tree.spare))).found == []
    heard = await check(fs, repair=True, heard=Heard(last=500))
    assert heard.kinds == [Kind.WRONG_COUNTER]
    assert await fs.slices(1) == [501]


# How it goes about it


async def test_paths_are_told(fs: Files, tree: Tree) -> None:
    await fs.make(b"new\nline\xff", parent=tree.e)
    ino = await fs.find(b"new\nline\xff", tree.e)
    await put_inode(fs, ino, nlink=3)
    await put_inode(fs, tree.twice, nlink=3)
    await put_inode(fs, tree.e, nlink=3)
    where = {finding.ino: finding.where for finding in (await check(fs)).found}
    assert where.pop(tree.twice) in ("/twice", "/d/twice")
    assert where == {ino: "/d/e/new\\x0aline\\xff", tree.e: "/d/e"}


async def test_more_findings_than_one_batch_of_repairs(fs: Files) -> None:
    names = [b"%04d" % n for n in range(300)]
    for name in names:
        ino = await fs.make(name)
        cookie = (await entry_of(fs, ROOT, name)).cookie
        await delete(fs, keys.entry(fs.volume.id, ROOT, name), keys.listing(fs.volume.id, ROOT, cookie))
    heard = await check(fs, repair=True)
    assert heard.kinds.count(Kind.INODE_WITHOUT_ENTRY) == 300
    assert len(await lost_and_found(fs)) == 300
    await assert_clean(fs)
    assert ino


async def test_a_check_can_be_stopped_and_what_was_repaired_stays(tmp_path: Path) -> None:
    fs = await Files.create(new_engine("memory", tmp_path))
    for n in range(200):
        await put_inode(fs, await fs.make(b"%d" % n), nlink=9)
    stop = threading.Event()

    class Stopping(Heard):
        def finding(self, finding: Finding, repaired: bool) -> None:
            super().finding(finding, repaired)
            stop.set()

    heard = Stopping()
    with pytest.raises(run.Interrupted):
        await run.Check(fs.engine, fs.volume, heard, stop, repair=True).run(store=False)
    assert 0 < len(heard.found) < 200
    left = (await check(fs)).found
    assert len(left) == 200 - len(heard.found)
    assert {finding.ino for finding in left}.isdisjoint(finding.ino for finding in heard.found)


async def test_another_volume_of_the_engine_is_left_alone(fs: Files, tree: Tree) -> None:
    other = await Files.create(fs.engine, "other")
    await an_entry_gone(fs, tree)
    await assert_clean(other)
    await check(fs, repair=True)
    await assert_clean(other)
    assert await other.names() == []


def test_every_kind_of_key_is_known() -> None:
    table = keys.__doc__ or ""
    assert "".join(sorted(set(re.findall(r"^V '(.)'", table, re.MULTILINE)))).encode() == keys.KINDS


def test_every_kind_of_finding_is_planted() -> None:
    planted = {kind for _, kinds, _ in PLANTINGS.values() for kind in kinds}
    assert set(Kind) - planted == {Kind.MISSING_OBJECT, Kind.DAMAGED_OBJECT}


# Sorting


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**64 - 1))), st.integers(1, 7))
def test_sorting(records: list[tuple[int, int]], limit: int) -> None:
    with Sorter(2, limit) as sorter:
        for record in records:
            sorter.add(*record)
        assert list(sorter) == sorted(records)
        assert list(sorter) == sorted(records)
        groups = Groups(sorter)
        for number in range(1, 10, 2):
            assert groups.take(number) == sorted((rest,) for first, rest in records if first == number)
        assert groups.number is None


async def test_it_all_goes_through_files(fs: Files, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting.Sorter.__init__, "__defaults__", (2,))
    await assert_clean(fs)
    await an_entry_gone(fs, tree)
    await check(fs, repair=True)
    await assert_clean(fs)


# What is no damage


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_random_work_is_no_damage(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", 4096)
        patch.setattr(chunks, "_TIDY_AT", 4)
        patch.setattr(chunks, "_CHUNKS_SWEPT", 2)
        asyncio.run(_work_at_random(random.Random(seed)))


async def _work_at_random(dice: random.Random) -> None:
    fs = await Files.create(new_engine("memory", Path()))
    work = RandomWork(fs, dice)
    for _ in range(12):
        for _ in range(15):
            await work.step()
        heard = await check(fs)
        assert {finding.kind for finding in heard.found} <= {Kind.ORPHAN}, heard.found
    await _end_sessions(fs)
    await assert_clean(fs)
    await fs.check()
    await fs.engine.close()


class RandomWork:
    """Any verb on any of a few names and inodes, refused or not."""

    def __init__(self, fs: Files, dice: random.Random) -> None:
        self.fs = fs
        self.dice = dice
        self.inos = [ROOT]
        self.slices: list[int] = []

    async def step(self) -> None:
        request = getattr(self, self.dice.choice([name for name in dir(self) if name.startswith("do_")]))()
        try:
            reply = await self.fs.call(request, object)
        except Refused:
            return
        if isinstance(reply, wire.Changed):
            self.inos.append(reply.attributes[0].ino)
        elif isinstance(request, wire.NewSlices) and isinstance(reply, wire.SliceIds):
            self.slices += reply.ids

    @property
    def ino(self) -> int:
        return self.dice.choice(self.inos)

    @property
    def name(self) -> bytes:
        return self.dice.choice([b"a", b"b", b"c", b"d"])

    @property
    def span(self) -> tuple[int, int]:
        return self.dice.randrange(30_000), self.dice.randrange(1, 12_000)

    def do_make(self) -> wire.Request:
        mode = self.dice.choice([FILE, FILE, DIRECTORY, SYMLINK])
        return wire.MakeNode(self.ino, self.name, mode, 0, 0, target=b"target" if mode == SYMLINK else None)

    def do_make_more(self) -> wire.Request:
        return wire.MakeNode(ROOT, self.name, FILE, 0, 0)

    def do_temporary(self) -> wire.Request:
        return wire.MakeTemporary(self.ino, FILE, 0, 0)

    def do_link(self) -> wire.Request:
        return wire.Link(self.ino, self.ino, self.name)

    def do_remove(self) -> wire.Request:
        return wire.Remove(self.ino, self.name, self.dice.random() < 0.5)

    def do_rename(self) -> wire.Request:
        return wire.Rename(self.ino, self.name, self.ino, self.name, False, self.dice.random() < 0.3)

    def do_reap(self) -> wire.Request:
        return wire.Reap([self.ino, self.ino])

    def do_write(self) -> wire.Request:
        return wire.WriteInline(self.ino, self.dice.randrange(3000), b"data")

    def do_xattr(self) -> wire.Request:
        return wire.SetXattr(self.ino, b"user." + self.name, b"value")

    def do_no_xattr(self) -> wire.Request:
        return wire.RemoveXattr(self.ino, b"user." + self.name)

    def do_resize(self) -> wire.Request:
        return wire.SetAttributes(self.ino, size=self.dice.choice([0, 0, 5, 4096, *self.span]))

    def do_allocate(self) -> wire.Request:
        return wire.Allocate(self.ino, *self.span, self.dice.random() < 0.5, self.dice.random() < 0.7)

    def do_copy(self) -> wire.Request:
        return wire.CopyRange(self.ino, self.span[0], self.ino, *self.span)

    def do_slices(self) -> wire.Request:
        return wire.NewSlices(2)

    def do_commit(self) -> wire.Request:
        which = self.dice.choice(self.slices) if self.slices else 0
        return wire.CommitSlices(self.ino, [Slice(*self.span, which, 0)], 0, self.dice.random() < 0.2)

    def do_commit_more(self) -> wire.Request:
        return self.do_commit()

    def do_retire(self) -> wire.Request:
        return wire.RetireSlices(sorted(self.slices)[:2])

    def do_forget(self) -> wire.Request:
        return wire.ForgetSlices(self.slices[:2])


class CheckedNamespace(Namespace):
    """The model's random verbs: at no time is there more to be found than orphans."""

    @invariant()
    def nothing_is_found(self) -> None:
        heard = self.runner.run(check(self.fs))
        assert {finding.kind for finding in heard.found} <= {Kind.ORPHAN}, heard.found


TestCheckedNamespace = CheckedNamespace.TestCase
TestCheckedNamespace.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, derandomize=True, phases=PHASES
)


# Clearing up


async def test_clearing_up_after_a_metaserver(fs: Files, tree: Tree) -> None:
    await fs.change(wire.Remove(tree.d, b"big", False))
    await fs.change(wire.Remove(ROOT, b"fifo", False), session=b"another--session")
    told: list[int] = []
    counted = await fs.engine.read(lambda snapshot: gc.count(snapshot, fs.volume, told.append))
    assert counted == (2, chunks.CHUNK_BYTES + 10)
    await gc.clear_up(fs.engine, fs.volume, told.append)
    assert await fs.engine.read(lambda snapshot: gc.count(snapshot, fs.volume, told.append)) == (0, 0)
    assert told
    assert await fs.unused() == [tree.a, tree.b]
    await assert_clean(fs)


async def test_retiring(fs: Files, tree: Tree) -> None:
    """A slice that is retired cannot be committed; one that is in use is not retired."""
    asked = [0, tree.a, tree.b, tree.spare, 10**6]
    inspected = await fs.call(wire.InspectSlices(asked), wire.SlicesInspected)
    assert inspected == wire.SlicesInspected([tree.spare], [], [0, 10**6])
    assert (await fs.call(wire.RetireSlices(asked), wire.SliceIds)).ids == [tree.spare]
    await fs.refused(wire.ErrorCode.INVALID, wire.CommitSlices(tree.big, [Slice(0, 1, tree.spare, 0)], 0))
    assert await fs.call(wire.InspectSlices(asked), wire.SlicesInspected) == wire.SlicesInspected(
        [], [tree.spare], [0, 10**6]
    )
    assert (await fs.call(wire.RetireSlices([tree.spare]), wire.SliceIds)).ids == [tree.spare]
    far = [n * keys.BLOCK_SLICES for n in range(65)]
    await fs.refused(wire.ErrorCode.TOO_LARGE, wire.RetireSlices(far))
    await assert_clean(fs)


async def test_unused_slices_are_listed_from_anywhere(fs: Files) -> None:
    ids = await fs.slices(4096)
    wanted = [ids[0], ids[5], ids[100], ids[4094], ids[4095]]
    await fs.call(wire.RetireSlices(wanted), wire.SliceIds)
    for n, after in enumerate([0, *wanted]):
        assert (await fs.call(wire.ListSlices(4096, after), wire.SliceIds)).ids == wanted[n:]
    assert (await fs.call(wire.ListSlices(2, ids[5]), wire.SliceIds)).ids == [ids[100], ids[4094]]
    assert (await fs.call(wire.ListSlices(2, ids[6]), wire.SliceIds)).ids == [ids[100], ids[4094]]
