"""Who is connected to which volume, until when, and what changed since each of them was last told.

All of it is in memory and ends with the server: a session of an earlier run cannot be resumed. Nothing here does I/O
or waits; the clock is given, in nanoseconds, and must count suspend. Everything is called on the event loop's thread,
but for :meth:`Session.check`, which the engine's writer thread calls inside a transaction and which reads two
attributes that the loop only ever replaces.

A client must not be told of its own changes, whose replies it has, but must be told of those whose replies were lost
with a connection. So the author of a change is not a session but an *incarnation* of it: each time a session is
opened or resumed it gets a new number, and changes of its earlier numbers count as somebody else's.
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from metaserver import wire
from metaserver.errors import Refused
from metaserver.volumes import Volume

#: Changes that a volume's feed remembers.
FEED_CHANGES: Final = 65536
#: The most names and inodes, and the most bytes, that one :class:`~metaserver.wire.Renewed` lists.
RENEWED_ITEMS: Final = 16384
RENEWED_BYTES: Final = wire.MAX_REPLY // 2
#: What an item costs in a frame, at most, beside its name.
_ITEM_BYTES: Final = 24
#: Sessions of one server, those included whose clients are gone but whose lease has not run out.
MAX_SESSIONS: Final = 65536

Name = tuple[int, bytes]


class Change(NamedTuple):
    """What one committed transaction changed. ``author`` is the incarnation that did it."""

    author: int
    names: tuple[Name, ...]
    inodes: tuple[int, ...]


class Feed:
    """The last changes of one volume. Versions count them, from 0 at the server's start."""

    def __init__(self, capacity: int = FEED_CHANGES) -> None:
        self.version = 0
        self._changes: deque[Change] = deque(maxlen=capacity)

    def append(self, change: Change) -> None:
        """Add a change; the oldest is forgotten when there are too many."""
        self.version += 1
        self._changes.append(change)

    def forget_all(self) -> None:
        """Something changed and it is not known what: whoever renews next is told to drop everything."""
        self.version += 1
        self._changes.clear()

    def since(self, seen: int, reader: int) -> tuple[list[Name], list[int]] | None:
        """Return the names and inodes that others than ``reader`` changed after ``seen``; ``None``: it is not known."""
        count = self.version - seen
        if not 0 <= count <= len(self._changes):
            return None
        names: dict[Name, None] = {}
        inodes: dict[int, None] = {}
        for change in itertools.islice(reversed(self._changes), count):
            if change.author != reader:
                names.update(dict.fromkeys(change.names))
                inodes.update(dict.fromkeys(change.inodes))
        return (list(names), list(inodes)) if _fits(names, inodes) else None


def _fits(names: Iterable[Name], inodes: dict[int, None]) -> bool:
    sizes = [len(name) for _, name in names]
    items = len(sizes) + len(inodes)
    return items <= RENEWED_ITEMS and sum(sizes) + items * _ITEM_BYTES <= RENEWED_BYTES


class Session:
    """A client's lease on a volume."""

    def __init__(self, session_id: bytes, volume: Volume, client: str, clock: Callable[[], int]) -> None:
        self.id = session_id
        self.volume = volume
        self.client = client
        self.incarnation = 0
        self.deadline_ns = 0
        self.ended = False
        #: The engine's losses that this client knows of.
        self.losses = 0
        self._clock = clock

    @property
    def is_live(self) -> bool:
        """Whether the lease has not run out and the session was not ended."""
        return not self.ended and self._clock() < self.deadline_ns

    def check(self) -> None:
        """Raise :exc:`~metaserver.errors.Refused` (STALE_SESSION) if the lease has run out. Any thread may call it."""
        if not self.is_live:
            raise Refused(wire.ErrorCode.STALE_SESSION, "the session's lease has run out")


class Sessions:
    """The sessions and feeds of one server."""

    def __init__(self, lease_ns: int, clock: Callable[[], int], feed_changes: int = FEED_CHANGES) -> None:
        self.lease_ns = lease_ns
        self._clock = clock
        self._feed_changes = feed_changes
        self._sessions: dict[bytes, Session] = {}
        self._feeds: dict[int, Feed] = {}
        self._incarnations = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        """Return the sessions that were not ended."""
        return list(self._sessions.values())

    def feed(self, volume: Volume) -> Feed:
        """Return a volume's feed of changes."""
        feed = self._feeds.get(volume.id)
        if feed is None:
            feed = self._feeds[volume.id] = Feed(self._feed_changes)
        return feed

    def forget_everything(self) -> None:
        """It is not known what changed, on any volume: everybody is told to drop everything."""
        for feed in self._feeds.values():
            feed.forget_all()

    def open(self, volume: Volume, client: str, resume: bytes | None) -> tuple[Session, bool]:
        """Return a session with a full lease, and whether it is the one to be resumed.

        Raises :exc:`~metaserver.errors.Refused` (BUSY) when there are too many.
        """
        session = self._sessions.get(resume) if resume is not None else None
        resumed = session is not None and session.volume.id == volume.id and session.is_live
        if session is None or not resumed:
            session = self._new(volume, client)
        session.incarnation = next(self._incarnations)
        session.deadline_ns = self._clock() + self.lease_ns
        return session, resumed

    def _new(self, volume: Volume, client: str) -> Session:
        if len(self._sessions) >= MAX_SESSIONS:
            raise Refused(wire.ErrorCode.BUSY, f"the metaserver has {MAX_SESSIONS} sessions")
        session = Session(secrets.token_bytes(16), volume, client, self._clock)
        self._sessions[session.id] = session
        return session

    def renew(self, session: Session, seen: int) -> wire.Renewed:
        """Extend the lease and tell what others changed after ``seen``; raises as :meth:`Session.check` does."""
        session.check()
        feed = self.feed(session.volume)
        changes = feed.since(seen, session.incarnation)
        session.deadline_ns = self._clock() + self.lease_ns
        names, inodes = changes if changes is not None else ([], [])
        return wire.Renewed(self.lease_ns // 1_000_000, feed.version, names, inodes, changes is None)

    def end(self, session: Session) -> None:
        """End a session: from here on it is refused, in transactions that wait for the engine too."""
        session.ended = True
        self._sessions.pop(session.id, None)

    def end_expired(self) -> list[Session]:
        """End the sessions whose lease has run out and return them."""
        expired = [session for session in self._sessions.values() if not session.is_live]
        for session in expired:
            self.end(session)
        return expired

    def committed(self, volume: Volume, author: int, request: wire.Request, reply: wire.Reply) -> None:
        """Put a committed change into the volume's feed, before the reply goes out."""
        if isinstance(reply, wire.Changed):
            inodes = tuple(attributes.ino for attributes in reply.attributes)
            self.feed(volume).append(Change(author, changed_names(request), inodes))


def changed_names(request: wire.Request) -> tuple[Name, ...]:
    """Return the entries that a request changes, as (directory, name)."""
    if isinstance(request, wire.MakeNode | wire.Link | wire.Remove):
        return ((request.parent, request.name),)
    if isinstance(request, wire.Rename):
        return (request.parent, request.name), (request.new_parent, request.new_name)
    return ()
