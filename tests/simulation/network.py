"""A network in memory: connections with delay, loss, partitions and flow control, as asyncio transports.

Each direction of a connection delivers in order; directions and connections are independent of each other, so what is
sent on one may overtake what is sent on another. What a partition stops is held, as TCP would send it again, and comes
when it heals. A connection that is cut is noticed by its two ends at different times.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from simulation.loop import Node, VirtualLoop, current_node

#: Bytes that the sockets of both sides take before a transport begins to buffer.
_SOCKET_BYTES: Final = 64 * 1024
#: Seconds after which an end notices a cut, at most.
_NOTICED_S: Final = 2.0

_END: Final = b""


class Network:
    """All connections and listeners. ``fast_s`` and ``slow_s`` bound the delays; one in ten messages is slow."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, fast_s: float = 0.005, slow_s: float = 0.2) -> None:
        self._loop = loop
        self._rng = rng
        self.fast_s = fast_s
        self.slow_s = slow_s
        self._listeners: dict[tuple[str, int], tuple[Node, Callable[[], asyncio.Protocol]]] = {}
        self._blocked: dict[tuple[str, str], None] = {}
        self.endpoints: list[Endpoint] = []
        self.messages = 0

    def delay(self) -> float:
        """Return how long the next message takes."""
        if self._rng.random() < 0.1:
            return self._rng.uniform(self.fast_s, self.slow_s)
        return self._rng.uniform(0.0002, self.fast_s)

    def listen(self, address: tuple[str, int], factory: Callable[[], asyncio.Protocol]) -> None:
        """The current node accepts connections on an address."""
        self._listeners[address] = current_node(), factory

    def ignore(self, address: tuple[str, int]) -> None:
        """Nobody accepts connections there any more."""
        self._listeners.pop(address, None)

    async def connect(
        self, factory: Callable[[], asyncio.Protocol], address: tuple[str, int]
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect the current node; a partition makes it wait, a missing listener is refused."""
        here = current_node()
        await asyncio.sleep(self.delay())
        while True:
            listener = self._listeners.get(address)
            there = listener[0].name if listener is not None else "server"
            if not self._is_blocked(here.name, there) and not self._is_blocked(there, here.name):
                break
            await asyncio.sleep(0.5)
        if listener is None or listener[0].dead:
            raise ConnectionRefusedError(f"nobody listens on {address}")
        return self._join(here, factory, *listener)

    def _join(
        self, here: Node, factory: Callable[[], asyncio.Protocol], there: Node, accept: Callable[[], asyncio.Protocol]
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        near, far = Endpoint(self, here), Endpoint(self, there)
        near.peer, far.peer = far, near
        self.endpoints += [near, far]
        self._loop.after(self.delay(), there, far.accept, accept)
        protocol = factory()
        near.protocol = protocol
        protocol.connection_made(near)
        return near, protocol

    # Faults

    def _is_blocked(self, source: str, target: str) -> bool:
        return (source, target) in self._blocked

    def block(self, source: Node, target: Node) -> None:
        """Nothing goes from one node to the other, until :meth:`heal`."""
        self._blocked[source.name, target.name] = None

    def heal(self) -> None:
        """All partitions end; what was held goes on its way."""
        self._blocked.clear()
        for endpoint in self.endpoints:
            endpoint.send_held()

    def cut(self, endpoint: Endpoint) -> None:
        """A connection breaks; what is on its way is lost."""
        for each in (endpoint, endpoint.peer):
            each.cut_off = True
            self._loop.after(self._rng.uniform(0, _NOTICED_S), each.node, each.lost, ConnectionResetError("cut"))

    def died(self, node: Node) -> None:
        """A process has ended: its machine tells the others."""
        for address, (listening, _) in list(self._listeners.items()):
            if listening is node:
                self.ignore(address)
        for endpoint in self.endpoints:
            if endpoint.node is node and not endpoint.closed:
                endpoint.closed = True
                endpoint.send(_END)
        self._forget_closed()

    def _forget_closed(self) -> None:
        self.endpoints = [each for each in self.endpoints if not (each.closed and each.peer.closed)]

    # For endpoints

    def carry(self, source: Endpoint, data: bytes) -> bool:
        """Send a message on its way; False: the direction is blocked."""
        if self._is_blocked(source.node.name, source.peer.node.name):
            return False
        self.messages += 1
        # Timers of one time come in the order of their making, so a direction delivers in order.
        now = self._loop.now
        source.last_arrival = max(source.last_arrival, now + self.delay())
        self._loop.after(source.last_arrival - now, source.peer.node, source.peer.arrived, data)
        return True

    def post(self, node: Node, callback: Callable[..., object], *args: Any) -> None:
        """Have a node run a callback."""
        self._loop.post(node, callback, *args)


class Endpoint(asyncio.Transport):
    """One end of a connection: the transport of its node's protocol."""

    protocol: asyncio.Protocol
    peer: Endpoint

    def __init__(self, network: Network, node: Node) -> None:
        super().__init__()
        self._network = network
        self.node = node
        self.closed = False
        self.cut_off = False
        self.last_arrival = 0.0
        self._accepted = False
        self._early: deque[bytes] = deque()
        self._held: deque[bytes] = deque()
        #: Bytes sent that the peer's protocol has not been given yet.
        self._undelivered = 0
        self._high = 64 * 1024
        self._paused_writing = False
        self._reading = True
        self._is_lost = False

    # asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closed or not data:
            return
        self._undelivered += len(data)
        self.send(bytes(data))
        if self.get_write_buffer_size() > self._high and not self._paused_writing:
            self._paused_writing = True
            self.protocol.pause_writing()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.send(_END)
            self._network.post(self.node, self.lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return max(0, self._undelivered - _SOCKET_BYTES)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else self._high

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._network.post(self.node, self._drain)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self.peer.node.name, 1) if name == "peername" else default

    # The network's calls

    def accept(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """The listening side's protocol is made."""
        self._accepted = True
        self.protocol = factory()
        self.protocol.connection_made(self)
        self._drain()

    def send(self, data: bytes) -> None:
        """Send, after what is held already."""
        if self.cut_off:
            return
        if self._held or not self._network.carry(self, data):
            self._held.append(data)

    def send_held(self) -> None:
        """A partition has healed."""
        while self._held and not self.cut_off and self._network.carry(self, self._held[0]):
            self._held.popleft()

    def arrived(self, data: bytes) -> None:
        """Something comes from the peer."""
        if not self.cut_off:
            self._early.append(data)
            self._drain()

    def _drain(self) -> None:
        while self._early and self._reading and not self._is_lost and self._is_up():
            data = self._early.popleft()
            if data == _END:
                self.lost(None)
                return
            self.peer.taken(len(data))
            if not self.closed:
                self.protocol.data_received(data)

    def _is_up(self) -> bool:
        return self._accepted or hasattr(self, "protocol")

    def taken(self, count: int) -> None:
        """The peer was given so many bytes."""
        self._undelivered -= count
        if self._paused_writing and self.get_write_buffer_size() <= self._high // 4:
            self._paused_writing = False
            self._network.post(self.node, self._resume)

    def _resume(self) -> None:
        if not self._is_lost:
            self.protocol.resume_writing()

    def lost(self, error: Exception | None) -> None:
        """The connection is over for this end."""
        if self._is_lost or not self._is_up():
            self.closed = True
            return
        if not self.closed:
            self.closed = True
            self.send(_END)
        self._is_lost = True
        self.protocol.connection_lost(error)
