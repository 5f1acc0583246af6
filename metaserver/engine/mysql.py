"""The engine on servers that speak MySQL's protocol: a store in two tables (see remote.py for what makes it an engine).

Tried with MariaDB and its InnoDB. A commit is one packet of statements, a transaction at SERIALIZABLE: the first raises
the tip's version, if it is still the expected one, and leaves the commit's marks there; the others write only where
these marks are found. So a commit that came too late writes nothing, and the row of the tip, which every commit locks,
puts them all in an order, whatever isolation a server makes of SERIALIZABLE. A deadlock, or a wait that was too long,
ends a commit with nothing written. A fetch is one statement, and so of one moment.

All keys and values go as hexadecimal numbers: nothing depends on escapes or character sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncmy
from asyncmy.constants import CLIENT
from asyncmy.errors import MySQLError

from metaserver.engine.base import Row, Space
from metaserver.engine.store import Found, Lost, Moved, Past, Query, Store, Tip, Writes
from metaserver.errors import EngineError, EngineFull, EngineUnusable

_log = logging.getLogger(__name__)

PORT: Final = 3306
#: The size that the database is said to have at most, in bytes, as the server does not tell how much room there is.
CAPACITY: Final = 2**40
#: Connections for reading, at most; one more commits.
_READERS: Final = 4
_TIMEOUT_S: Final = 10.0
_CONNECT_S: Final = 5
#: Deadlocks after which a commit is given up as a conflict.
_TRIES: Final = 5

_SETUP: Final = """
CREATE TABLE IF NOT EXISTS {0}_rows (k VARBINARY(400) PRIMARY KEY, v MEDIUMBLOB NOT NULL) ENGINE=InnoDB;
CREATE TABLE IF NOT EXISTS {0}_tip (one TINYINT PRIMARY KEY, version BIGINT NOT NULL, marks VARBINARY(400) NOT NULL)
ENGINE=InnoDB;
INSERT IGNORE INTO {0}_tip VALUES (1, 0, x'');
CREATE TABLE IF NOT EXISTS {0}_authority
(one TINYINT PRIMARY KEY, address VARBINARY(400) NOT NULL, token VARBINARY(16) NOT NULL) ENGINE=InnoDB
"""
_RETRIED: Final = (1205, 1213, 1020)
_FULL: Final = (1021, 1041, 1114)
_REFUSED: Final = (1044, 1045, 1049, 1142, 1227, 1698)
_LOST: Final = (1040, 1053, 1077, 1152, 1153, 1158, 1159, 1160, 1161, 1203, 1317, 1927, 4031, 2002, 2003, 2006, 2013)


class Retry(Exception):
    """The server has ended a transaction for the sake of another; nothing was written."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A database and what its tables' names begin with. ``tls``: what the server's certificate is checked by."""

    host: str
    port: int
    database: str
    user: str
    tables: str
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    capacity: int = CAPACITY


class MysqlStore(Store):
    """The rows of one set of tables."""

    #: A packet is to stay far below the server's ``max_allowed_packet``, 16 MiB unless it was made smaller.
    most_writes = 2000
    most_bytes = 4 * 1024 * 1024

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._is_set_up = False
        self._setting_up = asyncio.Lock()
        self._idle: list[Any] = []
        self._readers = asyncio.Semaphore(_READERS)
        self._writer: Any = None

    # The store

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        async with self._reader() as connection:
            return await self.fetch_by(connection, keys, queries)

    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        statements = self._statements(version, marks, writes)
        for _ in range(_TRIES):
            try:
                found = await self._commit(statements)
            except Retry:
                await self._drop_writer()  # which ends the transaction, if it is one still
                continue
            if found.marks == marks:
                return found.version
            raise Moved(found)
        raise Moved(None)

    def _statements(self, version: int, marks: bytes, writes: Writes) -> str:
        tables = self.settings.tables
        tip = f"version = version + 1, marks = {_hex(marks)}"
        moved = f"EXISTS (SELECT 1 FROM {tables}_tip WHERE marks = {_hex(marks)})"
        put = [f"SELECT {_hex(key)} AS k, {_hex(value)} AS v" for key, value in writes.items() if value is not None]
        gone = [_hex(key) for key, value in writes.items() if value is None]
        statements = [
            "START TRANSACTION",
            f"UPDATE {tables}_tip SET {tip} WHERE one = 1 AND version = {version}",
        ]
        if put:
            statements.append(
                f"INSERT INTO {tables}_rows (k, v) SELECT k, v FROM ({' UNION ALL '.join(put)}) AS made WHERE {moved}"
                " ON DUPLICATE KEY UPDATE v = VALUES(v)"
            )
        if gone:
            statements.append(f"DELETE FROM {tables}_rows WHERE k IN ({', '.join(gone)}) AND {moved}")
        statements += ["COMMIT", f"SELECT version, marks FROM {tables}_tip"]
        return "; ".join(statements)

    async def _commit(self, statements: str) -> Tip:
        if self._writer is None:
            self._writer = await self.connect("SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            await self._check_durability(self._writer)
        try:
            ((version, marks),) = await ask(self._writer, statements)
        except BaseException:
            await self._drop_writer()
            raise
        return Tip(int(version), marks)

    async def _check_durability(self, connection: Any) -> None:
        ((setting,),) = await ask(connection, "SELECT @@GLOBAL.innodb_flush_log_at_trx_commit")
        if int(setting) != 1:
            _log.warning("the server does not sync what it commits (innodb_flush_log_at_trx_commit): a crash loses it")

    @contextlib.asynccontextmanager
    async def past(self) -> AsyncIterator[Past]:
        connection = await self.connect("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        try:
            await ask(connection, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
            yield _MysqlPast(self, connection)
        finally:
            connection.close()

    async def space(self) -> Space:
        name = _hex(self.settings.database.encode())
        statement = f"SELECT SUM(data_length + index_length) FROM information_schema.tables WHERE table_schema = {name}"
        async with self._reader() as connection:
            ((used,),) = await ask(connection, statement)
        return Space(self.settings.capacity, max(0, self.settings.capacity - int(used or 0)))

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await self._drop_writer()

    # Reading

    async def fetch_by(
        self,
        connection: Any,
        keys: Sequence[bytes],
        queries: Sequence[Query],
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Found:
        """Read by one statement."""
        tables = self.settings.tables
        parts = [f"SELECT -2, marks, NULL, version FROM {tables}_tip"]
        if keys:
            parts.append(f"SELECT -1, k, v, 0 FROM {tables}_rows WHERE k IN ({', '.join(map(_hex, keys))})")
        for number, query in enumerate(queries):
            where = f"k >= {_hex(query.start)} AND k < {_hex(query.end)}"
            order = "DESC" if query.reverse else "ASC"
            limit = "" if query.limit is None else f" LIMIT {query.limit}"
            parts.append(f"SELECT {number}, k, v, 0 FROM {tables}_rows WHERE {where} ORDER BY k {order}{limit}")
        values: dict[bytes, bytes | None] = dict.fromkeys(keys)
        ranges: list[list[Row]] = [[] for _ in queries]
        tip = Tip(0, b"")
        for part, key, value, version in await ask(
            connection, " UNION ALL ".join(f"({part})" for part in parts), timeout_s
        ):
            if part >= 0:
                ranges[part].append((key, value))
            elif part == -1:
                values[key] = value
            else:
                tip = Tip(int(version), key)
        for query, found in zip(queries, ranges, strict=True):
            found.sort(reverse=query.reverse)
        return Found(tip, values, dict(zip(queries, ranges, strict=True)))

    # Connections

    @contextlib.asynccontextmanager
    async def _reader(self) -> AsyncIterator[Any]:
        """Have a connection that is in the middle of nothing; one that fails is not used again."""
        async with self._readers:
            isolation = "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ"
            connection = self._idle.pop() if self._idle else await self.connect(isolation)
            try:
                yield connection
            except BaseException:
                for each in (connection, *self._idle):  # what ended this one may have ended the others
                    each.close()
                self._idle.clear()
                raise
            self._idle.append(connection)

    async def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    async def connect(self, statement: str) -> Any:
        """Return a new connection to a database with the tables, after this first statement."""
        settings = self.settings
        try:
            async with asyncio.timeout(_CONNECT_S):
                connection = await asyncmy.connect(
                    host=settings.host.strip("[]"),
                    port=settings.port or PORT,
                    user=settings.user,
                    password=settings.password,
                    database=settings.database,
                    charset="utf8mb4",
                    ssl=settings.tls,
                    autocommit=True,
                    connect_timeout=_CONNECT_S,
                    client_flag=CLIENT.MULTI_STATEMENTS,
                )
        except (MySQLError, OSError, EOFError, TimeoutError) as error:
            raise _meaning(error) from None
        try:
            await ask(connection, statement)
            await self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _set_up(self, connection: Any) -> None:
        async with self._setting_up:
            if self._is_set_up:
                return
            name = _hex(f"{self.settings.tables}_authority".encode())
            where = f"table_schema = DATABASE() AND table_name = {name}"
            if not await ask(connection, f"SELECT 1 FROM information_schema.tables WHERE {where}"):
                await ask(connection, _SETUP.format(self.settings.tables))
            self._is_set_up = True


class _MysqlPast(Past):
    """A transaction that writes nothing."""

    def __init__(self, store: MysqlStore, connection: Any) -> None:
        self._store = store
        self._connection = connection
        self._turn = asyncio.Lock()

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        async with self._turn:
            return await self._store.fetch_by(self._connection, keys, queries, None)


def _hex(data: bytes) -> str:
    return f"x'{data.hex()}'"


async def ask(connection: Any, statements: str, timeout_s: float | None = _TIMEOUT_S) -> Sequence[tuple[Any, ...]]:
    """Send statements; return the rows of the last one. Raises :exc:`Lost`, :exc:`Retry` and EngineError.

    A connection for which it raised is of no use any more.
    """
    try:
        async with asyncio.timeout(timeout_s), connection.cursor() as cursor:
            await cursor.execute(statements)
            rows: Sequence[tuple[Any, ...]] = await cursor.fetchall()
            while await cursor.nextset():
                rows = await cursor.fetchall()
            return rows
    except (MySQLError, OSError, EOFError, TimeoutError) as error:
        raise _meaning(error) from None


def _meaning(error: BaseException) -> Exception:
    """Return what an error means."""
    code = error.args[0] if isinstance(error, MySQLError) and error.args else 0
    if code in _RETRIED:
        return Retry(str(error))
    for codes, kind in _MEANINGS.items():
        if code in codes:
            return kind(f"the server refuses it: {error.args[-1]}")
    if code in _LOST or not isinstance(code, int) or not code:
        return Lost(str(error) or type(error).__name__)
    return EngineError(f"MySQL: {code}: {error.args[-1]}")


_MEANINGS: Final[Mapping[tuple[int, ...], type[EngineError]]] = {_FULL: EngineFull, _REFUSED: EngineUnusable}
