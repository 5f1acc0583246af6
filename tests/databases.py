"""Real servers for storage engines: each is started once, on loopback, when the first test asks for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from bench.databases import SERVERS, Etcd, Server, Unavailable
from bench.ports import free_ports

__all__ = ["SERVERS", "Databases", "Etcd", "Proxy", "Server", "Unavailable", "free_ports", "proxy", "running"]


class Databases:
    """The servers of one run of the tests."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._missing: dict[str, str] = {}

    def server(self, kind: str) -> Server:
        """Return a server that runs; skip the test, with the reason, where there is none."""
        if kind not in self._servers and kind not in self._missing:
            try:
                server = SERVERS[kind]()
                self._servers[kind] = server
                server.start()
            except Unavailable as error:
                self._missing[kind] = str(error)
        if kind in self._missing:
            pytest.skip(self._missing[kind])
        return self._servers[kind]

    def url(self, kind: str, directory: Path) -> str:
        """Return the URL of a fresh engine of any kind."""
        if kind == "memory":
            return "memory://"
        if kind == "lmdb":
            return f"lmdb://{directory}"
        return self.server(kind).url()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class Proxy:
    """A listener that passes bytes on to a port, until it is told to lose them."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        self.port = 0
        #: Answers are not passed on, and connections are cut as soon as one comes.
        self.loses_answers = False
        #: Called when an answer was lost.
        self.lost: Callable[[], object] = lambda: None
        #: Nobody is let in.
        self.is_closed = False
        self._passes = asyncio.Event()
        self._passes.set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_closed:
            writer.transport.abort()
            return
        await self._passes.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pump(reader, back, False), self._pump(there, writer, True))
        self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if answers and self.loses_answers:
                    self.cut()
                    self.lost()
                    break
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
            await self._passes.wait()
        writer.transport.abort()

    def hold(self) -> None:
        """Pass nothing on, as a network that is broken: nobody is told, and nobody's connection ends."""
        self._passes.clear()

    def let_go(self) -> None:
        """Pass on what was held, and all else again."""
        self._passes.set()

    def cut(self) -> None:
        """Cut every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.cut()


@contextlib.asynccontextmanager
async def proxy(target: int) -> AsyncIterator[Proxy]:
    """A proxy for the body."""
    made = Proxy(target)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def running() -> Iterator[Databases]:
    """The servers, until the tests end."""
    databases = Databases()
    try:
        yield databases
    finally:
        databases.close()
