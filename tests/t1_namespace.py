"""Every verb of the namespace and every refusal, on each engine; what is stored is checked after each test."""

from __future__ import annotations

import asyncio
import stat

import pytest
from namespaces import DIRECTORY, FILE, INLINE_LIMIT, ROOT, SESSION, SYMLINK, Files

from metaserver import namespace, wire
from metaserver.errors import Refused
from metaserver.wire import ErrorCode, InodeFlag

OTHER = b"another session!"
BAD_NAMES = {
    b".": ErrorCode.INVALID,
    b"..": ErrorCode.INVALID,
    b"": ErrorCode.INVALID,
    b"a/b": ErrorCode.INVALID,
    b"a\0b": ErrorCode.INVALID,
    b"n" * 256: ErrorCode.NAME_TOO_LONG,
}


# Volumes


async def test_volumes(fs: Files) -> None:
    with pytest.raises(Refused) as refusal:
        await Files.create(fs.engine)
    assert refusal.value.code is ErrorCode.VOLUME_EXISTS
    other = await Files.create(fs.engine, "other")
    assert other.volume.id != fs.volume.id
    await other.make(b"only here")
    assert await fs.names() == []
    assert await fs.engine.read(lambda s: namespace.open_volume(s, "tests")) == fs.volume
    assert await fs.engine.read(namespace.list_volumes) == [other.volume, fs.volume]
    with pytest.raises(Refused) as refusal:
        await fs.engine.read(lambda s: namespace.open_volume(s, "none"))
    assert refusal.value.code is ErrorCode.NO_SUCH_VOLUME


async def test_root(fs: Files) -> None:
    root = await fs.stat(ROOT)
    assert root == wire.Attributes(ROOT, DIRECTORY, 2, 0, 0, 0, 0, 1000, 1000, 1000, 0, 1)


async def test_tables_cover_the_protocol() -> None:
    session = {wire.OpenSession, wire.Renew, wire.Sync, wire.CloseSession, wire.ClosedForWriting, wire.Acknowledge}
    session |= {wire.ReturnLeases}
    server = {wire.Hello, wire.CreateVolume, wire.FollowEvents, *session}
    server |= {wire.CreateIdentity, wire.RevokeIdentity, wire.ListIdentities, wire.GetStatus, wire.EvictSession}
    locks = {wire.TestLock, wire.SetLock, wire.CancelLock, wire.HoldLocks}
    others = {wire.ReserveInodes, wire.GetStatus, wire.EvictSession}
    assert {*namespace.READS, *namespace.WRITES, *server, *locks, *others} == set(wire.Request.__args__)
    assert not namespace.READS.keys() & namespace.WRITES.keys()


# Names


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:8]))
async def test_bad_names(fs: Files, name: bytes) -> None:
    ino = await fs.make(b"f")
    code = BAD_NAMES[name]
    await fs.refused(code, wire.Lookup(ROOT, name))
    await fs.refused(code, wire.MakeNode(ROOT, name, FILE, 0, 0))
    await fs.refused(code, wire.Link(ino, ROOT, name))
    await fs.refused(code, wire.Remove(ROOT, name, False))
    await fs.refused(code, wire.Remove(ROOT, name, True))
    await fs.refused(code, wire.Rename(ROOT, name, ROOT, b"g"))
    await fs.refused(code, wire.Rename(ROOT, b"f", ROOT, name))


async def test_longest_and_oddest_names(fs: Files) -> None:
    names = [b"n" * 255, b"...", b"\xff\xfe", b" ", b"\n"]
    for name in names:
        assert await fs.find(name) if await fs.make(name) else False
    assert await fs.names() == names


# Making


async def test_make_file(fs: Files) -> None:
    reply = await fs.change(wire.MakeNode(ROOT, b"f", FILE, 10, 20))
    inode, root = reply.attributes
    now = fs.now
    assert inode == wire.Attributes(inode.ino, FILE, 1, 10, 20, 0, 0, now, now, now, InodeFlag.INLINE, 1)
    assert (root.ino, root.nlink, root.mtime_ns, root.ctime_ns, root.atime_ns) == (ROOT, 2, now, now, 1000)
    assert root.version == reply.cookie == 2
    found = await fs.call(wire.Lookup(ROOT, b"f"), wire.Found)
    assert found == wire.Found(inode, reply.cookie)
    assert await fs.stat(ROOT) == root
    assert await fs.stat(inode.ino) == inode


async def test_make_directory(fs: Files) -> None:
    inode, root = (await fs.change(wire.MakeNode(ROOT, b"d", DIRECTORY, 1, 2))).attributes
    assert (inode.nlink, root.nlink, inode.flags) == (2, 3, 0)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
async def test_make_special(fs: Files, kind: int) -> None:
    rdev = 0x105 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    ino = await fs.make(b"s", kind | 0o4600, rdev=rdev)
    attributes = await fs.stat(ino)
    assert (attributes.mode, attributes.rdev, attributes.flags) == (kind | 0o4600, rdev, 0)


async def test_symlink(fs: Files) -> None:
    target = b"t" * 4095
    ino = await fs.make(b"l", SYMLINK, target=target)
    assert (await fs.stat(ino)).size == 4095
    assert (await fs.call(wire.ReadLink(ino), wire.TargetIs)).target == target


async def test_make_refusals(fs: Files) -> None:
    file = await fs.make(b"f")
    await fs.refused(ErrorCode.EXISTS, wire.MakeNode(ROOT, b"f", FILE, 0, 0))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.MakeNode(file, b"x", FILE, 0, 0))
    await fs.refused(ErrorCode.NOT_FOUND, wire.MakeNode(999_999, b"x", FILE, 0, 0))
    await fs.refused(ErrorCode.INVALID, wire.MakeNode(ROOT, b"x", 0o644, 0, 0))
    await fs.refused(ErrorCode.INVALID, wire.MakeNode(ROOT, b"x", 0o170000, 0, 0))
    await fs.refused(ErrorCode.INVALID, wire.MakeNode(ROOT, b"x", SYMLINK, 0, 0))
    await fs.refused(ErrorCode.INVALID, wire.MakeNode(ROOT, b"x", FILE, 0, 0, target=b"t"))
    await fs.refused(ErrorCode.INVALID, wire.MakeNode(ROOT, b"x", SYMLINK, 0, 0, target=b"a\0b"))
    await fs.refused(ErrorCode.INVALID, wire.MakeNode(ROOT, b"x", FILE, 0, 0, rdev=5))


async def test_setgid_is_inherited(fs: Files) -> None:
    shared = await fs.make(b"d", DIRECTORY | stat.S_ISGID, gid=77)
    inner, file = await fs.mkdir(b"d", shared), await fs.make(b"f", parent=shared)
    assert ((await fs.stat(inner)).gid, (await fs.stat(inner)).mode) == (77, DIRECTORY | stat.S_ISGID)
    assert ((await fs.stat(file)).gid, (await fs.stat(file)).mode) == (77, FILE)


async def test_inode_numbers_are_never_reused(fs: Files) -> None:
    seen: set[int] = set()
    for number in range(50):
        name = b"%d" % (number % 7)
        ino = await fs.make(name)
        assert ino not in seen
        seen.add(ino)
        await fs.change(wire.Remove(ROOT, name, False))
        await fs.call(wire.Reap([ino]), wire.Done)


# Lookups


async def test_lookup_refusals(fs: Files) -> None:
    file = await fs.make(b"f")
    await fs.refused(ErrorCode.NOT_FOUND, wire.Lookup(ROOT, b"g"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Lookup(12345, b"g"))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Lookup(file, b"g"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(12345))
    await fs.refused(ErrorCode.INVALID, wire.ReadLink(file))
    await fs.refused(ErrorCode.INVALID, wire.ReadLink(ROOT))
    await fs.refused(ErrorCode.NOT_FOUND, wire.ReadLink(12345))


# Links


async def test_hard_links_share_an_inode(fs: Files) -> None:
    ino, directory = await fs.make(b"f"), await fs.mkdir(b"d")
    reply = await fs.change(wire.Link(ino, directory, b"g"))
    inode, parent = reply.attributes
    assert (inode.ino, inode.nlink, inode.ctime_ns, inode.mtime_ns) == (ino, 2, fs.now, fs.now - 2)
    assert (parent.ino, parent.mtime_ns, parent.ctime_ns, parent.version) == (directory, fs.now, fs.now, reply.cookie)
    await fs.change(wire.WriteInline(ino, 0, b"shared"))
    assert await fs.read(await fs.find(b"g", directory)) == b"shared"
    inode, parent = (await fs.change(wire.Remove(ROOT, b"f", False))).attributes
    assert (inode.nlink, inode.ctime_ns, parent.ino, parent.mtime_ns) == (1, fs.now, ROOT, fs.now)
    assert await fs.find(b"g", directory) == ino


async def test_link_refusals(fs: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, directory = await fs.make(b"f"), await fs.mkdir(b"d")
    await fs.refused(ErrorCode.NOT_PERMITTED, wire.Link(directory, ROOT, b"x"))
    await fs.refused(ErrorCode.EXISTS, wire.Link(ino, ROOT, b"d"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Link(12345, ROOT, b"x"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Link(ino, 12345, b"x"))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Link(ino, ino, b"x"))
    monkeypatch.setattr(namespace, "MAX_LINKS", 2)
    await fs.change(wire.Link(ino, ROOT, b"x"))
    await fs.refused(ErrorCode.TOO_MANY_LINKS, wire.Link(ino, ROOT, b"y"))


# Removing


async def test_remove_refusals(fs: Files) -> None:
    directory, file = await fs.mkdir(b"d"), await fs.make(b"f")
    await fs.make(b"inside", parent=directory)
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.Remove(ROOT, b"d", False))
    await fs.refused(ErrorCode.NOT_EMPTY, wire.Remove(ROOT, b"d", True))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Remove(ROOT, b"f", True))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Remove(ROOT, b"x", False))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Remove(ROOT, b"x", True))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Remove(file, b"x", False))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Remove(12345, b"x", False))


async def test_an_orphan_keeps_its_data_until_reaped(fs: Files) -> None:
    ino = await fs.make(b"f")
    await fs.change(wire.WriteInline(ino, 0, b"data"))
    await fs.change(wire.SetXattr(ino, b"user.a", b"1"))
    inode, root = (await fs.change(wire.Remove(ROOT, b"f", False))).attributes
    assert (inode.ino, inode.nlink, root.ino) == (ino, 0, ROOT)
    await fs.change(wire.WriteInline(ino, 4, b" and more"))
    assert await fs.read(ino) == b"data and more"
    await fs.refused(ErrorCode.NOT_FOUND, wire.Link(ino, ROOT, b"again"))
    await fs.check()
    await fs.call(wire.Reap([ino]), wire.Done, OTHER)
    assert await fs.read(ino) == b"data and more"
    await fs.call(wire.Reap([ino, ino, 12345, ROOT]), wire.Done)
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(ino))
    await fs.sweep()
    assert (await fs.call(wire.GetStatistics(), wire.Statistics)).inodes == 1


async def test_a_removed_directory(fs: Files) -> None:
    directory = await fs.mkdir(b"d")
    inode, root = (await fs.change(wire.Remove(ROOT, b"d", True))).attributes
    assert (inode.nlink, root.nlink) == (0, 2)
    other = await fs.make(b"f")
    await fs.refused(ErrorCode.NOT_FOUND, wire.Remove(ROOT, b"d", True))
    await fs.refused(ErrorCode.NOT_FOUND, wire.MakeNode(directory, b"x", FILE, 0, 0))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Link(other, directory, b"x"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Rename(ROOT, b"f", directory, b"x"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Rename(directory, b"x", ROOT, b"y"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Remove(directory, b"x", False))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Lookup(directory, b"x"))
    assert await fs.names(directory) == []
    assert (await fs.stat(directory)).nlink == 0
    await fs.call(wire.Reap([directory]), wire.Done)
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(directory))


async def test_names_that_a_client_has_removed_go_together(fs: Files) -> None:
    below = await fs.mkdir(b"below")
    inos = [await fs.make(b"%d" % number, parent=below) for number in range(wire.MAX_REMOVED - 1)]
    linked = await fs.make(b"linked")
    await fs.change(wire.Link(linked, below, b"second"))
    names = [wire.RemovedName(below, b"%d" % number, ino, 10**6 + number) for number, ino in enumerate(inos)]
    request = wire.RemoveNames([wire.RemovedName(ROOT, b"linked", linked, 10**5), *names])
    changed = await fs.change(request)
    assert [each.ino for each in changed.attributes] == [linked, *inos, ROOT, below]
    assert [each.nlink for each in changed.attributes[:-2]] == [1, *[0] * len(inos)]
    assert changed.attributes[0].ctime_ns == (await fs.stat(ROOT)).mtime_ns == 10**5
    assert changed.attributes[1].ctime_ns == 10**6
    assert (await fs.stat(below)).mtime_ns == (await fs.stat(below)).ctime_ns == 10**6 + len(inos) - 1
    assert await fs.names(below) == [b"second"]
    await fs.call(wire.Reap([*inos, linked]), wire.Done)
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(inos[0]))
    assert (await fs.stat(linked)).nlink == 1, "what has another name lives on"


async def test_no_name_goes_if_one_cannot(fs: Files) -> None:
    file, directory = await fs.make(b"file"), await fs.mkdir(b"directory")
    good = wire.RemovedName(ROOT, b"file", file, 1)

    async def refused(code: ErrorCode, parent: int, name: bytes, ino: int) -> None:
        await fs.refused(code, wire.RemoveNames([good, wire.RemovedName(parent, name, ino, 1)]))

    await refused(ErrorCode.NOT_FOUND, ROOT, b"none", file)
    await refused(ErrorCode.NOT_FOUND, ROOT, b"file", file)
    await refused(ErrorCode.NOT_FOUND, ROOT, b"directory", file)
    await refused(ErrorCode.IS_A_DIRECTORY, ROOT, b"directory", directory)
    await refused(ErrorCode.NOT_A_DIRECTORY, file, b"file", file)
    await refused(ErrorCode.NOT_FOUND, 2**40, b"file", file)
    await refused(ErrorCode.INVALID, ROOT, b"a/b", file)
    assert await fs.names() == [b"file", b"directory"]


async def test_many_orphans_are_reaped_in_pieces(fs: Files) -> None:
    inos = [await fs.make(b"%d" % n) for n in range(60)]
    for number, ino in enumerate(inos):
        await fs.change(wire.SetXattr(ino, b"user.n", b"x"))
        await fs.change(wire.Remove(ROOT, b"%d" % number, False))
    await fs.call(wire.Reap(inos), wire.Done)
    await fs.check()
    assert await fs.engine.read(lambda s: namespace.has_garbage(s, fs.volume))
    assert await fs.sweep() > 0
    assert not await fs.engine.read(lambda s: namespace.has_garbage(s, fs.volume))
    assert (await fs.call(wire.GetStatistics(), wire.Statistics)).inodes == 1


async def test_the_end_of_a_session_reaps_its_orphans(fs: Files) -> None:
    async def orphan(name: bytes, session: bytes) -> int:
        ino = await fs.make(name)
        await fs.change(wire.Remove(ROOT, name, False), session)
        return ino

    mine = [await orphan(b"%d" % n, SESSION) for n in range(70)]
    others = await orphan(b"x", OTHER)
    assert await fs.engine.read(lambda s: namespace.sessions_with_orphans(s, fs.volume)) == [OTHER, SESSION]
    runs = 1
    while await fs.engine.write(lambda txn: namespace.reap_session(txn, fs.volume, SESSION)):
        runs += 1
    assert runs > 2
    assert await fs.engine.read(lambda s: namespace.sessions_with_orphans(s, fs.volume)) == [OTHER]
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetAttributes(mine[0]))
    assert (await fs.stat(others)).nlink == 0


# Renaming


async def test_rename_in_a_directory(fs: Files) -> None:
    ino = await fs.make(b"a")
    before = await fs.stat(ino)
    reply = await fs.change(wire.Rename(ROOT, b"a", ROOT, b"b"))
    moved, root = reply.attributes
    assert (moved.ino, moved.ctime_ns, moved.mtime_ns) == (ino, fs.now, before.mtime_ns)
    assert (root.ino, root.mtime_ns, root.version) == (ROOT, fs.now, reply.cookie)
    assert await fs.names() == [b"b"]
    await fs.refused(ErrorCode.NOT_FOUND, wire.Lookup(ROOT, b"a"))


async def test_rename_between_directories(fs: Files) -> None:
    one, two = await fs.mkdir(b"1"), await fs.mkdir(b"2")
    inner = await fs.mkdir(b"d", one)
    reply = await fs.change(wire.Rename(one, b"d", two, b"e"))
    assert [(a.ino, a.nlink, a.ctime_ns) for a in reply.attributes] == [
        (inner, 2, fs.now),
        (one, 2, fs.now),
        (two, 3, fs.now),
    ]
    assert await fs.find(b"e", two) == inner
    await fs.refused(ErrorCode.INVALID, wire.Rename(ROOT, b"2", inner, b"x"))


async def test_rename_replaces_a_file(fs: Files) -> None:
    new, old = await fs.make(b"new"), await fs.make(b"old")
    cookie = (await fs.call(wire.Lookup(ROOT, b"old"), wire.Found)).cookie
    reply = await fs.change(wire.Rename(ROOT, b"new", ROOT, b"old"))
    assert [(a.ino, a.nlink) for a in reply.attributes] == [(new, 1), (ROOT, 2), (old, 0)]
    assert reply.cookie == cookie, "an entry that is replaced keeps its place in the listing"
    assert await fs.names() == [b"old"]
    assert (await fs.stat(old)).nlink == 0


async def test_rename_replaces_one_of_several_links(fs: Files) -> None:
    await fs.make(b"new")
    old = await fs.make(b"old")
    await fs.change(wire.Link(old, ROOT, b"more"))
    reply = await fs.change(wire.Rename(ROOT, b"new", ROOT, b"old"))
    assert reply.attributes[-1].nlink == 1
    assert await fs.find(b"more") == old


async def test_rename_replaces_an_empty_directory(fs: Files) -> None:
    one, two = await fs.mkdir(b"1"), await fs.mkdir(b"2")
    moved, replaced = await fs.mkdir(b"d", one), await fs.mkdir(b"d", two)
    reply = await fs.change(wire.Rename(one, b"d", two, b"d"))
    assert [(a.ino, a.nlink) for a in reply.attributes] == [(moved, 2), (one, 2), (two, 3), (replaced, 0)]
    reply = await fs.change(wire.Rename(two, b"d", ROOT, b"1"))
    assert [(a.ino, a.nlink) for a in reply.attributes] == [(moved, 2), (two, 2), (ROOT, 4), (one, 0)]


async def test_rename_refusals(fs: Files) -> None:
    a, b, file = await fs.mkdir(b"a"), await fs.mkdir(b"b"), await fs.make(b"f")
    inner = await fs.mkdir(b"inner", a)
    deep = await fs.mkdir(b"deep", inner)
    await fs.refused(ErrorCode.NOT_FOUND, wire.Rename(ROOT, b"x", ROOT, b"y"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Rename(ROOT, b"f", ROOT, b"y", exchange=True))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Rename(12345, b"f", ROOT, b"y"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.Rename(ROOT, b"f", 12345, b"y"))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Rename(file, b"f", ROOT, b"y"))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Rename(ROOT, b"f", file, b"y"))
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.Rename(ROOT, b"f", ROOT, b"b"))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.Rename(ROOT, b"b", ROOT, b"f"))
    await fs.refused(ErrorCode.NOT_EMPTY, wire.Rename(ROOT, b"b", ROOT, b"a"))
    await fs.refused(ErrorCode.NOT_EMPTY, wire.Rename(inner, b"deep", ROOT, b"a"))
    await fs.refused(ErrorCode.INVALID, wire.Rename(ROOT, b"a", a, b"x"))
    await fs.refused(ErrorCode.INVALID, wire.Rename(ROOT, b"a", deep, b"x"))
    await fs.refused(ErrorCode.EXISTS, wire.Rename(ROOT, b"f", ROOT, b"b", no_replace=True))
    await fs.refused(ErrorCode.EXISTS, wire.Rename(ROOT, b"f", ROOT, b"f", no_replace=True))
    await fs.refused(ErrorCode.INVALID, wire.Rename(ROOT, b"f", ROOT, b"b", no_replace=True, exchange=True))
    await fs.refused(ErrorCode.INVALID, wire.Rename(ROOT, b"a", inner, b"deep", exchange=True))
    await fs.refused(ErrorCode.INVALID, wire.Rename(inner, b"deep", ROOT, b"a", exchange=True))
    await fs.change(wire.Rename(ROOT, b"f", b, b"f", no_replace=True))
    assert await fs.find(b"f", b) == file


async def test_rename_of_two_names_of_one_inode_changes_nothing(fs: Files) -> None:
    ino, directory = await fs.make(b"a"), await fs.mkdir(b"d")
    await fs.change(wire.Link(ino, directory, b"b"))
    before = [await fs.stat(ino), await fs.stat(ROOT), await fs.stat(directory)]
    for exchange in (False, True):
        reply = await fs.change(wire.Rename(ROOT, b"a", directory, b"b", exchange=exchange))
        assert reply.attributes == before
    await fs.change(wire.Rename(ROOT, b"d", ROOT, b"d"))
    assert [await fs.stat(ino), await fs.stat(ROOT), await fs.stat(directory)] == before
    assert await fs.names() == [b"a", b"d"]


async def test_exchange_across_directories(fs: Files) -> None:
    one, two = await fs.mkdir(b"1"), await fs.mkdir(b"2")
    directory, file = await fs.mkdir(b"x", one), await fs.make(b"y", parent=two)
    before = await fs.fetch(one), await fs.fetch(two)
    reply = await fs.change(wire.Rename(one, b"x", two, b"y", exchange=True))
    assert [(a.ino, a.nlink) for a in reply.attributes] == [(directory, 2), (one, 2), (two, 3), (file, 1)]
    assert all(a.ctime_ns == fs.now for a in reply.attributes)
    assert [a.mtime_ns == fs.now for a in reply.attributes] == [False, True, True, False]
    assert (await fs.find(b"x", one), await fs.find(b"y", two)) == (file, directory)
    after = await fs.fetch(one), await fs.fetch(two)
    assert [pages[0].entries[0].cookie for pages in after] == [pages[0].entries[0].cookie for pages in before]
    assert after[1][0].entries[0].cookie == reply.cookie
    await fs.refused(ErrorCode.INVALID, wire.Rename(ROOT, b"2", directory, b"x"))
    await fs.change(wire.Rename(ROOT, b"1", directory, b"x"))


async def test_exchange_in_a_directory(fs: Files) -> None:
    a, b = await fs.make(b"a"), await fs.mkdir(b"b")
    await fs.make(b"inside", parent=b)
    reply = await fs.change(wire.Rename(ROOT, b"a", ROOT, b"b", exchange=True))
    assert [x.ino for x in reply.attributes] == [a, ROOT, b]
    assert (await fs.find(b"a"), await fs.find(b"b")) == (b, a)
    assert await fs.names() == [b"a", b"b"]


# Attributes


async def test_set_attributes(fs: Files) -> None:
    ino = await fs.make(b"f")
    before = await fs.stat(ino)
    request = wire.SetAttributes(ino, mode=0o170000 | 0o4711, uid=5, gid=6, atime_ns=-7, mtime_ns=8)
    (after,) = (await fs.change(request)).attributes
    assert (after.mode, after.uid, after.gid) == (stat.S_IFREG | 0o4711, 5, 6)
    assert (after.atime_ns, after.mtime_ns, after.ctime_ns) == (-7, 8, fs.now)
    assert after.version == before.version + 1
    (again,) = (await fs.change(wire.SetAttributes(ino))).attributes
    assert (again.mode, again.mtime_ns, again.ctime_ns) == (after.mode, 8, fs.now)


async def test_set_size_sets_mtime(fs: Files) -> None:
    ino = await fs.make(b"f")
    (inode,) = (await fs.change(wire.SetAttributes(ino, size=5))).attributes
    assert (inode.size, inode.mtime_ns, inode.ctime_ns) == (5, fs.now, fs.now)
    (inode,) = (await fs.change(wire.SetAttributes(ino, size=5, mtime_ns=3))).attributes
    assert (inode.mtime_ns, inode.ctime_ns) == (3, fs.now)


async def test_set_size_refusals(fs: Files) -> None:
    fifo, file = await fs.make(b"p", stat.S_IFIFO | 0o600), await fs.make(b"f")
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.SetAttributes(ROOT, size=1))
    await fs.refused(ErrorCode.INVALID, wire.SetAttributes(fifo, size=1))
    await fs.refused(ErrorCode.TOO_LARGE, wire.SetAttributes(file, size=2**62))
    await fs.refused(ErrorCode.NOT_FOUND, wire.SetAttributes(12345, mode=0))


# Extended attributes


async def test_xattrs(fs: Files) -> None:
    ino = await fs.make(b"f")
    value = bytes(wire.MAX_XATTR_VALUE)
    for name in (b"user.b", b"user.a"):
        (inode,) = (await fs.change(wire.SetXattr(ino, name, value))).attributes
        assert inode.flags & InodeFlag.HAS_XATTRS
        assert (inode.ctime_ns, inode.mtime_ns) == (fs.now, 1001)
    assert (await fs.call(wire.GetXattr(ino, b"user.a"), wire.XattrIs)).value == value
    assert (await fs.call(wire.ListXattrs(ino), wire.XattrNames)).names == [b"user.a", b"user.b"]
    (inode,) = (await fs.change(wire.RemoveXattr(ino, b"user.a"))).attributes
    assert inode.flags & InodeFlag.HAS_XATTRS
    (inode,) = (await fs.change(wire.RemoveXattr(ino, b"user.b"))).attributes
    assert not inode.flags & InodeFlag.HAS_XATTRS
    assert (await fs.call(wire.ListXattrs(ino), wire.XattrNames)).names == []


async def test_xattr_create_and_replace(fs: Files) -> None:
    await fs.refused(ErrorCode.NO_XATTR, wire.SetXattr(ROOT, b"user.a", b"", replace=True))
    await fs.change(wire.SetXattr(ROOT, b"user.a", b"1", create=True))
    await fs.refused(ErrorCode.XATTR_EXISTS, wire.SetXattr(ROOT, b"user.a", b"2", create=True))
    await fs.change(wire.SetXattr(ROOT, b"user.a", b"3", replace=True))
    await fs.refused(ErrorCode.XATTR_EXISTS, wire.SetXattr(ROOT, b"user.a", b"", create=True, replace=True))
    await fs.refused(ErrorCode.NO_XATTR, wire.SetXattr(ROOT, b"user.b", b"", create=True, replace=True))
    assert (await fs.call(wire.GetXattr(ROOT, b"user.a"), wire.XattrIs)).value == b"3"


async def test_xattr_refusals(fs: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    await fs.refused(ErrorCode.NO_XATTR, wire.GetXattr(ROOT, b"user.a"))
    await fs.refused(ErrorCode.NO_XATTR, wire.RemoveXattr(ROOT, b"user.a"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetXattr(12345, b"user.a"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.ListXattrs(12345))
    await fs.refused(ErrorCode.NOT_FOUND, wire.SetXattr(12345, b"user.a", b""))
    await fs.refused(ErrorCode.INVALID, wire.SetXattr(ROOT, b"user.", b""))
    await fs.refused(ErrorCode.INVALID, wire.SetXattr(ROOT, b"user.a\0b", b""))
    await fs.refused(ErrorCode.NAME_TOO_LONG, wire.SetXattr(ROOT, b"user." + b"x" * 255, b""))
    await fs.refused(ErrorCode.UNSUPPORTED, wire.SetXattr(ROOT, b"system.posix_acl_access", b""))
    monkeypatch.setattr("metaserver.xattrs.MAX_XATTRS", 3)
    for number in range(3):
        await fs.change(wire.SetXattr(ROOT, b"user.%d" % number, b""))
    await fs.refused(ErrorCode.NO_SPACE, wire.SetXattr(ROOT, b"user.more", b""))
    await fs.change(wire.SetXattr(ROOT, b"user.1", b"again"))


async def test_xattrs_of_a_deleted_inode_go(fs: Files) -> None:
    ino = await fs.make(b"f")
    for number in range(150):
        await fs.change(wire.SetXattr(ino, b"user.%d" % number, b"v"))
    await fs.change(wire.Remove(ROOT, b"f", False))
    await fs.call(wire.Reap([ino]), wire.Done)
    await fs.check()
    assert await fs.sweep() >= 2


# Inline content


async def test_write_inline(fs: Files) -> None:
    ino = await fs.make(b"f")
    (inode,) = (await fs.change(wire.WriteInline(ino, 3, b"abc"))).attributes
    assert (inode.size, inode.mtime_ns, inode.ctime_ns, inode.atime_ns) == (6, fs.now, fs.now, 1001)
    await fs.change(wire.WriteInline(ino, 4, b"XY"))
    await fs.change(wire.WriteInline(ino, 0, b"12"))
    assert await fs.read(ino) == b"12\0aXY"
    (same,) = (await fs.change(wire.WriteInline(ino, 100, b""))).attributes
    assert same == await fs.stat(ino)
    assert (same.size, same.version) == (6, 4)
    await fs.change(wire.WriteInline(ino, 0, bytes(INLINE_LIMIT)))
    assert await fs.read(ino) == bytes(INLINE_LIMIT)


async def test_write_inline_refusals(fs: Files) -> None:
    ino, fifo = await fs.make(b"f"), await fs.make(b"p", stat.S_IFIFO | 0o600)
    await fs.refused(ErrorCode.TOO_LARGE, wire.WriteInline(ino, INLINE_LIMIT, b"x"))
    await fs.refused(ErrorCode.TOO_LARGE, wire.WriteInline(ino, 2**62, b"x"))
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.WriteInline(ROOT, 0, b"x"))
    await fs.refused(ErrorCode.INVALID, wire.WriteInline(fifo, 0, b"x"))
    await fs.refused(ErrorCode.NOT_FOUND, wire.WriteInline(12345, 0, b"x"))


async def test_sparse_tail(fs: Files) -> None:
    ino = await fs.make(b"f")
    await fs.change(wire.WriteInline(ino, 0, b"abcdef"))
    await fs.change(wire.SetAttributes(ino, size=3))
    await fs.change(wire.SetAttributes(ino, size=10 * INLINE_LIMIT))
    content = await fs.call(wire.GetContent(ino, 1, 2**40), wire.Content)
    assert (content.inline, content.attributes.size) == (b"bc", 10 * INLINE_LIMIT)
    await fs.change(wire.WriteInline(ino, 5, b"X"))
    assert (await fs.stat(ino)).size == 10 * INLINE_LIMIT
    await fs.change(wire.SetAttributes(ino, size=8))
    assert await fs.read(ino) == b"abc\0\0X\0\0"
    assert (await fs.call(wire.GetContent(ino, 8, 5), wire.Content)).inline == b""
    assert (await fs.call(wire.GetContent(ino, 100, 5), wire.Content)).inline == b""


async def test_get_content_refusals(fs: Files) -> None:
    link = await fs.make(b"l", SYMLINK, target=b"t")
    await fs.refused(ErrorCode.IS_A_DIRECTORY, wire.GetContent(ROOT, 0, 1))
    await fs.refused(ErrorCode.INVALID, wire.GetContent(link, 0, 1))
    await fs.refused(ErrorCode.NOT_FOUND, wire.GetContent(12345, 0, 1))


async def test_statistics(fs: Files) -> None:
    for number in range(20):
        ino = await fs.make(b"%d" % number)
        await fs.change(wire.WriteInline(ino, number, b"x"))
    await fs.change(wire.SetAttributes(await fs.find(b"19"), size=1000))
    await fs.make(b"l", SYMLINK, target=b"not counted")
    figures = await fs.call(wire.GetStatistics(), wire.Statistics)
    assert (figures.inodes, figures.bytes) == (22, sum(range(1, 20)) + 1000)
    assert 0 < figures.free_bytes <= figures.total_bytes


# Fetching


async def test_fetch_entries_and_data(fs: Files) -> None:
    small, large = await fs.make(b"small"), await fs.make(b"large")
    await fs.mkdir(b"d")
    await fs.make(b"l", SYMLINK, target=b"target")
    await fs.make(b"empty")
    sparse = await fs.make(b"sparse")
    await fs.change(wire.WriteInline(small, 0, b"abc"))
    await fs.change(wire.WriteInline(large, 0, b"x" * 200))
    await fs.change(wire.WriteInline(sparse, 0, b"s"))
    await fs.change(wire.SetAttributes(sparse, size=5))
    (page,) = await fs.fetch(data_limit=100)
    assert (page.last, page.complete, page.whole, page.directory) == (True, True, True, await fs.stat(ROOT))
    assert [(e.name, e.data) for e in page.entries] == [
        (b"small", b"abc"),
        (b"large", None),
        (b"d", None),
        (b"l", b"target"),
        (b"empty", b""),
        (b"sparse", b"s\0\0\0\0"),
    ]
    for entry in page.entries:
        assert wire.Found(entry.attributes, entry.cookie) == await fs.call(wire.Lookup(ROOT, entry.name), wire.Found)
    assert [entry.cookie for entry in page.entries] == [2, 3, 4, 5, 6, 7]


async def test_fetch_refusals(fs: Files) -> None:
    file = await fs.make(b"f")
    await fs.refused(ErrorCode.NOT_FOUND, wire.FetchDirectory(12345, 0, 1, 0, 0))
    await fs.refused(ErrorCode.NOT_A_DIRECTORY, wire.FetchDirectory(file, 0, 1, 0, 0))


async def test_fetch_goes_on_from_a_cookie(fs: Files) -> None:
    for number in range(5):
        await fs.make(b"%d" % number)
    found: list[bytes] = []
    cookie, complete, steps = 0, False, 0
    while not complete:
        (page,) = await fs.fetch(cookie=cookie, limit=2)
        assert page.whole == (cookie == 0)
        found += [entry.name for entry in page.entries]
        cookie, complete, steps = page.entries[-1].cookie, page.complete, steps + 1
        if steps == 1:
            await fs.change(wire.Remove(ROOT, b"1", False))
    assert (found, steps) == ([b"0", b"1", b"2", b"3", b"4"], 3)
    (page,) = await fs.fetch(cookie=cookie)
    assert (page.entries, page.complete, page.whole) == ([], True, False)
    (page,) = await fs.fetch(cookie=2**63 - 1)
    assert page.entries == []


async def test_fetch_exactly_the_limit_is_complete(fs: Files) -> None:
    await fs.make(b"a")
    await fs.make(b"b")
    assert (await fs.fetch(limit=2))[-1].complete
    assert not (await fs.fetch(limit=1))[-1].complete


async def test_fetch_around(fs: Files) -> None:
    for number in range(6):
        await fs.make(b"%d" % number)

    async def around(name: bytes, limit: int) -> tuple[bytes, bool, bool]:
        (page,) = await fs.fetch(limit=limit, around=name)
        return b"".join(entry.name for entry in page.entries), page.whole, page.complete

    assert await around(b"4", 6) == (b"012345", True, True)
    assert await around(b"3", 2) == (b"34", False, False)
    assert await around(b"3", 5) == (b"345", False, True)
    assert await around(b"0", 3) == (b"012", True, False)
    assert await around(b"none", 3) == (b"012", True, False)
    assert await around(b"none", 30) == (b"012345", True, True)


async def test_fetch_budget(fs: Files) -> None:
    for name in (b"a", b"b", b"c"):
        await fs.change(wire.WriteInline(await fs.make(name), 0, name * 10))
    (page,) = await fs.fetch(data_limit=100, data_budget=20)
    assert [entry.data for entry in page.entries] == [b"a" * 10, b"b" * 10, None]
    (page,) = await fs.fetch(data_limit=100, data_budget=10, around=b"b")
    assert [entry.data for entry in page.entries] == [None, b"b" * 10, None]


async def test_fetch_pages(fs: Files) -> None:
    names = [b"%03d" % number for number in range(150)]
    for name in names:
        ino = await fs.make(name)
        await fs.change(wire.WriteInline(ino, 0, name + bytes(INLINE_LIMIT - 3)))
    pages = await fs.fetch(data_limit=INLINE_LIMIT)
    assert len(pages) == 3
    assert [page.last for page in pages] == [page.complete for page in pages] == [False, False, True]
    assert [entry.name for page in pages for entry in page.entries] == names
    assert all(e.data and e.data[:3] == e.name for page in pages for e in page.entries)
    assert all(len(wire.encode(1, page)) < wire.PAGE_BYTES + 2 * INLINE_LIMIT for page in pages)
    pages = await fs.fetch(data_limit=INLINE_LIMIT, around=b"140")
    assert [entry.name for page in pages for entry in page.entries] == [b"140", *names[:140], *names[141:]]
    pages = await fs.fetch(data_limit=INLINE_LIMIT, around=b"002")
    assert [entry.name for page in pages for entry in page.entries] == names


# Many at once


async def test_concurrent_creates(fs: Files) -> None:
    inos = await asyncio.gather(*(fs.make(b"%d" % number) for number in range(30)))
    assert len(set(inos)) == 30
    pages = await fs.fetch()
    cookies = [entry.cookie for entry in pages[0].entries]
    assert len(set(cookies)) == 30
    assert cookies == sorted(cookies)
    outcomes = await asyncio.gather(*(fs.make(b"same") for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 4


async def test_a_commit_keeps_the_time_at_which_a_program_wrote(fs: Files) -> None:
    ino = await fs.make(b"file")
    await fs.change(wire.WriteInline(ino, 0, b"inline", 1_500))
    written = await fs.stat(ino)
    assert (written.mtime_ns, written.ctime_ns) == (1_500, 1_500)
    (first,) = await fs.slices(1)
    await fs.change(wire.CommitSlices(ino, [wire.Slice(6, 10, first, 0)], 16, True, written.version, 1_400))
    written = await fs.stat(ino)
    assert (written.mtime_ns, written.ctime_ns) == (1_400, 1_500), "what the inode changed last stays"
    changed = await fs.change(wire.SetAttributes(ino, mode=0o600))
    assert changed.attributes[0].ctime_ns == fs.now
