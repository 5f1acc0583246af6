"""What goes wrong in a run: faults drawn from the seed, each of which ends by itself."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from simulation.world import ServerProcess, World

_HOUR_NS: Final = 3600 * 10**9


class Faults:
    """The faults of one run. ``lease_s`` is the measure of how long they last."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._lease_s = world.setup.lease_s
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        #: No more begin.
        self.ending = False

    async def run(self) -> None:
        """Do one fault of clients after another, and at the same time one of the server's side, until ``ending``."""
        await asyncio.gather(
            self._do(
                (4, self.cut_a_connection),
                (3, self.partition),
                (2, self.one_way_partition),
                (3, self.freeze_a_worker),
                (2, self.kill_a_worker),
                (1, self.kill_a_client),
                (1, self.suspend_a_client),
                (1, self.jump_a_wall_clock),
            ),
            self._do(
                *self._of_servers(),
                (4, self.nothing),
                (1, self.slow_the_network),
                (1, self.fill_the_engine),
                (1, self.confuse_the_engine),
                (1, self.break_the_store),
            ),
        )

    def _of_servers(self) -> list[tuple[int, Callable[[], Awaitable[None]]]]:
        if self._world.setup.standby:
            return [(4, self.kill_a_metaserver), (4, self.freeze_a_metaserver)]
        return [(3, self.restart_the_server), (1, self.fail_over), (1, self.freeze_the_server)]

    async def _do(self, *kinds: tuple[int, Callable[[], Awaitable[None]]]) -> None:
        wanted = self._world.setup.kinds
        kinds = tuple(each for each in kinds if not wanted or each[1].__name__ in wanted)
        while kinds:
            await asyncio.sleep(self._rng.uniform(0.2, 1.0) * self._lease_s)
            if self.ending:
                return
            kind = self._rng.choices([each for _, each in kinds], weights=[weight for weight, _ in kinds])[0]
            self.counts[kind.__name__] += 1
            self._say(kind.__name__)
            await kind()

    def _say(self, what: str) -> None:
        self.log.append(f"{self._world.elapsed():.3f} s: {what}")

    async def _for_a_while(self, longest: float = 2.0) -> None:
        await asyncio.sleep(self._rng.uniform(0.05, longest) * self._lease_s)

    async def nothing(self) -> None:
        await self._for_a_while()

    async def cut_a_connection(self) -> None:
        endpoints = [each for each in self._world.network.endpoints if not each.closed]
        if endpoints:
            self._world.network.cut(self._rng.choice(endpoints))

    async def partition(self) -> None:
        client = self._rng.choice(self._world.clients)
        self._world.network.block(client.worker.node, self._world.server.node)
        self._world.network.block(self._world.server.node, client.worker.node)
        await self._for_a_while()
        self._world.network.heal()

    async def one_way_partition(self) -> None:
        client = self._rng.choice(self._world.clients)
        ends = [client.worker.node, self._world.server.node]
        self._rng.shuffle(ends)
        self._world.network.block(*ends)
        await self._for_a_while()
        self._world.network.heal()

    async def freeze_a_worker(self) -> None:
        node = self._rng.choice(self._world.clients).worker.node
        node.frozen = True
        await self._for_a_while()
        node.frozen = False

    async def kill_a_worker(self) -> None:
        client = self._rng.choice(self._world.clients)
        self._world.kill_worker(client)
        await self._for_a_while(0.2)
        client.start_worker()

    async def kill_a_client(self) -> None:
        client = self._rng.choice(self._world.clients)
        self._world.kill_client(client)
        await self._for_a_while(1.5)
        self._world.boot_client(client)

    async def restart_the_server(self) -> None:
        for _ in range(self._rng.choice((1, 1, 2))):
            self._world.kill_server()
            await self._for_a_while(0.3)
            self._world.start_server()

    async def fail_over(self) -> None:
        """Another server takes over from one that hangs, which then goes on for a while."""
        old = self._world.server
        old.node.frozen = True
        await self._for_a_while(0.3)
        self._world.start_server()
        await self._for_a_while()
        old.node.frozen = False
        await self._for_a_while(1.0)
        self._world.kill_server(old)

    def _a_metaserver(self) -> ServerProcess:
        """Return, of two, mostly the one that serves."""
        servers = self._world.servers.values()
        return self._world.server if self._rng.random() < 0.75 else self._rng.choice(list(servers))

    async def kill_a_metaserver(self) -> None:
        """One of two is killed; it is started again, before or after the other one has taken over."""
        process = self._a_metaserver()
        self._world.kill_server(process)
        await self._for_a_while(1.5)
        self._world.start_server(process.address)

    async def freeze_a_metaserver(self) -> None:
        """One of two hangs, and goes on when the other one has perhaps taken over."""
        process = self._a_metaserver()
        process.node.frozen = True
        await self._for_a_while()
        process.node.frozen = False
        await self._for_a_while(0.5)

    async def freeze_the_server(self) -> None:
        node = self._world.server.node
        node.frozen = True
        await self._for_a_while(0.7)
        node.frozen = False

    async def jump_a_wall_clock(self) -> None:
        nodes = [self._world.server.node, *(client.worker.node for client in self._world.clients)]
        self._rng.choice(nodes).wall_offset_ns += self._rng.choice((-_HOUR_NS, _HOUR_NS))

    async def slow_the_network(self) -> None:
        network = self._world.network
        before, network.slow_s = network.slow_s, self._lease_s / 4
        await self._for_a_while()
        network.slow_s = before

    async def suspend_a_client(self) -> None:
        """The lid is closed: for a moment, or for ten minutes."""
        client = self._rng.choice(self._world.clients)
        seconds = self._rng.choice((self._rng.uniform(0.1, 2.0) * self._lease_s, 600.0))
        nodes = [client.node, client.worker.node]
        self._world.loop.suspend(nodes, seconds)
        await asyncio.sleep(seconds)
        self._world.wake(client)

    async def fill_the_engine(self) -> None:
        self._world.engine.full = True
        await self._for_a_while(0.5)
        self._world.engine.full = False

    async def confuse_the_engine(self) -> None:
        """The outcome of some commits is not known."""
        self._world.engine.doubtful = True
        await self._for_a_while(0.5)
        self._world.engine.doubtful = False

    async def break_the_store(self) -> None:
        self._world.objects.failing = True
        await self._for_a_while()
        self._world.objects.failing = False
