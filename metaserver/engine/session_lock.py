"""The authority on databases: a lock of a session, and a row that says whose it is.

The server ends a session that has said nothing for ``LAPSE_S``: its holder hangs, or is cut off. It also ends one at
once, when it restarts or the connection breaks, and the holder may not know yet: he relies on the lock until almost
``LAPSE_S`` after he sent the last renewal. So each renewal changes the row, by a number: its *beat*. Whoever takes the
lock from one who did not give it back waits until the last beat, and only the lock's holder can make one, has been
there for ``LAPSE_S``; he has looked at it while he stood by, so most of that has passed. And a holder whose session
broke takes the lock again if nobody has stepped in.
"""

from __future__ import annotations

import abc
import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from metaserver.engine.authority import LAPSE_S
from metaserver.engine.remote_authority import RENEW_S, Lock, boottime_s
from metaserver.engine.sql_store import SqlStore
from metaserver.engine.store import Lost
from metaserver.errors import EngineBusy, EngineClosed

C = TypeVar("C")
T = TypeVar("T")

#: A token is who took the lock, and the beat.
_ID_BYTES: Final = 8
_BEAT_BYTES: Final = 4
#: Seconds that each answer may take.
_ANSWER_S: Final = LAPSE_S


class SessionLock(Lock, Generic[C]):
    """The lock, and what it takes of the server. Every method below raises Lost and EngineError."""

    def __init__(self, store: SqlStore[C]) -> None:
        self._store = store
        self._id = os.urandom(_ID_BYTES)
        self._address = ""
        #: The token that was seen last, and when at the latest it came to be, on a clock that counts suspend.
        self._seen = b""
        self._seen_s = 0.0
        self._session: C | None = None
        #: This session has the lock.
        self._is_held = False
        self._is_closed = False
        #: A session is asked one thing at a time.
        self._turn = asyncio.Lock()
        self._announced = ""

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
        """Say who has taken the lock, durably: by a beat that a crash undid the holder would seem silent."""

    @abc.abstractmethod
    async def _give_back(self, session: C, token: bytes) -> None:
        """Say that nobody has the lock, if it was this one, and let it go."""

    @abc.abstractmethod
    async def _announce(self, connection: C, address: str) -> list[str]:
        """Say that there is a metaserver, unless its address is empty; return all that were there lately."""

    @abc.abstractmethod
    async def _withdraw(self, connection: C, address: str) -> None:
        """Say that it is there no more."""

    @abc.abstractmethod
    async def _is_locked(self, session: C) -> bool:
        """Say whether any session has the lock."""

    async def take(self, address: str) -> None:
        if not await self._ask(self._obtain):
            holder = await self.holder()
            raise EngineBusy(f"the metaserver at {holder or 'an unknown place'} has the authority over this engine")
        said = await self._ask(self._look)
        if said is not None and not self._is_own(said):
            end = self._seen_s + LAPSE_S
            while boottime_s() < end:
                await asyncio.sleep(min(RENEW_S, end - boottime_s()))
                await self._ask(self._look)  # the session is to go on
        if not self._is_held:
            raise Lost("the session that had the lock has ended")
        self._address = address
        await self._ask(lambda session: self._say(session, address, self._token(0)))

    async def renew(self) -> None:
        if not self._is_held and not await self._ask(self._obtain):
            raise EngineBusy("another session has its lock")
        if not await self._ask(self._beat):
            raise EngineBusy("another metaserver has taken it")

    def _token(self, beat: int) -> bytes:
        return self._id + beat.to_bytes(_BEAT_BYTES)

    def _is_own(self, said: tuple[str, bytes]) -> bool:
        return said[1].startswith(self._id)

    async def _beat(self, session: C) -> bool:
        """Say that the lock is still this one's, over the session that has it; False: it is not."""
        said = await self._said(session)
        if said is None or not self._is_own(said):
            return False
        beat = int.from_bytes(said[1][_ID_BYTES:]) + 1
        await self._say(session, self._address, self._token(beat % 256**_BEAT_BYTES))
        return True

    async def _look(self, session: C) -> tuple[str, bytes] | None:
        """As :meth:`_said`, and take note of when the holder was last heard of."""
        said = await self._said(session)
        token = said[1] if said is not None else b""
        if token != self._seen or len(token) != _ID_BYTES + _BEAT_BYTES:  # others are of versions that do not beat
            self._seen, self._seen_s = token, boottime_s()
        return said

    async def holder(self) -> str | None:
        """As :meth:`Lock.holder`; who does not wait for the answer any more does not end the session, and its lock."""
        looking = asyncio.ensure_future(self._ask(self._find_holder))
        looking.add_done_callback(_take_note)
        return await asyncio.shield(looking)

    async def announce(self, address: str) -> list[str]:
        self._announced = address
        return await self._ask_beside(lambda connection: self._announce(connection, address))

    async def release(self) -> None:
        if self._session is not None:
            await self._ask(self._resign)
        announced, self._announced = self._announced, ""
        if announced:
            await self._ask_beside(lambda connection: self._withdraw(connection, announced))

    async def _resign(self, session: C) -> None:
        said = await self._said(session)
        await self._give_back(session, said[1] if said is not None and self._is_own(said) else self._id)

    async def close(self) -> None:
        self._is_closed = True
        self._end()
        await self._store.close()

    async def _obtain(self, session: C) -> bool:
        self._is_held = self._is_held or await self._try_lock(session)
        return self._is_held

    async def _find_holder(self, session: C) -> str | None:
        said = await self._look(session)
        return said[0] if said is not None and await self._is_locked(session) else None

    async def _ask(self, what: Callable[[C], Awaitable[T]]) -> T:
        """Ask one thing after the other over the session, which is not used again if it does not answer."""
        async with self._turn:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    if self._is_closed:
                        raise EngineClosed("the lock is given up")
                    if self._session is None:
                        self._session = await self._connect()
                    return await what(self._session)
            except TimeoutError:
                self._end()
                raise Lost(f"no answer within {_ANSWER_S:g} s") from None
            except BaseException:
                self._end()
                raise

    async def _ask_beside(self, what: Callable[[C], Awaitable[T]]) -> T:
        """Ask over another connection than the session, which waits for nobody."""
        try:
            async with asyncio.timeout(_ANSWER_S), self._store.reader() as connection:
                return await what(connection)
        except TimeoutError:
            raise Lost(f"no answer within {_ANSWER_S:g} s") from None

    def _end(self) -> None:
        session, self._session, self._is_held = self._session, None, False
        if session is not None:
            self._store.drop(session)


def _take_note(done: asyncio.Future[str | None]) -> None:
    """Take an error as told, though nobody may be waiting any more."""
    if not done.cancelled():
        done.exception()
