"""What the stores in SQL databases share: connections that read, one that commits, and what rows of an answer mean.

A fetch is one statement, and so of one moment. Its rows are (part, key, value, version): of part :data:`TIP_PART` the
marks and the version of the tip, of part :data:`KEYS_PART` a row that was asked for by its key, of part n those of the
n-th query, in any order.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Final, Generic, TypeVar

from metaserver.engine.base import Row, Space
from metaserver.engine.store import Found, Past, Query, Store, Tip

C = TypeVar("C")

TIP_PART: Final = -2
KEYS_PART: Final = -1
#: Connections for reading, at most; one more commits.
_READERS: Final = 4
#: Seconds that one statement may take.
TIMEOUT_S: Final = 10.0
#: Seconds that connecting may take.
CONNECT_S: Final = 5

Fetched = tuple[int, bytes, bytes, int]


class SqlStore(Store, Generic[C]):
    """The rows in tables of a database, over connections of type ``C``. All that asks raises Lost and EngineError."""

    def __init__(self, capacity: int) -> None:
        #: The size that the database is said to have at most, in bytes: no server tells how much room there is.
        self._capacity = capacity
        self._is_set_up = False
        self._setting_up = asyncio.Lock()
        self._idle: list[C] = []
        self._readers = asyncio.Semaphore(_READERS)
        self._writer: C | None = None

    @abc.abstractmethod
    async def _connect_reader(self) -> C:
        """Return a new connection for one statement after the other, each of one moment."""

    @abc.abstractmethod
    async def _connect_writer(self) -> C:
        """Return a new connection for commits."""

    @abc.abstractmethod
    async def _connect_past(self) -> C:
        """Return a new connection all of whose statements are of one moment."""

    @abc.abstractmethod
    def drop(self, connection: C) -> None:
        """End a connection at once."""

    @abc.abstractmethod
    async def _make_tables(self, connection: C) -> None:
        """Make the tables, unless they are there."""

    @abc.abstractmethod
    async def _used(self, connection: C) -> int:
        """Return the bytes that the database takes."""

    @abc.abstractmethod
    async def _select(
        self, connection: C, keys: Sequence[bytes], queries: Sequence[Query], timeout_s: float | None
    ) -> Iterable[Fetched]:
        """Read the tip, keys and ranges by one statement."""

    # The store

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        async with self.reader() as connection:
            return await self.fetch_by(connection, keys, queries)

    @contextlib.asynccontextmanager
    async def past(self) -> AsyncIterator[Past]:
        connection = await self._connect_past()
        try:
            yield _SqlPast(self, connection)
        finally:
            self.drop(connection)

    async def space(self) -> Space:
        async with self.reader() as connection:
            used = await self._used(connection)
        return Space(self._capacity, max(0, self._capacity - used))

    async def close(self) -> None:
        self._drop_readers()
        self._drop_writer()

    async def fetch_by(
        self, connection: C, keys: Sequence[bytes], queries: Sequence[Query], timeout_s: float | None = TIMEOUT_S
    ) -> Found:
        """Read over this connection."""
        return _found(keys, queries, await self._select(connection, keys, queries, timeout_s))

    # Connections

    @contextlib.asynccontextmanager
    async def reader(self) -> AsyncIterator[C]:
        """Have a connection that is in the middle of nothing; one that fails is not used again."""
        async with self._readers:
            connection = self._idle.pop() if self._idle else await self._connect_reader()
            try:
                yield connection
            except BaseException:
                self.drop(connection)
                self._drop_readers()  # what ended this one may have ended the others
                raise
            self._idle.append(connection)

    def _drop_readers(self) -> None:
        while self._idle:
            self.drop(self._idle.pop())

    async def _writing(self) -> C:
        if self._writer is None:
            self._writer = await self._connect_writer()
        return self._writer

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            self.drop(writer)

    async def _begun(self, connection: C, *steps: Callable[[C], Awaitable[object]]) -> C:
        """Return a new connection after the first steps over it; if one fails the connection is dropped."""
        try:
            for step in steps:
                await step(connection)
        except BaseException:
            self.drop(connection)
            raise
        return connection

    async def _set_up(self, connection: C) -> None:
        async with self._setting_up:
            if not self._is_set_up:
                await self._make_tables(connection)
                self._is_set_up = True


class _SqlPast(Past, Generic[C]):
    """A transaction that writes nothing."""

    def __init__(self, store: SqlStore[C], connection: C) -> None:
        self._store = store
        self._connection = connection
        self._turn = asyncio.Lock()

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        async with self._turn:
            return await self._store.fetch_by(self._connection, keys, queries, None)


def _found(keys: Sequence[bytes], queries: Sequence[Query], rows: Iterable[Fetched]) -> Found:
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    ranges: list[list[Row]] = [[] for _ in queries]
    tip = Tip(0, b"")
    for part, key, value, version in rows:
        if part >= 0:
            ranges[part].append((key, value))
        elif part == KEYS_PART:
            values[key] = value
        else:
            tip = Tip(int(version), key)
    for query, found in zip(queries, ranges, strict=True):
        found.sort(reverse=query.reverse)
    return Found(tip, values, dict(zip(queries, ranges, strict=True)))
