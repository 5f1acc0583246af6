"""The authority in PostgreSQL: an advisory lock of a session."""

from __future__ import annotations

import zlib
from typing import Final

import asyncpg

from metaserver.engine.authority import ANNOUNCED_S, LAPSE_S
from metaserver.engine.postgres import PostgresStore, answer
from metaserver.engine.session_lock import SessionLock

#: The first half of the lock's number; the second is the schema's.
_CLASS: Final = 0x62706675
_MS: Final = str(int(LAPSE_S * 1000))
_SETTINGS: Final = {
    "idle_session_timeout": _MS,
    "synchronous_commit": "on",
    "tcp_user_timeout": _MS,
    "tcp_keepalives_idle": "1",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "2",
}
_IS_LOCKED: Final = """
SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND objid::bigint = $2
    AND objsubid = 2 AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
"""
_SAY: Final = """
INSERT INTO authority VALUES (true, $1, $2) ON CONFLICT (one) DO UPDATE SET address = $1, token = $2
"""
#: Those that were seen long ago are deleted by who comes by; he is seen now.
_ANNOUNCE: Final = """
WITH gone AS (DELETE FROM metaservers WHERE seen < now() - interval '1 hour' AND address <> $1)
INSERT INTO metaservers SELECT $1, now() WHERE $1 <> '' ON CONFLICT (address) DO UPDATE SET seen = excluded.seen
"""
_ANNOUNCED: Final = f"SELECT address FROM metaservers WHERE seen > now() - interval '{ANNOUNCED_S} seconds'"


class PostgresLock(SessionLock[asyncpg.Connection]):
    """The lock of a schema."""

    _store: PostgresStore

    def __init__(self, store: PostgresStore) -> None:
        super().__init__(store)
        self._number = zlib.crc32(store.schema.encode()) - 2**31

    async def _connect(self) -> asyncpg.Connection:
        return await self._store.connect(**_SETTINGS)

    async def _try_lock(self, session: asyncpg.Connection) -> bool:
        return bool(await answer(session.fetchval("SELECT pg_try_advisory_lock($1, $2)", _CLASS, self._number)))

    async def _said(self, session: asyncpg.Connection) -> tuple[str, bytes] | None:
        row = await answer(session.fetchrow("SELECT address, token FROM authority"))
        return (row[0], row[1]) if row is not None else None

    async def _say(self, session: asyncpg.Connection, address: str, token: bytes) -> None:
        await answer(session.execute(_SAY, address, token))

    async def _give_back(self, session: asyncpg.Connection, token: bytes) -> None:
        await answer(session.execute("DELETE FROM authority WHERE token = $1", token))
        await answer(session.execute("SELECT pg_advisory_unlock_all()"))

    async def _announce(self, connection: asyncpg.Connection, address: str) -> list[str]:
        await answer(connection.execute("BEGIN READ WRITE"))
        await answer(connection.execute(_ANNOUNCE, address))
        rows = await answer(connection.fetch(_ANNOUNCED))
        await answer(connection.execute("COMMIT"))
        return [row[0] for row in rows]

    async def _withdraw(self, connection: asyncpg.Connection, address: str) -> None:
        await answer(connection.execute("BEGIN READ WRITE"))
        await answer(connection.execute("DELETE FROM metaservers WHERE address = $1", address))
        await answer(connection.execute("COMMIT"))

    async def _is_locked(self, session: asyncpg.Connection) -> bool:
        return bool(await answer(session.fetchval(_IS_LOCKED, _CLASS, self._number % 2**32)))
