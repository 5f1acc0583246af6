"""The metaserver over real sockets: every request, every limit, and clients that fail or mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import socket
import stat
import struct
import typing
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import messages
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import DIRECTORY, FILE, VOLUME, Client, Metaserver, fake_server, serving, until

from fuseclient.data.compaction import digest
from fuseclient.worker import rpc
from fuseclient.worker.session import Session
from metaserver import wire
from metaserver.connection import Limits
from metaserver.errors import Conflict, EngineFull, Unknown
from metaserver.gate import Access
from metaserver.listener import ListenError
from metaserver.wire import ErrorCode

ENGINES = ["memory://", "lmdb"]


@pytest.fixture
async def metaserver(tmp_path: Path) -> AsyncIterator[Metaserver]:
    async with serving(tmp_path) as running:
        yield running


async def refused(call: typing.Awaitable[Any]) -> ErrorCode:
    """Return the code with which a call is refused."""
    with pytest.raises(rpc.Refused) as error:
        await call
    return error.value.code


# Handshake and addresses


@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0", "tcp:[::1]:0"])
async def test_handshake(tmp_path: Path, address: str | None) -> None:
    async with serving(tmp_path, address=address) as metaserver:
        one, two = await metaserver.connect(), await metaserver.connect()
        assert one.welcome.version == wire.PROTOCOL_VERSION
        assert one.welcome.server_epoch == two.welcome.server_epoch
        epoch = one.welcome.server_epoch
        await metaserver.stop()
        await until(lambda: one.lost and two.lost)
        with pytest.raises(rpc.Disconnected):
            await metaserver.connect()
        await metaserver.start()
        assert (await metaserver.connect()).welcome.server_epoch != epoch


@pytest.mark.parametrize("version", [0, wire.PROTOCOL_VERSION - 1, wire.PROTOCOL_VERSION + 1, 2**32 - 1])
async def test_scenario_22_another_version_is_refused_cleanly(metaserver: Metaserver, version: int) -> None:
    raw = await metaserver.raw()
    raw.send(wire.encode(9, wire.Hello(version, "future")))
    request_id, reply = await raw.receive()
    assert request_id == 9
    assert isinstance(reply, wire.Failure)
    assert reply.code is ErrorCode.UNSUPPORTED
    assert await raw.until_closed() == []


async def test_a_client_reports_that_its_version_is_refused(tmp_path: Path) -> None:
    failure = wire.Failure(ErrorCode.UNSUPPORTED, "too old")
    async with fake_server(tmp_path, lambda number, _: [wire.encode(number, failure)]) as address:
        assert await refused(rpc.connect(address)) is ErrorCode.UNSUPPORTED


async def test_a_handshake_must_come_in_time(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(hello_s=0.05)) as metaserver:
        silent, slow = await metaserver.raw(), await metaserver.raw()
        slow.send(wire.encode(1, wire.Hello(wire.PROTOCOL_VERSION, "slow"))[:7])
        assert await silent.until_closed() == []
        assert await slow.until_closed() == []
        greeted = await metaserver.raw(greeted=True)
        raced = await metaserver.raw()
        assert await raced.until_closed() == []
        greeted.send(wire.encode(2, wire.Hello(wire.PROTOCOL_VERSION, "again")))
        assert (await greeted.receive())[0] == 2, "the limit of the handshake does not end a greeted connection"


async def test_a_client_gives_up_a_server_that_does_not_greet(tmp_path: Path) -> None:
    async with fake_server(tmp_path, lambda *_: []) as address:
        with pytest.raises(rpc.Disconnected, match="does not answer"):
            await rpc.connect(address, timeout_s=0.05)


async def test_there_is_a_most_of_connections(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(connections=2)) as metaserver:
        one, _ = await metaserver.connect(), await metaserver.connect()
        with pytest.raises(rpc.Refused, match="too many connections"):
            await metaserver.connect()
        one.abort()
        await until(lambda: len(metaserver.server.connections) == 1)
        await metaserver.connect()


async def test_the_unix_socket_is_its_owners(metaserver: Metaserver) -> None:
    path = metaserver.address.removeprefix("unix:")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    await metaserver.stop()
    await until(lambda: not os.path.exists(path))


async def test_a_dead_servers_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(tmp_path, address=f"unix:{path}") as metaserver:
        await metaserver.connect()


async def test_a_live_servers_socket_is_left_alone(metaserver: Metaserver, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="another server"):
        async with serving(tmp_path, address=metaserver.address):
            pass
    await metaserver.connect()


async def test_addresses_that_cannot_be_listened_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for address, what in [
        (f"unix:{tmp_path}/file", "not a socket"),
        (f"unix:{tmp_path}/none/socket", "No such file"),
        (f"unix:/{'x' * 200}", "too long"),
        ("tcp:0.0.0.0:0", "--insecure"),
        ("tcp:[::]:0", "--insecure"),
        ("tcp:192.0.2.1:0", "--insecure"),
    ]:
        with pytest.raises(ListenError, match=what):
            async with serving(tmp_path, address=address):
                pass


async def test_plaintext_off_this_machine_has_to_be_asked_for(metaserver: Metaserver) -> None:
    await metaserver.stop()
    metaserver.options["access"] = Access(insecure=True)
    await metaserver.start("tcp:0.0.0.0:0")
    (await rpc.connect(metaserver.address.replace("0.0.0.0", "127.0.0.1"))).abort()


# Requests


async def _every_request(client: Client) -> None:
    """Send every kind of request at least once and look at its reply."""
    call, change = client.connection.call, client.change
    directory = await client.make(b"directory", DIRECTORY)
    file = await client.make(b"file", parent=directory.ino)
    link = await client.make(b"symlink", 0o120777, target=b"target")
    assert (await call(wire.ReadLink(link.ino), wire.TargetIs)).target == b"target"
    found = await call(wire.Lookup(directory.ino, b"file"), wire.Found)
    assert found.attributes == file
    assert (await client.attributes(file.ino)) == file
    assert (await change(wire.SetAttributes(file.ino, mode=0o600))).attributes[0].mode == stat.S_IFREG | 0o600
    assert (await change(wire.Link(file.ino, wire.ROOT_INO, b"linked"))).attributes[0].nlink == 2
    await change(wire.Rename(directory.ino, b"file", wire.ROOT_INO, b"moved"))
    await change(wire.SetXattr(file.ino, b"user.a", b"value"))
    assert (await call(wire.GetXattr(file.ino, b"user.a"), wire.XattrIs)).value == b"value"
    assert (await call(wire.ListXattrs(file.ino), wire.XattrNames)).names == [b"user.a"]
    await change(wire.RemoveXattr(file.ino, b"user.a"))
    written = (await change(wire.WriteInline(file.ino, 2, b"data"))).attributes[0]
    content = await call(wire.GetContent(file.ino, 0, 100), wire.Content)
    assert (content.inline, content.attributes.size) == (b"\0\0data", 6)
    ids = (await call(wire.NewSlices(2), wire.SliceIds)).ids
    laid = wire.Slice(0, 5000, ids[0], 0)
    await change(wire.CommitSlices(file.ino, [laid], 5000, True, written.version))
    assert (await call(wire.GetContent(file.ino, 0, 5000), wire.Content)).slices == [laid]
    await call(wire.CompactSlices(file.ino, 0, 1, digest([laid]), [laid]), wire.Done)
    await call(wire.Sync(), wire.Done)
    copy = (await change(wire.MakeTemporary(wire.ROOT_INO, 0o100600, 0, 0))).attributes[0]
    assert (await change(wire.Allocate(copy.ino, 0, 100_000, False, False))).attributes[0].size == 100_000
    assert (await change(wire.CopyRange(file.ino, 0, copy.ino, 0, 5000))).done == 5000
    assert (await call(wire.Seek(copy.ino, 0, True), wire.Sought)).offset == 5000
    assert (await call(wire.OpenFile(copy.ino, True), wire.Found)).attributes.ino == copy.ino
    await call(wire.ClosedForWriting([copy.ino]), wire.Done)
    assert (await call(wire.TestLock(messages.LOCK), wire.LockIs)).lock is None
    for request in (wire.SetLock(messages.LOCK, 1), wire.CancelLock(2), wire.SetLock(messages.LOCK, 3, unlock=True)):
        await call(request, wire.LockAnswer)
    assert not (await call(wire.HoldLocks([], True), wire.LocksLost)).indexes
    await call(wire.Reap([copy.ino]), wire.Done)
    assert (await call(wire.GetStatistics(), wire.Statistics)).inodes >= 4
    await change(wire.Remove(wire.ROOT_INO, b"linked", False))
    removed = await change(wire.Remove(wire.ROOT_INO, b"moved", False))
    assert removed.attributes[0].nlink == 0
    assert (await client.attributes(file.ino)).nlink == 0, "kept as long as the session uses it"
    await call(wire.Reap([file.ino]), wire.Done)
    assert await refused(client.attributes(file.ino)) is ErrorCode.NOT_FOUND
    await _slices_become_unused(client, ids[0])
    assert (await call(wire.InspectSlices(ids), wire.SlicesInspected)).idle == ids
    assert (await call(wire.RetireSlices(ids), wire.SliceIds)).ids == ids
    number = (await call(wire.ReserveInodes(1), wire.InodesReserved)).first
    new = wire.NewFile(directory.ino, b"whole", number, 0o600, 1, 2, 3, 4, 5, 6, b"content")
    assert (await change(wire.MakeFiles([new]))).attributes[0].ino == number
    assert (await call(wire.GetContent(number, 0, 100), wire.Content)).inline == b"content"
    gone = await change(wire.RemoveNames([wire.RemovedName(directory.ino, b"whole", number, 7)]))
    assert [(each.ino, each.nlink) for each in gone.attributes] == [(number, 0), (directory.ino, 2)]
    await change(wire.Remove(wire.ROOT_INO, b"directory", True))
    pages = [page async for page in client.connection.stream(wire.FetchDirectory(1, 0, 100, 0, 0))]
    assert [entry.name for page in pages for entry in page.entries] == [b"symlink"]
    told = [page async for page in client.connection.follow(wire.FollowEvents(VOLUME, 0, False))]
    assert [event.version for page in told for event in page.events] == list(range(1, told[-1].version + 1))
    await call(wire.CreateIdentity(wire.Identity("somebody"), bytes(32)), wire.Done)
    assert [each.name for each in (await call(wire.ListIdentities(), wire.Identities)).identities] == ["somebody"]
    await call(wire.RevokeIdentity("somebody"), wire.Done)
    assert (await client.renew(client.session.version)).everything is False
    status = await client.connection.call(wire.GetStatus(VOLUME), wire.Status)
    assert client.session.session in [each.session for each in status.sessions]
    assert await refused(call(wire.EvictSession(VOLUME, bytes(16)), wire.Done)) is ErrorCode.NOT_FOUND
    await call(wire.CloseSession(), wire.Done)
    assert await refused(client.attributes()) is ErrorCode.STALE_SESSION


async def _slices_become_unused(client: Client, slice_id: int) -> None:
    async def unused() -> list[int]:
        return (await client.connection.call(wire.ListSlices(100), wire.SliceIds)).ids

    await until(unused)
    assert await unused() == [slice_id]
    await client.connection.call(wire.ForgetSlices([slice_id]), wire.Done)
    assert await unused() == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0"])
async def test_every_request(tmp_path: Path, engine: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: set[type] = set()
    encode, encode_reply = wire.encode, wire.encode_reply

    def noting(number: int, message: wire.Request | wire.Reply) -> bytes:
        sent.add(type(message))
        return encode(number, message)

    def noting_reply(number: int, reply: wire.Reply) -> bytearray:
        sent.add(type(reply))
        return encode_reply(number, reply)

    monkeypatch.setattr(wire, "encode", noting)
    monkeypatch.setattr(wire, "encode_reply", noting_reply)
    async with serving(tmp_path, engine, address=address) as metaserver:
        await _every_request(await metaserver.client())
    assert set(typing.get_args(wire.Request)) - {wire.Acknowledge, wire.ReturnLeases} <= sent
    assert wire.Failure in sent


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_fetch_of_several_pages(tmp_path: Path, engine: str) -> None:
    async with serving(tmp_path, engine) as metaserver:
        client = await metaserver.client()
        contents = {b"file%02d" % number: bytes([number]) * 40_000 for number in range(30)}
        made = await asyncio.gather(*(client.make(name) for name in contents))
        for node, data in zip(made, contents.values(), strict=True):
            await client.change(wire.WriteInline(node.ino, 0, data))
        request = wire.FetchDirectory(1, 0, 100, 65536, 2**63 - 1)
        pages = [page async for page in client.connection.stream(request)]
        assert len(pages) > 4
        assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
        assert pages[-1].complete
        assert {entry.name: entry.data for page in pages for entry in page.entries} == contents
        some = [page async for page in client.connection.stream(wire.FetchDirectory(1, 0, 10, 0, 0))]
        assert [(len(page.entries), page.complete) for page in some] == [(10, False)]


async def test_a_stream_can_be_left(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    for number in range(8):
        node = await client.make(b"%d" % number)
        await client.change(wire.WriteInline(node.ino, 0, b"x" * 60_000))
    fetch = wire.FetchDirectory(1, 0, 100, 65536, 2**63 - 1)
    async with contextlib.aclosing(client.connection.stream(fetch)) as pages:
        assert not (await anext(pages)).last
    assert (await client.attributes()).ino == 1
    assert await refused(anext(client.connection.stream(wire.FetchDirectory(99, 0, 1, 0, 0)))) is ErrorCode.NOT_FOUND


async def test_names_that_are_refused(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    for name in (b".", b"..", b"a/b", b"a\0b"):
        assert await refused(client.make(name)) is ErrorCode.INVALID


async def test_a_volume_is_made_once_and_opened_if_it_exists(metaserver: Metaserver) -> None:
    connection = await metaserver.connect()
    create = wire.CreateVolume("one", "file:///blocks", 4096)
    await connection.call(create, wire.Done)
    assert await refused(connection.call(create, wire.Done)) is ErrorCode.VOLUME_EXISTS
    client = Client(connection)
    assert await refused(client.open("two")) is ErrorCode.NO_SUCH_VOLUME
    opened = await client.open("one")
    assert (opened.store, opened.inline_limit, opened.lease_ms) == ("file:///blocks", 4096, 30_000)
    assert not opened.resumed


async def test_a_session_is_needed(metaserver: Metaserver) -> None:
    connection = await metaserver.connect()
    alone = (wire.Hello, wire.CreateVolume, wire.OpenSession, wire.FollowEvents, wire.GetStatus, wire.EvictSession)
    operators = (wire.CreateIdentity, wire.RevokeIdentity, wire.ListIdentities)
    for request in messages.REQUESTS:
        if isinstance(request, wire.FetchDirectory):
            assert await refused(anext(connection.stream(request))) is ErrorCode.INVALID
        elif not isinstance(request, (*alone, *operators, wire.Acknowledge, wire.ReturnLeases)):
            assert await refused(connection.call(request, wire.Done)) is ErrorCode.INVALID
    assert await refused(connection.call(wire.Hello(wire.PROTOCOL_VERSION, "again"), wire.Welcome)) is ErrorCode.INVALID
    client = await metaserver.client()
    assert await refused(client.open(VOLUME)) is ErrorCode.INVALID, "one session a connection"


async def test_volumes_are_apart(metaserver: Metaserver) -> None:
    one, two = await metaserver.client("one"), await metaserver.client("two")
    made = await one.make(b"file")
    assert await refused(two.attributes(made.ino)) is ErrorCode.NOT_FOUND
    assert (await two.renew(two.session.version)).names == []
    connection = Client(await metaserver.connect())
    assert not (await connection.open("two", resume=one.session.session)).resumed
    assert await refused(connection.attributes(made.ino)) is ErrorCode.NOT_FOUND
    assert (await one.attributes(made.ino)) == made, "the session that was asked for goes on"


# Sessions


async def test_resuming_over_a_new_connection(metaserver: Metaserver) -> None:
    old, other = await metaserver.client(), await metaserver.client()
    await old.make(b"mine")
    await other.make(b"theirs")
    new = Client(await metaserver.connect())
    assert (await new.open(VOLUME, resume=old.session.session)).resumed
    assert new.session.session == old.session.session
    renewed = await new.renew(old.session.version)
    assert renewed.names == [(1, b"mine")], "own changes: their replies may have been lost"
    assert await refused(old.attributes()) is ErrorCode.STALE_SESSION
    assert await refused(old.renew(0)) is ErrorCode.STALE_SESSION
    await old.open(VOLUME)
    await old.attributes()


async def test_a_session_that_is_not_renewed_expires_and_its_orphans_go(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.2) as metaserver:
        lazy = await metaserver.client()
        orphan = await lazy.make(b"file")
        await lazy.change(wire.Remove(1, b"file", False))
        await until(lambda: not metaserver.server.sessions.all())
        assert await refused(lazy.attributes()) is ErrorCode.STALE_SESSION
        assert not (await lazy.open(VOLUME, lazy.session.session)).resumed
        await lazy.renew(0)
        await until(lambda: _is_gone(lazy, orphan.ino))


async def test_closing_a_session_reaps_its_orphans(metaserver: Metaserver) -> None:
    client, other = await metaserver.client(), await metaserver.client()
    made = [await client.make(b"%d" % number) for number in range(80)]
    for number in range(80):
        await client.change(wire.Remove(1, b"%d" % number, False))
    assert (await other.attributes(made[0].ino)).nlink == 0
    await client.connection.call(wire.CloseSession(), wire.Done)
    for node in made:
        await until(functools.partial(_is_gone, other, node.ino))


@pytest.mark.parametrize("engine", ENGINES)
async def test_orphans_of_an_earlier_run_are_reaped(tmp_path: Path, engine: str) -> None:
    async with serving(tmp_path, engine, lease_s=0.3) as metaserver:
        client = await metaserver.client()
        orphan = await client.make(b"file")
        await client.change(wire.Remove(1, b"file", False))
        await metaserver.stop()
        await metaserver.start()
        await until(lambda: not metaserver.engine.waiting)
        client = await metaserver.client()

        async def gone() -> bool:
            await client.renew(0)
            return await _is_gone(client, orphan.ino)

        await until(gone)


async def _is_gone(client: Client, ino: int) -> bool:
    try:
        await client.attributes(ino)
    except rpc.Refused as error:
        return error.code is ErrorCode.NOT_FOUND
    return False


async def test_a_write_that_waited_past_its_lease_is_not_committed(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.2) as metaserver:
        client = await metaserver.client()
        metaserver.engine.hold()
        late = asyncio.create_task(refused(client.make(b"late")))
        (session,) = metaserver.server.sessions.all()
        await until(lambda: not session.is_live)
        metaserver.engine.let_go()
        assert await late is ErrorCode.STALE_SESSION
        await client.open(VOLUME)
        assert await refused(client.connection.call(wire.Lookup(1, b"late"), wire.Found)) is ErrorCode.NOT_FOUND


# The change feed


async def test_own_changes_are_told_after_a_resumption(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await metaserver.client()
    start = one.session.version
    directory = await one.make(b"directory", DIRECTORY)
    file = await one.make(b"file", parent=directory.ino)
    await one.change(wire.Rename(directory.ino, b"file", 1, b"moved"))
    await one.connection.call(wire.NewSlices(1), wire.SliceIds)
    await refused(one.make(b"moved"))
    assert (await one.renew(start)).inodes == []
    assert (await two.renew(start)).inodes == [], "others are told by breaks"
    again = Client(await metaserver.connect())
    await again.open(VOLUME, one.session.session)
    renewed = await again.renew(start)
    assert set(renewed.names) == {(1, b"directory"), (directory.ino, b"file"), (1, b"moved")}
    assert set(renewed.inodes) == {1, directory.ino, file.ino}
    assert not renewed.everything
    assert (await again.renew(start)).inodes == [], "told once"


async def test_a_history_that_is_too_long_is_everything(tmp_path: Path) -> None:
    async with serving(tmp_path, feed_changes=4) as metaserver:
        one = await metaserver.client()
        for number in range(5):
            await one.make(b"%d" % number)
        again = Client(await metaserver.connect())
        await again.open(VOLUME, one.session.session)
        renewed = await again.renew(one.session.version)
        assert renewed.everything
        nothing = wire.Renewed(30_000, renewed.version, [], [], False, renewed.metaservers)
        assert await again.renew(renewed.version) == nothing


async def test_an_unknown_outcome_is_looked_for(metaserver: Metaserver, caplog: pytest.LogCaptureFixture) -> None:
    one = await metaserver.client()
    metaserver.engine.error = Unknown("the disk is on fire")
    assert await refused(one.make(b"a")) is ErrorCode.INTERNAL, "without a number there is nothing to look for"
    assert "on fire" in caplog.text
    slot = (3, 1)
    assert (
        await refused(one.connection.change(wire.MakeNode(1, b"a", FILE, 0, 0), wire.Changed, *slot))
        is ErrorCode.INTERNAL
    )
    metaserver.engine.error = None
    made = await one.connection.change(wire.MakeNode(1, b"a", FILE, 0, 0), wire.Changed, *slot)
    assert (await one.attributes(made.attributes[0].ino)).nlink == 1


async def test_a_change_is_told_even_if_its_client_is_gone(metaserver: Metaserver) -> None:
    one = await metaserver.client()
    metaserver.engine.hold()
    lost = asyncio.create_task(one.make(b"a"))
    await until(lambda: metaserver.engine.waiting)
    one.connection.abort()
    with pytest.raises(rpc.Disconnected):
        await lost
    metaserver.engine.let_go()
    await until(lambda: not metaserver.server.connections)
    again = Client(await metaserver.connect())
    await again.open(VOLUME, one.session.session)
    assert (await again.renew(one.session.version)).names == [(1, b"a")]


# Limits


async def test_no_more_than_so_many_requests_run_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(in_flight=8)) as metaserver:
        client, other = await metaserver.client(), await metaserver.client()
        metaserver.engine.hold()
        calls = [asyncio.create_task(client.attributes()) for _ in range(100)]
        await until(lambda: metaserver.engine.waiting == 8)
        for _ in range(20):
            assert await refused(other.connection.call(wire.Hello(0, "idle"), wire.Done)) is ErrorCode.INVALID
        assert metaserver.engine.waiting == 8
        metaserver.engine.let_go()
        assert len(await asyncio.gather(*calls)) == 100


async def _much_to_fetch(client: Client) -> bytes:
    """Make a directory of a megabyte; return many requests for it."""
    for number in range(16):
        node = await client.make(b"%d" % number)
        await client.change(wire.WriteInline(node.ino, 0, b"x" * 65536))
    request = wire.FetchDirectory(1, 0, 100, 65536, 2**63 - 1)
    return b"".join(wire.encode(number, request) for number in range(10, 210))


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(stall_s=0.3, unsent_bytes=128 * 1024, in_flight=8)
    async with serving(tmp_path, limits=limits) as metaserver:
        client = await metaserver.client()
        requests = await _much_to_fetch(client)
        raw = await metaserver.raw(greeted=True)
        raw.send(wire.encode(2, wire.OpenSession(VOLUME, "lazy", None)))
        await raw.receive()
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        raw.send(requests)
        most = 0

        def gone() -> bool:
            nonlocal most
            most = max([most, *(connection.unsent_bytes for connection in metaserver.server.connections)])
            return len(metaserver.server.connections) == 1

        await until(gone)
        assert 128 * 1024 < most < 128 * 1024 + 8 * 2 * wire.PAGE_BYTES
        assert "does not take its replies" in caplog.text
        assert (await client.attributes()).ino == 1


async def test_a_client_that_reads_late_gets_everything(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(unsent_bytes=64 * 1024, in_flight=8)) as metaserver:
        client = await metaserver.client()
        requests = await _much_to_fetch(client)
        raw = await metaserver.raw(greeted=True)
        raw.send(wire.encode(2, wire.OpenSession(VOLUME, "late", None)))
        await raw.receive()
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        raw.send(requests)
        await until(lambda: any(connection.unsent_bytes > 64 * 1024 for connection in metaserver.server.connections))
        raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
        entries: dict[int, int] = {}
        for _ in range(200):
            last = False
            while not last:
                number, page = await raw.receive()
                assert isinstance(page, wire.DirectoryPage)
                entries[number] = entries.get(number, 0) + len(page.entries)
                last = page.last
        assert entries == dict.fromkeys(range(10, 210), 16)


async def test_closing_answers_what_is_in_progress(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    metaserver.engine.hold()
    making = asyncio.create_task(client.make(b"file"))
    await until(lambda: metaserver.engine.waiting)
    closing = asyncio.create_task(metaserver.stop())
    await until(lambda: not os.path.exists(metaserver.address.removeprefix("unix:")))
    metaserver.engine.let_go()
    assert (await making).nlink == 1
    await closing
    assert not metaserver.server.connections


# Errors inside


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFull("no space"), ErrorCode.NO_SPACE),
        (Conflict("again and again"), ErrorCode.BUSY),
        (RuntimeError("a bug"), ErrorCode.INTERNAL),
    ],
)
async def test_errors_of_the_engine(
    metaserver: Metaserver, error: Exception, code: ErrorCode, caplog: pytest.LogCaptureFixture
) -> None:
    client = await metaserver.client()
    metaserver.engine.error = error
    assert await refused(client.make(b"a")) is code
    assert await refused(client.attributes()) is code
    fetch = wire.FetchDirectory(1, 0, 1, 0, 0)
    assert await refused(anext(client.connection.stream(fetch))) is code
    metaserver.engine.error = None
    await client.attributes()
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) == (code is ErrorCode.INTERNAL)


# Hostile clients


def _framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def _hostile() -> list[tuple[str, bytes]]:
    """Frames that end a connection. The rest of a truncated one never comes."""
    chance = random.Random(20)
    lookup = wire.encode(7, wire.Lookup(1, b"name"))
    return [
        ("no length", b"\0\0\0\0"),
        ("largest length", b"\xff\xff\xff\xff"),
        ("one over the limit", struct.pack(">I", wire.MAX_REQUEST + 1)),
        ("the other byte order", struct.pack("<I", 20) + lookup),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n"),
        ("a reply", wire.encode(7, wire.Done())),
        ("noise", _framed(chance.randbytes(1000))),
        ("zeros", bytes(1000)),
        ("nested", _framed(b"\x92\x01\x92\x05" + b"\x91" * 100_000)),
        ("long array", _framed(b"\x92\x01\x92\x0e\xdd\xff\xff\xff\xff")),
        ("many inodes", _framed(msgpack.packb([7, [14, [2**40] * 20_000]]))),
        ("text for bytes", _framed(msgpack.packb([7, [6, 1, "name"]]))),
        ("extension", _framed(msgpack.packb([7, msgpack.ExtType(5, b"")]))),
        ("negative id", _framed(msgpack.packb([-7, [5]]))),
        ("a good frame, then noise", lookup + b"\xff" * 100),
        ("many small arrays", _framed(b"\x92\x07\xdc\xff\xff" + b"\x90" * 65535)),
    ]


async def _lives(client: Client) -> None:
    assert (await client.attributes()).ino == 1


@pytest.mark.parametrize("frame", [frame for _, frame in _hostile()], ids=[what for what, _ in _hostile()])
@pytest.mark.parametrize("greeted", [True, False])
async def test_a_hostile_frame_ends_its_own_connection_only(
    metaserver: Metaserver, frame: bytes, greeted: bool
) -> None:
    client = await metaserver.client()
    raw = await metaserver.raw(greeted)
    raw.send(frame)
    replies = await raw.until_closed()
    assert isinstance(replies[-1], wire.Failure)
    assert replies[-1].code is ErrorCode.MALFORMED
    await _lives(client)


async def test_a_hello_is_limited_more_than_a_request(metaserver: Metaserver) -> None:
    raw = await metaserver.raw()
    raw.send(struct.pack(">I", wire.MAX_HELLO + 1))
    assert [type(reply) for reply in await raw.until_closed()] == [wire.Failure]
    raw = await metaserver.raw()
    raw.send(wire.encode(1, wire.GetAttributes(1)))
    assert [type(reply) for reply in await raw.until_closed()] == [wire.Failure]


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 19])
async def test_a_truncated_frame_is_dropped_with_its_connection(metaserver: Metaserver, keep: int) -> None:
    client = await metaserver.client()
    raw = await metaserver.raw(greeted=True)
    raw.send(wire.encode(7, wire.OpenSession(VOLUME, "cut", None))[:keep])
    raw.writer.write_eof()
    assert await raw.until_closed() == []
    await until(lambda: len(metaserver.server.connections) == 1)
    await _lives(client)


async def test_frames_byte_by_byte(metaserver: Metaserver) -> None:
    raw = await metaserver.raw()
    for number in range(3):
        for byte in wire.encode(number, wire.Hello(wire.PROTOCOL_VERSION, "slow")):
            raw.send(bytes([byte]))
            await asyncio.sleep(0)
    assert [(await raw.receive())[0] for _ in range(3)] == [0, 1, 2]


_FRAMES = [wire.encode(5, message) for message in messages.REQUESTS]


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_random_and_mutated_frames(metaserver: Metaserver, data: st.DataObject) -> None:
    client = await metaserver.client()
    raw = await metaserver.raw(greeted=True)
    raw.send(wire.encode(2, wire.OpenSession(VOLUME, "fuzz", None)))
    await raw.receive()
    for frame in data.draw(st.lists(st.sampled_from(_FRAMES) | st.binary(max_size=200), min_size=1, max_size=4)):
        mutated = bytearray(frame)
        for _ in range(data.draw(st.integers(0, 3))):
            if mutated:
                mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
        raw.send(bytes(mutated))
    raw.writer.write_eof()
    for reply in await raw.until_closed():
        assert not (isinstance(reply, wire.Failure) and reply.code is ErrorCode.INTERNAL), reply
    await _lives(client)
    client.connection.abort()


# The client's end


async def test_a_lost_connection_in_the_middle_of_a_call(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    metaserver.engine.hold()
    calls = [asyncio.create_task(call) for call in (client.make(b"a"), client.attributes())]
    fetch = wire.FetchDirectory(1, 0, 1, 0, 0)
    calls.append(asyncio.create_task(anext(client.connection.stream(fetch))))  # type: ignore[arg-type]
    await until(lambda: metaserver.engine.waiting == 3)
    metaserver.drop_connections()
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, rpc.Disconnected)
        assert not isinstance(outcome, rpc.NotSent)
    with pytest.raises(rpc.NotSent):
        await client.attributes()


class Mount:
    """A session as a worker has it."""

    def __init__(self, metaserver: Metaserver) -> None:
        self.changes: list[wire.Renewed] = []
        self.lost = 0
        self.session = Session(
            metaserver.address,
            VOLUME,
            client="mount",
            on_changes=self.changes.append,
            on_renewed=lambda deadline: None,
            on_lost=self._lost,
        )

    def _lost(self) -> None:
        self.lost += 1

    async def make(self, name: bytes) -> wire.Changed:
        return await self.session.call(wire.MakeNode(1, name, FILE, 0, 0), wire.Changed)

    async def lookup(self, name: bytes) -> wire.Found:
        return await self.session.call(wire.Lookup(1, name), wire.Found)


async def test_after_a_lost_connection_reads_and_changes_are_repeated(metaserver: Metaserver) -> None:
    await (await metaserver.client()).connection.call(wire.CloseSession(), wire.Done)
    mount = Mount(metaserver)
    await mount.session.open()
    await mount.make(b"before")
    metaserver.engine.hold()
    read = asyncio.create_task(mount.lookup(b"before"))
    write = asyncio.create_task(mount.make(b"during"))
    await until(lambda: metaserver.engine.waiting == 2)
    metaserver.drop_connections()
    metaserver.engine.let_go()
    made = (await write).attributes[0]
    assert (await read).attributes.ino > 1
    assert (await mount.lookup(b"during")).attributes == made, "made once"
    assert mount.lost == 0
    await mount.session.close()


async def test_a_session_outlives_a_restart_of_the_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as metaserver:
        client = await metaserver.client()
        await client.connection.call(wire.CloseSession(), wire.Done)
        mount = Mount(metaserver)
        first = (await mount.session.open()).session
        await mount.make(b"file")
        await metaserver.stop()
        reading = asyncio.create_task(mount.lookup(b"file"))
        await metaserver.start()
        await reading
        assert mount.lost == 0
        assert mount.session.id == first
        await mount.make(b"another")  # nobody else is missing
        await mount.session.close()
        assert mount.session.id not in {session.id for session in metaserver.server.sessions.all()}


async def test_a_session_renews_itself(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.3) as metaserver:
        await metaserver.client()
        mount = Mount(metaserver)
        await mount.session.open()
        other = await metaserver.client()
        await other.make(b"theirs")
        await until(lambda: [session.client for session in metaserver.server.sessions.all()] == ["mount"])
        assert await mount.lookup(b"theirs")
        assert mount.lost == 0
        await mount.session.close()


@pytest.mark.parametrize(
    "answer",
    [
        _framed(b"\xc1"),
        b"\xff\xff\xff\xff",
        wire.encode(2, wire.Done()),
        wire.encode(3, wire.Done()),
        wire.encode(0, wire.Failure(ErrorCode.MALFORMED, "go away")),
        wire.encode(2, wire.GetAttributes(1)),
    ],
    ids=["noise", "oversized", "wrong type", "unknown id", "given up", "a request"],
)
async def test_a_client_survives_a_hostile_server(tmp_path: Path, answer: bytes) -> None:
    def replies(number: int, request: wire.Request) -> list[bytes]:
        welcome = wire.encode(number, wire.Welcome(wire.PROTOCOL_VERSION, "fake", 1))
        return [welcome] if isinstance(request, wire.Hello) else [answer]

    async with fake_server(tmp_path, replies) as address:
        connection = await rpc.connect(address)
        with pytest.raises(rpc.Disconnected):
            await connection.call(wire.GetAttributes(1), wire.Found)
        assert connection.lost


async def test_a_reply_to_a_call_that_was_given_up_is_passed_over(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    metaserver.engine.hold()
    call = asyncio.create_task(client.attributes())
    await until(lambda: metaserver.engine.waiting)
    call.cancel()
    metaserver.engine.let_go()
    assert (await client.attributes()).ino == 1


async def test_nobody_there(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", "tcp:127.0.0.1:1"):
        with pytest.raises(rpc.Disconnected, match="cannot connect"):
            await rpc.connect(address)
    with pytest.raises(ValueError, match="not an address"):
        await rpc.connect("127.0.0.1:7000")
