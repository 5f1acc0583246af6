"""The authority where MySQL's protocol is spoken: a named lock of a session."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

from metaserver.engine.authority import ANNOUNCED_S, LAPSE_S
from metaserver.engine.mysql import MysqlStore, ask
from metaserver.engine.session_lock import SessionLock

_SETTINGS: Final = f"SET SESSION wait_timeout = {math.ceil(LAPSE_S)}"


class MysqlLock(SessionLock[Any]):
    """The lock of one set of tables."""

    _store: MysqlStore

    def __init__(self, store: MysqlStore) -> None:
        super().__init__(store)
        settings = store.settings
        self._name = f"bpfuse-{hashlib.sha256(f'{settings.database}/{settings.tables}'.encode()).hexdigest()[:40]}"
        self._table = f"{settings.tables}_authority"
        self._metaservers = f"{settings.tables}_metaservers"

    async def _connect(self) -> Any:
        return await self._store.connect(_SETTINGS)

    async def _try_lock(self, session: Any) -> bool:
        ((taken,),) = await ask(session, f"SELECT GET_LOCK('{self._name}', 0)")
        return bool(taken)

    async def _said(self, session: Any) -> tuple[str, bytes] | None:
        rows = await ask(session, f"SELECT address, token FROM {self._table}")
        return (rows[0][0].decode(errors="replace"), rows[0][1]) if rows else None

    async def _say(self, session: Any, address: str, token: bytes) -> None:
        said = f"x'{address.encode().hex()}', x'{token.hex()}'"
        await ask(session, f"REPLACE INTO {self._table} VALUES (1, {said})")

    async def _give_back(self, session: Any, token: bytes) -> None:
        await ask(session, f"DELETE FROM {self._table} WHERE token = x'{token.hex()}'")
        await ask(session, f"DO RELEASE_LOCK('{self._name}')")

    async def _announce(self, connection: Any, address: str) -> list[str]:
        table, now = self._metaservers, "UTC_TIMESTAMP(3)"
        statements = [f"DELETE FROM {table} WHERE seen < {now} - INTERVAL 1 HOUR"]
        if address:
            statements.append(f"REPLACE INTO {table} VALUES (x'{address.encode().hex()}', {now})")
        statements.append(f"SELECT address FROM {table} WHERE seen > {now} - INTERVAL {math.ceil(ANNOUNCED_S)} SECOND")
        rows = await ask(connection, "; ".join(statements))
        return [row[0].decode(errors="replace") for row in rows]

    async def _withdraw(self, connection: Any, address: str) -> None:
        await ask(connection, f"DELETE FROM {self._metaservers} WHERE address = x'{address.encode().hex()}'")

    async def _is_locked(self, session: Any) -> bool:
        ((locked,),) = await ask(session, f"SELECT IS_USED_LOCK('{self._name}') IS NOT NULL")
        return bool(locked)
