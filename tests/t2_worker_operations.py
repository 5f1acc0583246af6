"""The FUSE operations against a real metaserver: results, errno, what the maps hold afterwards, and handles."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import pytest_asyncio
from served import DEADLINE_S, until
from worker_rig import INLINE_LIMIT, ME, ROOT, Rig, dirents, fails, rigged, spied

from fuseclient.data.objects import StoreError
from fuseclient.worker import handles
from fuseclient.worker.directories import MISSES
from fuseclient.worker.rpc import Refused
from metaserver import wire

DIR = stat.S_IFDIR | 0o755


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as rig:
        yield rig


@pytest_asyncio.fixture(params=[True, False], ids=["maps", "no maps"])
async def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> AsyncIterator[Rig]:
    """With maps, and its twin without."""
    async with rigged(tmp_path, monkeypatch, maps=request.param) as rig:
        yield rig


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """The test provokes errors that are logged."""
    caplog.set_level(logging.CRITICAL, "fuseclient")


# Names


async def test_nodes_of_every_kind(both: Rig) -> None:
    made = await both.ops.mkdir(ROOT, b"dir", DIR, ME)
    assert made.st_mode == DIR
    assert made.st_nlink == 2
    fifo = await both.ops.mknod(made.st_ino, b"fifo", stat.S_IFIFO | 0o600, 0, ME)
    device = await both.ops.mknod(made.st_ino, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), ME)
    assert device.st_rdev == os.makedev(1, 3)
    link = await both.ops.symlink(made.st_ino, b"link", b"../fifo", ME)
    assert await both.ops.readlink(link.st_ino, ME) == b"../fifo"
    hard = await both.ops.link(fifo.st_ino, ROOT, b"hard", ME)
    assert hard.st_nlink == 2
    assert await both.listing(made.st_ino) == {
        b"fifo": fifo.st_ino,
        b"null": device.st_ino,
        b"link": link.st_ino,
    }
    assert await both.ino(b"hard") == fifo.st_ino
    assert await both.ino(b"none") == 0


async def test_removing_and_renaming(both: Rig) -> None:
    one, two = await both.create(b"one"), await both.create(b"two")
    await both.ops.mkdir(ROOT, b"dir", DIR, ME)
    with fails(errno.EISDIR):
        await both.ops.unlink(ROOT, b"dir", ME)
    with fails(errno.ENOTDIR):
        await both.ops.rmdir(ROOT, b"one", ME)
    with fails(errno.EEXIST):
        await both.ops.rename(ROOT, b"one", ROOT, b"two", pyfuse3.RENAME_NOREPLACE, ME)
    with fails(errno.EINVAL):
        await both.ops.rename(ROOT, b"one", ROOT, b"two", 4, ME)
    await both.ops.rename(ROOT, b"one", ROOT, b"two", pyfuse3.RENAME_EXCHANGE, ME)
    assert (await both.ino(b"one"), await both.ino(b"two")) == (two, one)
    await both.ops.rename(ROOT, b"one", ROOT, b"two", 0, ME)
    assert (await both.ino(b"one"), await both.ino(b"two")) == (0, two)
    parent = await both.ino(b"dir")
    await both.ops.rename(ROOT, b"two", parent, b"three", 0, ME)
    with fails(errno.ENOTEMPTY):
        await both.ops.rmdir(ROOT, b"dir", ME)
    await both.ops.unlink(parent, b"three", ME)
    await both.ops.rmdir(ROOT, b"dir", ME)
    with fails(errno.ENOENT):
        await both.ops.rmdir(ROOT, b"dir", ME)
    assert await both.listing() == {}
    await both.assert_maps_are_right()


async def test_two_names_of_one_inode_survive_a_rename(rig: Rig) -> None:
    ino = await rig.create(b"one")
    await rig.ops.link(ino, ROOT, b"two", ME)
    await rig.ops.rename(ROOT, b"one", ROOT, b"two", 0, ME)
    assert await rig.ino(b"one") == ino
    await rig.assert_maps_are_right()


@pytest.mark.parametrize(
    ("name", "number"), [(b"x" * 256, errno.ENAMETOOLONG), (b"a/b", errno.EINVAL), (b"..", errno.EINVAL)]
)
async def test_bad_names(rig: Rig, name: bytes, number: int) -> None:
    calls = [
        rig.ops.lookup(ROOT, name, ME),
        rig.ops.mkdir(ROOT, name, DIR, ME),
        rig.ops.create(ROOT, name, 0o644, os.O_RDWR, ME),
        rig.ops.symlink(ROOT, name, b"target", ME),
        rig.ops.link(ROOT, ROOT, name, ME),
        rig.ops.unlink(ROOT, name, ME),
        rig.ops.rename(ROOT, b"x", ROOT, name, 0, ME),
    ]
    for call in calls:
        with fails(number):
            await call
    assert await rig.ino(b"x" * 255) == 0


async def test_creating_what_another_client_has_made(rig: Rig) -> None:
    assert await rig.ino(b"file") == 0
    made = await rig.other.make(b"file")
    with fails(errno.EEXIST):
        await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR | os.O_EXCL, ME)
    with fails(errno.ESTALE):
        await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    assert (ROOT, b"file") not in rig.maps.names
    assert await rig.ino(b"file") == made.ino


async def test_what_another_removes_between_a_lookup_and_its_open_is_opened(rig: Rig) -> None:
    made = await rig.other.make(b"file")
    assert await rig.ino(b"file") == made.ino
    await rig.other.change(wire.Remove(ROOT, b"file", False))
    opened = await rig.ops.open(made.ino, os.O_RDONLY, ME)
    assert made.ino in rig.ops._orphans
    await rig.ops.release(opened.fh)
    await until(lambda: made.ino not in rig.ops._orphans)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
async def test_who_asks_again_for_what_another_has_made_is_answered_if_he_owns_it(rig: Rig, flags: int) -> None:
    """The kernel looks again once only, and checks no permissions where it is told that a file was made."""
    made = await rig.other.make(b"file")
    for uid in (made.uid + 1, made.uid):
        asker: Any = SimpleNamespace(uid=uid, gid=0, pid=1000 + uid, umask=0o022)
        with fails(errno.ESTALE):
            await rig.ops.create(ROOT, b"file", 0o644, flags, asker)
        if uid != made.uid:
            with fails(errno.ESTALE):
                await rig.ops.create(ROOT, b"file", 0o644, flags, asker)
    opened, entry = await rig.ops.create(ROOT, b"file", 0o644, flags, asker)
    assert (entry.st_ino, entry.entry_timeout, entry.attr_timeout) == (made.ino, 0, 0)
    await rig.ops.release(opened.fh)
    await rig.other.change(wire.SetAttributes(made.ino, mode=0o044))
    for _ in range(2):
        with fails(errno.ESTALE):
            await rig.ops.create(ROOT, b"file", 0o644, flags, asker)


# Directories and the maps


async def test_the_first_miss_fetches_the_directory(rig: Rig) -> None:
    inos = [await rig.other.make(b"%03d" % index) for index in range(100)]
    await rig.other.change(wire.WriteInline(inos[7].ino, 0, b"seven"))
    log = spied(rig)
    assert await rig.ino(b"050") == inos[50].ino
    await until(lambda: len(rig.maps.names) == 100)
    assert [type(each) for each in log] == [wire.FetchDirectory]
    assert rig.maps.data[inos[7].ino] == b"seven"
    assert await rig.ino(b"absent") == 0
    assert rig.maps.names[ROOT, b"absent"] == 0
    assert len(log) == 1, "the whole directory is known"
    await rig.assert_maps_are_right()


async def test_an_absent_name_is_known_from_the_whole_directory(rig: Rig) -> None:
    await rig.other.make(b"file")
    log = spied(rig)
    assert await rig.ino(b"absent") == 0
    assert rig.maps.names[ROOT, b"absent"] == 0
    assert len(log) == 1


async def test_misses_at_once_share_one_fetch(rig: Rig) -> None:
    for index in range(50):
        await rig.other.make(b"%d" % index)
    log = spied(rig)
    found = await asyncio.gather(*(rig.ino(b"%d" % index) for index in range(60)))
    assert [type(each) for each in log] == [wire.FetchDirectory]
    assert [ino > 0 for ino in found] == [True] * 50 + [False] * 10


async def test_a_directory_whose_names_were_evicted_is_fetched_again(rig: Rig) -> None:
    for index in range(40):
        await rig.other.make(b"%d" % index)
    await rig.ino(b"0")
    log = spied(rig)
    for index in range(MISSES):
        assert await rig.ino(b"%d" % index)
    assert [type(each) for each in log] == [wire.Lookup] * MISSES
    assert await rig.ino(b"30")
    assert isinstance(log[-1], wire.FetchDirectory)


async def test_misses_of_absent_names_do_not_fetch_again(rig: Rig) -> None:
    await rig.other.make(b"file")
    await rig.ino(b"file")
    log = spied(rig)
    for index in range(2 * MISSES):
        assert await rig.ino(b"absent %d" % index) == 0
    assert log == []
    rig.ops._feeder.whole.clear()
    for index in range(2 * MISSES):
        assert await rig.ino(b"unknown %d" % index) == 0
    assert {type(each) for each in log} == {wire.Lookup}


async def test_without_maps_each_lookup_asks_the_metaserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rigged(tmp_path, monkeypatch, maps=False) as rig:
        made = await rig.other.make(b"file")
        log = spied(rig)
        for _ in range(3):
            assert await rig.ino(b"file") == made.ino
        assert [type(each) for each in log] == [wire.Lookup] * 3


@pytest.mark.parametrize("at_once", [1, 7, 1000])
async def test_listing(both: Rig, at_once: int) -> None:
    made = {b"%03d" % index: (await both.other.make(b"%03d" % index)).ino for index in range(30)}
    log = spied(both)
    assert await both.listing(at_once=at_once) == made
    if both.remembers:
        assert len(log) == 1
        await both.assert_maps_are_right()


async def test_a_listing_goes_on_while_entries_come_and_go(both: Rig) -> None:
    names = [b"%03d" % index for index in range(30)]
    for name in names:
        await both.create(name)
    fh = await both.ops.opendir(ROOT, ME)
    seen, start = [], 0
    while entries := await both.readdir(fh, start, 5):
        seen += [name for name, _, _ in entries]
        start = entries[-1][2]
        await both.ops.unlink(ROOT, names[len(seen) // 2], ME)
    assert len(seen) == len(set(seen))
    assert set(names[25:]) <= set(seen)
    await both.assert_maps_are_right()


async def test_a_listing_ends_though_each_entry_it_tells_of_is_renamed(both: Rig) -> None:
    for index in range(12):
        await both.create(b"%03d" % index)
    fh = await both.ops.opendir(ROOT, ME)
    seen, start = [], 0
    while entries := await both.readdir(fh, start, 1):
        ((name, _, start),) = entries
        seen.append(name)
        assert len(seen) < 100, "the listing does not end"
        if not name.startswith(b"."):
            await both.ops.rename(ROOT, name, ROOT, b"new" + name, 0, ME)
    assert len(seen) == 2 + 12
    assert sorted(await both.listing()) == [b"new%03d" % index for index in range(12)]
    await both.assert_maps_are_right()


async def test_large_directories_are_fetched_by_windows(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.ops._directories, "_window", 10)
    made = {b"%03d" % index: (await rig.other.make(b"%03d" % index)).ino for index in range(35)}
    assert await rig.ino(b"030") == made[b"030"]
    await until(lambda: (ROOT, b"034") in rig.maps.names)
    assert (ROOT, b"029") not in rig.maps.names
    assert await rig.ino(b"nothing") == 0
    log = spied(rig)
    assert await rig.listing(at_once=3) == made
    assert [type(each) for each in log] == [wire.FetchDirectory] * 4
    assert [name for name, _ in dirents(rig.maps.listings[ROOT])] == [b".", b"..", *made]
    await rig.assert_maps_are_right()


@pytest.mark.parametrize("changer", ["here", "elsewhere"])
async def test_a_listing_is_put_whole_and_goes_with_a_name(rig: Rig, changer: str) -> None:
    await rig.other.make(b"one")
    await rig.listing()
    assert [name for name, _ in dirents(rig.maps.listings[ROOT])] == [b".", b"..", b"one"]
    await rig.ops.getattr(ROOT, ME)
    assert ROOT in rig.maps.listings
    if changer == "here":
        await rig.create(b"two")
    else:
        await rig.other.make(b"two")
        assert {("entry", ROOT, b"two"), ("inode", ROOT)} <= set(rig.kernel.log)
    assert ROOT not in rig.maps.listings
    assert set(await rig.listing()) == {b"one", b"two"}
    assert ROOT in rig.maps.listings
    await rig.assert_maps_are_right()


async def test_no_listing_of_what_changes_while_it_is_fetched(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name comes between two windows: no listing is made of the two."""
    monkeypatch.setattr(rig.ops._directories, "_window", 10)
    for index in range(15):
        await rig.other.make(b"%03d" % index)
    fh = await rig.ops.opendir(ROOT, ME)
    first = await rig.readdir(fh, 0, 10)
    await rig.create(b"new")
    start = first[-1][2]
    while entries := await rig.readdir(fh, start, 10):
        start = entries[-1][2]
    assert ROOT not in rig.maps.listings


async def test_directories_that_the_kernel_listed_are_dropped_with_the_session(quiet: None, rig: Rig) -> None:
    made = await rig.ops.mkdir(ROOT, b"dir", DIR, ME)
    await rig.readdir(await rig.ops.opendir(made.st_ino, ME), 0, 10)
    rig.kernel.log.clear()
    assert rig.mount._changes is not None
    rig.mount._changes.lost()
    await rig.mount._changes.settle()
    assert ("epoch",) in rig.kernel.log
    assert ("inode", made.st_ino) in rig.kernel.log


async def test_a_removed_directory(both: Rig) -> None:
    made = await both.ops.mkdir(ROOT, b"dir", DIR, ME)
    fh = await both.ops.opendir(made.st_ino, ME)
    await both.ops.rmdir(ROOT, b"dir", ME)
    assert [name for name, _, _ in await both.readdir(fh, 0, 10)] == [b".", b".."]
    with fails(errno.ENOENT):
        await both.ops.mkdir(made.st_ino, b"x", DIR, ME)


async def test_what_changes_while_it_is_fetched_does_not_enter_the_maps(rig: Rig) -> None:
    """The fetch's reply is made before the change, and comes after the change is through."""
    ino = await rig.create(b"file", b"old")
    held = asyncio.Event()
    original = rig.session.stream

    async def slow(request: wire.FetchDirectory) -> AsyncIterator[wire.DirectoryPage]:
        pages = [page async for page in original(request)]
        await held.wait()
        for page in pages:
            yield page

    rig.session.stream = slow
    rig.maps.bump_epoch()
    lookup = asyncio.create_task(rig.ino(b"file"))
    await until(lambda: rig.ops._directories._fetches)
    await rig.set_attributes(ino, mode=0o600)
    await rig.create(b"another")
    await rig.ops.unlink(ROOT, b"another", ME)
    held.set()
    assert await lookup == ino
    await until(lambda: not rig.ops._directories._fetches)
    await rig.assert_maps_are_right()
    assert rig.maps.names[ROOT, b"another"] == 0
    assert stat.S_IMODE(rig.maps.inodes[ino].mode) == 0o600


# Files


async def test_small_and_large_files(both: Rig) -> None:
    small, large = os.urandom(1000), os.urandom(5 * 1024 * 1024 + 77)
    first, second = await both.create(b"small", small), await both.create(b"large", large)
    assert await both.content(first) == small
    assert await both.content(second) == large
    assert (await both.other.attributes(second)).size == len(large)
    assert not (await both.other.attributes(second)).flags & wire.InodeFlag.INLINE
    await both.assert_maps_are_right()


async def test_a_file_is_in_the_maps_when_its_last_writer_has_closed(rig: Rig) -> None:
    info, made = await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    assert rig.maps.names[ROOT, b"file"] == made.st_ino
    second = await rig.ops.open(made.st_ino, os.O_WRONLY, ME)
    await rig.ops.write(info.fh, 0, b"content")
    assert (await rig.ops.getattr(made.st_ino, ME)).st_size == 7
    assert (await rig.ops.lookup(ROOT, b"file", ME)).st_size == 7
    await rig.close(info.fh)
    assert made.st_ino not in rig.maps.inodes
    await rig.close(second.fh)
    assert rig.maps.inodes[made.st_ino].size == 7
    assert rig.maps.data[made.st_ino] == b"content"
    await rig.ops.open(made.st_ino, os.O_RDWR, ME)
    assert made.st_ino not in rig.maps.inodes


async def test_a_read_puts_a_small_file_into_the_maps(rig: Rig) -> None:
    ino = await rig.create(b"file", b"content")
    rig.maps.bump_epoch()
    assert await rig.content(ino) == b"content"
    assert rig.maps.data[ino] == b"content"
    writer = await rig.ops.open(ino, os.O_WRONLY, ME)
    assert await rig.content(ino) == b"content"
    assert ino not in rig.maps.data
    await rig.close(writer.fh)


async def test_truncation(both: Rig) -> None:
    ino = await both.create(b"file", os.urandom(INLINE_LIMIT * 3))
    info = await both.ops.open(ino, os.O_RDWR, ME)
    await both.ops.write(info.fh, 0, b"head")
    assert (await both.set_attributes(ino, size=2)).st_size == 2
    await both.ops.write(info.fh, 4, b"tail")
    assert (await both.set_attributes(ino, size=10)).st_size == 10
    await both.close(info.fh)
    assert await both.content(ino) == b"he\0\0tail\0\0"
    info = await both.ops.open(ino, os.O_WRONLY | os.O_TRUNC, ME)
    await both.close(info.fh)
    assert await both.content(ino) == b""
    await both.assert_maps_are_right()


async def test_times_set_after_a_write_are_not_changed_by_its_flush(both: Rig) -> None:
    info, made = await both.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    await both.ops.write(info.fh, 0, b"data")
    await both.set_attributes(made.st_ino, mtime_ns=123, atime_ns=-1)
    await both.close(info.fh)
    attributes = await both.ops.getattr(made.st_ino, ME)
    assert (attributes.st_mtime_ns, attributes.st_atime_ns, attributes.st_size) == (123, -1, 4)


async def test_attributes(both: Rig) -> None:
    ino = await both.create(b"file")
    changed = await both.set_attributes(ino, mode=0o4755, uid=12, gid=34)
    assert (changed.st_mode, changed.st_uid, changed.st_gid) == (stat.S_IFREG | 0o4755, 12, 34)
    far = 2**40 * 10**9
    assert (await both.set_attributes(ino, mtime_ns=far)).st_mtime_ns == 2**63 - 1
    with fails(errno.ESTALE):
        await both.ops.getattr(ino + 1000, ME)
    with fails(errno.EFBIG):
        await both.set_attributes(ino, size=2**62)


async def test_replies_hold_no_longer_than_the_lease(rig: Rig) -> None:
    entry = await rig.ops.lookup(ROOT, b"absent", ME)
    assert 25 < entry.entry_timeout <= 30
    entry = await rig.ops.getattr(ROOT, ME)
    assert 25 < entry.attr_timeout <= 30
    assert rig.maps.deadline_ns == rig.session.deadline_ns
    rig.ops._lease.move(0)
    assert (await rig.ops.getattr(ROOT, ME)).attr_timeout == 0


async def test_pages_stay_only_if_the_file_is_unchanged(rig: Rig) -> None:
    ino = (await rig.other.make(b"file")).ino
    assert not (await rig.ops.open(ino, os.O_RDONLY, ME)).keep_cache
    assert (await rig.ops.open(ino, os.O_RDONLY, ME)).keep_cache
    await rig.other.change(wire.WriteInline(ino, 0, b"new"))
    assert not (await rig.ops.open(ino, os.O_RDONLY, ME)).keep_cache


async def test_errors_of_a_store_reach_fsync(quiet: None, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    info, _ = await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)

    async def broken(*_: Any) -> None:
        raise StoreError("no store")

    with monkeypatch.context() as patch:
        patch.setattr(rig.mount._store, "put", broken)
        await rig.ops.write(info.fh, 0, b"x" * INLINE_LIMIT * 2)
        with fails(errno.EIO):
            await rig.ops.fsync(info.fh, False)
    await rig.ops.fsync(info.fh, False)
    await rig.close(info.fh)


async def test_statistics(rig: Rig) -> None:
    figures = await rig.ops.statfs(ME)
    assert figures.f_bsize == 4096
    assert figures.f_namemax == 255
    assert 0 < figures.f_bfree <= figures.f_blocks
    assert rig.maps.statfs["blocks"] == figures.f_blocks
    assert rig.maps.statfs["valid_until_ns"] <= rig.maps.deadline_ns


# Extended attributes


async def test_extended_attributes(both: Rig) -> None:
    ino = await both.create(b"file")
    with fails(errno.ENODATA):
        await both.ops.getxattr(ino, b"user.none", ME)
    await both.ops.setxattr(ino, b"user.one", b"1", ME)
    await both.ops.setxattr(ino, b"user.two", b"", ME)
    assert await both.ops.getxattr(ino, b"user.one", ME) == b"1"
    assert sorted(await both.ops.listxattr(ino, ME)) == [b"user.one", b"user.two"]
    await both.ops.removexattr(ino, b"user.one", ME)
    with fails(errno.ENODATA):
        await both.ops.removexattr(ino, b"user.one", ME)
    with fails(errno.EOPNOTSUPP):
        await both.ops.setxattr(ino, b"system.posix_acl_access", b"", ME)
    with fails(errno.EOPNOTSUPP):
        await both.ops.setxattr(ino, b"other.name", b"", ME)
    with fails(errno.ENOSPC):
        await both.ops.setxattr(ino, b"user.big", bytes(wire.MAX_XATTR_VALUE + 1), ME)
    await both.assert_maps_are_right()


async def test_a_label_is_kept_and_one_that_is_not_there_is_unsupported(both: Rig) -> None:
    """ls and cp ask for no other's then, and who copies trees with labels loses none."""
    label = b"security.selinux"
    info, made = await both.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    with fails(errno.EOPNOTSUPP):
        await both.ops.getxattr(made.st_ino, label, ME)
    await both.close(info.fh)
    with fails(errno.EOPNOTSUPP):
        await both.ops.getxattr(made.st_ino, label, ME)
    with fails(errno.ENODATA):
        await both.ops.removexattr(made.st_ino, label, ME)
    await both.ops.setxattr(made.st_ino, b"security.other", b"1", ME)
    with fails(errno.EOPNOTSUPP):
        await both.ops.getxattr(made.st_ino, label, ME)
    await both.ops.setxattr(made.st_ino, label, b"label", ME)
    assert await both.ops.getxattr(made.st_ino, label, ME) == b"label"
    assert sorted(await both.ops.listxattr(made.st_ino, ME)) == [b"security.other", label]


async def test_writes_do_not_ask_for_capabilities(rig: Rig) -> None:
    info, made = await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    log = spied(rig)
    with fails(errno.ENODATA):
        await rig.ops.getxattr(made.st_ino, b"security.capability", ME)
    assert log == []
    await rig.ops.setxattr(made.st_ino, b"security.capability", b"caps", ME)
    assert await rig.ops.getxattr(made.st_ino, b"security.capability", ME) == b"caps"
    await rig.close(info.fh)


# Handles and orphans


def test_handles_say_what_they_are() -> None:
    fh = handles.encode(2**48 - 1, writing=True, generation=1030)
    assert fh < 1 << 63
    assert handles.decode(fh) == handles.Handle(2**48 - 1, True, 1030 % handles.GENERATIONS, False)
    assert handles.decode(1 << 63 | 12) == handles.Handle(12, False, 0, True)


async def test_handles_of_the_bpf_program_are_served(rig: Rig) -> None:
    ino = await rig.create(b"file", b"content")
    rig.maps.opens = {ino: 2, ROOT: 1}
    fh = 1 << 63 | ino
    assert await rig.ops.read(fh, 3, 100) == b"tent"
    await rig.ops.flush(fh)
    await rig.ops.fsync(fh, False)
    await rig.ops.release(fh)
    assert [name for name, _, _ in await rig.readdir(1 << 63 | ROOT, 0, 10)] == [b".", b"..", b"file"]
    await rig.ops.releasedir(1 << 63 | ROOT)
    assert rig.maps.opens == {ino: 1, ROOT: 0}


async def test_handles_of_an_earlier_worker_go_on(rig: Rig) -> None:
    ino = await rig.create(b"file", b"content")
    reading = handles.encode(ino, writing=False, generation=0)
    writing = handles.encode(ino, writing=True, generation=0)
    assert await rig.ops.read(reading, 0, 100) == b"content"
    await rig.ops.flush(reading)
    await rig.ops.write(writing, 0, b"C")
    assert ino not in rig.maps.inodes
    with fails(errno.EIO):
        await rig.ops.fsync(writing, False)
    assert await rig.content(ino) == b"Content"
    await rig.ops.write(writing, 1, b"O")
    await rig.ops.flush(writing)
    await rig.ops.release(writing)
    await rig.ops.release(reading)
    assert rig.maps.inodes[ino].size == 7
    assert await rig.content(ino) == b"COntent"
    await rig.assert_maps_are_right()


async def gone(rig: Rig, ino: int) -> bool:
    try:
        await rig.other.attributes(ino)
    except Exception:
        return True
    return False


async def wait_gone(rig: Rig, ino: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await gone(rig, ino):  # noqa: ASYNC110 - the metaserver tells nobody
            await asyncio.sleep(0.01)


async def test_an_unlinked_file_lives_until_it_is_forgotten_and_closed(rig: Rig) -> None:
    ino = await rig.create(b"file", b"content")
    info = await rig.ops.open(ino, os.O_RDWR, ME)
    await rig.ops.unlink(ROOT, b"file", ME)
    assert (await rig.ops.getattr(ino, ME)).st_nlink == 0
    await rig.ops.write(info.fh, 7, b" more")
    assert await rig.content(ino) == b"content more"
    await rig.ops.forget([(ino, 1)])
    assert ino in rig.ops._orphans
    await rig.close(info.fh)
    await wait_gone(rig, ino)
    assert ino not in rig.ops._orphans


async def test_a_handle_of_bpf_keeps_an_orphan(rig: Rig) -> None:
    ino = await rig.create(b"file", b"content")
    rig.maps.opens = {ino: 1}
    await rig.ops.unlink(ROOT, b"file", ME)
    await rig.ops.forget([(ino, 1)])
    await rig.renew()
    assert await rig.content(ino) == b"content"
    rig.maps.opens = {}
    await rig.renew()
    await wait_gone(rig, ino)


async def test_a_replaced_file_is_reaped_and_files_with_links_are_not(rig: Rig) -> None:
    old, new = await rig.create(b"old"), await rig.create(b"new")
    await rig.ops.rename(ROOT, b"new", ROOT, b"old", 0, ME)
    await rig.ops.forget([(old, 1), (new, 1)])
    await wait_gone(rig, old)
    assert not await gone(rig, new)


async def test_many_orphans_are_reaped_at_once(rig: Rig) -> None:
    inos = [await rig.create(b"%d" % index) for index in range(64)]
    for index in range(64):
        await rig.ops.unlink(ROOT, b"%d" % index, ME)
    log = spied(rig)
    await rig.ops.forget([(ino, 1) for ino in inos])
    await until(lambda: log)
    assert [type(each) for each in log] == [wire.Reap]


# Files open for writing


async def test_opening_for_writing_takes_one_request_and_closing_tells_in_passing(rig: Rig) -> None:
    log = spied(rig)
    info, entry = await rig.ops.create(ROOT, b"file", stat.S_IFREG | 0o644, os.O_CREAT | os.O_RDWR, ME)
    await rig.close(info.fh)
    assert [type(each) for each in log if not isinstance(each, wire.Sync)] == [wire.MakeNode]
    ino = entry.st_ino
    log.clear()
    infos = [await rig.ops.open(ino, os.O_RDWR, ME) for _ in range(2)]
    assert log == [wire.OpenFile(ino, True)] * 2
    for each in infos:
        assert await keeps(rig, ino) is False
        await rig.close(each.fh)
    await until(lambda: keeps(rig, ino))


async def keeps(rig: Rig, ino: int) -> bool:
    """Say whether the other client may keep what it is told of an inode."""
    told: list[wire.Break] = []

    def note(each: wire.Break) -> None:
        told.append(each)
        rig.other.connection.acknowledge(each.number)

    rig.other.connection.on_break(note)
    await rig.other.attributes(ino)
    return not any(ino in each.written for each in told)


async def test_what_another_writes_is_asked_for_each_time_and_kept_when_it_is_closed(rig: Rig) -> None:
    ino = await rig.create(b"file", b"old")
    await rig.other.connection.call(wire.OpenFile(ino, True), wire.Found)
    log = spied(rig)
    for size in (4, 5, 6):
        await rig.other.change(wire.WriteInline(ino, 0, b"x" * size))
        assert (await rig.ops.getattr(ino, ME)).st_size == size
        assert ino not in rig.maps.inodes
        assert await rig.content(ino) == b"x" * size
        assert ino not in rig.maps.inodes
    await rig.other.connection.call(wire.ClosedForWriting([ino]), wire.Done)
    assert len(log) > 6
    await rig.ops.getattr(ino, ME)
    assert (ino in rig.maps.inodes) == rig.remembers


@pytest.mark.parametrize("size", [10, INLINE_LIMIT - 5, 2 * INLINE_LIMIT])
async def test_what_was_gathered_to_append_goes_behind_what_another_appended(rig: Rig, size: int) -> None:
    """Inline, out of there by the other's bytes, and in slices."""
    ino = await rig.create(b"file", b"begin")
    info = await rig.ops.open(ino, os.O_WRONLY | os.O_APPEND, ME)
    assert info.direct_io
    await rig.ops.write(info.fh | handles.APPENDS, 0, b"x" * size)
    await rig.ops.write(info.fh | handles.APPENDS, 0, b"y")
    await rig.other.change(wire.WriteInline(ino, 5, b"other", appended_at=5))
    await rig.ops.fsync(info.fh, False)
    assert (await rig.ops.getattr(ino, ME)).st_size == 11 + size
    await rig.ops.write(info.fh, 0, b"B")
    await rig.close(info.fh)
    assert await rig.content(ino) == b"Beginother" + b"x" * size + b"y"


async def test_attributes_of_a_new_file_wait_while_this_client_is_alone(rig: Rig) -> None:
    rig.session.alone = True
    log = spied(rig)
    info, entry = await rig.ops.create(ROOT, b"file", stat.S_IFREG | 0o644, os.O_CREAT | os.O_RDWR, ME)
    await rig.set_attributes(entry.st_ino, mode=0o600)
    await rig.ops.write(info.fh, 0, b"data")
    await rig.set_attributes(entry.st_ino, mtime_ns=5)
    assert not [each for each in log if isinstance(each, wire.SetAttributes)]
    shown = await rig.ops.getattr(entry.st_ino, ME)
    assert (shown.st_mode & 0o777, shown.st_mtime_ns, shown.st_size) == (0o600, 5, 4)
    acknowledged: list[object] = []
    rig.session._told(rig.session._connection, asyncio.Event(), wire.Break(0, [], [], joined=True))
    told = wire.Break(1, [], [], joined=True)
    assert rig.mount._changes is not None
    rig.mount._changes.broken(told, acknowledged.append)
    await until(lambda: acknowledged)
    found = await rig.other.attributes(entry.st_ino)
    assert (found.mode & 0o777, found.mtime_ns) == (0o600, 5)
    log.clear()
    await rig.set_attributes(entry.st_ino, mode=0o640)
    assert [each.mode for each in log if isinstance(each, wire.SetAttributes)] == [0o640]
    assert (await rig.other.attributes(entry.st_ino)).mode & 0o777 == 0o640
    await rig.close(info.fh)
    assert (await rig.other.attributes(entry.st_ino)).mtime_ns == 5


async def test_a_session_that_is_resumed_tells_what_is_open(rig: Rig) -> None:
    info, entry = await rig.ops.create(ROOT, b"file", stat.S_IFREG | 0o644, os.O_CREAT | os.O_RDWR, ME)
    (session,) = [each for each in rig.metaserver.server.sessions.all() if each.id == rig.session.id]
    session.writing.clear()
    rig.session._connection.abort()
    await until(lambda: session.writing == {entry.st_ino})
    await rig.close(info.fh)
    await until(lambda: not session.writing)


# Changes made elsewhere


async def test_a_change_of_another_leaves_every_cache_before_it_is_made(rig: Rig) -> None:
    ino = await rig.create(b"file", b"old")
    await rig.ops.lookup(ROOT, b"file", ME)
    rig.kernel.gate = asyncio.Event()
    change = asyncio.create_task(rig.other.change(wire.Remove(ROOT, b"file", False)))
    await until(lambda: ino not in rig.maps.inodes)
    assert (ROOT, b"file") not in rig.maps.names
    assert (await rig.ops.lookup(ROOT, b"file", ME)).entry_timeout == 0, "it is there yet, and must not be kept"
    assert not change.done()
    rig.kernel.gate.set()
    await change
    assert {("entry", ROOT, b"file"), ("inode", ino), ("inode", ROOT)} <= set(rig.kernel.log)
    assert await rig.ino(b"file") == 0
    await rig.assert_maps_are_right()


async def test_a_name_that_cannot_be_dropped_is_expired_with_all_others(rig: Rig) -> None:
    await rig.create(b"file", b"old")
    stuck = asyncio.Event()

    async def wait(*_: Any) -> None:
        await stuck.wait()

    rig.kernel.invalidate_entry = wait  # type: ignore[method-assign, assignment]
    await rig.other.change(wire.Remove(ROOT, b"file", False))
    assert ("epoch",) in rig.kernel.log
    stuck.set()


@pytest.mark.parametrize(("code", "expired"), [(wire.ErrorCode.INTERNAL, True), (wire.ErrorCode.EXISTS, False)])
async def test_what_a_change_of_unknown_outcome_was_to_change_is_asked_for_again(
    quiet: None, rig: Rig, monkeypatch: pytest.MonkeyPatch, code: wire.ErrorCode, expired: bool
) -> None:
    await rig.ino(b"file")

    async def refuse(request: wire.Request, reply_type: type[wire.Reply]) -> wire.Reply:
        raise Refused(code, "it may have been made")

    monkeypatch.setattr(rig.session, "call", refuse)
    with pytest.raises(pyfuse3.FUSEError):
        await rig.ops.mkdir(ROOT, b"file", 0o755, ME)
    assert (("epoch",) in rig.kernel.log) is expired
    assert (("attributes", ROOT) in rig.kernel.log) is expired


async def test_two_mounts_that_change_one_directory_do_not_wait_for_each_other(rig: Rig) -> None:
    """The kernel holds the directory's lock during our change, and theirs waits for what waits for that lock."""
    await rig.listing()
    lock = asyncio.Lock()

    async def wait(*_: Any) -> None:
        async with lock:
            pass

    async def ours(number: int) -> None:
        async with lock:
            await rig.ops.mkdir(ROOT, b"ours%d" % number, DIR, ME)

    rig.kernel.invalidate_entry = wait  # type: ignore[method-assign, assignment]
    for number in range(20):
        await asyncio.gather(ours(number), rig.other.make(b"theirs%d" % number))
    await rig.assert_maps_are_right()


async def test_when_everything_may_have_changed_all_pages_are_dropped(rig: Rig) -> None:
    ino = await rig.create(b"file", b"old")
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    epoch = rig.maps.epoch
    rig.mount._changes.apply(wire.Renewed(30_000, 1, [], [], True))  # type: ignore[union-attr]
    assert rig.maps.deadline_ns == 0
    await rig.renew()
    assert rig.maps.epoch == epoch + 1
    assert rig.kernel.log[0] == ("epoch",)
    assert ("inode", ino) in rig.kernel.log
    assert ("inode", directory) not in rig.kernel.log
    assert rig.maps.deadline_ns == rig.session.deadline_ns
    await rig.assert_maps_are_right()


async def test_a_kernel_that_fails_to_drop_gets_no_new_deadline(
    quiet: None, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await rig.other.make(b"file")
    deadline_ns = rig.maps.deadline_ns

    async def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(rig.kernel, "invalidate_entry", broken)
        rig.mount._changes.apply(wire.Renewed(30_000, 1, [(ROOT, b"file")], [made.ino], False))  # type: ignore[union-attr]
        await rig.renew()
        assert rig.maps.deadline_ns == deadline_ns
    await rig.renew()
    assert ("entry", ROOT, b"file") in rig.kernel.log
    assert ("inode", made.ino) in rig.kernel.log
    assert rig.maps.deadline_ns > deadline_ns


async def test_a_reply_that_others_overtook_says_nothing_of_xattrs_either(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to a change of a file that is written here comes after another has given it an xattr."""
    info, made = await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    await rig.ops.write(info.fh, 0, b"content")
    call, overtaken = rig.session.call, False

    async def late(request: wire.Request, reply_type: Any) -> Any:
        nonlocal overtaken
        reply = await call(request, reply_type)
        if isinstance(request, wire.WriteInline) and not overtaken:
            overtaken = True
            await rig.other.change(wire.SetXattr(made.st_ino, b"user.x", b"value"))
        return reply

    monkeypatch.setattr(rig.session, "call", late)
    await rig.ops.fsync(info.fh, False)
    assert overtaken
    assert made.st_ino not in rig.maps.written, "it is not known to have no xattrs"
    await rig.close(info.fh)


async def test_a_file_that_others_changed_while_it_is_written(rig: Rig) -> None:
    info, made = await rig.ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    await rig.other.change(wire.WriteInline(made.st_ino, 0, b"theirs"))
    await rig.ops.write(info.fh, 6, b" ours")
    await rig.renew()
    await rig.close(info.fh)
    assert await rig.content(made.st_ino) == b"theirs ours"
    await rig.assert_maps_are_right()


@pytest.mark.parametrize("verb", ["rename", "unlink", "link"])
async def test_links_of_a_new_file_that_is_committed_meanwhile(
    both: Rig, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A commit of its content is told of between the change of its names and the reply to that."""
    ops, call = both.ops, both.session.call
    await both.create(b"other")
    info, made = await ops.create(ROOT, b"file", 0o644, os.O_RDWR, ME)
    await ops.write(info.fh, 0, b"x" * 2 * INLINE_LIMIT)

    async def after_a_commit(request: wire.Request, reply_type: Any) -> Any:
        if isinstance(request, wire.Rename | wire.Remove | wire.Link):
            await ops._writer.publish(made.st_ino)
        return await call(request, reply_type)

    monkeypatch.setattr(both.session, "call", after_a_commit)
    if verb == "rename":
        await ops.rename(ROOT, b"other", ROOT, b"file", 0, ME)
    elif verb == "unlink":
        await ops.unlink(ROOT, b"file", ME)
    else:
        await ops.link(made.st_ino, ROOT, b"second", ME)
    assert (await ops.getattr(made.st_ino, ME)).st_nlink == (2 if verb == "link" else 0)
    await ops.release(info.fh)


async def test_a_lost_session_drops_everything(quiet: None, rig: Rig) -> None:
    await rig.create(b"file", b"content")
    session = rig.metaserver.server.sessions
    for each in list(session._sessions.values()):
        if each.id == rig.mount.session_id:
            session.end(each)
    rig.metaserver.drop_connections()
    rig.session.renew_now()
    await until(lambda: ("epoch",) in rig.kernel.log)
    assert (await rig.ops.lookup(ROOT, b"file", ME)).st_size == 7


# Everything at once


async def test_random_operations_at_once_leave_the_maps_right(rig: Rig) -> None:
    for seed in range(12):
        await _storm(rig, random.Random(seed))
        await until(lambda: not rig.ops._directories._fetches)
        await rig.assert_maps_are_right()


async def _storm(rig: Rig, chance: random.Random) -> None:
    directories = [ROOT]
    names = [b"a", b"b", b"c", b"d", b"dir"]

    async def step() -> None:
        parent, name = chance.choice(directories), chance.choice(names)
        try:
            await chance.choice((look, make, enter, remove, move, write, change, listing))(parent, name)
        except pyfuse3.FUSEError as error:
            if error.errno == errno.EIO:
                raise

    async def look(parent: int, name: bytes) -> None:
        await rig.ops.lookup(parent, name, ME)

    async def make(parent: int, name: bytes) -> None:
        await rig.create(name, chance.randbytes(chance.choice((0, 10, INLINE_LIMIT * 2))), parent)

    async def enter(parent: int, name: bytes) -> None:
        directories.append((await rig.ops.mkdir(parent, name, DIR, ME)).st_ino)

    async def remove(parent: int, name: bytes) -> None:
        await (rig.ops.rmdir if chance.random() < 0.3 else rig.ops.unlink)(parent, name, ME)

    async def move(parent: int, name: bytes) -> None:
        flags = chance.choice((0, 0, pyfuse3.RENAME_EXCHANGE, pyfuse3.RENAME_NOREPLACE))
        await rig.ops.rename(parent, name, chance.choice(directories), chance.choice(names), flags, ME)

    async def write(parent: int, name: bytes) -> None:
        if ino := await rig.ino(name, parent):
            info = await rig.ops.open(ino, os.O_RDWR, ME)
            try:
                await rig.ops.write(info.fh, chance.randrange(5000), chance.randbytes(20))
            finally:
                await rig.close(info.fh)

    async def change(parent: int, name: bytes) -> None:
        if ino := await rig.ino(name, parent):
            await rig.set_attributes(ino, mode=chance.choice((0o600, 0o644)))

    async def listing(parent: int, name: bytes) -> None:
        await rig.listing(parent)

    for _ in range(15):
        await asyncio.gather(*(step() for _ in range(6)))
        if chance.random() < 0.4:
            rig.maps.bump_epoch()
            rig.ops._directories.forget_everything()
