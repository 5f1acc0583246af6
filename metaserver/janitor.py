"""What a metaserver does without being asked: it ends sessions, and clears up what they and deletions leave.

One task does it, in transactions of a bounded size, so that clients' requests come in between. Orphans are the
unlinked inodes that a session still used: they go when it ends, those of an earlier run's sessions at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Final

from metaserver import events, fencing, namespace
from metaserver.coherence import Coherence
from metaserver.errors import EngineError
from metaserver.fenced_engine import FencedEngine
from metaserver.grace import Grace
from metaserver.sessions import Session, Sessions
from metaserver.status import Evictions
from metaserver.volumes import Volume

_log = logging.getLogger(__name__)

#: Seconds between two rounds, at most; with a short lease they come more often.
_PERIOD_S: Final = 1.0
#: Seconds between two looks for events that are too many or too old.
FORGET_S: Final = 10.0


class Janitor:
    """The clearing up of one server; :meth:`run` is its task."""

    #: Both are set before :meth:`run`.
    grace: Grace
    coherence: Coherence

    def __init__(self, engine: FencedEngine, sessions: Sessions, wall: Callable[[], int] = time.time_ns) -> None:
        self._engine = engine
        self._sessions = sessions
        self._period_s = min(_PERIOD_S, sessions.lease_ns / 1e9 / 8)
        #: Ended sessions with their volumes, and volumes that changed since they were last swept, by id.
        self._ended: list[tuple[Volume, bytes]] = []
        self._changed: dict[int, Volume] = {}
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._wall = wall
        self.evictions = Evictions(sessions)
        #: When events are looked at next, on the sessions' clock.
        self._forget_ns = 0

    async def end(self, session: Session) -> None:
        """End a session, durably: nothing of it is committed from here on. Its orphans go later."""
        session.ended = True
        await self.end_record(session.id)
        self._sessions.end(session)
        self._ended.append((session.volume, session.id))
        self._settled.clear()
        self._wake.set()

    async def evict(self, session: Session) -> None:
        """End a session whose lease has run out."""
        _log.info("the lease of %s on %s has run out", session.client, session.volume.name)
        await self.end(session)
        self.evictions.note(session)

    async def end_record(self, session: bytes) -> None:
        """Delete what the engine knows of a session."""
        await self._engine.write(lambda txn: fencing.delete_session(txn, session))
        await self._engine.sync()

    def changed(self, volume: Volume) -> None:
        """Something was committed on a volume: in the next round it is looked at for garbage."""
        self._changed[volume.id] = volume

    async def settle(self, timeout_s: float) -> None:
        """Wait until nothing of ended sessions is left, but no longer than ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()

    async def run(self) -> None:
        """Work until cancelled. What the engine refuses is tried again in the next round."""
        stock_taken = False
        while True:
            try:
                await self.grace.close()
                if not stock_taken and self.grace.is_over:
                    await self._take_stock()
                    stock_taken = True
                await self._round()
            except EngineError as error:
                _log.error("clearing up: %s", error)
            except Exception:
                _log.exception("clearing up failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._wake.wait()

    async def _take_stock(self) -> None:
        """Find what an earlier run of the server left."""
        for volume in await self._engine.read(namespace.list_volumes):
            left = await self._engine.read(functools.partial(namespace.sessions_with_orphans, volume=volume))
            live = {session.id for session in self._sessions.all()}
            self._ended += [(volume, session) for session in left if session not in live]
            self.changed(volume)

    async def _round(self) -> None:
        """End the sessions whose lease has run out, reap what ended sessions left, and sweep changed volumes."""
        self._wake.clear()
        for session in self._sessions.expired():
            await self.evict(session)
        if self.grace.is_over:
            self.coherence.settle_reclaimed()
        while self._ended:
            await self._reap(*self._ended[-1])
        self._settled.set()
        while self._changed:
            await self._sweep(next(iter(self._changed.values())))
        if self._sessions.clock() >= self._forget_ns:
            self._forget_ns = self._sessions.clock() + int(FORGET_S * 1e9)
            await self._forget_events()

    async def _forget_events(self) -> None:
        for volume in await self._engine.read(namespace.list_volumes):
            excess = await self._engine.read(functools.partial(events.excess, volume=volume, now_ns=self._wall()))
            if excess is not None:
                body = functools.partial(events.forget, volume=volume, excess=excess)
                while await self._engine.write(body, lazy=True):
                    pass

    async def _reap(self, volume: Volume, session: bytes) -> None:
        while await self._engine.write(lambda txn: namespace.reap_session(txn, volume, session)):
            pass
        self._ended.remove((volume, session))
        self.changed(volume)

    async def _sweep(self, volume: Volume) -> None:
        self._changed.pop(volume.id)
        if await self._engine.read(lambda snapshot: namespace.has_garbage(snapshot, volume)):
            while await self._engine.write(lambda txn: namespace.sweep(txn, volume)):
                pass
