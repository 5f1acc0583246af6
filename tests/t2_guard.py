"""What the sessions of an identity may reach and change, whatever their client sends."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, NamedTuple

import messages
import msgspec
import pytest
from certificates import Authority
from secured import enter, identity, secured
from served import DIRECTORY, FILE, Client, Metaserver

from fuseclient.worker import rpc
from metaserver import guard, namespace, unlinked, wire
from metaserver.tls import Tls
from metaserver.wire import ROOT_INO, ErrorCode, Squash


class Place(NamedTuple):
    """A metaserver, root's own client of it, and where identities are made."""

    metaserver: Metaserver
    root: Client
    directory: Path
    ca: str

    async def enter(self, name: str, **more: object) -> Client:
        query = await identity(self.metaserver, name, self.directory, **more)
        return await enter(self.metaserver, f"ca={self.ca}&{query}")

    async def connect(self, name: str) -> Client:
        """Connect once more as an identity that was entered with."""
        query = f"ca={self.ca}&token={self.directory}/{name}.token"
        return Client(await self.metaserver.connect_to(f"{self.metaserver.tcp}?{query}"))


@pytest.fixture
async def place(tmp_path: Path, tls: Tls, authority: Authority) -> AsyncIterator[Place]:
    async with secured(tmp_path, tls) as metaserver:
        root = Client(await metaserver.connect())
        await root.open("volume")
        await root.change(wire.SetAttributes(ROOT_INO, mode=0o1777))
        yield Place(metaserver, root, tmp_path, authority.path)


async def refused(call: Awaitable[object]) -> ErrorCode:
    with pytest.raises(rpc.Refused) as error:
        await call
    return error.value.code


async def owned(root: Client, name: bytes, mode: int, parent: int = ROOT_INO, uid: int = 0, gid: int = 0) -> int:
    made = await root.change(wire.MakeNode(parent, name, mode, uid, gid))
    return made.attributes[0].ino


def fields_named() -> set[type]:
    return set(guard._INODES) | {*guard._NAMELESS, wire.TestLock, wire.SetLock, wire.HoldLocks}


def test_every_request_that_names_an_inode_is_known() -> None:
    """A request that is new is looked at here, or is refused to who is confined to a subtree."""
    for request in messages.REQUESTS:
        names = {name for name in request.__struct_fields__ if name in ("ino", "parent", "new_parent", "source")}
        assert names == set(guard._INODES.get(type(request), ())), type(request)
    volume_wide = {wire.ListSlices, wire.InspectSlices, wire.ForgetSlices, wire.RetireSlices}
    refused_to_all = {wire.MakeFiles, wire.RemoveNames}
    assert {*namespace.READS, *namespace.WRITES} - fields_named() == volume_wide | refused_to_all


async def test_who_is_bounded_makes_and_removes_files_one_by_one(place: Place) -> None:
    client = await place.enter("squashed", squash=wire.Squash.ROOT)
    number = (await place.root.connection.call(wire.ReserveInodes(1), wire.InodesReserved)).first
    assert await refused(client.connection.call(wire.ReserveInodes(1), wire.InodesReserved)) is ErrorCode.ACCESS_DENIED
    file = wire.NewFile(wire.ROOT_INO, b"file", number, 0o644, 0, 0, 1, 1, 1, 1)
    assert await refused(client.connection.call(wire.MakeFiles([file]), wire.Changed)) is ErrorCode.ACCESS_DENIED
    assert (await place.root.change(wire.MakeFiles([file]))).attributes[0].ino == number
    removal = wire.RemoveNames([wire.RemovedName(wire.ROOT_INO, b"file", number, 1)])
    assert await refused(client.connection.call(removal, wire.Changed)) is ErrorCode.ACCESS_DENIED
    assert (await place.root.change(removal)).attributes[0].nlink == 0


async def test_who_may_only_read_changes_nothing(place: Place) -> None:
    ino = await owned(place.root, b"file", FILE)
    client = await place.enter("reader", read_only=True)
    assert client.session.read_only
    assert await refused(client.connection.call(wire.OpenFile(ino, True), wire.Found)) is ErrorCode.READ_ONLY
    assert (await client.connection.call(wire.OpenFile(ino, False), wire.Found)).attributes.ino == ino
    for request in messages.REQUESTS:
        if type(request) in namespace.WRITES and not isinstance(request, wire.Reap):
            assert await refused(client.connection.call(request, wire.Changed)) is ErrorCode.READ_ONLY
    await client.connection.call(wire.Reap([ino]), wire.Done | wire.Changed)  # type: ignore[arg-type]


async def test_a_subtree_is_all_there_is(place: Place) -> None:
    root = place.root
    home = await owned(root, b"home", DIRECTORY)
    within = await owned(root, b"within", DIRECTORY, home)
    inside = await owned(root, b"inside", FILE, within)
    other = await owned(root, b"other", DIRECTORY)
    outside = await owned(root, b"outside", FILE, other)
    await root.change(wire.WriteInline(outside, 0, b"secret"))
    client = await place.enter("tenant", subtree=b"/home/", squash=Squash.NONE)
    call, change = client.connection.call, client.change

    assert (await client.attributes(ROOT_INO)).ino == ROOT_INO
    pages = [page async for page in client.connection.stream(wire.FetchDirectory(ROOT_INO, 0, 100, 0, 0))]
    assert [entry.name for page in pages for entry in page.entries] == [b"within"]
    assert pages[0].directory.ino == ROOT_INO
    made = await change(wire.MakeNode(ROOT_INO, b"made", FILE, 0, 0))
    assert made.attributes[1].ino == ROOT_INO
    assert (await root.connection.call(wire.Lookup(home, b"made"), wire.Found)).attributes.ino == made.attributes[0].ino
    assert (await client.attributes(inside)).ino == inside

    lock = wire.Lock(outside, 1, False, 0, 9, True)
    for ino in (home, other, outside, 2**40):
        for request in messages.REQUESTS:
            if fields := guard._INODES.get(type(request)):
                for field in fields:
                    values = dict.fromkeys(fields, ROOT_INO) | {field: ino}
                    aimed = _replace(request, **values)
                    if isinstance(aimed, wire.FetchDirectory):
                        assert await refused(anext(client.connection.stream(aimed))) is ErrorCode.NOT_FOUND
                    else:
                        assert await refused(call(aimed, wire.Changed)) is ErrorCode.NOT_FOUND, aimed
    for request in (wire.TestLock(lock), wire.SetLock(lock, 1), wire.HoldLocks([lock], True)):
        assert await refused(call(request, wire.LockIs)) is ErrorCode.NOT_FOUND
    for request in (wire.ListSlices(1), wire.ForgetSlices([1]), wire.RetireSlices([1]), wire.InspectSlices([1])):
        assert await refused(call(request, wire.SliceIds)) is ErrorCode.ACCESS_DENIED
    for name in (b"..", b".", b"../other"):
        assert await refused(call(wire.Lookup(ROOT_INO, name), wire.Found)) is ErrorCode.INVALID
    follow = wire.FollowEvents("volume", 0, False)
    assert await refused(anext(client.connection.follow(follow))) is ErrorCode.ACCESS_DENIED
    again = await place.connect("tenant")
    resume = wire.OpenSession("volume", "test", client.session.session, [inside, outside, 2**40])
    await again.connection.call(resume, wire.SessionOpened)
    session = next(each for each in place.metaserver.server.sessions.all() if each.id == client.session.session)
    assert session.writing == {inside}


def _replace(request: Any, **values: int) -> Any:
    return msgspec.structs.replace(request, **values)


async def test_what_is_renamed_is_in_or_out_from_then_on(place: Place) -> None:
    root = place.root
    home, other = [await owned(root, name, DIRECTORY) for name in (b"home", b"other")]
    directory = await owned(root, b"directory", DIRECTORY, other)
    file = await owned(root, b"file", FILE, directory)
    client = await place.enter("tenant", subtree=b"/home", squash=Squash.NONE)

    async def reached(*inos: int) -> list[bool]:
        found = []
        for ino in inos:
            try:
                await client.attributes(ino)
                found.append(True)
            except rpc.Refused:
                found.append(False)
        return found

    assert await reached(directory, file) == [False, False]
    await root.change(wire.Rename(other, b"directory", home, b"directory"))
    assert await reached(directory, file) == [True, True]
    await root.change(wire.Rename(home, b"directory", other, b"directory"))
    assert await reached(directory, file) == [False, False]
    await root.change(wire.Rename(directory, b"file", home, b"file"))
    assert await reached(directory, file) == [False, True]
    # A file with names on both sides is there for who finds it by the one within.
    await root.change(wire.Link(file, other, b"second"))
    assert await reached(file) == [False]
    await client.connection.call(wire.Lookup(ROOT_INO, b"file"), wire.Found)
    assert await reached(file) == [True]
    await root.change(wire.Remove(home, b"file", False))
    assert await reached(file) == [False]
    # The subtree itself: its directory is what it was when the session was opened.
    await root.change(wire.Rename(ROOT_INO, b"home", other, b"moved"))
    await client.make(b"more")
    assert (await root.connection.call(wire.Lookup(home, b"more"), wire.Found)).attributes.nlink == 1
    assert await refused(place.enter("next", subtree=b"/home")) is ErrorCode.NOT_FOUND


async def test_breaks_name_the_root_as_the_client_knows_it(place: Place) -> None:
    home = await owned(place.root, b"home", DIRECTORY)
    client = await place.enter("tenant", subtree=b"/home", squash=Squash.NONE)
    told: list[wire.Break] = []

    def note(breaking: wire.Break) -> None:
        told.append(breaking)
        client.connection.acknowledge(breaking.number)

    client.connection.on_break(note)
    await client.attributes()
    assert await refused(client.connection.call(wire.Lookup(ROOT_INO, b"new"), wire.Found)) is ErrorCode.NOT_FOUND
    await place.root.make(b"new", parent=home)
    assert [(each.names, each.inodes) for each in told if each.number] == [([(ROOT_INO, b"new")], [ROOT_INO])]


async def test_roots_rights_are_taken_away(place: Place) -> None:
    root = place.root
    private = await owned(root, b"private", 0o040700)
    secret = await owned(root, b"secret", 0o100600)
    await root.change(wire.WriteInline(secret, 0, b"secret"))
    users = await owned(root, b"users", 0o100400, uid=1000, gid=1000)
    await root.change(wire.WriteInline(users, 0, b"user's"))
    client = await place.enter("tenant", squash=Squash.ROOT)
    call, change = client.connection.call, client.change

    made = (await change(wire.MakeNode(ROOT_INO, b"made", FILE, 0, 0))).attributes[0]
    assert (made.uid, made.gid) == (65534, 65534)
    kept = (await change(wire.MakeNode(ROOT_INO, b"kept", FILE, 1000, 1001))).attributes[0]
    assert (kept.uid, kept.gid) == (1000, 1001)
    assert (await change(wire.WriteInline(users, 0, b"changed"))).attributes[0].size == 7
    pages = [page async for page in client.connection.stream(wire.FetchDirectory(ROOT_INO, 0, 100, 9999, 9999))]
    data = {entry.name: entry.data for page in pages for entry in page.entries}
    assert data[b"secret"] is None
    assert data[b"users"] == b"changed"
    denied, forbidden = ErrorCode.ACCESS_DENIED, ErrorCode.NOT_PERMITTED
    requests: list[tuple[wire.Request, ErrorCode]] = [
        (wire.GetContent(secret, 0, 9), denied),
        (wire.OpenFile(secret, False), denied),
        (wire.WriteInline(secret, 0, b"x"), denied),
        (wire.Lookup(private, b"x"), denied),
        (wire.MakeNode(private, b"x", FILE, 0, 0), denied),
        (wire.Link(secret, ROOT_INO, b"stolen"), denied),
        (wire.CopyRange(secret, 0, made.ino, 0, 6), denied),
        (wire.SetAttributes(secret, size=0), denied),
        (wire.SetAttributes(secret, mode=0o666), forbidden),
        (wire.SetAttributes(made.ino, uid=0), forbidden),
        (wire.SetAttributes(made.ino, gid=0), forbidden),
        (wire.Remove(ROOT_INO, b"secret", False), forbidden),
        (wire.Rename(ROOT_INO, b"secret", ROOT_INO, b"made"), forbidden),
        (wire.Rename(ROOT_INO, b"made", ROOT_INO, b"secret"), forbidden),
        (wire.MakeNode(ROOT_INO, b"device", 0o020666, 0, 0, 1), forbidden),
        (wire.SetXattr(made.ino, b"security.capability", b"x"), forbidden),
        (wire.SetXattr(secret, b"user.x", b"x"), denied),
    ]
    for request, code in requests:
        assert await refused(call(request, wire.Changed)) is code, request
    assert await refused(anext(client.connection.stream(wire.FetchDirectory(private, 0, 9, 0, 0)))) is denied
    assert (await change(wire.SetAttributes(made.ino, mode=0o600))).attributes[0].mode & 0o777 == 0o600


async def test_a_lock_takes_the_right_to_open_the_file_so(place: Place) -> None:
    """Of a range as the kernel asks (fcntl): by who may write, or read; of a whole file (flock): by who may open it."""
    secret, told = await owned(place.root, b"secret", 0o100600), await owned(place.root, b"told", 0o100644)
    users = await owned(place.root, b"users", 0o100600, uid=1000, gid=1000)
    squashed = await place.enter("tenant", squash=Squash.ROOT)
    reader = await place.enter("reader", squash=Squash.NONE, read_only=True)
    granted = "granted"

    async def asked(client: Client, ino: int, *, exclusive: bool, flock: bool = False, unlock: bool = False) -> object:
        end = wire.LAST_BYTE
        request = wire.SetLock(wire.Lock(ino, 1, flock, 0, end, exclusive), 1, unlock=unlock)
        try:
            answer = await client.connection.call(request, wire.LockAnswer)
        except rpc.Refused as error:
            return error.code
        assert answer.outcome is wire.LockOutcome.GRANTED
        if not unlock:
            await asked(client, ino, exclusive=exclusive, flock=flock, unlock=True)
        return granted

    denied = ErrorCode.ACCESS_DENIED
    for client, ino, write, read, whole in (
        (squashed, secret, denied, denied, denied),
        (squashed, told, denied, granted, granted),
        (squashed, users, granted, granted, granted),
        (reader, secret, denied, granted, granted),
    ):
        assert await asked(client, ino, exclusive=True) == write
        assert await asked(client, ino, exclusive=False) == read
        for exclusive in (True, False):
            assert await asked(client, ino, exclusive=exclusive, flock=True) == whole
    assert await asked(squashed, secret, exclusive=True, unlock=True) == granted

    claims = [wire.Lock(ino, 1, False, 0, 9, True) for ino in (users, secret, told)]
    assert (await squashed.connection.call(wire.HoldLocks(claims, True), wire.LocksLost)).indexes == [1, 2]
    test = wire.TestLock(wire.Lock(secret, 2, False, 0, 9, True))
    assert (await place.root.connection.call(test, wire.LockIs)).lock is None
    held = (await place.root.connection.call(wire.TestLock(claims[0]), wire.LockIs)).lock
    assert held is not None


async def test_an_identity_keeps_so_many_unlinked_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all its sessions; what is reaped counts no more, and others are not concerned."""
    monkeypatch.setattr(unlinked, "MOST_OF_ACCOUNT", 3)
    one, two = await place.enter("tenant", squash=Squash.NONE), await place.connect("tenant")
    await two.open("volume")
    for client, name in ((one, b"a"), (one, b"b"), (two, b"c"), (two, b"d"), (place.root, b"e")):
        await client.make(name)

    async def remove(client: Client, name: bytes) -> int:
        return (await client.change(wire.Remove(ROOT_INO, name, False))).attributes[0].ino

    kept = [await remove(one, b"a"), await remove(one, b"b"), await remove(two, b"c")]
    for request in (
        wire.Remove(ROOT_INO, b"d", False),
        wire.Rename(ROOT_INO, b"e", ROOT_INO, b"d"),
        wire.MakeTemporary(ROOT_INO, FILE, 0, 0),
    ):
        for client in (one, two):
            assert await refused(client.connection.call(request, wire.Changed)) is ErrorCode.NO_SPACE
    await remove(place.root, b"e")
    await one.make(b"more")
    await one.connection.call(wire.Reap(kept[:1]), wire.Done)
    kept.append(await remove(two, b"d"))
    assert await refused(remove(one, b"more")) is ErrorCode.NO_SPACE
    for client in (one, two):
        await client.connection.call(wire.Reap(kept), wire.Done)
    for _ in range(10):  # nothing is left behind
        await one.connection.call(wire.Reap([await remove(one, b"more")]), wire.Done)
        await one.make(b"more")


async def test_names_that_are_removed_together_count_each(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of who is not bounded: for others they are removed one by one."""
    monkeypatch.setattr(unlinked, "MOST_OF_ACCOUNT", 3)
    made = {name: await place.root.make(name) for name in (b"a", b"b", b"c", b"d")}

    def removal(*names: bytes) -> wire.RemoveNames:
        return wire.RemoveNames([wire.RemovedName(ROOT_INO, name, made[name].ino, 1) for name in names])

    assert await refused(place.root.connection.call(removal(*made), wire.Changed)) is ErrorCode.NO_SPACE
    await place.root.connection.call(removal(b"a", b"b"), wire.Changed)
    assert await refused(place.root.connection.call(removal(b"c", b"d"), wire.Changed)) is ErrorCode.NO_SPACE
    await place.root.connection.call(removal(b"c"), wire.Changed)


async def test_no_program_gets_roots_group(place: Place) -> None:
    """Nor is a directory of root's moved elsewhere, by who may write to where it is and goes."""
    shared = await owned(place.root, b"shared", 0o042777)
    file = (await (client := await place.enter("tenant", squash=Squash.ROOT)).change(
        wire.MakeNode(shared, b"file", FILE, 1000, 1000))).attributes[0]  # fmt: skip
    assert (file.uid, file.gid) == (1000, 0)
    inner = await owned(place.root, b"inner", DIRECTORY, shared)
    mine = (await client.change(wire.MakeNode(shared, b"mine", DIRECTORY, 1000, 1000))).attributes[0]
    assert mine.mode & stat.S_ISGID
    forbidden = ErrorCode.NOT_PERMITTED
    for request, code in (
        (wire.MakeNode(shared, b"program", 0o102755, 1000, 1000), forbidden),
        (wire.MakeTemporary(shared, 0o102755, 1000, 1000), forbidden),
        (wire.SetAttributes(file.ino, mode=0o2755), forbidden),
        (wire.Rename(shared, b"inner", mine.ino, b"inner"), ErrorCode.ACCESS_DENIED),
        (wire.Rename(shared, b"file", ROOT_INO, b"nothing", exchange=True), ErrorCode.NOT_FOUND),
    ):
        assert await refused(client.connection.call(request, wire.Changed)) is code, request
    assert (await client.change(wire.SetAttributes(file.ino, mode=0o755))).attributes[0].mode & 0o7777 == 0o755
    assert (await client.change(wire.SetAttributes(mine.ino, mode=0o2755))).attributes[0].mode & 0o7777 == 0o2755
    await client.change(wire.Rename(shared, b"mine", ROOT_INO, b"mine"))
    assert (await place.root.attributes(inner)).uid == 0


async def test_whatever_a_squashed_client_sends_nothing_becomes_roots(place: Place) -> None:
    """Each request that changes something, as root would send it, at what is the client's own and at what is root's."""
    private = await owned(place.root, b"private", DIRECTORY)
    secret = await owned(place.root, b"secret", 0o100644, private)
    await place.root.change(wire.WriteInline(secret, 0, b"root's"))
    before = await place.root.attributes(secret)
    client = await place.enter("tenant", squash=Squash.ROOT)
    home = (await client.change(wire.MakeNode(ROOT_INO, b"home", DIRECTORY, 0, 0))).attributes[0].ino
    file = (await client.change(wire.MakeNode(home, b"name", FILE, 0, 0))).attributes[0].ino
    for request in messages.REQUESTS:
        fields = guard._INODES.get(type(request), ())
        if type(request) not in namespace.WRITES or not fields:
            continue
        for of_inode, of_parent in ((file, home), (secret, private), (secret, home), (file, private)):
            inodes = {name: of_parent if "parent" in name else of_inode for name in fields}
            ids = {name: 0 for name in ("uid", "gid") if name in request.__struct_fields__}
            with contextlib.suppress(rpc.Refused):
                await client.connection.call(_replace(request, **inodes, **ids), wire.Changed)
    assert await place.root.attributes(secret) == before
    assert (await place.root.connection.call(wire.GetContent(secret, 0, 9), wire.Content)).inline == b"root's"
    pages = [page async for page in place.root.connection.stream(wire.FetchDirectory(home, 0, 100, 0, 0))]
    made = [entry.attributes for page in pages for entry in page.entries]
    assert made
    assert all(each.uid != 0 and each.gid != 0 for each in made)
    pages = [page async for page in place.root.connection.stream(wire.FetchDirectory(private, 0, 100, 0, 0))]
    assert [entry.name for page in pages for entry in page.entries] == [b"secret"]


async def test_all_are_one_user(place: Place) -> None:
    theirs = await owned(place.root, b"theirs", 0o100640, uid=1000, gid=1000)
    groups = await owned(place.root, b"groups", 0o100660, uid=1000, gid=77)
    client = await place.enter("everybody", squash=Squash.ALL, uid=1001, gid=77)
    made = (await client.change(wire.MakeNode(ROOT_INO, b"made", FILE, 1000, 0))).attributes[0]
    assert (made.uid, made.gid) == (1001, 77)
    assert await refused(client.change(wire.WriteInline(theirs, 0, b"x"))) is ErrorCode.ACCESS_DENIED
    assert await refused(client.connection.call(wire.GetContent(theirs, 0, 1), wire.Content)) is ErrorCode.ACCESS_DENIED
    await client.change(wire.WriteInline(groups, 0, b"x"))
    assert await refused(client.change(wire.SetAttributes(groups, mode=0o666))) is ErrorCode.NOT_PERMITTED
    assert await refused(client.change(wire.SetAttributes(made.ino, gid=1000))) is ErrorCode.NOT_PERMITTED


async def test_root_is_nobody_from_another_machine_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    near = await place.enter("near")
    assert (await near.make(b"near")).uid == os.geteuid()
    monkeypatch.setattr("metaserver.gate._is_loopback", lambda peer: False)
    far = await place.enter("far")
    assert (await far.make(b"far")).uid == wire.NOBODY
