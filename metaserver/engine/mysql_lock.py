"""The authority where MySQL's protocol is spoken: a named lock of a session, which ends when it says nothing."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

from metaserver.engine.authority import LAPSE_S
from metaserver.engine.mysql import MysqlStore, ask
from metaserver.engine.remote_authority import Lock
from metaserver.engine.store import Lost
from metaserver.errors import EngineBusy

#: A session that says nothing for so long is ended, whether its holder hangs, is cut off, or its machine is gone.
_SETTINGS: Final = f"SET SESSION wait_timeout = {math.ceil(LAPSE_S)}"


class MysqlLock(Lock):
    """The lock of one set of tables."""

    def __init__(self, store: MysqlStore) -> None:
        self._store = store
        settings = store.settings
        self._name = f"bpfuse-{hashlib.sha256(f'{settings.database}/{settings.tables}'.encode()).hexdigest()[:40]}"
        self._connection: Any = None

    async def take(self, address: str) -> None:
        connection = self._connection = self._connection or await self._store.connect(_SETTINGS)
        try:
            ((taken,),) = await ask(connection, f"SELECT GET_LOCK('{self._name}', 0)")
            if taken:
                said = f"x'{address.encode().hex()}'"
                await ask(connection, f"REPLACE INTO {self._store.settings.tables}_authority VALUES (1, {said})")
        except BaseException:
            self._drop()
            raise
        if not taken:
            raise EngineBusy(f"the metaserver at {await self.holder()} has the authority over this engine")

    async def renew(self) -> None:
        if self._connection is None:
            raise EngineBusy("the session that has its lock was ended")
        try:
            ((holds,),) = await ask(self._connection, f"SELECT IS_USED_LOCK('{self._name}') = CONNECTION_ID()")
        except Lost as lost:
            self._drop()  # the server may have ended it already, and a new session has no lock
            raise EngineBusy(str(lost)) from None
        if not holds:
            raise EngineBusy("another session has its lock")

    async def holder(self) -> str | None:
        connection = self._connection or await self._store.connect(_SETTINGS)
        try:
            rows = await ask(
                connection,
                f"SELECT address FROM {self._store.settings.tables}_authority"
                f" WHERE IS_USED_LOCK('{self._name}') IS NOT NULL",
            )
        except BaseException:
            self._drop()
            raise
        finally:
            if connection is not self._connection:
                connection.close()
        return rows[0][0].decode(errors="replace") if rows else None

    async def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await ask(connection, f"DO RELEASE_LOCK('{self._name}')")
            finally:
                connection.close()

    async def close(self) -> None:
        self._drop()
        await self._store.close()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
