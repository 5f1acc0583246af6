"""The PostgreSQL engine: a store in two tables of one schema (see remote.py for what makes it an engine).

``rows`` has the keys and values, ``tip`` one row with the version of the last commit and its marks. A commit is one
statement, and so one transaction, at SERIALIZABLE: it raises the version if it is still the expected one, and writes if
it did. What concurrent commits do to each other, PostgreSQL tells as a serialisation failure; then nothing was written.
A fetch is one statement, too, whose snapshot has the tip that its rows are of. A moment that is read for longer is a
transaction at REPEATABLE READ.

Nothing is listened for: one process writes at a time, and others compare the tip.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import asyncpg

from metaserver.engine.base import Row, Space
from metaserver.engine.store import Found, Lost, Moved, Past, Query, Store, Tip, Writes
from metaserver.errors import EngineError, EngineFull, EngineUnusable

T = TypeVar("T")

PORT: Final = 5432
#: The size that the database is said to have at most, in bytes, as PostgreSQL does not tell how much room there is.
CAPACITY: Final = 2**40
#: Connections for reading, at most; one more commits.
_READERS: Final = 4
_TIMEOUT_S: Final = 10.0
_CONNECT_S: Final = 5.0
#: Serialisation failures and deadlocks after which a commit is given up as a conflict.
_TRIES: Final = 5

_SETUP: Final = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE IF NOT EXISTS {schema}.rows (k bytea PRIMARY KEY, v bytea NOT NULL);
ALTER TABLE {schema}.rows ALTER COLUMN v SET STORAGE EXTERNAL;
CREATE TABLE IF NOT EXISTS {schema}.tip (one boolean PRIMARY KEY, version bigint NOT NULL, marks bytea NOT NULL);
INSERT INTO {schema}.tip VALUES (true, 0, '') ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS {schema}.authority
    (one boolean PRIMARY KEY, address text NOT NULL, token bytea NOT NULL);
"""
#: Number of the advisory lock under which one connection at a time makes the tables.
_SETUP_LOCK: Final = 0x6270667573650000
_COMMIT: Final = """
WITH moved AS (UPDATE tip SET version = version + 1, marks = $2 WHERE version = $1 RETURNING version),
put AS (INSERT INTO rows SELECT k, v FROM unnest($3::bytea[], $4::bytea[]) AS new (k, v)
        WHERE EXISTS (SELECT FROM moved) ON CONFLICT (k) DO UPDATE SET v = excluded.v),
gone AS (DELETE FROM rows WHERE k = ANY ($5::bytea[]) AND EXISTS (SELECT FROM moved))
SELECT version FROM moved
"""
_TIP: Final = "SELECT -2 AS part, marks AS k, NULL::bytea AS v, version FROM tip"
_KEYS: Final = "SELECT -1, k, v, 0 FROM rows WHERE k = ANY (${0}::bytea[])"
_RANGE: Final = "(SELECT {0}, k, v, 0 FROM rows WHERE k >= ${1} AND k < ${2} ORDER BY k {4} LIMIT ${3})"
_SETTINGS: Final = {"application_name": "bpfuse", "enable_seqscan": "off", "jit": "off"}
_LOST: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.QueryCanceledError,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """A database and a schema in it. ``tls``: what the server's certificate is checked by; ``None``: it is not."""

    hosts: tuple[tuple[str, int], ...]
    database: str
    user: str
    schema: str
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    capacity: int = CAPACITY


class PostgresStore(Store):
    """The rows of a schema."""

    #: Far below what PostgreSQL would take: it is a bound for how long the others wait.
    most_writes = 2000
    most_bytes = 8 * 1024 * 1024

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_set_up = False
        self._setting_up = asyncio.Lock()
        self._idle: list[asyncpg.Connection] = []
        self._readers = asyncio.Semaphore(_READERS)
        self._writer: asyncpg.Connection | None = None

    @property
    def schema(self) -> str:
        """Where the tables are."""
        return self._settings.schema

    # The store

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        async with self._reader() as connection:
            return await answer(fetch(connection, keys, queries))

    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        put = {key: value for key, value in writes.items() if value is not None}
        gone = [key for key, value in writes.items() if value is None]
        arguments = version, marks, list(put), list(put.values()), gone
        for _ in range(_TRIES):
            connection = await self._writing()
            try:
                new = await answer(connection.fetchval(_COMMIT, *arguments, timeout=_TIMEOUT_S))
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
                continue  # nothing was written, and the next try sees what was in the way
            except Lost:
                await self._drop_writer()
                raise
            if new is None:
                raise Moved(await self._tip())
            return int(new)
        raise Moved(None)

    async def _tip(self) -> Tip:
        return (await self.fetch((), ())).tip

    @contextlib.asynccontextmanager
    async def past(self) -> AsyncIterator[Past]:
        connection = await self.connect()
        try:
            await answer(connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            yield _PostgresPast(connection)
        finally:
            connection.terminate()

    async def space(self) -> Space:
        async with self._reader() as connection:
            used = await answer(connection.fetchval("SELECT pg_database_size(current_database())"))
        return Space(self._settings.capacity, max(0, self._settings.capacity - int(used)))

    async def close(self) -> None:
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()
        await self._drop_writer()

    # Connections

    @contextlib.asynccontextmanager
    async def _reader(self) -> AsyncIterator[asyncpg.Connection]:
        """Have a connection that is in the middle of nothing; one that fails is not used again."""
        async with self._readers:
            connection = self._idle.pop() if self._idle else await self.connect(default_transaction_read_only="on")
            try:
                yield connection
            except BaseException:
                for each in (connection, *self._idle):  # what ended this one may have ended the others
                    each.terminate()
                self._idle.clear()
                raise
            self._idle.append(connection)

    async def _writing(self) -> asyncpg.Connection:
        if self._writer is None:
            self._writer = await self.connect(default_transaction_isolation="serializable")
            if await answer(self._writer.fetchval("SHOW synchronous_commit")) in ("off", "local"):
                await answer(self._writer.execute("SET synchronous_commit = on"))
        return self._writer

    async def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.terminate()

    async def connect(self, **more: str) -> asyncpg.Connection:
        """Return a new connection to a server that can be written to, with the schema's tables."""
        settings = self._settings
        connection = await answer(
            asyncpg.connect(
                host=[host.strip("[]") for host, _ in settings.hosts],
                port=[port or PORT for _, port in settings.hosts],
                user=settings.user,
                password=settings.password,
                database=settings.database,
                ssl=settings.tls if settings.tls is not None else "prefer",
                timeout=_CONNECT_S,
                server_settings={**_SETTINGS, **more, "search_path": settings.schema},
                target_session_attrs="read-write" if len(settings.hosts) > 1 else None,
            )
        )
        try:
            await self._set_up(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _set_up(self, connection: asyncpg.Connection) -> None:
        async with self._setting_up:
            if self._is_set_up:
                return
            if await answer(connection.fetchval("SELECT to_regclass('authority')")) is None:
                setup = f"SELECT pg_advisory_xact_lock({_SETUP_LOCK});" + _SETUP.format(schema=self._settings.schema)
                await answer(connection.execute(f"BEGIN READ WRITE; {setup} COMMIT"))
            self._is_set_up = True


class _PostgresPast(Past):
    """A transaction that writes nothing."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        async with self._turn:
            return await answer(fetch(self._connection, keys, queries, timeout_s=None))


async def fetch(
    connection: asyncpg.Connection,
    keys: Sequence[bytes],
    queries: Sequence[Query],
    timeout_s: float | None = _TIMEOUT_S,
) -> Found:
    """Read by one statement."""
    parts, arguments = [_TIP], list[Any]()
    if keys:
        arguments.append(list(keys))
        parts.append(_KEYS.format(len(arguments)))
    for number, query in enumerate(queries):
        first = len(arguments) + 1
        arguments += [query.start, query.end, query.limit]
        parts.append(_RANGE.format(number, first, first + 1, first + 2, "DESC" if query.reverse else ""))
    rows = await connection.fetch(" UNION ALL ".join(parts), *arguments, timeout=timeout_s)
    values: dict[bytes, bytes | None] = dict.fromkeys(keys)
    ranges: list[list[Row]] = [[] for _ in queries]
    tip = Tip(0, b"")
    for part, key, value, version in rows:
        if part >= 0:
            ranges[part].append((key, value))
        elif part == -1:
            values[key] = value
        else:
            tip = Tip(version, key)
    for query, found in zip(queries, ranges, strict=True):
        found.sort(reverse=query.reverse)
    return Found(tip, values, dict(zip(queries, ranges, strict=True)))


async def answer(asked: Awaitable[T]) -> T:
    """Return an answer, or raise what the refusal means; serialisation failures and deadlocks as they are."""
    try:
        return await asked
    except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
        raise
    except asyncpg.DiskFullError as error:
        raise EngineFull(f"PostgreSQL: {error}") from None
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        raise EngineUnusable(f"PostgreSQL: {error}") from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise EngineUnusable(f"PostgreSQL: {error}") from None
    except _LOST as error:
        raise Lost(f"{error or type(error).__name__}") from None
    except asyncpg.PostgresError as error:
        raise EngineError(f"PostgreSQL: {error.sqlstate}: {error}") from None
