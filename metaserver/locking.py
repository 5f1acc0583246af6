"""The locks of a server's sessions: requests, their outcomes, and what a restart and the end of a session mean.

Who has what is in a table for each volume (locks.py), in memory only. A lock is as good as its session: it is free when
that has ended, which is durable before (see janitor.py), so that nothing of its owner is committed after. A server that
was started again knows of no locks. The clients tell it of theirs as they come back, before they renew, and until
everybody has, or can come back no more, nobody gets a lock: the request is answered WAITING, as one that waits for
others is, and no request of a connection is held up by it.

Everything runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Mapping, Sized
from typing import Final

from metaserver import wire
from metaserver.errors import Refused
from metaserver.grace import Grace
from metaserver.locks import (
    ACCOUNT_LOCKS,
    ACCOUNT_WAITS,
    SESSION_LOCKS,
    SESSION_WAITS,
    Claim,
    LockTable,
    Owner,
    Span,
    Wait,
)
from metaserver.sessions import Session, Sessions
from metaserver.volumes import Volume
from metaserver.wire import LockOutcome

_log = logging.getLogger(__name__)

#: What :meth:`Locking.answer` answers.
LockRequest = wire.TestLock | wire.SetLock | wire.CancelLock | wire.HoldLocks
#: Seconds that who came later stands behind others who wait: one to two of these.
_TICK_S: Final = 0.5


class Locking:
    """The locks of all volumes of a server. ``grace`` gives the grace of this run."""

    def __init__(self, sessions: Sessions, grace: Callable[[], Grace]) -> None:
        self._sessions = sessions
        self._grace = grace
        self._tables: dict[int, LockTable] = {}
        #: Locks that sessions are telling of (``None``: one that may not be), and sessions that have told all, of those
        #: of an earlier run.
        self._claims: dict[Session, list[Claim | None]] = {}
        self._known: set[Session] = set()
        self._told = asyncio.Event()
        #: Requests that wait until it is known who has what.
        self._early: dict[Session, dict[int, asyncio.Task[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        sessions.on_end.append(self._ended)

    def answer(self, session: Session, request: LockRequest, forbidden: Container[int] = ()) -> wire.Reply:
        """Answer a request of a live session; raise :exc:`~metaserver.errors.Refused` (INVALID).

        ``forbidden`` are the indexes of locks that a session tells of, and may not have.
        """
        if isinstance(request, wire.HoldLocks):
            return self._hold(session, request, forbidden)
        if isinstance(request, wire.CancelLock):
            return wire.LockAnswer(self._cancel(session, request.number))
        lock = request.lock
        if lock.start > lock.end or (lock.flock and (lock.start, lock.end) != (0, wire.LAST_BYTE)):
            raise Refused(wire.ErrorCode.INVALID, "a lock of no bytes, or of a part of a file that is locked whole")
        if isinstance(request, wire.TestLock):
            return self._test(session, lock)
        return wire.LockAnswer(self._set(session, request))

    def _table(self, volume: Volume) -> LockTable:
        table = self._tables.get(volume.id)
        if table is None:
            table = self._tables[volume.id] = LockTable(_settled, _account)
        return table

    def _test(self, session: Session, lock: wire.Lock) -> wire.LockIs:
        found = self._table(session.volume).conflict(_owner(session, lock), lock.ino, _span(lock))
        if found is None:
            return wire.LockIs(None)
        owner, span = found
        pid = span.pid if owner.session is session else 0
        return wire.LockIs(wire.Lock(lock.ino, 0, lock.flock, span.start, span.end, span.exclusive, pid))

    def _set(self, session: Session, request: wire.SetLock) -> LockOutcome:
        lock = request.lock
        if request.unlock:
            table = self._table(session.volume)
            return table.unlock(_owner(session, lock), lock.ino, lock.start, lock.end)
        return self._lock(session, request) if self._is_over(session.volume) else self._lock_later(session, request)

    def _lock(self, session: Session, request: wire.SetLock) -> LockOutcome:
        lock, table = request.lock, self._table(session.volume)
        number = request.number if request.wait else None
        outcome = table.set(_owner(session, lock), lock.ino, _span(lock), number)
        if outcome is LockOutcome.WAITING:
            self._start_timer()
        return outcome

    def _cancel(self, session: Session, number: int) -> LockOutcome:
        early = self._early.get(session, {}).pop(number, None)
        if early is not None:
            early.cancel()
        waited = early is not None or self._table(session.volume).cancel(session, number)
        return LockOutcome.CANCELLED if waited else LockOutcome.DENIED

    # Time

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        waiting = [table for table in self._tables.values() if table.waiting]
        for table in waiting:
            table.tick()
        if waiting:
            self._start_timer()

    # After a restart

    def is_known(self, session: Session) -> None:
        """A session holds no locks that this server does not know of."""
        if session in self._known:
            return
        if any(each is session for each in self._sessions.all()):
            self._known.add(session)
        self._claims.pop(session, None)
        self._told.set()

    def _hold(self, session: Session, request: wire.HoldLocks, forbidden: Container[int]) -> wire.LocksLost:
        """Take in what a session says it holds; with the last of it, make it so."""
        claims = self._claims.setdefault(session, [])
        if len(claims) + len(request.locks) > SESSION_LOCKS:
            raise Refused(wire.ErrorCode.INVALID, f"more than {SESSION_LOCKS} locks")
        if _count(self._claims, session) + len(request.locks) > ACCOUNT_LOCKS:
            raise Refused(wire.ErrorCode.INVALID, f"more than {ACCOUNT_LOCKS} locks of one identity")
        claims += [None if index in forbidden else _claim(lock) for index, lock in enumerate(request.locks)]
        if not request.last:
            return wire.LocksLost([])
        del self._claims[session]
        for task in self._early.pop(session, {}).values():
            task.cancel()
        allowed = [(index, claim) for index, claim in enumerate(claims) if claim is not None]
        lost = self._table(session.volume).restore(session, [claim for _, claim in allowed])
        self.is_known(session)
        without = {index for index, claim in enumerate(claims) if claim is None}
        return wire.LocksLost(sorted(without.union(allowed[each][0] for each in lost)))

    def _is_over(self, volume: Volume) -> bool:
        """Whether it is known who has what on a volume."""
        return self._grace().may_change and not self._silent(volume)

    def _silent(self, volume: Volume) -> bool:
        """Whether a session has come back that may hold locks and has not told of them."""
        return any(
            each.reclaimed and each.volume.id == volume.id and each not in self._known for each in self._sessions.all()
        )

    def _lock_later(self, session: Session, request: wire.SetLock) -> LockOutcome:
        early = self._early.setdefault(session, {})
        if request.number not in early:
            if len(early) >= SESSION_WAITS or _count(self._early, session) >= ACCOUNT_WAITS:
                return LockOutcome.FULL
            early[request.number] = asyncio.create_task(self._lock_when_over(session, request))
        return LockOutcome.WAITING

    async def _lock_when_over(self, session: Session, request: wire.SetLock) -> None:
        try:
            await self._over(session.volume)
            outcome = self._lock(session, request) if session.is_live else LockOutcome.CANCELLED
        except Exception:
            _log.exception("waiting until it is known who holds which lock failed")
            outcome = LockOutcome.FULL
        early = self._early.get(session, {})
        early.pop(request.number, None)
        if not early:
            self._early.pop(session, None)
        if outcome is not LockOutcome.WAITING:
            _tell(session, request.number, outcome)

    async def _over(self, volume: Volume) -> None:
        await self._grace().over()
        while self._silent(volume):
            self._told.clear()
            await self._told.wait()

    def _ended(self, session: Session) -> None:
        """A session holds nothing any more."""
        self._known.discard(session)
        self._claims.pop(session, None)
        for task in self._early.pop(session, {}).values():
            task.cancel()
        self._table(session.volume).end(session)
        self._told.set()


def _count(gathered: Mapping[Session, Sized], session: Session) -> int:
    """Return how many of what was gathered are of sessions of the same account."""
    return sum(len(each) for other, each in gathered.items() if other.account == session.account)


def _account(session: Session) -> bytes:
    return session.account


def _settled(wait: Wait, outcome: LockOutcome) -> None:
    if isinstance(wait.owner.session, Session):
        _tell(wait.owner.session, wait.number, outcome)


def _tell(session: Session, number: int, outcome: LockOutcome) -> None:
    if session.push is not None:
        session.push(wire.encode(0, wire.LockSettled(number, outcome)))


def _owner(session: Session, lock: wire.Lock) -> Owner:
    return Owner(session, lock.flock, lock.owner)


def _claim(lock: wire.Lock) -> Claim:
    return Claim(lock.ino, lock.flock, lock.owner, _span(lock))


def _span(lock: wire.Lock) -> Span:
    return Span(lock.start, lock.end, lock.exclusive, lock.pid)
