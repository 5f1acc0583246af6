"""The authority in PostgreSQL: an advisory lock of a session, which the server ends when it hears nothing of it."""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

import asyncpg

from metaserver.engine.authority import LAPSE_S
from metaserver.engine.postgres import PostgresStore, answer
from metaserver.engine.remote_authority import Lock
from metaserver.engine.store import Lost
from metaserver.errors import EngineBusy

#: The first half of the lock's number; the second is the schema's.
_CLASS: Final = 0x62706675
_MS: Final = str(int(LAPSE_S * 1000))
#: A session that says nothing for so long is ended, whether its holder hangs, is cut off, or its machine is gone.
_SETTINGS: Final = {
    "idle_session_timeout": _MS,
    "tcp_user_timeout": _MS,
    "tcp_keepalives_idle": "1",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "2",
}


class PostgresLock(Lock):
    """The lock of a schema."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store
        self._number = zlib.crc32(store.schema.encode()) - 2**31
        self._connection: asyncpg.Connection | None = None

    async def take(self, address: str) -> None:
        connection = self._connection = self._connection or await self._store.connect(**_SETTINGS)
        try:
            taken = await answer(connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", _CLASS, self._number))
            if taken:
                await answer(
                    connection.execute(
                        "INSERT INTO authority VALUES (true, $1) ON CONFLICT (one) DO UPDATE SET address = $1", address
                    )
                )
        except BaseException:
            self._drop()
            raise
        if not taken:
            raise EngineBusy(f"the metaserver at {await self.holder()} has the authority over this engine")

    async def renew(self) -> None:
        if self._connection is None or self._connection.is_closed():
            raise EngineBusy("the session that has its lock was ended")
        try:
            await answer(self._connection.fetchval("SELECT 1"))
        except Lost as lost:
            self._drop()  # the server may have ended it already, and a new session has no lock
            raise EngineBusy(str(lost)) from None

    async def holder(self) -> str | None:
        connection = self._connection or await self._store.connect(**_SETTINGS)
        try:
            return await answer(
                connection.fetchval(
                    "SELECT address FROM authority WHERE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory'"
                    " AND classid = $1 AND objid::bigint = $2 AND objsubid = 2 AND granted"
                    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
                    _CLASS,
                    self._number % 2**32,
                )
            )
        finally:
            if connection is not self._connection:
                connection.terminate()

    async def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            async with asyncio.timeout(LAPSE_S):
                await answer(connection.close())

    async def close(self) -> None:
        self._drop()
        await self._store.close()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
