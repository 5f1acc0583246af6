"""The fault scenarios of the coherence protocol that fit the simulation, each as a story; the checker looks on.

The numbers are those of the specification. What a rule is for that random seeds seldom show is told here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from unittest import mock

import pytest
from pyfuse3 import FUSEError
from simulation.client import Client
from simulation.programs import Failed, Program
from simulation.world import ADDRESS, VOLUME, Setup, World, finish, running

from fuseclient.worker import rpc
from fuseclient.worker.changes import Changes
from fuseclient.worker.guard import Guard
from fuseclient.worker.session import Acknowledge
from metaserver import namespace, wire
from metaserver.fsck.findings import Finding, Kind
from metaserver.fsck.run import Check

T = TypeVar("T")
ROOT = wire.ROOT_INO
FILE = b"f0"


class Stage:
    """A world with two clients, and what the story is told with."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.one, self.two = world.clients
        self.lease_s = world.setup.lease_s

    async def do(self, client: Client, action: Callable[[Program], Awaitable[T]], leases: float = 4) -> T:
        """Have a program of a client do something; it must have ended after so many leases."""

        async def run() -> T:
            with self.world.history.operation(f"the story's part of client {client.index}"):
                return await action(self.world.program(client))

        async with asyncio.timeout(leases * self.lease_s):
            return await self.world.loop.spawn(client.node, run())

    async def watch(self, client: Client, seconds: float, parent: int = ROOT, name: bytes = FILE) -> None:
        """Have a client look at a name again and again; what it sees, if anything, is the checker's to judge."""
        until = self.world.loop.now + seconds
        while self.world.loop.now < until:
            with contextlib.suppress(Failed):
                await self.do(client, lambda program: program.stat(parent, name), 100)
            await asyncio.sleep(0.05)

    def cut_off(self, client: Client) -> None:
        self.world.network.block(client.worker.node, self.world.server.node)
        self.world.network.block(self.world.server.node, client.worker.node)

    def restart(self) -> None:
        """The server is killed and started again."""
        self.world.kill_server()
        self.world.start_server()

    async def ready(self, client: Client) -> None:
        """Wait until a client's worker serves."""
        while client.worker.mount is None:  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.05)


def complaints(story: Callable[[Stage], Awaitable[None]], seed: int = 0, **setup: Any) -> list[str]:
    """Play a story and return what the checker has to say."""
    with running(seed, Setup(clients=2, faults=False, **setup)) as world:

        async def everything() -> None:
            await world.prepare()
            stage = Stage(world)
            for client in world.clients:
                await stage.ready(client)
            await story(stage)
            await world.look_at_the_end()

        return finish(world, everything).complaints


def play(story: Callable[[Stage], Awaitable[None]], seed: int = 0, **setup: Any) -> None:
    """Play a story in which nobody sees anything wrong."""
    assert complaints(story, seed, **setup) == []


both_modes = pytest.mark.parametrize("accel", [True, False], ids=["bpf", "off"])


@both_modes
def test_scenario_04_a_break_that_is_not_acknowledged_ends_the_lease(accel: bool) -> None:
    play(_silent_holder, accel=accel)


async def _silent_holder(stage: Stage) -> None:
    """Renewals come through, acknowledgements do not."""
    one, two = stage.one, stage.two
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    with mock.patch.object(Changes, "_break", _forget_break):
        begun = stage.world.loop.now
        await stage.do(one, lambda program: program.create(ROOT, FILE))
        assert 0.3 * stage.lease_s < stage.world.loop.now - begun < 1.5 * stage.lease_s
    assert await stage.do(two, lambda program: program.stat(ROOT, FILE))


async def _forget_break(*args: object) -> None:
    """Drop and acknowledge nothing."""


def test_scenario_05_a_break_that_overtakes_a_grant_discards_it() -> None:
    told = 0
    broken = Changes.broken

    def counting(changes: Changes, message: wire.Break, acknowledge: Acknowledge) -> None:
        nonlocal told
        told += message.number == 0
        broken(changes, message, acknowledge)

    with mock.patch.object(Changes, "broken", counting):
        for seed in range(6):
            play(_race, seed)
    assert told, "no reply was overtaken"


def test_scenario_06_a_fetch_in_flight_keeps_nothing_of_what_was_broken_meanwhile() -> None:
    refused = 0
    may_put = Guard.may_put

    def counting(guard: Guard, token: Any, key: Any) -> bool:
        nonlocal refused
        allowed = may_put(guard, token, key)
        refused += not allowed
        return allowed

    with mock.patch.object(Guard, "may_put", counting):
        for seed in range(6):
            play(_race, seed)
    assert refused, "no fetch was overtaken"


async def _race(stage: Stage) -> None:
    """One makes and removes a file; the other looks at it and lists the directory all the time."""

    async def change() -> None:
        for _ in range(15):
            await stage.do(stage.one, lambda program: program.create(ROOT, FILE, b"content"))
            await stage.do(stage.one, lambda program: program.remove(ROOT, FILE, directory=False))

    async def look() -> None:
        while not changing.done():
            await stage.do(stage.two, lambda program: program.list(ROOT))
            await stage.watch(stage.two, 0.01)

    changing = asyncio.create_task(change())
    await look()
    await changing


def test_scenario_08_what_holders_have_is_not_changed_before_they_are_back() -> None:
    play(_restart_with_a_holder_cut_off)


async def _restart_with_a_holder_cut_off(stage: Stage) -> None:
    one, two = stage.one, stage.two
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    stage.cut_off(two)
    stage.restart()
    watching = asyncio.create_task(stage.watch(two, 2 * stage.lease_s))
    await stage.do(one, lambda program: program.create(ROOT, FILE))
    await asyncio.sleep(2 * stage.lease_s)
    stage.world.network.heal()
    await watching


def test_scenario_09_who_lost_its_state_between_two_restarts_does_not_come_back() -> None:
    async def story(stage: Stage) -> None:
        one, two = stage.one, stage.two
        await stage.do(two, lambda program: program.stat(ROOT, FILE))
        assert two.worker.mount is not None
        old = two.worker.mount.session_id
        stage.restart()
        await asyncio.sleep(0.1 * stage.lease_s)
        stage.world.kill_client(two)
        stage.restart()
        two.boot()
        await stage.ready(two)
        assert two.worker.mount.session_id != old
        begun = stage.world.loop.now
        await stage.do(one, lambda program: program.create(ROOT, FILE))
        assert stage.world.loop.now - begun > 0.3 * stage.lease_s, "its caches may have lived on"
        late = await rpc.connect(ADDRESS)
        assert not (await late.call(wire.OpenSession(VOLUME, "late", old), wire.SessionOpened)).resumed
        assert await stage.do(two, lambda program: program.stat(ROOT, FILE))

    play(story)


@pytest.mark.parametrize("restart", [False, True])
def test_scenario_10_a_reply_lost_after_the_commit(restart: bool) -> None:
    """The same change is not made twice, and its program is told what came of it the first time."""

    async def story(stage: Stage) -> None:
        one, world = stage.one, stage.world

        def lose_the_reply(commit: object) -> None:
            world.witness.on_commit = lambda commit: None
            for endpoint in world.network.endpoints:
                if endpoint.node is one.worker.node and not endpoint.closed:
                    world.network.cut(endpoint)
            if restart:
                world.loop.post(world.node, stage.restart)

        actions: list[Callable[[Program], Awaitable[object]]] = [
            lambda program: program.create(ROOT, FILE),
            lambda program: program.mkdir(ROOT, b"s0"),
            lambda program: program.rename(ROOT, FILE, ROOT, b"f1", exchange=False),
            lambda program: program.remove(ROOT, b"f1", directory=False),
            lambda program: program.remove(ROOT, b"s0", directory=True),
        ]
        for action in actions:
            world.witness.on_commit = lose_the_reply
            await stage.do(one, action, 6)
        ino = await stage.do(one, lambda program: program.create(ROOT, FILE))
        world.witness.on_commit = lose_the_reply
        await stage.do(one, lambda program: program.link(ino, ROOT, b"f2"), 6)

    play(story)


def test_scenario_11_a_wall_clock_that_jumps_changes_nothing() -> None:
    async def story(stage: Stage) -> None:
        one, two = stage.one, stage.two
        assert one.worker.mount is not None
        session = one.worker.mount.session_id
        for node, hours in ((stage.world.server.node, 1), (one.worker.node, -1), (two.worker.node, 1)):
            node.wall_offset_ns += hours * 3600 * 10**9
            await stage.do(one, lambda program: program.create(ROOT, FILE))
            await stage.watch(two, 2 * stage.lease_s)
            await stage.do(one, lambda program: program.remove(ROOT, FILE, directory=False))
        assert one.worker.mount.session_id == session

    play(story)


@both_modes
@pytest.mark.parametrize("seconds", [3.0, 600.0])
def test_scenario_11_a_suspend_is_the_end_of_what_is_cached(accel: bool, seconds: float) -> None:
    async def story(stage: Stage) -> None:
        one, two, world = stage.one, stage.two, stage.world
        await stage.do(two, lambda program: program.stat(ROOT, FILE))
        world.loop.suspend([two.node, two.worker.node], seconds)
        making = asyncio.create_task(stage.do(one, lambda program: program.create(ROOT, FILE)))
        await asyncio.sleep(seconds)
        world.wake(two)
        await asyncio.sleep(0.5)
        await stage.watch(two, stage.lease_s)
        await making
        assert await stage.do(two, lambda program: program.stat(ROOT, FILE))

    play(story, accel=accel)


def test_scenario_12_an_old_server_that_goes_on_commits_nothing() -> None:
    async def story(stage: Stage) -> None:
        one, two, world = stage.one, stage.two, stage.world
        await stage.do(two, lambda program: program.stat(ROOT, FILE))
        making = asyncio.create_task(stage.do(one, lambda program: program.create(ROOT, FILE), 10))
        old = world.server
        world.witness.on_commit = lambda commit: pytest.fail("it was to wait")
        two.freeze(True)
        await asyncio.sleep(0.3)
        old.node.frozen = True
        world.witness.on_commit = lambda commit: None
        world.start_server()
        await asyncio.sleep(0.1)
        old.node.frozen = False
        two.freeze(False)
        await asyncio.sleep(2 * stage.lease_s)
        world.kill_server(old)
        await making
        assert await stage.do(two, lambda program: program.stat(ROOT, FILE))

    play(story)


def test_scenario_13_an_engine_that_is_away_and_loses_what_it_had_acknowledged() -> None:
    """The seam: an engine whose leader changes, in the middle of a commit, and one whose history is gone."""

    async def story(stage: Stage) -> None:
        one, two, world = stage.one, stage.two, stage.world
        for number in range(6):
            world.engine.away_until = world.loop.now + 0.5 * stage.lease_s
            world.engine.doubtful = True
            begun = world.loop.now
            name = b"f%d" % (number % 3)
            with contextlib.suppress(Failed):
                await stage.do(one, functools.partial(Program.create, parent=ROOT, name=name))
            assert world.loop.now - begun < stage.lease_s, "a writer pauses for less than a lease"
            world.engine.doubtful = False
            await stage.do(two, lambda program: program.list(ROOT))
            world.engine.lose()
            await asyncio.sleep(2 * stage.lease_s + 5)
            await stage.do(two, lambda program: program.list(ROOT))

    play(story, lazy=True)


def test_scenario_16_renames_across_and_removals_for_ten_minutes() -> None:
    names = (b"s0", b"s1")

    async def wander(stage: Stage, client: Client, rng: random.Random) -> None:
        until = stage.world.loop.now + 600

        async def step(program: Program) -> None:
            places = [ROOT]
            for _ in range(3):
                ino = await program.lookup(rng.choice(places), rng.choice((*names, b"d0", b"d1")))
                places += [ino] if ino else []
            here, there, name, other = rng.choice(places), rng.choice(places), rng.choice(names), rng.choice(names)
            kind = rng.random()
            if kind < 0.4:
                await program.mkdir(here, name)
            elif kind < 0.9 and (here, name) != (there, other):
                await program.rename(here, name, there, other, exchange=kind > 0.8)
            elif kind > 0.9:
                await program.remove(here, name, directory=True)

        while stage.world.loop.now < until:
            await asyncio.sleep(rng.uniform(0, 2.0))
            try:
                await stage.do(client, step, 20)
            except Failed:
                continue

    async def story(stage: Stage) -> None:
        stage.world.network.slow_s = 1.0
        await asyncio.gather(*(wander(stage, each, random.Random(each.index)) for each in stage.world.clients))
        assert await _findings(stage.world) == []

    play(story)


async def _findings(world: World) -> list[str]:
    """Return what fsck finds, but for what is unlinked and in use."""
    found: list[str] = []
    live = [each.worker.mount.session_id for each in world.clients if each.worker.mount is not None]

    class Listener:
        def progress(self, what: str, done: int, total: int) -> None: ...
        def slices(self, needed: list[tuple[int, int]]) -> None: ...

        def finding(self, finding: Finding, repaired: bool) -> None:
            if finding.kind is not Kind.ORPHAN or finding.arguments[0] not in live:
                found.append(str(finding))

        def losses(self) -> tuple[list[tuple[int, int]], int]:
            return [], 0

    (volume,) = await world.engine.read(namespace.list_volumes)
    await Check(world.engine, volume, Listener(), threading.Event(), repair=False).run(store=False)
    return found


def test_scenario_20_an_object_store_that_fails_for_two_minutes() -> None:
    """A write is refused, or waits; never does it seem to be done. No metadata names an object that is not stored."""

    async def story(stage: Stage) -> None:
        one, world = stage.one, stage.world
        ino = await stage.do(one, lambda program: program.create(ROOT, FILE, b"content 00000001"))
        world.objects.failing = True
        begun, refused = world.loop.now, 0
        while world.loop.now < begun + 120:
            try:
                await stage.do(one, lambda program: program.write(ino, b"content 00000002"))
                pytest.fail("it was not stored")
            except Failed:
                refused += 1
            await asyncio.sleep(10)
        assert refused > 5
        world.objects.failing = False
        await stage.do(one, lambda program: program.write(ino, b"content 00000003"))
        assert await stage.do(stage.two, lambda program: program.read(ino)) == b"content 00000003"

    play(story, inline_limit=0)


@pytest.mark.parametrize("full", ["engine", "store"])
def test_scenario_21_no_space_is_said_and_gets_over(full: str) -> None:
    async def story(stage: Stage) -> None:
        one, world = stage.one, stage.world
        ino = await stage.do(one, lambda program: program.create(ROOT, FILE, b"content 00000001"))
        world.engine.full, world.objects.full = full == "engine", full == "store"
        with pytest.raises(Failed) as refused:
            await stage.do(one, lambda program: program.write(ino, b"content 00000002"))
        assert isinstance(refused.value.__cause__, FUSEError)
        assert refused.value.__cause__.errno == errno.ENOSPC
        if full == "engine":
            with pytest.raises(Failed):
                await stage.do(one, lambda program: program.mkdir(ROOT, b"s0"))
        assert await stage.do(stage.two, lambda program: program.read(ino)) == b"content 00000001"
        world.engine.full = world.objects.full = False
        await stage.do(one, lambda program: program.write(ino, b"content 00000003"))
        assert await stage.do(stage.two, lambda program: program.read(ino)) == b"content 00000003"

    play(story, inline_limit=0)


# Rules that random seeds seldom show the need of


async def _partition(stage: Stage) -> None:
    """Scenario 3: both sides live on."""
    one, two = stage.one, stage.two
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    stage.cut_off(two)
    watching = asyncio.create_task(stage.watch(two, 2 * stage.lease_s))
    await stage.do(one, lambda program: program.create(ROOT, FILE))
    await asyncio.sleep(stage.lease_s)
    stage.world.network.heal()
    await watching


async def _worker_replaced(stage: Stage) -> None:
    """A worker dies while its change waits for a holder; the next one caches what the change is to replace."""
    one, two = stage.one, stage.two
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    two.freeze(True)
    making = asyncio.create_task(stage.do(one, lambda program: program.mkdir(ROOT, FILE)))
    await asyncio.sleep(0.5)
    stage.world.kill_worker(one)
    one.start_worker()
    await stage.ready(one)
    await stage.watch(one, 1.0)
    two.freeze(False)
    await stage.watch(two, 1.0)
    await stage.watch(one, 1.0)
    with pytest.raises(Failed):
        await making


def _evict(client: Client, directory: int = ROOT) -> None:
    assert client.maps is not None
    client.maps.give_up(directory)


async def _returned(stage: Stage, client: Client, leases: float = 1.3) -> None:
    """Have a client's maps give up the root, and wait until it should have given back the lease."""
    _evict(client)
    await asyncio.sleep(leases * stage.lease_s)


async def _changed_elsewhere(stage: Stage, ino: int) -> None:
    """Change and remove what the other client may have in its caches, and look at what it shows for a lease."""
    await stage.do(stage.one, lambda program: program.chmod(ino, 0o600))
    await stage.do(stage.one, lambda program: program.remove(ROOT, FILE, directory=False))
    await stage.watch(stage.two, stage.lease_s)


async def _cached_names(stage: Stage) -> None:
    """What was evicted is still in the kernel's caches, of names and attributes, until the lease is over."""
    one, two = stage.one, stage.two
    ino = await stage.do(one, lambda program: program.create(ROOT, FILE))
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    await _returned(stage, two, 0.4)
    await _changed_elsewhere(stage, ino)


async def _cached_pages(stage: Stage) -> None:
    """The kernel keeps pages for longer than the lease, and a later open by a BPF program lets it."""
    one, two = stage.one, stage.two
    ino = await stage.do(one, lambda program: program.create(ROOT, FILE, b"content 00000001"))
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    await stage.do(two, lambda program: program.read(ino))
    await _returned(stage, two)
    await stage.do(one, lambda program: program.write(ino, b"content 00000002"))
    await asyncio.sleep(0.2)  # until others may cache it
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    await stage.do(two, lambda program: program.read(ino))


async def _told_again(stage: Stage) -> None:
    """What was evicted is put again, and evicted again before its first wait is over."""
    one, two = stage.one, stage.two
    ino = await stage.do(one, lambda program: program.create(ROOT, FILE))
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    await _returned(stage, two, 1.05)
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    await _returned(stage, two, 0.4)
    await _changed_elsewhere(stage, ino)


async def _still_open(stage: Stage) -> None:
    """A file is read through a handle after it was evicted, and unlinked elsewhere."""
    one, two = stage.one, stage.two
    await stage.do(one, lambda program: program.create(ROOT, FILE, b"content 00000001"))

    async def read(program: Program) -> None:
        ino = await program.stat(ROOT, FILE)
        handle = await two.kernel.open(ino, writing=False)
        await _returned(stage, two, 2.5)
        await stage.do(one, lambda program: program.remove(ROOT, FILE, directory=False))
        await asyncio.sleep(0.2)
        content, _ = await two.kernel.read(ino, handle)
        stage.world.exceptions += [] if content == b"content 00000001" else [f"read {content!r}"]
        await two.kernel.close(ino, handle)

    try:
        await stage.do(two, read, 6)
    except FUSEError as error:
        stage.world.exceptions.append(f"an open file was read: {error}")


async def _in_flight(stage: Stage) -> None:
    """A reply to what was asked for before the lease was given back comes after it."""
    one, two = stage.one, stage.two
    ino = await stage.do(one, lambda program: program.create(ROOT, FILE))
    await stage.do(two, lambda program: program.stat(ROOT, FILE))
    delivered = rpc._Protocol._deliver
    held: list[Callable[[], None]] = []

    def late(protocol: rpc._Protocol, number: int, reply: wire.Reply) -> None:
        if isinstance(reply, wire.Found) and number and reply.attributes.ino == ino:
            node = two.worker.node
            held.append(lambda: stage.world.loop.post(node, delivered, protocol, number, reply))
        else:
            delivered(protocol, number, reply)

    await _returned(stage, two, 0.9)
    stage.two.kernel.inode(ino).expires = 0.0
    with mock.patch.object(rpc._Protocol, "_deliver", late):
        asking = asyncio.create_task(stage.do(two, lambda program: program.stat(ROOT, FILE), 100))
        await asyncio.sleep(0.5 * stage.lease_s)
    await stage.do(one, lambda program: program.chmod(ino, 0o600))
    for deliver in held:
        deliver()
    await asking
    await stage.watch(two, 0.2 * stage.lease_s)


STORIES = {
    "leases returned when they are over": _cached_names,
    "leases returned without pages": _cached_pages,
    "leases returned of what was not told since": _told_again,
    "leases returned of what is not open": _still_open,
    "leases returned of what enters no cache": _in_flight,
    "deadline": _partition,
    "grace": _restart_with_a_holder_cut_off,
    "renewal after acknowledgement": _silent_holder,
    "one connection": _worker_replaced,
}


@pytest.mark.parametrize("rule", STORIES)
def test_a_rule_that_is_off_is_noticed(rule: str) -> None:
    story = STORIES[rule]
    assert complaints(story) == []
    try:
        assert complaints(story, rule_off=rule)
    except TimeoutError:
        assert rule == "renewal after acknowledgement", "a writer waits without end"
