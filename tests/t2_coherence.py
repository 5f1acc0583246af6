"""The metaserver's side of coherence, over sockets: grants, breaks, eviction, the fence, grace, remembered outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from served import DIRECTORY, FILE, VOLUME, Client, Metaserver, serving, until

from fuseclient.data.compaction import digest
from fuseclient.worker import rpc
from metaserver import coherence, fencing, inodes, opens, recovery, wire
from metaserver.errors import Fenced
from metaserver.server import Server
from metaserver.sessions import Session, Sessions
from metaserver.volumes import Volume
from metaserver.wire import ErrorCode

ROOT = wire.ROOT_INO


@pytest.fixture
async def metaserver(tmp_path: Path) -> AsyncIterator[Metaserver]:
    async with serving(tmp_path) as running:
        yield running


class Holder(Client):
    """A client that keeps the breaks it is told and acknowledges them when asked to."""

    def __init__(self, connection: rpc.Connection, *, silent: bool = False) -> None:
        super().__init__(connection)
        self.told: list[wire.Break] = []
        self.silent = silent
        connection.on_break(self._told)

    def _told(self, told: wire.Break) -> None:
        self.told.append(told)
        if not self.silent:
            self.connection.acknowledge(told.number)

    def acknowledge(self) -> None:
        for told in self.told:
            self.connection.acknowledge(told.number)

    async def lookup(self, name: bytes, parent: int = ROOT) -> wire.Found | None:
        try:
            return await self.connection.call(wire.Lookup(parent, name), wire.Found)
        except rpc.Refused as refused:
            if refused.code is not ErrorCode.NOT_FOUND:
                raise
            return None


async def holder(metaserver: Metaserver, *, silent: bool = False) -> Holder:
    await metaserver.client()
    client = Holder(await metaserver.connect(), silent=silent)
    await client.open(VOLUME)
    return client


async def refused(call: object) -> ErrorCode:
    with pytest.raises(rpc.Refused) as caught:
        await call  # type: ignore[misc]
    return caught.value.code


# Breaks


async def test_a_holder_is_told_before_the_change_is_made(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver, silent=True)
    file = await one.make(b"file")
    assert await two.lookup(b"file")
    change = asyncio.create_task(one.change(wire.SetAttributes(file.ino, mode=0o600)))
    await until(lambda: two.told)
    assert (two.told[0].names, two.told[0].inodes) == ([], [file.ino])
    assert (await one.attributes(file.ino)).mode == FILE, "not yet"
    assert not change.done()
    two.acknowledge()
    assert (await change).attributes[0].mode & 0o777 == 0o600


async def test_what_nobody_else_holds_is_told_to_nobody(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    await two.lookup(b"absent")
    directory = await one.make(b"dir", DIRECTORY)
    file = await one.make(b"file", parent=directory.ino)
    told = len(two.told)
    await one.change(wire.SetAttributes(file.ino, mode=0o600))
    await one.change(wire.Rename(directory.ino, b"file", directory.ino, b"moved"))
    await one.change(wire.Remove(directory.ino, b"moved", False))
    assert len(two.told) == told


@pytest.mark.parametrize("name", [b"file", b"absent"])
async def test_names_are_told_present_or_not(metaserver: Metaserver, name: bytes) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    await one.make(b"file")
    await two.lookup(name)
    if name == b"file":
        await one.change(wire.Remove(ROOT, name, False))
    else:
        await one.make(name)
    assert (ROOT, name) in two.told[-1].names


async def test_an_inode_is_told_by_whatever_name_it_is_changed(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    here, there = await one.make(b"here", DIRECTORY), await one.make(b"there", DIRECTORY)
    file = await one.make(b"file", parent=here.ino)
    await one.change(wire.Link(file.ino, there.ino, b"link"))
    assert await two.lookup(b"link", there.ino)
    await one.change(wire.Remove(here.ino, b"file", False))
    assert two.told[-1] == wire.Break(two.told[-1].number, [], [file.ino]), "its number of links has changed"


async def test_what_a_fetch_brought_is_held_and_given_up_with_the_break(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    made = [await one.make(b"%d" % number) for number in range(20)]
    request = wire.FetchDirectory(ROOT, 0, 100, 0, 0)
    assert [page async for page in two.connection.stream(request)]
    for node in made:
        await one.change(wire.SetAttributes(node.ino, mode=0o600))
    assert [told.inodes for told in two.told] == [[node.ino] for node in made]
    for node in made:
        await one.change(wire.SetAttributes(node.ino, mode=0o640))
    assert len(two.told) == 20, "what was dropped is not held"


async def test_what_is_read_while_it_is_being_changed_is_not_to_be_kept(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver, silent=True)
    three = await holder(metaserver)
    file = await one.make(b"file")
    await two.lookup(b"file")
    change = asyncio.create_task(one.change(wire.SetAttributes(file.ino, mode=0o600)))
    await until(lambda: two.told)
    found = await three.lookup(b"file")
    assert found is not None
    assert found.attributes.mode == FILE
    assert three.told == [wire.Break(0, [], [file.ino])], "told before the reply, and nobody waits"
    two.acknowledge()
    await change


async def test_a_reply_that_a_change_overtook_is_not_to_be_kept(metaserver: Metaserver) -> None:
    """The read is of before the change, its reply of after."""
    one, two = await metaserver.client(), await holder(metaserver)
    file = await one.make(b"file")
    server = metaserver.server.coherence
    (session,) = [each for each in metaserver.server.sessions.all() if each.id == two.session.session]
    since = server.version(session.volume)
    await one.change(wire.SetAttributes(file.ino, mode=0o600))
    assert server.grant(session, since, coherence.Grant(None, None, [file.ino])) == wire.Break(0, [], [file.ino])
    assert server.grant(session, server.version(session.volume), coherence.Grant(None, None, [file.ino])) is None


async def test_two_that_change_one_thing_at_once_do_not_deadlock(metaserver: Metaserver) -> None:
    one, two = await holder(metaserver), await holder(metaserver)
    for client in (one, two):
        await client.lookup(b"a")
    calls = [client.make(b"%d-%d" % (which, n)) for which, client in enumerate((one, two)) for n in range(40)]
    assert len(await asyncio.gather(*calls)) == 80


async def test_scenario_14_one_who_ignores_breaks_is_evicted_and_fenced(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.5) as metaserver:
        bad = await holder(metaserver, silent=True)
        await bad.lookup(b"file")
        one = await metaserver.client()
        began = time.monotonic()
        making = asyncio.create_task(one.make(b"file"))
        await until(lambda: bad.told)
        renewal = asyncio.create_task(refused(bad.renew(0)))
        try:
            await making
        except rpc.Refused as error:
            if error.code is not ErrorCode.STALE_SESSION:  # its own lease ran out: nobody renews it here
                raise
        assert 0.2 < time.monotonic() - began < 5
        assert await renewal is ErrorCode.STALE_SESSION, "scenario 4: what is not acknowledged stops the renewal"
        assert await refused(bad.make(b"late")) is ErrorCode.STALE_SESSION
        assert not (await bad.open(VOLUME, bad.session.session)).resumed


async def test_a_break_is_sent_again_to_one_who_comes_back(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver, silent=True)
    await two.lookup(b"file")
    making = asyncio.create_task(one.make(b"file"))
    await until(lambda: two.told)
    two.connection.abort()
    again = Holder(await metaserver.connect())
    assert (await again.open(VOLUME, two.session.session)).resumed
    await making
    assert again.told == two.told


async def test_a_change_that_waits_is_not_made_for_a_connection_that_was_replaced(metaserver: Metaserver) -> None:
    """Who resumes the session may be a worker that knows nothing of it."""
    one, two = await holder(metaserver, silent=True), await holder(metaserver)
    await one.lookup(b"file")
    making = asyncio.create_task(two.make(b"file"))
    await until(lambda: one.told)
    again = Holder(await metaserver.connect())
    assert (await again.open(VOLUME, two.session.session)).resumed
    assert await again.lookup(b"file") is None
    assert again.told == [wire.Break(0, [(ROOT, b"file")], [])], "it may be made still"
    assert (ROOT, b"file") in (await again.renew(again.session.version)).names
    one.acknowledge()
    assert await refused(making) is ErrorCode.STALE_SESSION
    assert await again.lookup(b"file") is None
    assert len(again.told) == 1, "it cannot be made any more"


async def test_one_who_holds_too_much_is_to_drop_everything(
    metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coherence, "SESSION_BITMAPS", 2)
    one, two = await metaserver.client(), await holder(metaserver)
    for number in range(2200):
        await one.make(b"%d" % number)
    assert [page async for page in two.connection.stream(wire.FetchDirectory(ROOT, 0, 4096, 0, 0))]
    await until(lambda: any(told.everything for told in two.told))
    (session,) = [each for each in metaserver.server.sessions.all() if each.id == two.session.session]
    await until(lambda: not session.pending)
    told = len(two.told)
    await one.make(b"another")
    assert len(two.told) == told, "it holds nothing any more"


async def test_what_is_given_back_is_not_held_and_costs_nothing(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    made = [await one.make(b"%d" % number) for number in range(20)]
    assert [page async for page in two.connection.stream(wire.FetchDirectory(ROOT, 0, 100, 0, 0))]
    (session,) = [each for each in metaserver.server.sessions.all() if each.id == two.session.session]
    held = metaserver.server.coherence.held
    assert held(session) == (1, 21)
    assert two.connection.return_leases([], [node.ino for node in made[:10]])
    await two.attributes(made[0].ino)
    assert held(session) == (1, 12), "what was asked for after it is held again"
    for node in made:
        await one.change(wire.SetAttributes(node.ino, mode=0o600))
    assert [told.inodes for told in two.told] == [[node.ino] for node in (made[0], *made[10:])]
    assert two.connection.return_leases([ROOT], [ROOT])
    await two.renew(0)
    assert held(session) == (0, 0)
    assert not session.holder.blocks, "nor does it take memory"
    await one.make(b"another")
    assert len(two.told) == 11


async def test_what_an_earlier_connection_gives_back_is_held(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    file = await one.make(b"file")
    again = Holder(await metaserver.connect())
    assert (await again.open(VOLUME, two.session.session)).resumed
    await again.attributes(file.ino)
    assert two.connection.return_leases([ROOT], [file.ino])
    assert await refused(two.renew(0)) is ErrorCode.STALE_SESSION, "it was read"
    await one.change(wire.SetAttributes(file.ino, mode=0o600))
    assert [told.inodes for told in again.told] == [[file.ino]]


# The fence and the grace


@pytest.mark.parametrize("late", ["change", "renewal", "cleaning"])
async def test_scenario_12_an_old_server_commits_nothing(metaserver: Metaserver, late: str) -> None:
    """It refuses, nor does it extend leases or clear up; and cuts everybody off as soon as it has found out."""
    one = await metaserver.client()
    old = metaserver.server
    other = Server(metaserver.engine)
    await other.take_over()
    if late == "cleaning":
        with pytest.raises(Fenced):
            await old.janitor.end_record(one.session.session)
    else:
        doing = one.make(b"late") if late == "change" else one.renew(0)
        assert await refused(doing) is ErrorCode.STALE_SESSION
    await until(lambda: one.connection.lost)
    with pytest.raises(Fenced):
        await metaserver.engine.read(old.tenure.check)


async def test_scenario_05_an_ended_session_is_refused_in_the_transaction(metaserver: Metaserver) -> None:
    one = await metaserver.client()
    await metaserver.engine.write(lambda txn: fencing.delete_session(txn, one.session.session))
    assert await refused(one.make(b"late")) is ErrorCode.STALE_SESSION


async def _restart(metaserver: Metaserver) -> None:
    metaserver.abort_clients()
    await metaserver.stop()
    await metaserver.start()


@pytest.mark.parametrize("engine", ["memory://", "lmdb"])
async def test_scenario_08_nothing_is_changed_until_all_are_back(tmp_path: Path, engine: str) -> None:
    async with serving(tmp_path, engine) as metaserver:
        first = await metaserver.client()
        await first.connection.call(wire.CloseSession(), wire.Done)
        old = await holder(metaserver)
        await old.lookup(b"file")
        sessions = [each.id for each in metaserver.server.sessions.all()]
        await _restart(metaserver)
        new = Client(await metaserver.connect())
        await new.open(VOLUME)
        making = asyncio.create_task(new.make(b"file"))
        assert (await new.attributes()).ino == ROOT, "reads go on"
        back = [Holder(await metaserver.connect()) for _ in sessions]
        for client, session in zip(back, sessions, strict=True):
            assert not making.done()
            assert (await client.open(VOLUME, session)).resumed
        await making
        assert all((ROOT, b"file") in client.told[0].names for client in back), "what they hold is not known: anything"


async def test_after_the_grace_nobody_comes_back(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.5) as metaserver:
        old = await holder(metaserver)
        await _restart(metaserver)
        new = Client(await metaserver.connect())
        began = time.monotonic()
        await new.open(VOLUME)
        making = asyncio.create_task(new.make(b"file"))
        while not making.done():
            await new.renew(0)
        await making
        assert time.monotonic() - began > 0.3
        late = Client(await metaserver.connect())
        assert not (await late.open(VOLUME, old.session.session)).resumed


async def test_scenario_09_who_was_ended_in_the_first_grace_is_not_back_in_the_second(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.5) as metaserver:
        old = await holder(metaserver)
        await _restart(metaserver)
        await until(lambda: metaserver.server.janitor.grace.is_over)
        await _restart(metaserver)
        late = Client(await metaserver.connect())
        assert not (await late.open(VOLUME, old.session.session)).resumed


async def test_who_did_not_come_back_before_a_second_restart_still_may(metaserver: Metaserver) -> None:
    old = await holder(metaserver)
    await _restart(metaserver)
    await _restart(metaserver)
    back = Client(await metaserver.connect())
    assert (await back.open(VOLUME, old.session.session)).resumed
    assert (await back.renew(0)).everything, "a worker that knows nothing drops all there is"


@pytest.mark.parametrize("puts_off", [True, False])
async def test_after_a_crash_what_was_cached_may_be_lost(
    metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch, puts_off: bool
) -> None:
    monkeypatch.setattr(type(metaserver.engine), "puts_off", puts_off)
    old = await holder(metaserver)
    assert old.session.puts_off == puts_off
    await old.lookup(b"file")
    with monkeypatch.context() as context:
        context.setattr(recovery, "finish", _nothing)
        await _restart(metaserver)
    back = Holder(await metaserver.connect(), silent=True)
    assert (await back.open(VOLUME, old.session.session)).resumed
    if not puts_off:
        assert not back.told, "nothing can be lost"
        return
    assert back.told[0].everything
    renewal = asyncio.create_task(back.renew(0))
    await back.attributes()
    assert not renewal.done(), "its lease moves past that only when it has dropped everything"
    back.acknowledge()
    await renewal


async def _nothing(*args: object) -> None:
    """Leave the engine as if the server had been killed."""


async def test_after_a_loss_everybody_is_to_drop_everything(
    metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    await one.make(b"file")
    await two.lookup(b"file")
    monkeypatch.setattr(type(metaserver.engine), "losses", 1)
    await two.lookup(b"file")
    assert two.told[0].everything
    assert await refused(two.connection.call(wire.Sync(), wire.Done)) is ErrorCode.INTERNAL
    await two.connection.call(wire.Sync(), wire.Done)


# What the data path adds


async def test_a_compaction_is_told(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    file = await one.make(b"file")
    ids = (await one.connection.call(wire.NewSlices(1), wire.SliceIds)).ids
    laid = wire.Slice(0, 5000, ids[0], 0)
    await one.change(wire.CommitSlices(file.ino, [laid], 5000, False, 0))
    await two.connection.call(wire.GetContent(file.ino, 0, 5000), wire.Content)
    await one.connection.call(wire.CompactSlices(file.ino, 0, 1, digest([laid]), [laid]), wire.Done)
    assert two.told[-1].inodes == [file.ino], "where its content lies is not what it was"


async def test_ranges_are_told(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    source, file = await one.make(b"source"), await one.make(b"file")
    await one.change(wire.WriteInline(source.ino, 0, b"data"))
    for request in (wire.Allocate(file.ino, 0, 10, False, False), wire.CopyRange(source.ino, 0, file.ino, 0, 4)):
        await two.attributes(source.ino)
        await two.attributes(file.ino)
        two.told.clear()
        await one.change(request)
        assert [told.inodes for told in two.told] == [[file.ino]], "what is only read stays"


async def test_a_nameless_file_gets_its_name(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    file = (await one.change(wire.MakeTemporary(ROOT, FILE, 0, 0))).attributes[0]
    assert await two.lookup(b"named") is None
    await one.change(wire.Link(file.ino, ROOT, b"named"))
    assert (ROOT, b"named") in two.told[-1].names


async def test_who_makes_a_directory_knows_that_it_is_empty(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    directory = await two.make(b"dir", DIRECTORY)
    await one.make(b"file", parent=directory.ino)
    assert (directory.ino, b"file") in two.told[-1].names


# Remembered outcomes


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("engine", ["memory://", "lmdb"])
async def test_scenario_10_a_change_sent_again_has_its_first_outcome(
    tmp_path: Path, engine: str, restart: bool
) -> None:
    async with serving(tmp_path, engine) as metaserver:
        only = Client((await metaserver.client()).connection)
        await only.connection.call(wire.CloseSession(), wire.Done)
        await only.open(VOLUME)
        await only.make(b"gone")
        changes: list[wire.Request] = [
            wire.MakeNode(ROOT, b"dir", DIRECTORY, 0, 0),
            wire.Rename(ROOT, b"dir", ROOT, b"moved"),
            wire.Remove(ROOT, b"gone", False),
        ]
        first = [await only.connection.change(each, wire.Changed, n, 1) for n, each in enumerate(changes)]
        session = only.session.session
        if restart:
            await _restart(metaserver)
            only = Client(await metaserver.connect())
            assert (await only.open(VOLUME, session)).resumed
        again = [await only.connection.change(each, wire.Changed, n, 1) for n, each in enumerate(changes)]
        assert again == first
        assert await refused(only.change(changes[2])) is ErrorCode.NOT_FOUND, "without its number it is another change"


async def test_an_overtaken_change_is_refused(metaserver: Metaserver) -> None:
    one = await metaserver.client()
    await one.connection.change(wire.MakeNode(ROOT, b"a", FILE, 0, 0), wire.Changed, 5, 7)
    late = one.connection.change(wire.MakeNode(ROOT, b"b", FILE, 0, 0), wire.Changed, 5, 6)
    assert await refused(late) is ErrorCode.STALE_SESSION


# Many


async def test_scenario_15_very_many_holders(metaserver: Metaserver) -> None:
    """10,000 sessions, most of them without a socket of their own: what they are told is counted."""
    one = await metaserver.client()
    volume = metaserver.server.sessions.all()[0].volume
    server, told = metaserver.server.coherence, 0

    def push(frame: bytes) -> None:
        nonlocal told
        told += 1

    sessions = [metaserver.server.sessions.open(volume, "many") for _ in range(10_000)]
    for session in sessions:
        session.push = push
        server.grant(session, server.version(volume), coherence.Grant(ROOT, None, [ROOT]))
    began = time.monotonic()
    making = asyncio.create_task(one.make(b"file"))
    await until(lambda: told == 10_000)
    for session in sessions:
        server.acknowledge(session, min(session.pending))
    await making
    assert time.monotonic() - began < 5
    assert not any(session.pending for session in sessions)


# Files open for writing


async def _open(client: Client, ino: int) -> wire.Attributes:
    return (await client.connection.call(wire.OpenFile(ino, True), wire.Found)).attributes


async def _close(client: Client, *inos: int) -> None:
    await client.connection.call(wire.ClosedForWriting(list(inos)), wire.Done)


async def _keeps(client: Holder, name: bytes) -> bool:
    """Look a name up and say whether the inode may be kept."""
    client.told.clear()
    found = await client.lookup(name)
    assert found is not None
    return all(found.attributes.ino not in told.inodes + told.written for told in client.told)


async def test_a_file_that_is_made_open_is_not_kept_by_others_until_it_is_closed(metaserver: Metaserver) -> None:
    one, two = await holder(metaserver), await holder(metaserver)
    file = await one.make(b"file", writing=True)
    assert not await _keeps(two, b"file")
    assert two.told == [wire.Break(0, [], [], False, [file.ino])], "the name may be kept"
    assert await _keeps(one, b"file"), "its writer knows what it does"
    await one.change(wire.WriteInline(file.ino, 0, b"data"))
    found = await two.lookup(b"file")
    assert found is not None
    assert found.attributes.size == 4, "each commit is seen"
    await _close(one, file.ino)
    assert await _keeps(two, b"file")


async def test_an_open_for_writing_has_the_others_drop_the_inode(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await holder(metaserver, silent=True)
    file = await one.make(b"file")
    await two.lookup(b"file")
    opening = asyncio.create_task(_open(one, file.ino))
    await until(lambda: two.told)
    assert (two.told[0].names, two.told[0].inodes) == ([], [file.ino])
    assert not opening.done()
    two.acknowledge()
    assert (await opening).ino == file.ino
    two.silent = False
    assert not await _keeps(two, b"file")


async def test_two_writers_know_of_each_other(metaserver: Metaserver) -> None:
    one, two = await holder(metaserver), await holder(metaserver)
    file = await one.make(b"file", writing=True)
    await _open(two, file.ino)
    assert not await _keeps(one, b"file")
    assert not await _keeps(two, b"file")
    await _close(one, file.ino)
    assert await _keeps(two, b"file")
    assert not await _keeps(one, b"file")


async def test_pages_of_a_directory_leave_out_what_is_being_written(metaserver: Metaserver) -> None:
    one, two = await holder(metaserver), await holder(metaserver)
    made = [await one.make(b"%d" % number, writing=number == 5) for number in range(10)]
    assert [page async for page in two.connection.stream(wire.FetchDirectory(ROOT, 0, 100, 0, 0))]
    assert [(told.inodes, told.written) for told in two.told] == [([], [made[5].ino])]


@pytest.mark.parametrize("how", ["close", "end", "evict"])
async def test_what_a_session_had_open_ends_with_it(tmp_path: Path, how: str) -> None:
    async with serving(tmp_path, lease_s=0.5 if how == "evict" else 30) as metaserver:
        two = await holder(metaserver)
        one = await metaserver.client()
        file = await one.make(b"file", writing=True)
        if how == "close":
            await _close(one, file.ino)
        elif how == "end":
            await one.connection.call(wire.CloseSession(), wire.Done)
        else:
            await until(lambda: _renewed(two, one, metaserver))
        assert await _keeps(two, b"file")


async def _renewed(client: Client, gone: Client, metaserver: Metaserver) -> bool:
    await client.renew(0)
    return all(each.id != gone.session.session for each in metaserver.server.sessions.all())


@pytest.mark.parametrize("restart", [False, True])
async def test_who_comes_back_tells_what_it_has_open(metaserver: Metaserver, restart: bool) -> None:
    one, two = await metaserver.client(), await holder(metaserver)
    kept, closed = await one.make(b"kept", writing=True), await one.make(b"closed", writing=True)
    sessions = [client.session.session for client in (one, two)]
    if restart:
        await _restart(metaserver)
        two = Holder(await metaserver.connect())
        assert (await two.open(VOLUME, sessions[1])).resumed
    back = await metaserver.connect()
    request = wire.OpenSession(VOLUME, "test", sessions[0], [kept.ino])
    assert (await back.call(request, wire.SessionOpened)).resumed
    assert not await _keeps(two, b"kept")
    assert await _keeps(two, b"closed"), "it was closed while the connection was away"
    assert closed.ino != kept.ino


async def test_an_open_of_what_is_no_more_is_not_noted(metaserver: Metaserver) -> None:
    one = await metaserver.client()
    assert await refused(_open(one, 12345)) is ErrorCode.NOT_FOUND
    (session,) = [each for each in metaserver.server.sessions.all() if each.id == one.session.session]
    assert not session.writing


async def test_a_session_with_too_many_open_files_is_served_all_the_same(
    metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opens, "MOST_OPEN", 2)
    one, two = await metaserver.client(), await holder(metaserver)
    for number in range(4):
        await one.make(b"%d" % number, writing=True)
    assert [await _keeps(two, b"%d" % number) for number in range(4)] == [False, False, True, True]


async def test_an_identity_has_so_many_files_open_over_all_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opens, "MOST_OF_IDENTITY", 3)
    table = Sessions(10**9, lambda: 0)
    volume = Volume(1, "volume", 0, "file:///blocks")
    one, two, other = (table.open(volume, "test", owner) for owner in (b"identity", b"identity", b"other one"))
    open_files = opens.Opens()
    for session, inos in ((one, (1, 2, 2)), (two, (3, 4)), (other, (5, 6))):
        for ino in inos:
            open_files.add(session, ino)
    assert (one.writing, two.writing, other.writing) == ({1, 2}, {3}, {5, 6})
    open_files.remove(one, [1, 7])
    open_files.add(two, 4)
    assert two.writing == {3, 4}


async def test_an_identity_of_many_sessions_pushes_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds the most of all is one session of another identity; together the many hold more."""
    monkeypatch.setattr(coherence, "VOLUME_BITMAPS", 6)
    table = Sessions(10**9, lambda: 0)
    volume = Volume(1, "volume", 0, "file:///blocks")
    dropped: list[Session] = []

    async def evict(session: Session) -> None:
        raise AssertionError

    leases = coherence.Coherence(table, evict)
    monkeypatch.setattr(leases, "drop_everything", dropped.append)
    many = [table.open(volume, "test", b"many of one") for _ in range(4)]
    other = table.open(volume, "test", b"other one")

    def hold(session: Session, blocks: int) -> None:
        leases.grant(session, 0, coherence.Grant(None, None, [block << 20 for block in range(1, blocks + 1)]))

    hold(other, 3)
    for session in many:
        hold(session, 1)
    assert dropped == [many[0]]


# Files that are open while others unlink them


class Opener(Holder):
    """A holder that says of some inodes that they are open."""

    def __init__(self, connection: rpc.Connection) -> None:
        super().__init__(connection)
        self.has: set[int] = set()

    def _told(self, told: wire.Break) -> None:
        self.told.append(told)
        still_open = self.has if told.everything else self.has.intersection(told.inodes)
        self.connection.acknowledge(told.number, sorted(still_open))

    async def opens(self, ino: int) -> None:
        self.has.add(ino)
        await self.connection.call(wire.OpenFile(ino, False), wire.Found)

    async def reap(self, *inos: int) -> None:
        self.has.difference_update(inos)
        await self.connection.call(wire.Reap(list(inos)), wire.Done)


async def opener(metaserver: Metaserver) -> Opener:
    await metaserver.client()
    client = Opener(await metaserver.connect())
    await client.open(VOLUME)
    return client


async def _unlink(client: Client, how: str) -> None:
    if how == "remove":
        await client.change(wire.Remove(ROOT, b"file", False))
    else:
        await client.make(b"other")
        await client.change(wire.Rename(ROOT, b"other", ROOT, b"file"))


async def _exists(client: Client, ino: int) -> bool:
    try:
        await client.attributes(ino)
    except rpc.Refused as error:
        return error.code is not ErrorCode.NOT_FOUND
    return True


@pytest.mark.parametrize("how", ["remove", "rename"])
async def test_what_is_unlinked_lives_on_for_who_has_it_open(metaserver: Metaserver, how: str) -> None:
    one, two = await metaserver.client(), await opener(metaserver)
    file = await one.make(b"file")
    await one.change(wire.WriteInline(file.ino, 0, b"data"))
    await two.opens(file.ino)
    await _unlink(one, how)
    await one.connection.call(wire.Reap([file.ino]), wire.Done)
    assert (await two.attributes(file.ino)).nlink == 0
    await two.change(wire.WriteInline(file.ino, 4, b"more"))
    content = await two.connection.call(wire.GetContent(file.ino, 0, 100), wire.Content)
    assert content.inline == b"datamore"
    before = await one.connection.call(wire.GetStatistics(), wire.Statistics)
    await two.reap(file.ino)
    assert not await _exists(one, file.ino)
    after = await one.connection.call(wire.GetStatistics(), wire.Statistics)
    assert (after.inodes, after.bytes) == (before.inodes - 1, before.bytes - 8)


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_the_last_of_those_who_have_it_open_deletes_it(metaserver: Metaserver, first: int) -> None:
    """They end in any order, by reaping or with their sessions."""
    one, two, three = [await opener(metaserver) for _ in range(3)]
    file = await one.make(b"file")
    await two.opens(file.ino)
    await three.opens(file.ino)
    await one.change(wire.Remove(ROOT, b"file", False))
    ends = [one, two, three]
    ends = ends[first:] + ends[:first]
    await ends[0].reap(file.ino)
    assert await _exists(ends[1], file.ino)
    await ends[1].connection.call(wire.CloseSession(), wire.Done)
    await metaserver.server.janitor.settle(5)
    assert await _exists(ends[2], file.ino)
    await ends[2].reap(file.ino)
    assert not await _exists(ends[2], file.ino)


async def test_who_has_a_file_open_is_asked_each_time(metaserver: Metaserver) -> None:
    """A break has it give up what it caches, not what it has open; nor does dropping everything."""
    one, two = await metaserver.client(), await opener(metaserver)
    file = await one.make(b"file")
    await two.opens(file.ino)
    for mode in (0o600, 0o640):
        await one.change(wire.SetAttributes(file.ino, mode=mode))
    assert [told.inodes for told in two.told] == [[file.ino]] * 2
    (session,) = [each for each in metaserver.server.sessions.all() if each.id == two.session.session]
    metaserver.server.coherence.drop_everything(session)
    await until(lambda: not session.pending)
    await one.change(wire.Remove(ROOT, b"file", False))
    await one.connection.call(wire.Reap([file.ino]), wire.Done)
    assert await _exists(two, file.ino)


async def test_after_a_restart_who_has_a_file_open_is_asked(metaserver: Metaserver) -> None:
    two = await opener(metaserver)
    for each in metaserver.server.sessions.all():
        if each.id != two.session.session:
            await metaserver.server.janitor.end(each)
    file = await two.make(b"file")
    two.has.add(file.ino)
    await _restart(metaserver)
    back = Opener(await metaserver.connect())
    back.has = two.has
    assert (await back.open(VOLUME, two.session.session)).resumed
    one = Client(await metaserver.connect())
    await one.open(VOLUME)
    await one.change(wire.Remove(ROOT, b"file", False))
    await one.connection.call(wire.Reap([file.ino]), wire.Done)
    assert await _exists(back, file.ino)


async def test_who_closed_a_file_before_it_was_unlinked_need_not_reap_it_again(metaserver: Metaserver) -> None:
    """It said that it has it open, and closed it while others were still asked."""
    one, two, three = await metaserver.client(), await opener(metaserver), await holder(metaserver, silent=True)
    file = await one.make(b"file")
    await two.opens(file.ino)
    await three.lookup(b"file")
    removing = asyncio.create_task(one.change(wire.Remove(ROOT, b"file", False)))
    await until(lambda: two.told and three.told)
    await two.reap(file.ino)
    three.acknowledge()
    await removing
    await one.connection.call(wire.Reap([file.ino]), wire.Done)
    assert not await _exists(one, file.ino)


async def test_what_is_unlinked_cannot_be_opened_any_more(metaserver: Metaserver) -> None:
    one, two, three = await opener(metaserver), await opener(metaserver), await opener(metaserver)
    file = await one.make(b"file")
    await two.opens(file.ino)
    await one.change(wire.Remove(ROOT, b"file", False))
    for client in (one, two):
        await client.opens(file.ino)
    for writing in (False, True):
        call = three.connection.call(wire.OpenFile(file.ino, writing), wire.Found)
        assert await refused(call) is ErrorCode.NOT_FOUND


async def test_an_open_waits_for_an_unlinking_that_asked_before(metaserver: Metaserver) -> None:
    """It said that it had not opened the file; so when it opens it then, the file must be gone, or not go."""
    one, two, three = await metaserver.client(), await opener(metaserver), await holder(metaserver, silent=True)
    file = await one.make(b"file")
    await two.lookup(b"file")
    await three.lookup(b"file")
    removing = asyncio.create_task(one.change(wire.Remove(ROOT, b"file", False)))
    await until(lambda: two.told and three.told)
    opening = asyncio.create_task(refused(two.opens(file.ino)))
    await two.attributes()
    assert not opening.done()
    three.acknowledge()
    await removing
    assert await opening is ErrorCode.NOT_FOUND


async def test_very_many_who_have_it_open(metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "MOST_OPENERS", 2)
    one, others = await metaserver.client(), [await opener(metaserver) for _ in range(4)]
    file = await one.make(b"file")
    for each in others:
        await each.opens(file.ino)
    await one.change(wire.Remove(ROOT, b"file", False))
    await one.connection.call(wire.Reap([file.ino]), wire.Done)
    assert await _exists(one, file.ino)
    for each in others:
        await each.reap(file.ino)
    assert not await _exists(one, file.ino)


# Appending


async def test_what_is_appended_follows_what_others_have_appended(metaserver: Metaserver) -> None:
    one, two = await metaserver.client(), await metaserver.client()
    file = await one.make(b"file")
    await one.change(wire.WriteInline(file.ino, 0, b"one", appended_at=0))
    assert await refused(two.change(wire.WriteInline(file.ino, 0, b"two", appended_at=0))) is ErrorCode.BUSY
    await two.change(wire.WriteInline(file.ino, 3, b"two", appended_at=3))
    ids = (await one.connection.call(wire.NewSlices(1), wire.SliceIds)).ids
    version = (await one.attributes(file.ino)).version
    slices = [wire.Slice(0, 10, ids[0], 0)]
    for size, code in ((3, ErrorCode.BUSY), (6, None)):
        commit = wire.CommitSlices(file.ino, slices, 10, True, version, appended_at=size)
        if code is None:
            assert (await one.change(commit)).attributes[0].size == 10
        else:
            assert await refused(one.change(commit)) is code


# Clients that are alone


async def test_who_is_alone_is_told_before_another_comes(metaserver: Metaserver) -> None:
    await (await metaserver.client()).connection.call(wire.CloseSession(), wire.Done)
    one = Holder(await metaserver.connect(), silent=True)
    assert (await one.open(VOLUME)).alone
    two = Holder(await metaserver.connect())
    opening = asyncio.create_task(two.open(VOLUME))
    await until(lambda: one.told)
    assert one.told[0].joined
    await one.attributes()
    assert not opening.done()
    one.acknowledge()
    assert not (await opening).alone
    three = Holder(await metaserver.connect())
    assert not (await three.open(VOLUME)).alone
    assert len(one.told) == 1, "it knows"
    assert not two.told


async def test_one_of_two_who_come_at_once_is_alone_at_most(metaserver: Metaserver) -> None:
    await (await metaserver.client()).connection.call(wire.CloseSession(), wire.Done)
    clients = [Holder(await metaserver.connect()) for _ in range(4)]
    opened = await asyncio.gather(*(each.open(VOLUME) for each in clients))
    told = [any(told.joined for told in each.told) for each in clients]
    assert told.count(True) == 1
    assert all(client_told or not each.alone for client_told, each in zip(told, opened, strict=True))


@pytest.mark.parametrize("gone", [False, True])
async def test_who_is_alone_and_silent_holds_others_up_for_one_lease(tmp_path: Path, gone: bool) -> None:
    async with serving(tmp_path, lease_s=0.5) as metaserver:
        await (await metaserver.client()).connection.call(wire.CloseSession(), wire.Done)
        one = Holder(await metaserver.connect(), silent=True)
        assert (await one.open(VOLUME)).alone
        if gone:
            one.connection.abort()
        two = Client(await metaserver.connect())
        assert (await two.open(VOLUME)).alone, "the other was evicted"
        if not gone:
            assert one.told[0].joined
            assert await refused(one.make(b"late")) is ErrorCode.STALE_SESSION


@pytest.mark.parametrize("engine", ["memory://", "lmdb"])
async def test_after_a_restart_others_wait_for_who_was_alone(tmp_path: Path, engine: str) -> None:
    async with serving(tmp_path, engine) as metaserver:
        await (await metaserver.client()).connection.call(wire.CloseSession(), wire.Done)
        one = Client(await metaserver.connect())
        assert (await one.open(VOLUME)).alone
        await _restart(metaserver)
        two = Client(await metaserver.connect())
        opening = asyncio.create_task(two.open(VOLUME))
        back = Holder(await metaserver.connect(), silent=True)
        opened = await back.open(VOLUME, one.session.session)
        assert (opened.resumed, opened.alone) == (True, False)
        assert back.told[0].joined
        await back.change(wire.MakeNode(ROOT, b"waited", FILE, 0, 0))
        assert not opening.done()
        back.acknowledge()
        assert not (await opening).alone
        assert (await two.connection.call(wire.Lookup(ROOT, b"waited"), wire.Found)).attributes.ino


async def test_an_end_in_order_waits_for_acknowledgements(metaserver: Metaserver) -> None:
    """A change under way is answered before the server ends, though the one it waits for has nothing under way."""
    one, two = await metaserver.client(), await holder(metaserver, silent=True)
    await two.lookup(b"file")
    making = asyncio.create_task(one.make(b"file"))
    await until(lambda: two.told)
    stopping = asyncio.create_task(metaserver.stop())
    await until(lambda: not metaserver.front.accepts)
    two.acknowledge()
    await making
    await stopping
