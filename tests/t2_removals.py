"""Names that a client removes by itself, and tells of later: what the metaserver is asked, and that nobody notices."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from served import until
from worker_rig import ME, ROOT, Rig, fails, joined, rigged, watched

from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

DIR = stat.S_IFDIR | 0o755
QUIET = (wire.ClosedForWriting, wire.ReserveInodes, wire.InspectSlices, wire.ListSlices, wire.Reap)


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as rig:
        begun(rig)
        yield rig


@pytest_asyncio.fixture(params=[True, False], ids=["maps", "no maps"])
async def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> AsyncIterator[Rig]:
    """With maps, and its twin without, which holds nothing back."""
    async with rigged(tmp_path, monkeypatch, maps=request.param) as rig:
        begun(rig)
        yield rig


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "fuseclient")


def begun(rig: Rig) -> None:
    """The client believes that it is alone, and that the metaserver is lazy."""
    rig.session.alone = True
    rig.session.opened = msgspec.structs.replace(rig.session.opened, lazy=True)


async def filled(rig: Rig, *names: bytes) -> tuple[int, list[int]]:
    """Make a directory with files, of which everybody knows; return it and them."""
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    inos = [await rig.create(name, b"data", directory) for name in names]
    await rig.ops.fsyncdir(0, False)
    return directory, inos


async def others_see(rig: Rig, directory: int) -> set[bytes]:
    """Return what others see in a directory."""
    pages = rig.other.connection.stream(wire.FetchDirectory(directory, 0, 100, 0, 0))
    return {entry.name async for page in pages for entry in page.entries}


async def test_names_are_removed_many_at_a_time(both: Rig) -> None:
    names = [b"%d" % number for number in range(2 * wire.MAX_REMOVED)]
    directory, _ = await filled(both, *names, b"kept")
    before = await both.ops.getattr(directory, ME)
    log = watched(both, QUIET)
    for name in names:
        await both.ops.unlink(directory, name, ME)
    after = await both.ops.getattr(directory, ME)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert await others_see(both, directory) == {b"kept"}
    if both.remembers:
        requests = [len(each.names) for each in log if isinstance(each, wire.RemoveNames)]
        assert sum(requests) == len(names)
        assert len(requests) <= 4
    for name in names:
        assert await both.ino(name, directory) == 0
    with fails(errno.ENOENT):
        await both.ops.unlink(directory, names[0], ME)
    found = await both.other.attributes(directory)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (found.mtime_ns, found.ctime_ns)
    await both.assert_maps_are_right()


async def test_nobody_is_told_until_it_matters(rig: Rig) -> None:
    directory, _ = await filled(rig, b"a", b"b")
    log = watched(rig, QUIET)
    await rig.ops.unlink(directory, b"a", ME)
    shown = rig.maps.inodes[directory]
    assert log == []
    assert await others_see(rig, directory) == {b"a", b"b"}
    await until(lambda: log)
    await until(lambda: not rig.mount._removals._held)
    assert await others_see(rig, directory) == {b"b"}, "by itself, in a moment"
    found = await rig.other.attributes(directory)
    assert (shown.mtime_ns, shown.ctime_ns) == (found.mtime_ns, found.ctime_ns)
    await rig.assert_maps_are_right()


async def test_what_others_would_see_is_told_before_they_are_let_in(rig: Rig) -> None:
    directory, _ = await filled(rig, b"a", b"b")
    await rig.ops.unlink(directory, b"a", ME)
    await joined(rig)
    assert await others_see(rig, directory) == {b"b"}
    log = watched(rig, QUIET)
    await rig.ops.unlink(directory, b"b", ME)
    assert [type(each) for each in log] == [wire.Remove]


async def test_whatever_is_asked_for_comes_after(both: Rig) -> None:
    names = [b"link", b"list", b"stat", b"rmdir", b"again", b"over", b"sync", b"read", b"xattr", b"mknod"]
    directory, inos = await filled(both, *names)
    ino = dict(zip(names, inos, strict=True))
    info = await both.ops.open(ino[b"read"], os.O_RDONLY, ME)
    await both.ops.link(ino[b"link"], directory, b"second", ME)
    await both.ops.unlink(directory, b"link", ME)
    shown = await both.ops.getattr(ino[b"link"], ME)
    assert shown.st_nlink == 1
    assert shown.st_ctime_ns == (await both.other.attributes(ino[b"link"])).ctime_ns
    await both.ops.unlink(directory, b"list", ME)
    assert b"list" not in await both.listing(directory)
    await both.ops.unlink(directory, b"stat", ME)
    assert await both.ino(b"stat", directory) == 0
    await both.ops.unlink(directory, b"read", ME)
    assert (await both.ops.getattr(ino[b"read"], ME)).st_nlink == 0
    assert await both.ops.read(info.fh, 0, 10) == b"data"
    await both.ops.release(info.fh)
    await both.ops.unlink(directory, b"again", ME)
    new = await both.create(b"again", b"new", directory)
    assert await both.ino(b"again", directory) == new
    assert await both.content(new) == b"new"
    await both.ops.unlink(directory, b"again", ME)
    await both.ops.unlink(directory, b"over", ME)
    await both.ops.rename(directory, b"second", directory, b"over", 0, ME)
    await both.ops.unlink(directory, b"mknod", ME)
    await both.ops.mknod(directory, b"mknod", stat.S_IFIFO | 0o600, 0, ME)
    await both.ops.unlink(directory, b"mknod", ME)
    for name in (b"over", b"sync", b"xattr"):
        await both.ops.unlink(directory, name, ME)
    with fails(errno.ENOTEMPTY):
        await both.ops.rmdir(ROOT, b"dir", ME)
    await both.ops.unlink(directory, b"rmdir", ME)
    await both.ops.rmdir(ROOT, b"dir", ME)
    assert await others_see(both, ROOT) == set()
    await both.assert_maps_are_right()


async def test_a_sync_makes_it_durable(rig: Rig) -> None:
    directory, _ = await filled(rig, b"a")
    log = watched(rig, QUIET)
    await rig.ops.unlink(directory, b"a", ME)
    await rig.ops.fsyncdir(0, False)
    assert [type(each) for each in log] == [wire.RemoveNames, wire.Sync]


async def test_what_is_removed_is_deleted_when_the_kernel_has_forgotten_it(rig: Rig) -> None:
    """It may forget it before the metaserver knows that it is removed; what has another name lives on."""
    directory, (one, two, three) = await filled(rig, b"1", b"2", b"3")
    await rig.ops.link(two, directory, b"second", ME)
    for name in (b"1", b"2", b"3"):
        await rig.ops.unlink(directory, name, ME)
    await rig.ops.forget([(one, 1), (two, 1), (three, 1)])

    async def is_there(ino: int) -> bool:
        try:
            await rig.other.attributes(ino)
        except Refused:
            return False
        return True

    await until(lambda: not rig.mount._removals._held)
    await rig.mount.operations._orphans._reap(set(rig.mount.operations._orphans._due))
    assert [await is_there(ino) for ino in (one, two, three)] == [False, True, False]
    assert two not in rig.mount.operations._orphans


async def test_what_is_not_held_back(rig: Rig) -> None:
    """A file that is open for writing; one that nobody was told of; names of a directory that is not known whole."""
    directory, (ino, _) = await filled(rig, b"written", b"unknown")
    await rig.ops.lookup(ROOT, b"none", ME)
    info = await rig.ops.open(ino, os.O_RDWR, ME)
    log = watched(rig, QUIET)
    await rig.ops.unlink(directory, b"written", ME)
    rig.mount.operations._feeder.whole.forget(directory)
    await rig.ops.unlink(directory, b"unknown", ME)
    assert [type(each) for each in log] == [wire.Remove, wire.Remove]
    await rig.ops.write(info.fh, 0, b"more")
    await rig.close(info.fh)
    rig.session.opened = msgspec.structs.replace(rig.session.opened, lazy=False)
    await rig.create(b"durable")
    log.clear()
    await rig.ops.unlink(ROOT, b"durable", ME)
    assert [type(each) for each in log] == [wire.Remove]


async def test_a_removal_of_which_nothing_was_heard_is_tried_again(rig: Rig, quiet: None) -> None:
    directory, _ = await filled(rig, b"a", b"b", b"c")
    call, deaf = rig.session.call, True

    async def lost(request: wire.Request, reply_type: Any) -> Any:
        if isinstance(request, wire.RemoveNames) and deaf:
            raise Disconnected("nothing was heard")
        return await call(request, reply_type)

    rig.session.call = lost
    await rig.ops.unlink(directory, b"a", ME)
    with fails(errno.EIO):
        await rig.ops.fsyncdir(0, False)
    with fails(errno.EIO):
        await rig.ops.unlink(directory, b"b", ME)
    deaf = False
    await rig.ops.fsyncdir(0, False)
    assert await others_see(rig, directory) == {b"b", b"c"}
    assert rig.mount._removals.figures() == {"names": 1, "requests": 1, "held": 0}
    assert rig.mount._removals._failing is None


async def test_names_of_a_session_that_has_ended_are_there_again(rig: Rig, quiet: None) -> None:
    """Others may have seen them since. Whoever syncs is told, once."""
    directory, inos = await filled(rig, b"a", b"b")
    await rig.ops.fsyncdir(0, False)
    await rig.ops.unlink(directory, b"a", ME)
    old = wire.RemoveNames(list(rig.mount._removals._held.values()))
    rig.session._on_lost()
    with pytest.raises(Refused):
        rig.session._check_change(old)
    assert await others_see(rig, directory) == {b"a", b"b"}
    assert await rig.ino(b"a", directory) == inos[0]
    assert inos[0] not in rig.mount.operations._orphans
    with fails(errno.EIO):
        await rig.ops.fsyncdir(0, False)
    await rig.ops.fsyncdir(0, False)


async def test_a_name_that_another_replaced_is_left_alone(rig: Rig, quiet: None) -> None:
    """It cannot be while this client has its session, but is not relied upon; the others are removed."""
    directory, _ = await filled(rig, b"a", b"b", b"c")
    for name in (b"a", b"b", b"c"):
        await rig.ops.unlink(directory, name, ME)
    await rig.other.change(wire.Remove(directory, b"b", False))
    new = (await rig.other.change(wire.MakeNode(directory, b"b", stat.S_IFREG | 0o644, 0, 0))).attributes[0].ino
    with fails(errno.EIO):
        await rig.ops.fsyncdir(0, False)
    assert await others_see(rig, directory) == {b"b"}
    assert await rig.ino(b"b", directory) == new
    await rig.ops.fsyncdir(0, False)


async def test_an_unmount_tells_what_is_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rigged(tmp_path, monkeypatch) as rig:
        begun(rig)
        directory, _ = await filled(rig, b"a")
        await rig.ops.unlink(directory, b"a", ME)
        await rig.mount.close()
        assert await others_see(rig, directory) == set()
