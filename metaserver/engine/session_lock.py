"""The authority on databases: a lock of a session, and a row that says whose it is.

The server ends a session that has said nothing for ``LAPSE_S``: its holder hangs, or is cut off. It also ends one at
once, when it restarts or the connection breaks, and the holder may not know yet. So whoever takes the lock from one who
did not give it back waits for ``LAPSE_S`` before it is his; the holder stops relying on it earlier than that. And a
holder whose session broke takes the lock again if nobody has stepped in.
"""

from __future__ import annotations

import abc
import asyncio
import os
from collections.abc import Awaitable
from typing import Final, Generic, TypeVar

from metaserver.engine.authority import LAPSE_S
from metaserver.engine.remote_authority import RENEW_S, Lock
from metaserver.engine.sql_store import SqlStore
from metaserver.errors import EngineBusy

C = TypeVar("C")
T = TypeVar("T")

_TOKEN_BYTES: Final = 16


class SessionLock(Lock, Generic[C]):
    """The lock, and what it takes of the server. Every method below raises Lost and EngineError."""

    def __init__(self, store: SqlStore[C]) -> None:
        self._store = store
        self._token = os.urandom(_TOKEN_BYTES)
        self._session: C | None = None
        self._is_held = False

    @abc.abstractmethod
    async def _connect(self) -> C:
        """Begin a session."""

    @abc.abstractmethod
    async def _try_lock(self, session: C) -> bool:
        """Take the lock, unless another session has it."""

    @abc.abstractmethod
    async def _said(self, session: C) -> tuple[str, bytes] | None:
        """Return the address and the token of who took the lock last and did not give it back."""

    @abc.abstractmethod
    async def _say(self, session: C, address: str, token: bytes) -> None:
        """Say who has taken the lock."""

    @abc.abstractmethod
    async def _give_back(self, session: C, token: bytes) -> None:
        """Say that nobody has the lock, if it was this one, and let it go."""

    @abc.abstractmethod
    async def _is_locked(self, session: C) -> bool:
        """Say whether any session has the lock."""

    async def take(self, address: str) -> None:
        await self._careful(self._take(await self._opened(), address))

    async def renew(self) -> None:
        await self._careful(self._renew(await self._opened()))

    async def holder(self) -> str | None:
        return await self._careful(self._find_holder(await self._opened()))

    async def release(self) -> None:
        if self._session is not None:
            async with asyncio.timeout(LAPSE_S):
                await self._careful(self._give_back(self._session, self._token))

    async def close(self) -> None:
        self._end()
        await self._store.close()

    async def _take(self, session: C, address: str) -> None:
        if not await self._try_lock(session):
            holder = await self._find_holder(session)
            raise EngineBusy(f"the metaserver at {holder or 'an unknown place'} has the authority over this engine")
        said = await self._said(session)
        if said is not None and said[1] != self._token:
            for _ in range(round(LAPSE_S / RENEW_S) + 1):
                await asyncio.sleep(RENEW_S)
                await self._said(session)  # the session is to go on
        await self._say(session, address, self._token)
        self._is_held = True

    async def _renew(self, session: C) -> None:
        if not self._is_held and not await self._try_lock(session):
            raise EngineBusy("another session has its lock")
        self._is_held = True
        said = await self._said(session)
        if said is None or said[1] != self._token:
            raise EngineBusy("another metaserver has taken it")

    async def _find_holder(self, session: C) -> str | None:
        said = await self._said(session)
        return said[0] if said is not None and await self._is_locked(session) else None

    async def _opened(self) -> C:
        if self._session is None:
            self._session = await self._connect()
        return self._session

    async def _careful(self, asking: Awaitable[T]) -> T:
        """Wait for an answer; a session that failed is not used again."""
        try:
            return await asking
        except EngineBusy:
            raise
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        session, self._session, self._is_held = self._session, None, False
        if session is not None:
            self._store.drop(session)
