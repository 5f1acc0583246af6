"""Streams of a volume's events to whoever follows it, woken by the engine's commits.

A follower reads what is durable, never what is only acknowledged: with commits put off, a change that a crash could
still undo is not told until its commit is made. While there is nothing to tell a follower waits, and the engine is not
asked. A page is read only when the one before it was taken, so a slow follower costs no memory; what it has not come to
in time is forgotten like everything else, and it is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

from metaserver import events, wire
from metaserver.engine.base import Engine, Snapshot
from metaserver.volumes import Volume, open_volume


class Followers:
    """All who follow volumes of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = 0
        #: Set, and replaced, when more has become durable.
        self._more = asyncio.Event()

    async def pages(self, request: wire.FollowEvents) -> AsyncGenerator[wire.EventPage, None]:
        """Yield what was asked for; raise :exc:`~metaserver.errors.Refused`: NO_SUCH_VOLUME, EVENTS_GONE."""
        volume, start, last = await self._begin(request)
        told = False
        with self._watching():
            while True:
                more = self._more
                page = await self._page(volume, start, None if request.live else last)
                if page.events or page.last or not told:
                    yield page
                    start, told = page.version, True
                else:
                    await more.wait()
                if page.last:
                    return

    async def _begin(self, request: wire.FollowEvents) -> tuple[Volume, int, int]:
        """Return the volume, and the versions after which a stream begins and with which it ends."""
        volume = await self._engine.read(lambda snapshot: open_volume(snapshot, request.volume))
        await self._engine.sync()  # what was acknowledged before this is told now, or is not asked for

        def body(snapshot: Snapshot) -> tuple[Volume, int, int]:
            return volume, events.start_of(snapshot, volume, request.since), events.last_version(snapshot, volume)

        return await self._engine.read_durable(body)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self._count += 1
        self._engine.watch(self._committed)
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._engine.watch(None)

    async def _page(self, volume: Volume, start: int, last: int | None) -> wire.EventPage:
        """Return the next page; it is the last one that reaches ``last``."""
        found = await self._engine.read_durable(lambda snapshot: events.events_after(snapshot, volume, start))
        version = found[-1].version if found else start
        return wire.EventPage(version, found, last is not None and version >= last, volume.identity)

    def _committed(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()
