"""What a metaserver does without being asked: it ends sessions, and clears up what they and deletions leave.

One task does it, in transactions of a bounded size, so that clients' requests come in between. Orphans are the
unlinked inodes that a session still used: they go when it ends, those of an earlier run's sessions at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import Final

from metaserver import namespace
from metaserver.engine.base import Engine
from metaserver.errors import EngineError
from metaserver.sessions import Session, Sessions
from metaserver.volumes import Volume

_log = logging.getLogger(__name__)

#: Seconds between two rounds, at most; with a short lease they come more often.
_PERIOD_S: Final = 1.0


class Janitor:
    """The clearing up of one server; :meth:`run` is its task."""

    def __init__(self, engine: Engine, sessions: Sessions) -> None:
        self._engine = engine
        self._sessions = sessions
        self._period_s = min(_PERIOD_S, sessions.lease_ns / 1e9 / 8)
        #: Ended sessions with their volumes, and volumes that changed since they were last swept, by id.
        self._ended: list[tuple[Volume, bytes]] = []
        self._changed: dict[int, Volume] = {}
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()

    def ended(self, session: Session) -> None:
        """A session has ended: its orphans are to go."""
        self._ended.append((session.volume, session.id))
        self._settled.clear()
        self._wake.set()

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
                if not stock_taken:
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
        for session in self._sessions.end_expired():
            _log.info("the lease of %s on %s has run out", session.client, session.volume.name)
            self.ended(session)
        while self._ended:
            await self._reap(*self._ended[-1])
        self._settled.set()
        while self._changed:
            await self._sweep(next(iter(self._changed.values())))

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
