"""Files that a client makes by itself, and tells of later: what the metaserver is asked, and that nobody notices."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pyfuse3
import pytest
import pytest_asyncio
from served import until
from worker_rig import INLINE_LIMIT, ME, ROOT, Rig, fails, joined, rigged, watched

from fuseclient.data.grants import NO_GRANT
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

FILE = stat.S_IFREG | 0o644
DIR = stat.S_IFDIR | 0o755
#: When what is posted here was written: later than anything is made, and in time for an int64 of nanoseconds.
NOW = 4 * 10**18
QUIET = (wire.ClosedForWriting, wire.ReserveInodes, wire.InspectSlices, wire.ListSlices)


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as rig:
        await begun(rig)
        yield rig


@pytest_asyncio.fixture(params=[True, False], ids=["maps", "no maps"])
async def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> AsyncIterator[Rig]:
    """With maps, and its twin without, which holds nothing back."""
    async with rigged(tmp_path, monkeypatch, maps=request.param) as rig:
        await begun(rig)
        yield rig


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "fuseclient")


async def begun(rig: Rig) -> None:
    """The client believes that it is alone, knows the root, and has numbers."""
    rig.session.alone = True
    await rig.ops.lookup(ROOT, b"none", ME)
    await rig.create(b"first")
    if rig.remembers:
        await until(lambda: rig.mount._creations._numbers)


def lazily(rig: Rig) -> None:
    """The metaserver acknowledges before it is durable."""
    rig.session.opened = msgspec.structs.replace(rig.session.opened, lazy=True)


async def begin(rig: Rig, name: bytes = b"file", parent: int = ROOT) -> tuple[int, int]:
    """Make a file and leave it open; return its handle and inode."""
    info, entry = await rig.ops.create(parent, name, FILE, os.O_CREAT | os.O_EXCL | os.O_RDWR, ME)
    return info.fh, entry.st_ino


async def known(rig: Rig, name: bytes, parent: int = ROOT) -> int:
    """Return what a name stands for to others; 0: nothing."""
    try:
        return (await rig.other.connection.call(wire.Lookup(parent, name), wire.Found)).attributes.ino
    except Refused:
        return 0


async def test_a_file_takes_one_request(both: Rig) -> None:
    log = watched(both, QUIET)
    fh, ino = await begin(both)
    await both.set_attributes(ino, mode=0o600)
    await both.ops.write(fh, 0, b"data")
    await both.set_attributes(ino, mtime_ns=5, uid=7)
    shown = await both.ops.getattr(ino, ME)
    assert (await both.ops.lookup(ROOT, b"file", ME)).st_ino == ino
    if both.remembers:
        assert log == []
        assert await known(both, b"file") == 0
    await both.ops.flush(fh)
    if both.remembers:
        assert [type(each) for each in log] == [wire.MakeFiles]
    found = await both.other.attributes(ino)
    assert (found.mode, found.uid, found.size, found.mtime_ns) == (stat.S_IFREG | 0o600, 7, 4, 5)
    assert (shown.st_mode, shown.st_uid, shown.st_size, shown.st_mtime_ns) == (found.mode, 7, 4, 5)
    assert shown.st_ctime_ns == found.ctime_ns
    await both.ops.release(fh)
    assert await both.content(ino) == b"data"
    await both.assert_maps_are_right()


@pytest.mark.parametrize("size", [0, 1, INLINE_LIMIT, INLINE_LIMIT + 1, 5 * 1024 * 1024])
async def test_files_of_each_size(rig: Rig, size: int) -> None:
    fh, ino = await begin(rig)
    data = os.urandom(size)
    for at in range(0, size, 1 << 20):
        await rig.ops.write(fh, at, data[at : at + (1 << 20)])
    await rig.set_attributes(ino, mtime_ns=5)
    await rig.close(fh)
    found = await rig.other.attributes(ino)
    assert (found.size, found.mtime_ns) == (size, 5)
    assert await rig.content(ino) == data


async def test_another_client_is_let_in_when_all_is_told(rig: Rig) -> None:
    fh, ino = await begin(rig)
    await rig.ops.write(fh, 0, b"da")
    await joined(rig)
    assert await known(rig, b"file") == ino
    assert (await rig.other.attributes(ino)).size == 2
    log = watched(rig, QUIET)
    await rig.ops.write(fh, 2, b"ta")
    await rig.close(fh)
    assert await rig.content(ino) == b"data"
    await rig.create(b"after")
    assert wire.MakeNode in map(type, log)
    assert wire.MakeFiles not in map(type, log)


async def test_what_depends_on_a_new_file_finds_it(both: Rig) -> None:
    """Each of these comes to an open file that nobody was told of, in a directory of its own."""

    async def made(name: bytes) -> tuple[int, int]:
        directory = (await both.ops.mkdir(ROOT, name, DIR, ME)).st_ino
        fh, ino = await begin(both, parent=directory)
        await both.ops.write(fh, 0, b"data")
        handles.append(fh)
        return directory, ino

    handles: list[int] = []
    directory, ino = await made(b"rename")
    await both.ops.rename(directory, b"file", ROOT, b"moved", 0, ME)
    assert await known(both, b"moved") == ino
    directory, ino = await made(b"link")
    await both.ops.link(ino, directory, b"other", ME)
    assert (await both.other.attributes(ino)).nlink == 2
    directory, ino = await made(b"unlink")
    await both.ops.unlink(directory, b"file", ME)
    assert await both.ino(b"file", directory) == 0
    directory, ino = await made(b"list")
    assert await both.listing(directory) == {b"file": ino}
    directory, ino = await made(b"rmdir")
    with fails(errno.ENOTEMPTY):
        await both.ops.rmdir(ROOT, b"rmdir", ME)
    directory, ino = await made(b"over")
    await both.ops.mkdir(ROOT, b"empty", DIR, ME)
    with fails(errno.ENOTEMPTY):
        await both.ops.rename(ROOT, b"empty", ROOT, b"over", 0, ME)
    directory, ino = await made(b"again")
    with fails(errno.EEXIST):
        await both.ops.mkdir(directory, b"file", DIR, ME)
    with fails(errno.EEXIST):
        await begin(both, parent=directory)
    directory, ino = await made(b"xattr")
    await both.ops.setxattr(ino, b"user.a", b"value", ME)
    assert await both.ops.getxattr(ino, b"user.a", ME) == b"value"
    directory, ino = await made(b"read")
    assert await both.content(ino) == b"data"
    directory, ino = await made(b"cut")
    await both.set_attributes(ino, size=2)
    assert await both.content(ino) == b"da"
    directory, ino = await made(b"times")
    await both.set_attributes(directory, mtime_ns=5)
    for fh in handles:
        await both.close(fh)
    assert (await both.other.attributes(directory)).mtime_ns == 5
    await both.assert_maps_are_right()


async def test_a_directory_is_as_old_as_its_newest_file(both: Rig) -> None:
    before = (await both.ops.getattr(ROOT, ME)).st_mtime_ns
    fh, _ = await begin(both)
    shown = await both.ops.getattr(ROOT, ME)
    assert shown.st_mtime_ns > before
    await both.close(fh)
    found = await both.other.attributes(ROOT)
    assert (found.mtime_ns, found.ctime_ns) == (shown.st_mtime_ns, shown.st_ctime_ns)


async def test_the_maps_know_a_directory_while_files_in_it_are_held_back(rig: Rig) -> None:
    """Its times never go back, whichever of its files is told of first; nobody is asked for them."""
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    log = watched(rig, QUIET)
    shown = [rig.maps.inodes[directory]]
    handles = []
    for number in range(3):
        handles.append(await begin(rig, b"f%d" % number, directory))
        shown.append(rig.maps.inodes[directory])
    assert log == []
    for fh, _ in handles:
        await rig.ops.flush(fh)
        shown.append(rig.maps.inodes[directory])
    assert [type(each) for each in log] == [wire.MakeFiles] * 3
    times = [(each.mtime_ns, each.ctime_ns) for each in shown]
    assert times == sorted(times)
    assert len(set(times)) == 4
    found = await rig.other.attributes(directory)
    assert times[-1] == (found.mtime_ns, found.ctime_ns)
    assert (shown[1].mode, shown[1].nlink, shown[1].uid) == (found.mode, found.nlink, found.uid)
    for fh, _ in handles:
        await rig.ops.release(fh)
    await rig.assert_maps_are_right()


async def test_the_maps_forget_a_directory_whose_files_may_have_been_told_of(rig: Rig, quiet: None) -> None:
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    fh, _ = await begin(rig, b"file", directory)
    assert directory in rig.maps.inodes
    call = rig.session.call

    async def lost(request: wire.Request, reply_type: Any) -> Any:
        if isinstance(request, wire.MakeFiles):
            raise Disconnected("nothing was heard")
        return await call(request, reply_type)

    rig.session.call = lost
    with fails(errno.EIO):
        await rig.ops.flush(fh)
    assert directory not in rig.maps.inodes
    rig.session.call = call
    await rig.close(fh)
    await rig.assert_maps_are_right()


async def test_a_setgid_directory_gives_its_group(both: Rig) -> None:
    directory = (await both.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    await both.set_attributes(directory, mode=0o2775, gid=77)
    fh, ino = await begin(both, parent=directory)
    assert (await both.ops.getattr(ino, ME)).st_gid == 77
    await both.close(fh)
    assert (await both.other.attributes(ino)).gid == 77


async def test_closed_files_gather_if_the_metaserver_is_lazy(rig: Rig) -> None:
    lazily(rig)
    log = watched(rig, QUIET)
    made = {}
    for number in range(3 * wire.MAX_NEW_FILES):
        fh, ino = await begin(rig, b"f%d" % number)
        await rig.ops.write(fh, 0, b"content %d" % number)
        assert rig.ops.flush_now(fh)
        assert rig.ops.release_now(fh)
        made[b"f%d" % number] = ino
        assert (await rig.ops.lookup(ROOT, b"f%d" % number, ME)).st_ino == ino
        assert (await rig.ops.getattr(ino, ME)).st_size == len(b"content %d" % number)
    await rig.ops.fsyncdir(0, False)
    assert [type(each) for each in log] == [*[wire.MakeFiles] * 3, wire.Sync]
    assert {name: await known(rig, name) for name in made} == made
    for number in range(0, len(made), 10):
        assert await rig.content(made[b"f%d" % number]) == b"content %d" % number
    await rig.assert_maps_are_right()


async def test_a_closed_file_is_told_of_before_what_depends_on_it(rig: Rig) -> None:
    lazily(rig)
    ino = await rig.create(b"a", b"data")
    assert await known(rig, b"a") == 0
    assert await rig.content(ino) == b"data"
    assert await known(rig, b"a") == ino
    ino = await rig.create(b"b", b"data")
    await rig.ops.rename(ROOT, b"b", ROOT, b"a", 0, ME)
    assert await known(rig, b"a") == ino
    ino = await rig.create(b"d", b"data")
    await joined(rig)
    assert await known(rig, b"d") == ino
    rig.session.alone = True
    ino = await rig.create(b"e", b"data")
    async with asyncio.timeout(5):
        while await known(rig, b"e") != ino:  # noqa: ASYNC110 - by itself, in a moment
            await asyncio.sleep(0.02)


async def test_a_closed_file_is_changed_and_renamed_without_a_word(rig: Rig) -> None:
    """As rsync and pip do with what they have written."""
    lazily(rig)
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    await rig.create(b"other", b"data", directory)
    log = watched(rig, QUIET)
    ino = await rig.create(b".file", b"data", directory)
    made = await rig.ops.getattr(ino, ME)
    await rig.set_attributes(ino, atime_ns=4, mtime_ns=5)
    await rig.set_attributes(ino, mode=0o4640)
    await rig.set_attributes(ino, uid=6, gid=7)
    before = await rig.ops.getattr(directory, ME)
    await rig.ops.rename(directory, b".file", directory, b"file", 1, ME)
    assert not [each for each in log if not isinstance(each, wire.GetAttributes)]
    assert await rig.ino(b".file", directory) == 0
    assert await rig.ino(b"file", directory) == ino
    told = await rig.ops.getattr(ino, ME)
    assert (told.st_mode, told.st_uid, told.st_gid) == (stat.S_IFREG | 0o4640, 6, 7)
    assert (told.st_size, told.st_atime_ns, told.st_mtime_ns) == (4, 4, 5)
    assert told.st_ctime_ns > made.st_ctime_ns
    names = await rig.ops.getattr(directory, ME)
    assert names.st_mtime_ns > before.st_mtime_ns
    second = await rig.create(b".file", b"another", directory)
    await joined(rig)
    assert [await known(rig, name, directory) for name in (b"file", b".file")] == [ino, second]
    found = await rig.other.attributes(ino)
    assert (found.mode, found.uid, found.gid, found.size) == (told.st_mode, 6, 7, 4)
    assert (found.atime_ns, found.mtime_ns, found.ctime_ns) == (4, 5, told.st_ctime_ns)
    assert (await rig.other.attributes(directory)).mtime_ns >= names.st_mtime_ns
    assert await rig.content(ino) == b"data"
    assert await rig.content(second) == b"another"
    await rig.assert_maps_are_right()


@pytest.mark.parametrize("change", ["mode", "name"])
async def test_a_closed_file_that_is_on_its_way_is_changed_there(rig: Rig, quiet: None, change: str) -> None:
    """Whether or not the metaserver has said that it has it."""
    lazily(rig)
    call, heard = rig.session.call, asyncio.Event()

    async def deaf(request: wire.Request, reply_type: Any) -> Any:
        reply = await call(request, reply_type)
        if isinstance(request, wire.MakeFiles):
            rig.session.call = call
            await heard.wait()
            raise Disconnected("the session was lost while a change was under way")
        return reply

    async def changed() -> None:
        if change == "mode":
            await rig.set_attributes(ino, mode=0o604)
        else:
            await rig.ops.rename(ROOT, b"file", ROOT, b"new", 0, ME)

    rig.session.call = deaf
    ino = await rig.create(b"file", b"data")
    rig.mount._creations._start()
    await until(lambda: rig.session.call is call)
    changing = asyncio.create_task(changed())
    await asyncio.sleep(0)
    heard.set()
    with fails(errno.EIO):
        await changing
    rig.mount._creations._failing = None  # as if another had been made since
    await changed()
    if change == "mode":
        assert (await rig.other.attributes(ino)).mode & 0o777 == 0o604
    else:
        assert (await known(rig, b"file"), await known(rig, b"new")) == (0, ino)
    assert await rig.content(ino) == b"data"
    await rig.assert_maps_are_right()


async def test_a_name_that_another_took_meanwhile(rig: Rig, quiet: None) -> None:
    """The session was lost, and with it the right to keep anything back."""
    fh, ino = await begin(rig)
    taken = (await rig.other.change(wire.MakeNode(ROOT, b"file", FILE, 0, 0))).attributes[0].ino
    with pytest.raises(pyfuse3.FUSEError):
        await rig.ops.flush(fh)
    await rig.ops.release(fh)
    assert await known(rig, b"file") == taken
    assert await rig.ino(b"file") == taken
    assert ino not in rig.mount._creations
    lazily(rig)
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    await rig.create(b"closed", b"data", directory)
    kept = await rig.create(b"kept", b"data", directory)
    await rig.other.change(wire.MakeNode(directory, b"closed", FILE, 0, 0))
    with fails(errno.EIO):
        await rig.ops.fsyncdir(0, False)
    assert await known(rig, b"kept", directory) == kept, "the others are not concerned"
    await rig.ops.fsyncdir(0, False)


async def test_a_commit_of_which_nothing_was_heard_is_not_made_twice(rig: Rig, quiet: None) -> None:
    fh, ino = await begin(rig)
    await rig.ops.write(fh, 0, b"da")
    call = rig.session.call

    async def deaf(request: wire.Request, reply_type: Any) -> Any:
        reply = await call(request, reply_type)
        if isinstance(request, wire.MakeFiles):
            rig.session.call = call
            raise Disconnected("the session was lost while a change was under way")
        return reply

    rig.session.call = deaf
    with fails(errno.EIO):
        await rig.ops.flush(fh)
    await rig.ops.write(fh, 2, b"ta")
    await rig.close(fh)
    assert await known(rig, b"file") == ino
    assert await rig.content(ino) == b"data"


async def test_a_file_that_cannot_be_made_is_reported_and_gone(rig: Rig, quiet: None) -> None:
    call = rig.session.call

    async def full(request: wire.Request, reply_type: Any) -> Any:
        if isinstance(request, wire.MakeFiles):
            raise Refused(wire.ErrorCode.NO_SPACE, "the engine is full")
        return await call(request, reply_type)

    rig.session.call = full
    fh, _ = await begin(rig)
    with fails(errno.ENOSPC):
        await rig.ops.flush(fh)
    await rig.ops.release(fh)
    assert await rig.ino(b"file") == 0
    lazily(rig)
    directory = (await rig.ops.mkdir(ROOT, b"dir", DIR, ME)).st_ino
    await rig.create(b"closed", b"data", directory)
    with fails(errno.ENOSPC):
        await rig.ops.fsyncdir(0, False)
    log = watched(rig, QUIET)
    fh, _ = await begin(rig, b"next", directory)
    assert wire.MakeNode in map(type, log), "nothing more is held back"
    rig.session.call = call
    await rig.ops.fsyncdir(0, False)
    assert await known(rig, b"closed", directory)
    await rig.close(fh)


async def closed_ahead(rig: Rig, name: bytes, data: bytes) -> tuple[int, int]:
    """Make a file that the channel has answered the closing of, with what was posted to it still on its way."""
    fh, ino = await begin(rig, name)
    assert rig.ops.grant(fh).closes == INLINE_LIMIT

    async def withdraw(_: int) -> None:
        rig.mount._writer.hooks.withdraw = nothing
        rig.ops.take_posted(fh, 0, memoryview(data), NOW)

    async def nothing(_: int) -> None:
        pass

    rig.mount._writer.hooks.withdraw = withdraw
    return fh, ino


async def test_what_was_closed_ahead_is_taken_before_anybody_is_told_of_the_file(rig: Rig) -> None:
    lazily(rig)
    fh, ino = await closed_ahead(rig, b"a", b"renamed")
    await rig.ops.rename(ROOT, b"a", ROOT, b"b", 0, ME)
    assert (await rig.other.attributes(ino)).size == len(b"renamed")
    assert rig.ops.grant(fh).closes == 0, "it is not held back any more"
    await rig.ops.release(fh)
    fh, ino = await closed_ahead(rig, b"c", b"joined")
    await joined(rig)
    assert (await rig.other.attributes(ino)).size == len(b"joined")
    await rig.ops.release(fh)
    assert await rig.content(ino) == b"joined"
    await rig.assert_maps_are_right()


async def changed_ahead(rig: Rig, name: bytes) -> tuple[int, int]:
    """Make a file that the channel has answered a change of, which comes when what was granted is taken back."""
    begun = rig.ops.create_now(ROOT, name, FILE, os.O_CREAT | os.O_EXCL | os.O_RDWR, ME)
    assert begun is not None
    assert begun.grant.changes
    ino = begun.entry.st_ino

    async def withdraw(_: int) -> None:
        rig.mount._writer.hooks.withdraw = nothing
        rig.ops.take_change(wire.SetAttributes(ino, mode=0o604, changed_ns=NOW))

    async def nothing(_: int) -> None:
        pass

    rig.mount._writer.hooks.withdraw = withdraw
    return begun.opened.fh, ino


@pytest.mark.parametrize("how", ["rename", "join", "look", "wait"])
async def test_what_was_changed_ahead_is_taken_before_anybody_is_told_of_the_file(rig: Rig, how: str) -> None:
    fh, ino = await changed_ahead(rig, b"a")
    if how == "rename":
        await rig.ops.rename(ROOT, b"a", ROOT, b"b", 0, ME)
    elif how == "join":
        await joined(rig)
    elif how == "look":
        await rig.ops.listxattr(ino, ME)
    else:
        rig.mount._writer._committer._grown_old(rig.mount._writer._files[ino])
        await until(lambda: ino not in rig.mount._creations)
    found = await rig.other.attributes(ino)
    assert found.mode & 0o777 == 0o604
    assert how == "rename" or found.ctime_ns == NOW
    assert not rig.ops.grant(fh, changes=True).changes, "others may know of it"
    with pytest.raises(RuntimeError, match="others may know"):
        rig.ops.take_change(wire.SetAttributes(ino, mode=0o600, changed_ns=NOW))
    await rig.close(fh)
    await rig.assert_maps_are_right()


async def test_nothing_is_taken_back_for_a_flush_that_has_ended_it(rig: Rig) -> None:
    fh, ino = await changed_ahead(rig, b"a")
    rig.ops.take_change(wire.SetAttributes(ino, mode=0o640, changed_ns=NOW))
    rig.ops.syncs(ino)
    await rig.close(fh)
    assert (await rig.other.attributes(ino)).mode & 0o777 == 0o640
    await rig.assert_maps_are_right()


async def test_what_may_be_closed_ahead(rig: Rig) -> None:
    """It cannot fail any more: the file is small, and nobody waits for it to be made."""
    fh, ino = await begin(rig)
    assert rig.ops.grant(fh).closes == 0, "closing makes it durable"
    lazily(rig)
    assert rig.ops.grant(fh).closes == INLINE_LIMIT
    await rig.ops.write(fh, INLINE_LIMIT, b"x")
    assert rig.ops.grant(fh).closes == 0
    assert rig.ops.grant(fh).credit
    rig.mount.locks._inos[ino] += 1
    assert rig.ops.grant(fh) == NO_GRANT
    rig.mount.locks._inos.clear()
    await rig.close(fh)


async def test_a_file_that_was_closed_ahead_is_made_whatever_stands_in_the_way(rig: Rig, quiet: None) -> None:
    lazily(rig)
    fh, ino = await begin(rig)
    assert rig.ops.grant(fh).closes
    call, full = rig.session.call, True

    async def refuse(request: wire.Request, reply_type: Any) -> Any:
        if isinstance(request, wire.MakeFiles) and full:
            raise Refused(wire.ErrorCode.NO_SPACE, "the engine is full")
        return await call(request, reply_type)

    rig.session.call = refuse
    rig.ops.take_posted(fh, 0, memoryview(b"data"), NOW)
    with fails(errno.ENOSPC):
        await rig.ops.rename(ROOT, b"file", ROOT, b"other", 0, ME)
    await rig.ops.release(fh)
    full = False
    await rig.ops.rename(ROOT, b"file", ROOT, b"other", 0, ME)
    assert await known(rig, b"other") == ino
    assert await rig.content(ino) == b"data"


async def test_a_break_waits_until_the_kernel_knows_a_file_that_was_just_made(rig: Rig) -> None:
    """The reply with attributes that the kernel is to keep may still be on its way: it must not come after."""
    _, made = await begin(rig)
    knows, asked = False, 0

    async def invalidate(ino: int) -> bool:
        nonlocal asked
        asked += ino == made
        return knows

    rig.mount._kernel._kernel.invalidate_attributes = invalidate  # type: ignore[method-assign]
    acknowledged: list[object] = []
    assert rig.mount._changes is not None
    rig.mount._changes.broken(wire.Break(1, [], [made]), acknowledged.append)
    await until(lambda: asked > 3)
    assert not acknowledged
    knows = True
    await until(lambda: acknowledged)


async def test_a_file_that_stays_open_is_told_of(rig: Rig) -> None:
    rig.mount._writer._committer._flush_age_s = 0.01
    fh, ino = await begin(rig)
    async with asyncio.timeout(5):
        while await known(rig, b"file") != ino:  # noqa: ASYNC110 - by itself, in a moment
            await asyncio.sleep(0.02)
    await rig.close(fh)
