"""The one thing that the data path needs of whatever reaches the metaserver."""

from __future__ import annotations

from typing import Protocol, TypeVar

from metaserver import wire

Reply = TypeVar("Reply", bound=wire.Reply)


class Caller(Protocol):
    """A session, a connection, or a test's double."""

    async def call(self, request: wire.Request, reply_type: type[Reply], /) -> Reply:
        """Return the reply; raise Refused or Disconnected, of :mod:`fuseclient.worker.rpc`."""
        ...
