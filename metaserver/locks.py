"""Advisory locks of one volume: who has which bytes of which file, who waits for them, and who would wait for ever.

Pure: no I/O, no clock, nothing awaited. What :meth:`LockTable.set` settles at once it returns; what is settled later,
because somebody else unlocks or ends, is told to ``on_settled``.

There are two kinds, which know nothing of each other, as in Linux: byte ranges (fcntl) and whole files (flock). An
owner is a session, a kind, and a number that the session's kernel gave it: a process, or an open file.

* A range lock replaces what its owner has in the range, and merges with its neighbours (fcntl(2)). One that is refused,
  or waits, changes nothing. A flock that is converted is given up first, as flock(2) says.
* Waiters stand in a queue for each file and get their lock as soon as nothing held conflicts with it. So that readers
  that come and go cannot keep a writer out for ever, who asks for a lock and has none of that file stands behind those
  who wait already, if they want what conflicts. But not for long, until :meth:`LockTable.tick` was called twice: what
  waits may wait for a process that waits for this one, of which nobody here knows.
* Of range locks, a wait that would close a circle of owners, over all files and sessions, is refused. The circle is
  looked for when a wait begins, and when an owner that waits is given what others wait for.

What a session may have is bounded, and what all sessions of an account may have; each operation is linear in the owners
and waiters of one file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from metaserver.wire import LAST_BYTE
from metaserver.wire import LockOutcome as Outcome

#: Ranges that a session may hold, and locks that it may wait for.
SESSION_LOCKS: Final = 8192
SESSION_WAITS: Final = 1024
#: And all sessions of one account.
ACCOUNT_LOCKS: Final = 65_536
ACCOUNT_WAITS: Final = 8192


class Owner(NamedTuple):
    """Who has a lock. Locks of one owner never conflict with each other."""

    session: Hashable
    flock: bool
    number: int


class Span(NamedTuple):
    """Bytes ``start`` to ``end``, the last one included, locked by a process ``pid`` of its session's machine."""

    start: int
    end: int
    exclusive: bool
    pid: int = 0


class Claim(NamedTuple):
    """A lock that a session says it holds."""

    ino: int
    flock: bool
    number: int
    span: Span


@dataclass(eq=False, slots=True)
class Wait:
    """A lock that is waited for. ``number`` is the session's own name for it."""

    owner: Owner
    ino: int
    span: Span
    number: int
    #: Ticks that it has seen; after two it stands behind nobody.
    ticks: int = 0


@dataclass(slots=True)
class _File:
    held: dict[Owner, list[Span]] = field(default_factory=dict)
    queue: dict[Wait, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Party:
    """What one session has."""

    #: Files in which an owner holds something, and how many spans of all of them there are.
    holds: set[tuple[int, Owner]] = field(default_factory=set)
    spans: int = 0
    waits: dict[int, Wait] = field(default_factory=dict)


@dataclass(slots=True)
class _Total:
    """What all sessions of one account have."""

    spans: int = 0
    waits: int = 0


class LockTable:
    """The locks of one volume. Sessions are any hashable objects, and so are the accounts that ``account_of`` gives."""

    def __init__(
        self,
        on_settled: Callable[[Wait, Outcome], object] = lambda wait, outcome: None,
        account_of: Callable[[Any], Hashable] = lambda session: session,
        *,
        session_locks: int = SESSION_LOCKS,
        session_waits: int = SESSION_WAITS,
        account_locks: int = ACCOUNT_LOCKS,
        account_waits: int = ACCOUNT_WAITS,
    ) -> None:
        self._on_settled = on_settled
        self._account_of = account_of
        self._session_locks = session_locks
        self._session_waits = session_waits
        self._account_locks = account_locks
        self._account_waits = account_waits
        self._totals: defaultdict[Hashable, _Total] = defaultdict(_Total)
        self._files: dict[int, _File] = {}
        self._parties: dict[Hashable, _Party] = {}
        #: What each owner of range locks waits for.
        self._waits: dict[Owner, dict[Wait, None]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held or waited for."""
        return not self._files

    @property
    def waiting(self) -> bool:
        """Whether anything is waited for, so that :meth:`tick` is to be called from time to time."""
        return any(party.waits for party in self._parties.values())

    def held(self, session: Hashable) -> list[Claim]:
        """Return what a session holds."""
        party = self._parties.get(session, _Party())
        return [
            Claim(ino, owner.flock, owner.number, span)
            for ino, owner in party.holds
            for span in self._files[ino].held[owner]
        ]

    # Requests

    def conflict(self, owner: Owner, ino: int, span: Span) -> tuple[Owner, Span] | None:
        """Return the first lock of another owner that is in the way of one; ``None``: it would be granted."""
        file = self._files.get(ino)
        return min(_conflicts(file, owner, span), key=lambda found: found[1].start, default=None) if file else None

    def set(self, owner: Owner, ino: int, span: Span, wait: int | None = None) -> Outcome:
        """Lock a range. With ``wait``, a number of the session's own, wait until nobody is in the way.

        A wait of the same number that is there already goes on.
        """
        party = self._parties.setdefault(owner.session, _Party())
        if wait is not None and wait in party.waits:
            return Outcome.WAITING
        if not self._has_room(owner, ino, span):
            self._tidy_party(owner.session)
            return Outcome.FULL
        file = self._files.setdefault(ino, _File())
        is_new = owner not in file.held
        if owner.flock and file.held.get(owner, [span])[0].exclusive != span.exclusive:
            self._replace(ino, owner, [])
            self._pump(ino)
            file = self._files.setdefault(ino, _File())
        outcome = self._try(file, Wait(owner, ino, span, wait or 0), wait is not None, is_new)
        if outcome is Outcome.GRANTED and not span.exclusive:
            self._pump(ino)  # it may have been exclusive before
        self._tidy(ino, owner.session)
        return outcome

    def _try(self, file: _File, wanted: Wait, may_wait: bool, is_new: bool) -> Outcome:
        blocked = any(True for _ in _conflicts(file, wanted.owner, wanted.span))
        if not blocked and not (may_wait and is_new and _stands_behind(wanted, file.queue)):
            self._grant(wanted)
            return Outcome.GRANTED
        if not may_wait:
            return Outcome.DENIED
        if not self._may_wait(wanted.owner.session):
            return Outcome.FULL
        self._enqueue(wanted)
        if blocked and self._closes_circle(wanted):
            self._dequeue(wanted)
            return Outcome.DEADLOCK
        return Outcome.WAITING

    def unlock(self, owner: Owner, ino: int, start: int = 0, end: int = LAST_BYTE) -> Outcome:
        """Give up a range: GRANTED; or FULL, if what is left of a lock would be too many pieces."""
        file, party = self._files.get(ino), self._parties.get(owner.session)
        before = file.held.get(owner, []) if file is not None else []
        after = _without(before, start, end)
        if party is None or after == before:
            return Outcome.GRANTED
        if len(after) > len(before) and not self._may_hold(owner.session):
            return Outcome.FULL
        self._replace(ino, owner, after)
        self._pump(ino)
        self._tidy(ino, owner.session)
        return Outcome.GRANTED

    def cancel(self, session: Hashable, number: int) -> bool:
        """Give up a wait, without a word to ``on_settled``; say whether there was one."""
        party = self._parties.get(session)
        wait = party.waits.get(number) if party is not None else None
        if wait is None:
            return False
        self._dequeue(wait)
        self._pump(wait.ino)
        self._tidy(wait.ino, session)
        return True

    def end(self, session: Hashable) -> None:
        """A session has ended: what it holds is free, and its waits are over."""
        self.restore(session, ())

    def restore(self, session: Hashable, claims: Sequence[Claim]) -> list[int]:
        """Have a session hold these locks, and nothing else, and wait for nothing.

        Returns the indexes of those that it cannot have, because somebody else has what conflicts, or are too many.
        """
        party = self._parties.setdefault(session, _Party())
        touched = {ino for ino, _ in party.holds} | {wait.ino for wait in party.waits.values()}
        for wait in list(party.waits.values()):
            self._dequeue(wait)
            self._on_settled(wait, Outcome.CANCELLED)
        for ino, owner in list(party.holds):
            self._replace(ino, owner, [])
        lost = [index for index, claim in enumerate(claims) if not self._restore(session, claim)]
        for ino in touched:
            self._pump(ino)
            self._tidy_file(ino)
        self._tidy_party(session)
        return lost

    def _restore(self, session: Hashable, claim: Claim) -> bool:
        owner = Owner(session, claim.flock, claim.number)
        if not self._has_room(owner, claim.ino, claim.span):
            return False
        file = self._files.setdefault(claim.ino, _File())
        fits = not any(True for _ in _conflicts(file, owner, claim.span))
        if fits:
            self._replace(claim.ino, owner, _with(file.held.get(owner, []), claim.span))
        self._tidy_file(claim.ino)
        return fits

    def tick(self) -> None:
        """Have those who stand behind others' wishes only get their lock, if they stood there at the last tick too."""
        files = []
        for ino, file in self._files.items():
            for wait in file.queue:
                wait.ticks += 1
            if file.queue:
                files.append(ino)
        for ino in files:
            self._pump(ino)

    # Holding

    def _may_hold(self, session: Hashable) -> bool:
        """Whether a session may hold one more span."""
        total = self._totals.get(self._account_of(session), _Total())
        return self._parties[session].spans < self._session_locks and total.spans < self._account_locks

    def _may_wait(self, session: Hashable) -> bool:
        total = self._totals.get(self._account_of(session), _Total())
        return len(self._parties[session].waits) < self._session_waits and total.waits < self._account_waits

    def _has_room(self, owner: Owner, ino: int, span: Span) -> bool:
        if self._may_hold(owner.session):
            return True
        file = self._files.get(ino)
        before = file.held.get(owner, []) if file is not None else []
        return len(_with(before, span)) <= len(before)

    def _replace(self, ino: int, owner: Owner, spans: list[Span]) -> None:
        """Have an owner hold these spans of a file."""
        file, party = self._files[ino], self._parties[owner.session]
        more = len(spans) - len(file.held.get(owner, ()))
        party.spans += more
        self._totals[self._account_of(owner.session)].spans += more
        if spans:
            file.held[owner] = spans
            party.holds.add((ino, owner))
        else:
            file.held.pop(owner, None)
            party.holds.discard((ino, owner))

    def _grant(self, wait: Wait) -> None:
        held = self._files[wait.ino].held.get(wait.owner, [])
        self._replace(wait.ino, wait.owner, _with(held, wait.span))
        if wait.owner in self._waits:
            self._break_circles(wait)

    def _tidy(self, ino: int, session: Hashable) -> None:
        self._tidy_file(ino)
        self._tidy_party(session)

    def _tidy_file(self, ino: int) -> None:
        file = self._files.get(ino)
        if file is not None and not file.held and not file.queue:
            del self._files[ino]

    def _tidy_party(self, session: Hashable) -> None:
        party = self._parties.get(session)
        if party is not None and not party.holds and not party.waits:
            del self._parties[session]
        account = self._account_of(session)
        if self._totals.get(account) == _Total():
            del self._totals[account]

    # Waiting

    def _enqueue(self, wait: Wait) -> None:
        self._files[wait.ino].queue[wait] = None
        self._parties[wait.owner.session].waits[wait.number] = wait
        self._totals[self._account_of(wait.owner.session)].waits += 1
        if not wait.owner.flock:
            self._waits.setdefault(wait.owner, {})[wait] = None

    def _dequeue(self, wait: Wait) -> None:
        self._files[wait.ino].queue.pop(wait, None)
        if self._parties[wait.owner.session].waits.pop(wait.number, None) is not None:
            self._totals[self._account_of(wait.owner.session)].waits -= 1
        waits = self._waits.get(wait.owner, {})
        waits.pop(wait, None)
        if not waits:
            self._waits.pop(wait.owner, None)

    def _pump(self, ino: int) -> None:
        """Give those who wait for a file what they can have now."""
        file = self._files.get(ino)
        if file is None:
            return
        before: list[Wait] = []
        for wait in list(file.queue):
            if wait not in file.queue:
                continue
            blocked = any(True for _ in _conflicts(file, wait.owner, wait.span))
            if blocked or (wait.owner not in file.held and _stands_behind(wait, before)):
                before.append(wait)
                continue
            self._dequeue(wait)
            self._grant(wait)
            self._on_settled(wait, Outcome.GRANTED)

    # Circles

    def _blockers(self, wait: Wait) -> Iterator[Owner]:
        """Yield the owners that a wait waits for."""
        for owner, _ in _conflicts(self._files[wait.ino], wait.owner, wait.span):
            yield owner

    def _closes_circle(self, wait: Wait) -> bool:
        """Say whether what a wait waits for waits, at the end, for the owner of that wait."""
        seen: set[Owner] = set()
        ahead = list(self._blockers(wait)) if not wait.owner.flock else []
        while ahead:
            owner = ahead.pop()
            if owner == wait.owner:
                return True
            if owner in seen:
                continue
            seen.add(owner)
            for each in self._waits.get(owner, ()):
                ahead.extend(self._blockers(each))
        return False

    def _break_circles(self, granted: Wait) -> None:
        """An owner that waits elsewhere, in another thread, got a lock: who waits for that may wait for ever now."""
        for wait in list(self._files[granted.ino].queue):
            if _excludes(wait.owner, wait.span, granted.owner, granted.span) and self._closes_circle(wait):
                self._dequeue(wait)
                self._on_settled(wait, Outcome.DEADLOCK)


def _excludes(one: Owner, wanted: Span, other: Owner, held: Span) -> bool:
    if one == other or one.flock != other.flock or not (wanted.exclusive or held.exclusive):
        return False
    return wanted.start <= held.end and held.start <= wanted.end


def _conflicts(file: _File, owner: Owner, wanted: Span) -> Iterator[tuple[Owner, Span]]:
    """Yield what others hold of a file that a lock cannot be held beside."""
    for other, spans in file.held.items():
        if other == owner or other.flock != owner.flock:
            continue
        for span in spans[bisect_left(spans, wanted.start, key=_end_of) :]:
            if span.start > wanted.end:
                break
            if wanted.exclusive or span.exclusive:
                yield other, span


def _stands_behind(wait: Wait, others: Iterable[Wait]) -> bool:
    """Say whether somebody who waited before wants what conflicts with a lock, and is to have it first."""
    if wait.ticks > 1:
        return False
    return any(_excludes(wait.owner, wait.span, each.owner, each.span) for each in others)


def _end_of(span: Span) -> int:
    return span.end


def _without(spans: list[Span], start: int, end: int) -> list[Span]:
    """Return the spans of one owner without a range."""
    first = bisect_left(spans, start, key=_end_of)
    kept, last = spans[:first], first
    while last < len(spans) and spans[last].start <= end:
        span = spans[last]
        if span.start < start:
            kept.append(span._replace(end=start - 1))
        if span.end > end:
            kept.append(span._replace(start=end + 1))
        last += 1
    return kept + spans[last:]


def _with(spans: list[Span], new: Span) -> list[Span]:
    """Return the spans of one owner with another laid over them, merged with neighbours of its kind."""
    rest = _without(spans, new.start, new.end)
    place = bisect_left(rest, new.start, key=_end_of)
    if place < len(rest) and _joins(new, rest[place]):
        new = new._replace(end=rest.pop(place).end)
    if place and _joins(rest[place - 1], new):
        place -= 1
        new = new._replace(start=rest.pop(place).start)
    return [*rest[:place], new, *rest[place:]]


def _joins(one: Span, other: Span) -> bool:
    return one.end + 1 == other.start and one.exclusive == other.exclusive
