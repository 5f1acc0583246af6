"""The PostgreSQL engine: a store in two tables of one schema (see remote.py for what makes it an engine).

``rows`` has the keys and values, ``tip`` one row with the version of the last commit and its marks. A commit is one
statement, and so one transaction, at SERIALIZABLE: it raises the version if it is still the expected one, and writes if
it did. What concurrent commits do to each other, PostgreSQL tells as a serialisation failure; then nothing was written.
A fetch is one statement, too, whose snapshot has the tip that its rows are of. A moment that is read for longer is a
transaction at REPEATABLE READ.

Nothing is listened for: one process writes at a time, and others compare the tip.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import asyncpg

from metaserver.engine.sql_store import CONNECT_S, KEYS_PART, TIMEOUT_S, TIP_PART, Fetched, SqlStore
from metaserver.engine.store import Lost, Moved, Query, Tip, Writes
from metaserver.errors import EngineError, EngineFull, EngineUnusable

T = TypeVar("T")

PORT: Final = 5432
#: The size that the database is said to have at most, in bytes.
CAPACITY: Final = 2**40
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
CREATE TABLE IF NOT EXISTS {schema}.metaservers (address text PRIMARY KEY, seen timestamptz NOT NULL);
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
_TIP: Final = f"SELECT {TIP_PART} AS part, marks AS k, NULL::bytea AS v, version FROM tip"
_KEYS: Final = f"SELECT {KEYS_PART}, k, v, 0 FROM rows WHERE k = ANY (${{0}}::bytea[])"
_RANGE: Final = "(SELECT {0}, k, v, 0 FROM rows WHERE k >= ${1} AND k < ${2} ORDER BY k {4} LIMIT ${3})"
_HOLD: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
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
    asyncpg.StatementCompletionUnknownError,
    asyncpg.ReadOnlySQLTransactionError,  # whoever answers there now is a replica
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


class PostgresStore(SqlStore[asyncpg.Connection]):
    """The rows of a schema."""

    #: Far below what PostgreSQL would take: it is a bound for how long the others wait.
    most_writes = 2000
    most_bytes = 8 * 1024 * 1024

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.capacity)
        self._settings = settings

    @property
    def schema(self) -> str:
        """Where the tables are."""
        return self._settings.schema

    # Commits

    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        put = {key: value for key, value in writes.items() if value is not None}
        gone = [key for key, value in writes.items() if value is None]
        arguments = version, marks, list(put), list(put.values()), gone
        for _ in range(_TRIES):
            connection = await self._writing()
            try:
                new = await answer(connection.fetchval(_COMMIT, *arguments, timeout=TIMEOUT_S))
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
                continue  # nothing was written, and the next try sees what was in the way
            except Lost:
                self._drop_writer()
                raise
            if new is None:
                raise Moved(await self._tip())
            return int(new)
        raise Moved(None)

    async def _tip(self) -> Tip:
        return (await self.fetch((), ())).tip

    # Reading

    async def _select(
        self, connection: asyncpg.Connection, keys: Sequence[bytes], queries: Sequence[Query], timeout_s: float | None
    ) -> Iterable[Fetched]:
        parts, arguments = [_TIP], list[Any]()
        if keys:
            arguments.append(list(keys))
            parts.append(_KEYS.format(len(arguments)))
        for number, query in enumerate(queries):
            first = len(arguments) + 1
            arguments += [query.start, query.end, query.limit]
            parts.append(_RANGE.format(number, first, first + 1, first + 2, "DESC" if query.reverse else ""))
        rows: Iterable[Fetched] = await answer(
            connection.fetch(" UNION ALL ".join(parts), *arguments, timeout=timeout_s)
        )
        return rows

    async def _used(self, connection: asyncpg.Connection) -> int:
        return int(await answer(connection.fetchval("SELECT pg_database_size(current_database())")))

    # Connections

    async def _connect_reader(self) -> asyncpg.Connection:
        return await self.connect(default_transaction_read_only="on")

    async def _connect_past(self) -> asyncpg.Connection:
        return await self._begun(await self.connect(), lambda it: answer(it.execute(_HOLD)))

    async def _connect_writer(self) -> asyncpg.Connection:
        connection = await self.connect(default_transaction_isolation="serializable")
        return await self._begun(connection, _be_durable)

    def drop(self, connection: asyncpg.Connection) -> None:
        connection.terminate()

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
                timeout=CONNECT_S,
                server_settings={**_SETTINGS, **more, "search_path": settings.schema},
                target_session_attrs="read-write" if len(settings.hosts) > 1 else None,
            )
        )
        return await self._begun(connection, self._set_up)

    async def _make_tables(self, connection: asyncpg.Connection) -> None:
        if await answer(connection.fetchval("SELECT to_regclass('metaservers')")) is None:
            setup = f"SELECT pg_advisory_xact_lock({_SETUP_LOCK});" + _SETUP.format(schema=self._settings.schema)
            await answer(connection.execute(f"BEGIN READ WRITE; {setup} COMMIT"))


async def _be_durable(connection: asyncpg.Connection) -> None:
    """Have commits synced before they are answered, whatever the server's default is."""
    if await answer(connection.fetchval("SHOW synchronous_commit")) in ("off", "local"):
        await answer(connection.execute("SET synchronous_commit = on"))


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
    except ssl.SSLCertVerificationError as error:
        raise EngineUnusable(f"PostgreSQL: its certificate: {error.verify_message}") from None
    except _LOST as error:
        raise Lost(f"{error or type(error).__name__}") from None
    except asyncpg.PostgresError as error:
        raise EngineError(f"PostgreSQL: {error.sqlstate}: {error}") from None
