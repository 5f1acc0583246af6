"""Who is connected to which volume, until when, and what changed since each of them was last told.

All of it is in memory; what has to outlive the server is in fencing.py. Nothing here does I/O or waits; the clock is
given, in nanoseconds, and must count suspend. Everything is called on the event loop's thread, but for
:meth:`Session.check`, which the engine's writer thread calls inside a transaction and which reads two attributes that
the loop only ever replaces.

What others change a client is told by breaks (see coherence.py). With a renewal it is told of its own changes whose
replies may have been lost with a connection, or with a worker. So the author of a change is not a session but an
*incarnation* of it: each time a session is opened or resumed it gets a new number, and it is told of the changes of
its earlier numbers.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from metaserver import wire
from metaserver.errors import Refused
from metaserver.holdings import Holder
from metaserver.volumes import Volume

if TYPE_CHECKING:
    from metaserver.breaks import Breaking
    from metaserver.guard import Guard

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
    """The last changes of one volume. Versions count them, from ``version`` at the server's start."""

    def __init__(self, capacity: int = FEED_CHANGES, version: int = 0) -> None:
        self.version = version
        self._changes: deque[Change] = deque(maxlen=capacity)

    def append(self, change: Change) -> None:
        """Add a change; the oldest is forgotten when there are too many."""
        self.version += 1
        self._changes.append(change)

    def forget_all(self) -> None:
        """Something changed and it is not known what: whoever renews next is told to drop everything."""
        self.version += 1
        self._changes.clear()

    def after(self, seen: int) -> list[Change] | None:
        """Return the changes after ``seen``, the newest first; ``None``: they are not known."""
        count = self.version - seen
        if not 0 <= count <= len(self._changes):
            return None
        return list(itertools.islice(reversed(self._changes), count))

    def since(self, seen: int, authors: Container[int]) -> tuple[list[Name], list[int]] | None:
        """Return the names and inodes that ``authors`` changed after ``seen``; ``None``: it is not known."""
        changes = self.after(seen)
        if changes is None:
            return None
        names: dict[Name, None] = {}
        inodes: dict[int, None] = {}
        for change in changes:
            if change.author in authors:
                names.update(dict.fromkeys(change.names))
                inodes.update(dict.fromkeys(change.inodes))
        return (list(names), list(inodes)) if _fits(names, inodes) else None


def _fits(names: Iterable[Name], inodes: dict[int, None]) -> bool:
    sizes = [len(name) for _, name in names]
    items = len(sizes) + len(inodes)
    return items <= RENEWED_ITEMS and sum(sizes) + items * _ITEM_BYTES <= RENEWED_BYTES


class Session:
    """A client's lease on a volume."""

    def __init__(
        self, session_id: bytes, volume: Volume, client: str, clock: Callable[[], int], owner: bytes = b""
    ) -> None:
        self.id = session_id
        self.volume = volume
        self.client = client
        #: The identity that it belongs to (see gate.py).
        self.owner = owner
        #: That was revoked or has expired. What the client had cached it may use until its lease has run out.
        self.is_revoked = False
        #: What of the volume it may reach and change; ``None``: all.
        self.guard: Guard | None = None
        self.incarnation = 0
        self.deadline_ns = 0
        self.ended = False
        #: What its client calls itself.
        self.software = ""
        #: It is to end when its lease does, and refused everything until then.
        self.evicted = False
        #: The engine's losses that this client knows of.
        self.losses = 0
        #: Earlier incarnations, of whose changes the client was not told yet.
        self.earlier: set[int] = set()
        #: It is its volume's only one, and its client counts on being told before there is another.
        self.alone = False
        #: So it was, and it has not acknowledged yet that it is not.
        self.was_alone = False
        #: It was opened at an earlier run of the server.
        self.reclaimed = False
        #: What it may have in its caches.
        self.holder = Holder(self)
        #: The inodes that it has open for writing, as far as is known (see opens.py).
        self.writing: set[int] = set()
        #: The breaks that it has not acknowledged, by number, oldest first.
        self.pending: dict[int, Breaking] = {}
        #: Set with each break that it acknowledges.
        self.acknowledged = asyncio.Event()
        #: Sends a frame over the session's connection, if there is one.
        self.push: Callable[[bytes], None] | None = None
        self._clock = clock

    @property
    def account(self) -> bytes:
        """Whose totals it counts in: those of its identity, or, without one, its own."""
        return self.owner if len(self.owner) > 1 else self.id

    @property
    def is_live(self) -> bool:
        """Whether the lease has not run out and the session was not ended."""
        return not self.ended and self._clock() < self.deadline_ns

    def check(self) -> None:
        """Raise :exc:`~metaserver.errors.Refused` (STALE_SESSION) if the lease has run out, or it is evicted.

        Any thread may call it.
        """
        if self.evicted:
            raise Refused(wire.ErrorCode.STALE_SESSION, "the session was evicted")
        if not self.is_live:
            raise Refused(wire.ErrorCode.STALE_SESSION, "the session's lease has run out")
        if self.is_revoked:
            raise Refused(wire.ErrorCode.NOT_AUTHENTICATED, "the session's identity was revoked")


class Sessions:
    """The sessions and feeds of one server. Each of ``on_end`` is called with each session that ends, once."""

    def __init__(
        self, lease_ns: int, clock: Callable[[], int], feed_changes: int = FEED_CHANGES, first_version: int = 0
    ) -> None:
        self.lease_ns = lease_ns
        self.clock = clock
        #: Where the versions of the feeds begin: above those of every earlier run.
        self.first_version = first_version
        self.on_end: list[Callable[[Session], None]] = []
        self._feed_changes = feed_changes
        self._sessions: dict[bytes, Session] = {}
        self._feeds: dict[int, Feed] = {}
        self._incarnations = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        """Return the sessions that were not ended, those included whose lease has run out."""
        return list(self._sessions.values())

    def feed(self, volume: Volume) -> Feed:
        """Return a volume's feed."""
        feed = self._feeds.get(volume.id)
        if feed is None:
            feed = self._feeds[volume.id] = Feed(self._feed_changes, self.first_version)
        return feed

    def forget_everything(self) -> None:
        """It is not known what changed, on any volume."""
        for feed in self._feeds.values():
            feed.forget_all()

    def of_volume(self, volume: Volume) -> list[Session]:
        """Return the sessions on one volume; see :meth:`all`."""
        return [session for session in self._sessions.values() if session.volume.id == volume.id]

    def open(self, volume: Volume, client: str, owner: bytes = b"") -> Session:
        """Return a new session with a full lease; raise :exc:`~metaserver.errors.Refused` (BUSY)."""
        return self._add(Session(secrets.token_bytes(16), volume, client, self.clock, owner))

    def reclaim(self, session_id: bytes, volume: Volume, client: str, owner: bytes = b"") -> Session:
        """Return a session of an earlier run of the server, with a full lease; raises as :meth:`open` does."""
        session = Session(session_id, volume, client, self.clock, owner)
        session.reclaimed = True
        return self._add(session)

    def _add(self, session: Session) -> Session:
        if len(self._sessions) >= MAX_SESSIONS:
            raise Refused(wire.ErrorCode.BUSY, f"the metaserver has {MAX_SESSIONS} sessions")
        self._sessions[session.id] = session
        session.incarnation = next(self._incarnations)
        session.deadline_ns = self.clock() + self.lease_ns
        return session

    def resume(self, volume: Volume, session_id: bytes | None, owner: bytes = b"") -> Session | None:
        """Return the live session of this id as a new incarnation, or ``None``. The lease is not extended.

        Raises :exc:`~metaserver.errors.Refused` (ACCESS_DENIED) if it is another identity's.
        """
        session = self._sessions.get(session_id) if session_id is not None else None
        if session is None or session.volume.id != volume.id or not session.is_live or session.evicted:
            return None
        must_own(owner, session.owner)
        session.check()
        session.earlier.add(session.incarnation)
        session.incarnation = next(self._incarnations)
        return session

    def renew(
        self, session: Session, seen: int, now_ns: int, left_over: tuple[list[Name], list[int]] = ([], [])
    ) -> wire.Renewed:
        """Extend the lease from ``now_ns`` and tell of the session's own changes whose replies may have been lost.

        ``left_over``: names and inodes of those that may be made still. Raises as :meth:`Session.check` does.
        """
        session.check()
        feed = self.feed(session.volume)
        changes = self._own_changes(session, feed, seen)
        session.earlier.clear()
        session.reclaimed = False
        session.deadline_ns = max(session.deadline_ns, now_ns + self.lease_ns)
        names, inodes = (changes[0] + left_over[0], changes[1] + left_over[1]) if changes is not None else ([], [])
        return wire.Renewed(self.lease_ns // 1_000_000, feed.version, names, inodes, changes is None)

    def _own_changes(self, session: Session, feed: Feed, seen: int) -> tuple[list[Name], list[int]] | None:
        """Return what the session's earlier incarnations changed; a new worker (0) knows nothing of an earlier run."""
        if session.reclaimed and not seen:
            return None
        return feed.since(seen, session.earlier) if session.earlier else ([], [])

    def end(self, session: Session) -> None:
        """End a session: from here on it is refused, in transactions that wait for the engine too."""
        session.ended = True
        if self._sessions.pop(session.id, None) is not None:
            for each in self.on_end:
                each(session)

    def expired(self) -> list[Session]:
        """Return the sessions whose lease has run out."""
        return [session for session in self._sessions.values() if not session.is_live]

    def committed(self, volume: Volume, author: int, names: Iterable[Name], inodes: Iterable[int]) -> None:
        """Put a committed change into the volume's feed, before the reply goes out."""
        self.feed(volume).append(Change(author, tuple(names), tuple(inodes)))


def must_own(owner: bytes, of_session: bytes) -> None:
    """Raise :exc:`~metaserver.errors.Refused` (ACCESS_DENIED) unless a session belongs to this identity."""
    if owner != of_session:
        raise Refused(wire.ErrorCode.ACCESS_DENIED, "the session belongs to another identity")


def changed_names(request: wire.Request) -> tuple[Name, ...]:
    """Return the entries that a request changes, as (directory, name)."""
    if isinstance(request, wire.MakeNode | wire.Link | wire.Remove):
        return ((request.parent, request.name),)
    if isinstance(request, wire.Rename):
        return (request.parent, request.name), (request.new_parent, request.new_name)
    if isinstance(request, wire.MakeFiles):
        return tuple((file.parent, file.name) for file in request.files)
    if isinstance(request, wire.RemoveNames):
        return tuple((each.parent, each.name) for each in request.names)
    return ()


def changed_inodes(request: wire.Request, reply: wire.Reply) -> list[int]:
    """Return the inodes that a request has changed, or of which it has changed where their content lies."""
    if isinstance(request, wire.CompactSlices):
        return [request.ino]
    return [attributes.ino for attributes in reply.attributes] if isinstance(reply, wire.Changed) else []
