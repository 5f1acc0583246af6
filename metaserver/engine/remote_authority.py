"""The authority over an engine on servers elsewhere: a lock that these keep, and drop when it is not renewed.

While the lock is held for certain, nobody else writes: whoever writes has taken it before. So the engine need not ask
whether its rows at hand are current (:meth:`RemoteEngine.trust`). For certain means: until ``LAPSE_S`` after the last
renewal was *sent*, less a margin for clocks that run apart, on a clock that counts suspend.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from metaserver.engine.authority import LAPSE_S, Candidate
from metaserver.engine.base import Engine
from metaserver.engine.remote import FIRST_PATIENCE_S, RemoteEngine
from metaserver.engine.store import Lost
from metaserver.errors import EngineBusy, EngineError, EngineUnavailable, EngineUnusable

_log = logging.getLogger(__name__)

#: Seconds between two renewals; by how much the holder gives up earlier than the servers may.
RENEW_S: Final = LAPSE_S / 4
_MARGIN_S: Final = LAPSE_S / 10
_RELEASE_S: Final = 2.0
_PAUSE_S: Final = 0.25


class Lock(abc.ABC):
    """A lock kept by an engine's servers. Everything raises :exc:`~metaserver.engine.store.Lost` and EngineError."""

    @abc.abstractmethod
    async def take(self, address: str) -> None:
        """Take it; raise :exc:`EngineBusy`."""

    @abc.abstractmethod
    async def renew(self) -> None:
        """Keep it for ``LAPSE_S`` from when this was called; raise :exc:`EngineBusy` if it is held no more."""

    @abc.abstractmethod
    async def holder(self) -> str | None:
        """Return the address of who holds it."""

    @abc.abstractmethod
    async def announce(self, address: str) -> list[str]:
        """Say that this address can be asked, unless it is empty, for ``ANNOUNCED_S``; return all that have said so."""

    @abc.abstractmethod
    async def release(self) -> None:
        """Give it back, if it is held, and take back what was announced."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of all connections."""


class RemoteCandidate(Candidate):
    """``open_engine`` opens the engine that the lock stands for."""

    def __init__(self, address: str, lock: Lock, open_engine: Callable[[], RemoteEngine]) -> None:
        super().__init__(address)
        self._lock = lock
        self._open = open_engine
        self._engine: RemoteEngine | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._has_met = False

    async def take(self) -> Engine:
        await self._answered(lambda: self._lock.take(self.address))
        sent = boottime_s()
        await self._answered(self._lock.renew)
        self._engine = self._open()
        self._hold(sent)
        self._keeping = asyncio.create_task(self._keep(), name="authority")
        return self._engine

    async def _answered(self, ask: Callable[[], object]) -> None:
        """Ask for the lock. Servers that never answered are not the right ones; others may come back."""
        end = boottime_s() + FIRST_PATIENCE_S
        while True:
            try:
                await ask()  # type: ignore[misc]
            except Lost as lost:
                if self._has_met:
                    raise EngineBusy(f"the engine does not answer: {lost}") from None
                if boottime_s() > end:
                    raise EngineUnusable(f"the engine does not answer: {lost}") from None
                await asyncio.sleep(_PAUSE_S)
                continue
            except EngineBusy:
                self._has_met = True
                raise
            self._has_met = True
            return

    async def holder(self) -> str | None:
        with contextlib.suppress(Lost):
            return await self._lock.holder()
        return None

    async def announce(self) -> list[str]:
        try:
            return await self._lock.announce(self.address)
        except Lost as lost:
            raise EngineUnavailable(f"the engine does not answer: {lost}") from None

    async def resign(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            assert self._keeping is not None
            self._keeping.cancel()
            engine.trust(0)
            await engine.close()
        with contextlib.suppress(Lost, EngineError, TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                await self._lock.release()
        await self._lock.close()

    def _hold(self, sent: float) -> None:
        self._until = sent + LAPSE_S - _MARGIN_S
        if self._engine is not None:
            self._engine.trust(self._until)

    async def _keep(self) -> None:
        """Renew the lock until it is lost."""
        why = "it was not renewed in time"
        while boottime_s() < self._until:
            await asyncio.sleep(min(RENEW_S, max(0.0, self._until - boottime_s())))
            sent = boottime_s()
            try:
                async with asyncio.timeout(max(0.0, self._until - sent)):
                    await self._lock.renew()
                self._hold(sent)
            except (Lost, TimeoutError) as error:
                _log.warning("the authority could not be renewed: %s", error or "no answer")
                await asyncio.sleep(min(_PAUSE_S, max(0.0, self._until - boottime_s())))
            except EngineError as error:
                why = str(error)
                break
        if self._engine is not None:
            self._engine.trust(0)
        self.on_lost(why)


def boottime_s() -> float:
    """Return seconds on a clock that counts suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
