"""One run: a server, some clients and their programs, what goes wrong, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

import pyfuse3
from served import Given

from fuseclient.credentials import Credentials
from fuseclient.worker import mount as worker_mount
from fuseclient.worker import rpc
from metaserver import listener, wire
from metaserver.engine import Candidate
from metaserver.front import Front
from metaserver.gate import Access
from metaserver.server import Server
from simulation import checker, kernel
from simulation.authority import Authority, LeasedCandidate
from simulation.client import Client
from simulation.clocks import simulated
from simulation.faults import Faults
from simulation.history import History
from simulation.loop import START_S, Node, Stuck, VirtualLoop
from simulation.network import Network
from simulation.programs import DIRECTORIES, LOG, Failed, Program, Wanderer
from simulation.rules import switched_off
from simulation.storage import ObjectsInMemory, Witness, WitnessedEngine
from simulation.tree import check_tree

VOLUME: Final = "volume"
ADDRESS: Final = "tcp:server:1"
#: Where there is another metaserver, if there are two.
SECOND: Final = "tcp:second:1"
#: Whoever comes may do all.
ANYBODY: Final = Access(insecure=True, squash=wire.Squash.NONE)


@dataclass(frozen=True)
class Setup:
    """What a run is made of."""

    clients: int = 3
    programs: int = 2
    operations: int = 40
    lease_s: float = 5.0
    inline_limit: int = 4096
    faults: bool = True
    accel: bool = True
    #: The engine acknowledges before it is durable.
    lazy: bool = False
    #: Only the first client is there from the beginning: the others come later, one by one.
    late: bool = False
    #: There are two metaservers, one of which stands by.
    standby: bool = False
    #: The kinds of faults that there are; empty: all.
    kinds: tuple[str, ...] = ()
    #: A rule of :mod:`simulation.rules` that does not hold.
    rule_off: str | None = None


def setup_of(seed: int) -> Setup:
    """Return what a seed says its run is made of."""
    rng = random.Random(f"setup of {seed}")
    return Setup(
        clients=rng.choice((2, 2, 3, 4)),
        programs=rng.choice((1, 1, 2, 2)),
        operations=rng.choice((10, 15, 20, 30)),
        inline_limit=rng.choice((0, 4096, 4096)),
        faults=rng.random() < 0.85,
        accel=rng.random() < 0.8,
        lazy=rng.random() < 0.25,
        standby=rng.random() < 0.25,
        late=rng.random() < 0.5,
    )


@dataclass
class Verdict:
    """What came of a run. ``digest`` is the same for the same seed and code."""

    seed: int
    complaints: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    digest: int = 0
    elapsed_s: float = 0.0
    steps: int = 0
    #: What happened how often: reads by who answered, faults, changes.
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = (f"seed {self.seed}: {len(self.complaints)} complaints after {self.elapsed_s:.1f} s of virtual time",)
        return "\n  ".join([*lines, *self.complaints[:8], "faults:", *self.faults])


class ServerProcess:
    """A metaserver and its node."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.node = Node(address.split(":")[1], boot_offset_ns=123_456_789_000)
        self.server: Server | None = None


class World:
    """All of a run. Made by :func:`running`."""

    def __init__(self, seed: int, setup: Setup, loop: VirtualLoop, rng: random.Random) -> None:
        self.seed = seed
        self.setup = setup
        self.loop = loop
        self.node = Node("world")
        self.network = Network(loop, random.Random(rng.random()))
        self.objects = ObjectsInMemory(random.Random(rng.random()))
        self.witness = Witness(loop, self.objects)
        self.engine = WitnessedEngine(self.witness, random.Random(rng.random()), lazy=setup.lazy)
        self.history = History(loop)
        self.faults = Faults(self, random.Random(rng.random()))
        self.clients: list[Client] = []
        self.authority = Authority(loop, self.engine)
        #: By address, the last one that was started there.
        self.servers: dict[str, ServerProcess] = {}
        self.rng = random.Random(rng.random())
        self._tokens = itertools.count(1000)
        self._programs: list[tuple[Client, asyncio.Task[None]]] = []
        self.setup_commits = 0
        self.exceptions: list[str] = []

    def note_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something was raised where nobody can catch it."""
        error = context.get("exception")
        where = traceback.extract_tb(error.__traceback__)[-1] if error is not None else ""
        self.exceptions.append(f"{context['message']}: {error!r} at {where}")

    def elapsed(self) -> float:
        return self.loop.now - START_S

    # The server

    @property
    def addresses(self) -> str:
        """The metaservers, as clients are given them."""
        return f"{ADDRESS},{SECOND}" if self.setup.standby else ADDRESS

    @property
    def server(self) -> ServerProcess:
        """The metaserver that serves, or would if it were not in trouble."""
        ruling = [each for each in self.servers.values() if each.node is self.witness.ruler]
        return ruling[0] if self.setup.standby and ruling else self.servers[ADDRESS]

    def start_server(self, address: str = ADDRESS) -> None:
        """Start a server on what the one before left; of two, one that serves when the other does no more."""
        process = self.servers[address] = ServerProcess(address)
        self.loop.spawn(process.node, self._serve(process), "server")

    def _candidate(self, address: str) -> Candidate:
        return LeasedCandidate(address, self.authority) if self.setup.standby else Given(address, self.engine)

    async def _serve(self, process: ServerProcess) -> None:
        front = Front(
            self._candidate,
            lambda engine: Server(engine, lease_s=self.setup.lease_s, access=ANYBODY),
            access=ANYBODY,
        )
        await front.start(process.address)
        process.server = front.server

    def kill_server(self, process: ServerProcess | None = None) -> None:
        """Kill a server; the one that serves, unless told otherwise. The engine's process ends with that one."""
        node, serving = (process or self.server).node, self.server.node
        self.loop.kill(node)
        self.network.died(node)
        if node is serving:
            self.engine.crash()

    # Clients

    def add_client(self) -> Client:
        """Boot another client."""
        rng = random.Random(self.rng.random())
        client = Client(self.loop, rng, len(self.clients), self.addresses, VOLUME, self.setup.accel)
        client.on_ready = self.history.worker_ready
        client.on_lost = self.history.session_lost
        self.clients.append(client)
        return client

    async def _add_late_clients(self) -> None:
        while len(self.clients) < self.setup.clients:
            await asyncio.sleep(self.rng.uniform(0.1, 4.0) * self.setup.lease_s)
            self.start_programs(self.add_client())

    def kill_worker(self, client: Client) -> None:
        self.history.worker_died(client.index)
        self.history.lose_held(client.index)
        client.kill_worker()
        self.network.died(client.worker.node)

    def kill_client(self, client: Client) -> None:
        """The machine and its programs are gone; what they were doing may have been done."""
        client.kill()
        self.network.died(client.worker.node)
        self._programs = [(owner, task) for owner, task in self._programs if owner is not client]
        self.history.lose_held(client.index)
        self.history.abandon(client.node)
        self.history.sync_failed(client.index)

    def wake(self, client: Client) -> None:
        """A machine that was suspended goes on, and its worker is told of that."""
        for node in (client.node, client.worker.node):
            node.frozen = False
        self.history.woken(client.index)
        if client.worker.mount is not None:
            self.loop.post(client.worker.node, client.worker.mount.woken)

    def boot_client(self, client: Client) -> None:
        """Start a machine again, with programs that go on."""
        client.boot()
        self.start_programs(client)

    def program(self, client: Client) -> Program:
        rng = random.Random(self.rng.random())
        return Program(self.loop, client, self.history, rng, lazy=self.setup.lazy)

    def start_programs(self, client: Client) -> None:
        """Start the random programs of a client."""
        for number in range(self.setup.programs):
            wanderer = Wanderer(
                self.program(client), random.Random(self.rng.random()), self.next_token, self.setup.operations
            )
            work = wanderer.run(self.history, f"client {client.index}.{number}")
            self._programs.append((client, self.loop.spawn(client.node, work)))

    def next_token(self) -> int:
        """Return a number that is in no other content or owner."""
        return next(self._tokens)

    # Runs

    async def prepare(self) -> None:
        """Start a server with a volume and the shared directories in it, and the clients."""
        self.start_server()
        await asyncio.sleep(0.1)
        if self.setup.standby:
            self.start_server(SECOND)
        connection = await rpc.connect(ADDRESS)
        await connection.call(wire.CreateVolume(VOLUME, "file:///blocks", self.setup.inline_limit), wire.Done)
        await connection.call(wire.OpenSession(VOLUME, "setup", None), wire.SessionOpened)
        for name in DIRECTORIES:
            await connection.call(wire.MakeNode(wire.ROOT_INO, name, 0o040755, 0, 0), wire.Changed)
        log = await connection.call(wire.MakeNode(wire.ROOT_INO, LOG, 0o100644, 0, 0), wire.Changed)
        self.witness.logs[log.attributes[0].ino] = Counter()
        await connection.call(wire.CloseSession(), wire.Done)
        connection.abort()
        self.setup_commits = len(self.witness.commits)
        for _ in range(1 if self.setup.late else self.setup.clients):
            self.add_client()

    async def run_programs(self) -> None:
        """Let random programs and faults do what they do; then heal, and let all end in time."""
        for client in self.clients:
            self.start_programs(client)
        faults = asyncio.create_task(self.faults.run()) if self.setup.faults else None
        await self._add_late_clients()
        await self._until(lambda: not self._running(), 60 * self.setup.lease_s)
        if faults is not None:
            self.faults.ending = True
            await faults
        await self.settle()

    def _errors(self) -> list[BaseException]:
        errors = [task.exception() for _, task in self._programs if task.done() and not task.cancelled()]
        return [error for error in errors if error is not None]

    def _running(self) -> bool:
        return any(not task.done() for _, task in self._programs)

    async def settle(self) -> None:
        """Everything must end within a few leases."""
        await self._until(lambda: not self._running(), 10 * self.setup.lease_s + 30)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition, at most so long."""
        limit = self.loop.now + seconds
        while not condition() and self.loop.now < limit:  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.2)

    async def look_at_the_end(self) -> None:
        """Each client reads all there is."""
        for client in self.clients:
            task = self.loop.spawn(client.node, self._look(client))
            done, _ = await asyncio.wait({task}, timeout=10 * self.setup.lease_s)
            for each in done:
                each.result()

    async def _look(self, client: Client) -> None:
        program = self.program(client)
        with self.history.operation(f"the last look of client {client.index}"):
            entries = self.engine.entries(1)
            for parent, names in entries.items():
                for name in names:
                    with contextlib.suppress(Failed):
                        ino = await program.stat(parent, name)
                        if ino in self.witness.logs:
                            await program.read_log(ino)
                        elif ino and ino not in entries and ino in self.witness.contents():
                            await program.read(ino)

    def verdict(self) -> Verdict:
        """Return what is to be said of all that happened."""
        complaints = [f"not ended: {what}" for _, what in self.history.pending.values()]
        settling_s = 2 * self.setup.lease_s + 5
        faults = self.setup.faults
        complaints += checker.check(self.history, self.witness.commits, self.setup_commits, settling_s, faults=faults)
        complaints += self.exceptions + self.witness.complaints
        complaints += [f"a program failed: {error!r}" for error in self._errors()]
        complaints += check_tree(self.engine.entries(1), self.engine.inodes(1))
        return Verdict(
            self.seed,
            complaints,
            self.faults.log,
            self.loop.digest,
            self.elapsed(),
            self.loop.steps,
            self._counts(),
        )

    def _counts(self) -> Counter[str]:
        sources = ("errno" if read.source.startswith("the errno") else read.source for read in self.history.reads)
        counts = Counter(f"read from {source}" for source in sources)
        counts.update(f"{change.what.split()[0]} {change.outcome.value}" for change in self.history.changes)
        counts["removed by itself"] = sum(
            change.held and change.what.startswith("unlink") for change in self.history.changes
        )
        counts["store failures"] = self.objects.failures
        return counts + self.faults.counts + self.engine.counts


@contextlib.contextmanager
def running(seed: int, setup: Setup) -> Iterator[World]:
    """A world in which nothing has happened yet."""
    rng = random.Random(seed)
    loop = VirtualLoop(random.Random(rng.random()))
    world = World(seed, setup, loop, rng)
    with simulated(loop, random.Random(rng.random())), _in_place_of_the_machine(world), switched_off(setup.rule_off):
        asyncio.set_event_loop(loop)
        loop.set_exception_handler(world.note_exception)
        try:
            yield world
        finally:
            loop.discard()
            asyncio.set_event_loop(None)


@contextlib.contextmanager
def _in_place_of_the_machine(world: World) -> Iterator[None]:
    """Sockets, the object store and pyfuse3's one free function are models; logging is silent."""
    network = world.network

    async def create_connection(factory: Callable[[], Any], host: str, port: int) -> Any:
        return await network.connect(factory, (host, port))

    async def create_server(factory: Callable[[], Any], sock: Any) -> _Listening:
        network.listen(tuple(sock), factory)
        return _Listening(network, tuple(sock))

    level = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (world.loop, "create_connection", create_connection),
            (world.loop, "create_server", create_server),
            (Credentials, "needs_tls", lambda credentials, host: False),
            (listener, "listen", lambda address, may_be_reached: address),
            (listener, "address_of", str),
            (listener, "remove_socket", lambda sock: None),
            (worker_mount, "open_store", lambda url: world.objects),
            (pyfuse3, "readdir_reply", kernel.patched_readdir_reply),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


class _Listening:
    """What stands for :class:`asyncio.Server`."""

    def __init__(self, network: Network, address: tuple[str, int]) -> None:
        self._network = network
        self._address = address

    def close(self) -> None:
        self._network.ignore(self._address)


def run(seed: int, setup: Setup = Setup()) -> Verdict:
    """Run one seed and return the verdict."""
    with running(seed, setup) as world:

        async def everything() -> None:
            await world.prepare()
            await world.run_programs()
            await world.look_at_the_end()

        return finish(world, everything)


def finish(world: World, main: Callable[[], Any]) -> Verdict:
    """Run a coroutine function in a world and return the verdict; a run that gets stuck is a complaint, too."""
    stuck = []
    try:
        world.loop.run_until_complete(world.loop.spawn(world.node, main()))
    except Stuck as error:
        stuck.append(str(error))
    verdict = world.verdict()
    verdict.complaints += stuck
    return verdict
