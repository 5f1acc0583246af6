"""A metaserver in the test's own process, on a real socket, with an engine that can be held up or made to fail."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from fuseclient.worker import rpc
from metaserver import wire
from metaserver.connection import Limits
from metaserver.engine import Candidate, Engine, Snapshot, Transaction, open_engine
from metaserver.front import Front
from metaserver.gate import Access
from metaserver.server import Server
from metaserver.sessions import FEED_CHANGES

T = TypeVar("T")

VOLUME: Final = "volume"
FILE: Final = 0o100644
DIRECTORY: Final = 0o040755
#: Seconds after which a condition that has not come true fails the test.
DEADLINE_S: Final = 10.0

_numbers = itertools.count()


async def until(condition: Callable[[], object | Awaitable[object]]) -> None:
    """Wait until a condition, which may be a coroutine function, is true."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            outcome = condition()
            if await outcome if inspect.isawaitable(outcome) else outcome:
                return
            await asyncio.sleep(0.002)


class Held(Engine):
    """Another engine whose reads and writes wait while it is held, and fail with ``error`` if that is set."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting = 0
        self.error: Exception | None = None
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    async def _pass(self) -> None:
        self.waiting += 1
        await self._open.wait()
        self.waiting -= 1
        if self.error is not None:
            raise self.error

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        await self._pass()
        return await self.engine.read(body)

    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        await self._pass()
        return await self.engine.read_durable(body)

    def watch(self, callback: Callable[[], object] | None) -> None:
        self.engine.watch(callback)

    async def write(self, body: Callable[[Transaction], T], *, lazy: bool = False) -> T:
        await self._pass()
        return await self.engine.write(body, lazy=lazy)

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        return await self.engine._attempt(body, lazy)

    @property
    def is_lazy(self) -> bool:
        return self.engine.is_lazy

    @property
    def puts_off(self) -> bool:
        return self.engine.puts_off

    @property
    def losses(self) -> int:
        return self.engine.losses

    async def sync(self) -> None:
        await self._pass()
        await self.engine.sync()

    async def close(self) -> None:
        await self.engine.close()


class Given(Candidate):
    """The authority over an engine that the test owns: it is there for the taking, and not closed."""

    def __init__(self, address: str, engine: Engine) -> None:
        super().__init__(address)
        self._engine = engine

    async def take(self) -> Engine:
        return self._engine

    async def holder(self) -> str | None:
        return self.address

    async def announce(self) -> list[str]:
        return [self.address]

    async def resign(self) -> None:
        pass


class Metaserver:
    """A server that can be stopped and started again on the same engine and address."""

    def __init__(self, engine: Engine, directory: Path, **options: Any) -> None:
        self.engine = Held(engine)
        self.options = options
        self.address = f"unix:{directory}/{next(_numbers)}.sock"
        self.server: Server
        #: Where it listens beside ``address``.
        self.tcp: str
        self._clients: list[rpc.Connection | Raw] = []

    async def start(self, address: str | None = None, **options: Any) -> None:
        await self.start_on(address or self.address, **options)

    async def start_on(self, *addresses: str, **options: Any) -> None:
        """Start on one or two addresses; ``address`` and ``tcp`` are what they came to be."""
        self.front = Front(
            lambda place: Given(place, self.engine),
            lambda engine: Server(engine, **self.options),
            self.options.get("limits", Limits()),
            self.options.get("access", Access()),
        )
        self.address = await self.front.start(*addresses, **options)
        self.tcp = self.front.addresses[-1]
        assert self.front.server is not None
        self.server = self.front.server

    async def stop(self) -> None:
        await self.front.close()

    async def connect(self) -> rpc.Connection:
        return await self.connect_to(self.address)

    async def connect_to(self, address: str) -> rpc.Connection:
        connection = await rpc.connect(address)
        self._clients.append(connection)
        return connection

    async def raw(self, greeted: bool = False) -> Raw:
        """Return a bare connection, on which the handshake is done if ``greeted``."""
        raw = await Raw.connect(self.address)
        self._clients.append(raw)
        if greeted:
            raw.send(wire.encode(1, wire.Hello(wire.PROTOCOL_VERSION, "raw")))
            assert isinstance((await raw.receive())[1], wire.Welcome)
        return raw

    def abort_clients(self) -> None:
        """End all the test's own connections."""
        for client in self._clients:
            client.abort()

    async def client(self, volume: str = VOLUME) -> Client:
        """Return a connection with a session on a volume, which is made if it does not exist."""
        connection = await self.connect()
        with contextlib.suppress(rpc.Refused):
            await connection.call(wire.CreateVolume(volume, "file:///blocks", 65536), wire.Done)
        client = Client(connection)
        await client.open(volume)
        return client

    def drop_connections(self) -> None:
        """Cut every client off, as a failing network does."""
        for connection in list(self.server.connections):
            connection.cut("the test does it")


@contextlib.asynccontextmanager
async def serving(
    directory: Path,
    engine: str = "memory://",
    *,
    address: str | None = None,
    lease_s: float = 30.0,
    limits: Limits | None = None,
    feed_changes: int = FEED_CHANGES,
    **options: Any,
) -> AsyncIterator[Metaserver]:
    """A running metaserver; ``engine`` is a URL or "lmdb" for one in ``directory``."""
    url = f"lmdb://{directory}/meta" if engine == "lmdb" else engine
    opened = open_engine(url)
    options |= {"lease_s": lease_s, "limits": limits or Limits(), "feed_changes": feed_changes}
    metaserver = Metaserver(opened, directory, **options)
    await metaserver.start(address)
    try:
        yield metaserver
    finally:
        metaserver.engine.let_go()
        metaserver.engine.error = None
        metaserver.abort_clients()
        await metaserver.stop()
        await opened.close()


class Client:
    """A connection with a session, and short forms of some requests."""

    def __init__(self, connection: rpc.Connection) -> None:
        self.connection = connection
        self.session: wire.SessionOpened

    async def open(self, volume: str, resume: bytes | None = None) -> wire.SessionOpened:
        request = wire.OpenSession(volume, "test", resume)
        self.session = await self.connection.call(request, wire.SessionOpened)
        return self.session

    async def change(self, request: wire.Request) -> wire.Changed:
        return await self.connection.call(request, wire.Changed)

    async def make(self, name: bytes, mode: int = FILE, parent: int = wire.ROOT_INO, **more: Any) -> wire.Attributes:
        changed = await self.change(wire.MakeNode(parent, name, mode, 0, 0, **more))
        return changed.attributes[0]

    async def attributes(self, ino: int = wire.ROOT_INO) -> wire.Attributes:
        return (await self.connection.call(wire.GetAttributes(ino), wire.Found)).attributes

    async def renew(self, seen: int) -> wire.Renewed:
        return await self.connection.call(wire.Renew(seen), wire.Renewed)


class Raw:
    """The bare socket of a client that may do as it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str) -> Raw:
        where = wire.parse_address(address)
        if isinstance(where, wire.UnixAddress):
            return cls(*await asyncio.open_unix_connection(where.path))
        return cls(*await asyncio.open_connection(where.host, where.port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self) -> tuple[int, wire.Reply]:
        """Return the next reply; raise asyncio.IncompleteReadError at the end."""
        async with asyncio.timeout(DEADLINE_S):
            header = await self.reader.readexactly(wire.HEADER_BYTES)
            return wire.decode_reply(await self.reader.readexactly(wire.body_length(header, wire.MAX_REPLY)))

    async def until_closed(self) -> list[wire.Reply]:
        """Return what comes until the server closes the connection."""
        replies: list[wire.Reply] = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                replies.append((await self.receive())[1])
        return replies

    def abort(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def fake_server(
    directory: Path, replies: Callable[[int, wire.Request], list[bytes]]
) -> AsyncGenerator[str, None]:
    """A server of the test's own making, which answers each request with whatever bytes; yields its address."""

    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = wire.body_length(await reader.readexactly(wire.HEADER_BYTES), wire.MAX_REQUEST)
                for data in replies(*wire.decode_request(await reader.readexactly(length))):
                    writer.write(data)

    path = f"{directory}/{next(_numbers)}.sock"
    server = await asyncio.start_unix_server(handle, path)
    try:
        yield f"unix:{path}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
