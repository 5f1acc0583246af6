"""Clients that speak the protocol and cache nothing: what passes between them and a metaserver, and how long."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import Final

from fuseclient.worker import rpc
from metaserver import wire

_VOLUME: Final = "protocol"


class _Counted:
    """A connection whose frames are counted, as they come out of the socket and go into it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self.messages = 0

    @classmethod
    async def connect(cls, address: str, volume: str) -> _Counted:
        where = wire.parse_address(address)
        if isinstance(where, wire.UnixAddress):
            counted = cls(*await asyncio.open_unix_connection(where.path))
        else:
            counted = cls(*await asyncio.open_connection(where.host, where.port))
        await counted.call(wire.Hello(wire.PROTOCOL_VERSION, "bench"))
        await counted.call(wire.OpenSession(volume, "bench"))
        return counted

    async def call(self, request: wire.Request) -> wire.Reply:
        """Return the reply; whatever else comes before it is counted, too."""
        sent = next(self._ids)
        self._writer.write(wire.encode(sent, request))
        self.messages += 1
        while True:
            number, reply = await self.receive()
            if number == sent:
                return reply

    async def receive(self) -> tuple[int, wire.Reply]:
        header = await self._reader.readexactly(wire.HEADER_BYTES)
        body = await self._reader.readexactly(wire.body_length(header, wire.MAX_REPLY))
        self.messages += 1
        return wire.decode_reply(body)

    async def settle(self) -> None:
        """Return when all that was sent before has come: the reply to another request comes last."""
        await self.call(wire.GetStatistics())
        self.messages -= 2

    def close(self) -> None:
        self._writer.transport.abort()


class Clients:
    """Some holders, and one who changes things, on a volume of their own."""

    def __init__(self, address: str, writer: rpc.Connection, holders: list[rpc.Connection]) -> None:
        self._address = address
        self._writer = writer
        self._holders = holders
        self._names = (b"%d" % number for number in itertools.count())

    @classmethod
    async def connect(cls, address: str, holders: int) -> Clients:
        """Connect ``holders`` and one more to a metaserver."""
        connections = [await rpc.connect(address) for _ in range(holders + 1)]
        with contextlib.suppress(rpc.Refused):
            await connections[0].call(wire.CreateVolume(_VOLUME, "file:///nowhere", 65536), wire.Done)
        for each in connections:
            await each.call(wire.OpenSession(_VOLUME, "bench"), wire.SessionOpened)
        return cls(address, connections[0], connections[1:])

    async def timed_change(self, holders: int) -> float:
        """Return the seconds that a change takes of something that so many others hold, who drop it when told."""
        made = await self._make(next(self._names), 0o100644)
        for each in self._holders[:holders]:
            await each.call(wire.GetAttributes(made), wire.Found)
        start = time.perf_counter()
        await self._writer.call(wire.SetAttributes(made, mode=0o600), wire.Changed)
        return time.perf_counter() - start

    async def messages_of_changes(self, changes: int) -> int:
        """Return how many messages beside a request and its reply pass when one changes what nobody else holds.

        Another client is there all the time, and holds another directory.
        """
        mine = await self._make(next(self._names), 0o040755)
        other = await self._make(next(self._names), 0o040755)
        counted = [await _Counted.connect(self._address, _VOLUME) for _ in range(2)]
        try:
            changing, watching = counted
            await watching.call(wire.FetchDirectory(other, 0, 16, 0, 0))
            for each in counted:
                await each.settle()
                each.messages = 0
            for number in range(changes):
                reply = await changing.call(wire.MakeNode(mine, b"%d" % number, 0o100644, 0, 0))
                if not isinstance(reply, wire.Changed):
                    raise RuntimeError(f"a change was refused: {reply}")
            await watching.settle()
            return sum(each.messages for each in counted) - 2 * changes
        finally:
            for each in counted:
                each.close()

    async def _make(self, name: bytes, mode: int) -> int:
        changed = await self._writer.call(wire.MakeNode(wire.ROOT_INO, name, mode, 0, 0), wire.Changed)
        return changed.attributes[0].ino

    async def close(self) -> None:
        """Close every session."""
        for each in (self._writer, *self._holders):
            with contextlib.suppress(rpc.Refused, rpc.Disconnected):
                await each.call(wire.CloseSession(), wire.Done)
            each.abort()
