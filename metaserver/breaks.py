"""Breaks: what other sessions must drop before a change is committed, and the wait until they have.

A break goes out over the connections of all its holders at once, as one frame made once. Each holder acknowledges it,
or loses its session at its deadline, which is not moved while a break is not acknowledged: so a change waits for one
lease at most. A holder without a connection gets the break when it resumes its session.

Nothing here is kept without bound: each change waits for one break at a time, and a connection has a bounded number
of changes under way. What a slow client does not take is bounded by its connection, which is cut off.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence

from metaserver import wire
from metaserver.sessions import Session

#: Called with a session that has dropped what a break told, and those of the inodes that are open there.
Dropped = Callable[[Session, Sequence[int]], None]


class Breaking:
    """One break, on its way. ``dropped`` is called with each session that has dropped what it says."""

    def __init__(self, message: wire.Break, waiting: Iterable[Session], dropped: Dropped) -> None:
        self.message = message
        self.frame = wire.encode(0, message)
        #: In the order of sending: the same run makes the same messages.
        self.waiting = dict.fromkeys(waiting)
        self.done = asyncio.Event()
        self._dropped = dropped

    def settle(self, session: Session, *, dropped: bool, still_open: Sequence[int] = ()) -> None:
        """A session need not be waited for any more: it has ``dropped`` all of it, or it has ended."""
        session.pending.pop(self.message.number, None)
        session.acknowledged.set()
        if dropped and session in self.waiting:
            self._dropped(session, still_open)
        self.waiting.pop(session, None)
        if not self.waiting:
            self.done.set()


class Breaks:
    """The breaks of one server. ``evict`` ends a session whose lease has run out, durably."""

    def __init__(self, clock: Callable[[], int], evict: Callable[[Session], Awaitable[None]]) -> None:
        self._clock = clock
        self._evict = evict
        self._numbers = itertools.count(1)

    def send(
        self,
        sessions: Iterable[Session],
        names: list[tuple[int, bytes]],
        inodes: list[int],
        dropped: Dropped,
        *,
        everything: bool = False,
        joined: bool = False,
    ) -> Breaking:
        """Send a break to these sessions and return it."""
        message = wire.Break(next(self._numbers), names, inodes, everything, joined=joined)
        breaking = Breaking(message, sessions, dropped)
        for session in breaking.waiting:
            session.pending[message.number] = breaking
            if session.push is not None:
                session.push(breaking.frame)
        return breaking

    async def wait(self, breaking: Breaking) -> None:
        """Return when every session has acknowledged a break or was evicted."""
        while breaking.waiting:
            late = [session for session in breaking.waiting if not session.is_live]
            for session in late:
                await self._evict(session)
            if not late:
                left_ns = min(session.deadline_ns for session in breaking.waiting) - self._clock()
                await _within(left_ns / 1e9, breaking.done.wait())

    async def settled(self, session: Session) -> None:
        """Return when a session has acknowledged what it was sent until now; raise as :meth:`Session.check` does."""
        last = max(session.pending, default=0)
        while session.pending and min(session.pending) <= last:
            session.check()
            session.acknowledged.clear()
            await _within((session.deadline_ns - self._clock()) / 1e9, session.acknowledged.wait())


async def _within(delay_s: float, event: Awaitable[object]) -> None:
    """Await something for at most so many seconds."""
    try:
        async with asyncio.timeout(max(0.0, delay_s)):
            await event
    except TimeoutError:
        pass
