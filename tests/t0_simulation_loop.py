"""The simulation's loop and network: virtual time, nodes that stop, die and sleep, and what faults do to messages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from simulation.loop import START_S, Node, Stuck, VirtualLoop
from simulation.network import Endpoint, Network
from simulation.rwlock import ReadWriteLock


class Box:
    """A loop with a node to run in, and a log."""

    def __init__(self, seed: int = 0) -> None:
        self.loop = VirtualLoop(random.Random(seed))
        self.log: list[Any] = []

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self.loop.run_until_complete(self.loop.spawn(Node("main"), main))
        finally:
            self.loop.discard()

    async def tick(self, name: str, times: int, pause_s: float = 1.0) -> None:
        for number in range(times):
            self.log.append((name, number, round(self.loop.now - START_S, 3)))
            await asyncio.sleep(pause_s)


def test_time_passes_at_once() -> None:
    box = Box()
    box.run(box.tick("a", 3, 3600.0))
    assert box.log == [("a", 0, 0.0), ("a", 1, 3600.0), ("a", 2, 7200.0)]


def test_the_seed_decides_who_goes_first() -> None:
    def order(seed: int) -> list[Any]:
        box = Box(seed)

        async def main() -> None:
            tasks = [box.loop.spawn(Node(name), box.tick(name, 5, 0.0)) for name in "abc"]
            await asyncio.wait(tasks)

        box.run(main())
        return box.log

    assert order(1) == order(1)
    assert len({str(order(seed)) for seed in range(10)}) > 5
    for name in "abc":
        assert [number for who, number, _ in order(3) if who == name] == [0, 1, 2, 3, 4]


def test_a_frozen_node_catches_up_and_a_dead_one_does_not() -> None:
    box = Box()

    async def main() -> None:
        frozen, dead = Node("frozen"), Node("dead")
        task = box.loop.spawn(frozen, box.tick("frozen", 3))
        box.loop.spawn(dead, box.tick("dead", 3))
        await asyncio.sleep(0.5)
        frozen.frozen = True
        box.loop.kill(dead)
        await asyncio.sleep(9.5)
        frozen.frozen = False
        await task

    box.run(main())
    assert box.log == [("frozen", 0, 0.0), ("dead", 0, 0.0), ("frozen", 1, 10.0), ("frozen", 2, 11.0)] or box.log == [
        ("dead", 0, 0.0), ("frozen", 0, 0.0), ("frozen", 1, 10.0), ("frozen", 2, 11.0),
    ]  # fmt: skip


def test_a_suspended_machine_has_no_time() -> None:
    box = Box()

    async def main() -> None:
        node = Node("laptop")
        task = box.loop.spawn(node, box.tick("laptop", 3))
        await asyncio.sleep(0.5)
        box.loop.suspend([node], 600.0)
        await asyncio.sleep(600.0)
        node.frozen = False
        await task
        assert box.loop.now - START_S == pytest.approx(603.0)

    box.run(main())
    assert [when for _, _, when in box.log] == [0.0, 601.0, 602.0]


def test_nothing_left_to_do_is_an_error() -> None:
    box = Box()

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck):
        box.run(main())


def test_a_lock_is_given_in_turn() -> None:
    box = Box()
    lock = ReadWriteLock()

    async def hold(name: str, exclusive: bool) -> None:
        async with lock.exclusive() if exclusive else lock.shared():
            box.log.append(f"+{name}")
            await asyncio.sleep(1)
            box.log.append(f"-{name}")

    async def main() -> None:
        await asyncio.gather(hold("r1", False), hold("r2", False), hold("w", True), hold("r3", False))

    box.run(main())
    assert box.log == ["+r1", "+r2", "-r1", "-r2", "+w", "-w", "+r3", "-r3"]


# The network


class Recorder(asyncio.Protocol):
    """Keeps what comes."""

    def __init__(self, box: Box, name: str) -> None:
        self.box = box
        self.name = name
        self.transport: Any = None
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, error: Exception | None) -> None:
        self.box.log.append((self.name, "lost", type(error).__name__))

    def pause_writing(self) -> None:
        self.box.log.append((self.name, "pause"))

    def resume_writing(self) -> None:
        self.box.log.append((self.name, "resume"))


class Wired(Box):
    """A server and a client with a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(self.loop, random.Random(1))
        self.server, self.client = Node("server"), Node("client")
        self.far = Recorder(self, "server")
        self.near: Recorder

    def play(self, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def listen() -> None:
            self.network.listen(("server", 1), lambda: self.far)

        async def connect() -> None:
            _, protocol = await self.network.connect(lambda: Recorder(self, "client"), ("server", 1))
            assert isinstance(protocol, Recorder)
            self.near = protocol

        async def main() -> None:
            await self.loop.spawn(self.server, listen())
            await self.loop.spawn(self.client, connect())
            await asyncio.sleep(1)
            await story()

        self.run(main())


def test_messages_arrive_in_order() -> None:
    wired = Wired()

    async def story() -> None:
        for number in range(100):
            wired.near.transport.write(b"%02d" % number)
        await asyncio.sleep(1)
        assert wired.far.received == b"".join(b"%02d" % number for number in range(100))

    wired.play(story)


def test_a_partition_holds_and_healing_delivers() -> None:
    wired = Wired()

    async def story() -> None:
        wired.network.block(wired.client, wired.server)
        wired.near.transport.write(b"there")
        wired.far.transport.write(b"back")
        await asyncio.sleep(60)
        assert (wired.far.received, wired.near.received) == (b"", b"back"), "one way only"
        wired.network.heal()
        await asyncio.sleep(1)
        assert wired.far.received == b"there"

    wired.play(story)


def test_a_cut_is_noticed_by_both_and_loses_what_is_on_its_way() -> None:
    wired = Wired()

    async def story() -> None:
        wired.near.transport.write(b"lost")
        wired.network.cut(wired.network.endpoints[0])
        await asyncio.sleep(5)
        assert wired.far.received == b""
        assert sorted(name for name, *_ in wired.log) == ["client", "server"]

    wired.play(story)


def test_a_dead_process_is_noticed() -> None:
    wired = Wired()

    async def story() -> None:
        wired.loop.kill(wired.server)
        wired.network.died(wired.server)
        await asyncio.sleep(1)
        assert wired.log == [("client", "lost", "NoneType")]

        async def again() -> None:
            with pytest.raises(ConnectionRefusedError):
                await wired.network.connect(lambda: Recorder(wired, "client"), ("server", 1))

        await wired.loop.spawn(wired.client, again())

    wired.play(story)


def test_a_slow_consumer_is_felt() -> None:
    wired = Wired()

    async def story() -> None:
        wired.client.frozen = True
        for _ in range(20):
            wired.far.transport.write(bytes(16384))
        await asyncio.sleep(5)
        assert wired.log == [("server", "pause")]
        assert wired.far.transport.get_write_buffer_size() > 0
        wired.client.frozen = False
        await asyncio.sleep(1)
        assert wired.log == [("server", "pause"), ("server", "resume")]
        assert len(wired.near.received) == 20 * 16384

    wired.play(story)


def test_a_reader_that_pauses_gets_the_rest_later() -> None:
    wired = Wired()

    async def story() -> None:
        transport: Endpoint = wired.near.transport
        transport.pause_reading()
        wired.far.transport.write(b"later")
        await asyncio.sleep(5)
        assert wired.near.received == b""
        transport.resume_reading()
        await asyncio.sleep(1)
        assert wired.near.received == b"later"

    wired.play(story)


@pytest.mark.filterwarnings("error")
def test_what_a_run_leaves_may_start_tasks_at_its_end() -> None:
    """As the worker does, when the last writer of a file has gone; none of them runs."""
    box = Box()

    async def late() -> None:
        box.log.append("late")

    async def left() -> None:
        try:
            await asyncio.sleep(10.0)
        finally:
            box.log.append(asyncio.create_task(late()))

    async def main() -> None:
        box.loop.spawn(Node("left"), left())
        await asyncio.sleep(1.0)

    box.run(main())
    assert len(box.log) == 1
    assert isinstance(box.log[0], asyncio.Task)
