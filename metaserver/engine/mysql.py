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
import logging
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncmy
from asyncmy.constants import CLIENT
from asyncmy.errors import MySQLError

from metaserver.engine.sql_store import CONNECT_S, KEYS_PART, TIMEOUT_S, TIP_PART, Fetched, SqlStore
from metaserver.engine.store import Lost, Moved, Query, Tip, Writes
from metaserver.errors import EngineError, EngineFull, EngineUnusable

_log = logging.getLogger(__name__)

PORT: Final = 3306
#: The size that the database is said to have at most, in bytes.
CAPACITY: Final = 2**40
#: Deadlocks after which a commit is given up as a conflict.
_TRIES: Final = 5

_SETUP: Final = """
CREATE TABLE IF NOT EXISTS {0}_rows (k VARBINARY(400) PRIMARY KEY, v MEDIUMBLOB NOT NULL) ENGINE=InnoDB;
CREATE TABLE IF NOT EXISTS {0}_tip (one TINYINT PRIMARY KEY, version BIGINT NOT NULL, marks VARBINARY(400) NOT NULL)
ENGINE=InnoDB;
INSERT IGNORE INTO {0}_tip VALUES (1, 0, x'');
CREATE TABLE IF NOT EXISTS {0}_authority
(one TINYINT PRIMARY KEY, address VARBINARY(400) NOT NULL, token VARBINARY(16) NOT NULL) ENGINE=InnoDB;
CREATE TABLE IF NOT EXISTS {0}_metaservers
(address VARBINARY(400) PRIMARY KEY, seen DATETIME(3) NOT NULL) ENGINE=InnoDB
"""
_READING: Final = "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ"
_WRITING: Final = "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE"
_HOLD: Final = "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"
_RETRIED: Final = (1205, 1213, 1020)
_FULL: Final = (1021, 1041, 1114)
_REFUSED: Final = (1044, 1045, 1049, 1142, 1227, 1698)
_LOST: Final = (1040, 1053, 1077, 1152, 1153, 1158, 1159, 1160, 1161, 1203, 1317, 1927, 4031, 2002, 2003, 2006, 2013)
#: What asyncmy raises; RuntimeError for a connection that is closed while it is set up.
_FAILURES: Final = (MySQLError, OSError, EOFError, TimeoutError, RuntimeError)


class Retry(Lost):
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


class MysqlStore(SqlStore[Any]):
    """The rows of one set of tables."""

    #: A packet is to stay far below the server's ``max_allowed_packet``, 16 MiB unless it was made smaller.
    most_writes = 2000
    most_bytes = 4 * 1024 * 1024

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.capacity)
        self.settings = settings

    # Commits

    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        statements = self._statements(version, marks, writes)
        for _ in range(_TRIES):
            try:
                found = await self._commit(statements)
            except Retry:
                self._drop_writer()  # which ends the transaction, if it is one still
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
        writer = await self._writing()
        try:
            ((version, marks),) = await ask(writer, statements)
        except BaseException:
            self._drop_writer()
            raise
        return Tip(int(version), marks)

    async def _check_durability(self, connection: Any) -> None:
        ((setting,),) = await ask(connection, "SELECT @@GLOBAL.innodb_flush_log_at_trx_commit")
        if int(setting) != 1:
            _log.warning("the server does not sync what it commits (innodb_flush_log_at_trx_commit): a crash loses it")

    # Reading

    async def _select(
        self, connection: Any, keys: Sequence[bytes], queries: Sequence[Query], timeout_s: float | None
    ) -> Iterable[Fetched]:
        tables = self.settings.tables
        parts = [f"SELECT {TIP_PART}, marks, NULL, version FROM {tables}_tip"]
        if keys:
            parts.append(f"SELECT {KEYS_PART}, k, v, 0 FROM {tables}_rows WHERE k IN ({', '.join(map(_hex, keys))})")
        for number, query in enumerate(queries):
            where = f"k >= {_hex(query.start)} AND k < {_hex(query.end)}"
            order = "DESC" if query.reverse else "ASC"
            limit = "" if query.limit is None else f" LIMIT {query.limit}"
            parts.append(f"SELECT {number}, k, v, 0 FROM {tables}_rows WHERE {where} ORDER BY k {order}{limit}")
        statement = " UNION ALL ".join(f"({part})" for part in parts)
        return [(part, k, v, int(version)) for part, k, v, version in await ask(connection, statement, timeout_s)]

    async def _used(self, connection: Any) -> int:
        name = _hex(self.settings.database.encode())
        statement = f"SELECT SUM(data_length + index_length) FROM information_schema.tables WHERE table_schema = {name}"
        ((used,),) = await ask(connection, statement)
        return int(used or 0)

    # Connections

    async def _connect_reader(self) -> Any:
        return await self.connect(_READING)

    async def _connect_past(self) -> Any:
        connection = await self.connect(_READING)
        return await self._begun(connection, lambda it: ask(it, _HOLD))

    async def _connect_writer(self) -> Any:
        return await self._begun(await self.connect(_WRITING), self._check_durability)

    def drop(self, connection: Any) -> None:
        connection.close()

    async def connect(self, statement: str) -> Any:
        """Return a new connection to a database with the tables, after this first statement."""
        settings = self.settings
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await asyncmy.connect(
                    host=settings.host.strip("[]"),
                    port=settings.port or PORT,
                    user=settings.user,
                    password=settings.password,
                    database=settings.database,
                    charset="utf8mb4",
                    ssl=settings.tls,
                    autocommit=True,
                    connect_timeout=CONNECT_S,
                    client_flag=CLIENT.MULTI_STATEMENTS,
                )
        except _FAILURES as error:
            raise _meaning(error) from None
        return await self._begun(connection, lambda it: ask(it, statement), self._set_up)

    async def _make_tables(self, connection: Any) -> None:
        name = _hex(f"{self.settings.tables}_metaservers".encode())
        where = f"table_schema = DATABASE() AND table_name = {name}"
        if not await ask(connection, f"SELECT 1 FROM information_schema.tables WHERE {where}"):
            await ask(connection, _SETUP.format(self.settings.tables))


def _hex(data: bytes) -> str:
    return f"x'{data.hex()}'"


async def ask(connection: Any, statements: str, timeout_s: float | None = TIMEOUT_S) -> Sequence[tuple[Any, ...]]:
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
    except _FAILURES as error:
        raise _meaning(error) from None


def _meaning(error: BaseException) -> Exception:
    """Return what an error means."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return EngineUnusable(f"the server's certificate: {cause.verify_message}")
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
