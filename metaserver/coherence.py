"""What may be cached, by whom, and what a change has to wait for: the heart of the coherence between clients.

A **grant** is what a reply lets its client cache: the names of a directory (a lookup grants all of them, so that the
absent ones are covered) and the inodes in the reply. It is given at the moment the reply is sent, and only if no
change of it is under way and none was committed since the reply was read. What is not granted is named by a break of
number 0, sent before the reply: the client then uses the reply and keeps nothing of it.

A **change** marks what it touches as being changed from before it looks at the holders until its reply is made. Its
transaction finds out what it touches, and is given up with :exc:`Held` if somebody else holds any of that; these get a
break, and when each has acknowledged or was evicted the transaction is tried again. If nobody else holds anything, the
first try commits, and nothing is sent or awaited.

A session **returns** what it has given up by itself (ReturnLeases). That is taken in the turn of the loop in which it
is read, and not answered: the connection says what came before it, and what after.

An inode that a session has open for writing is not granted to others: each reply about it comes with a note that it is
being written. It counts as held all the same, because what the kernel reads of it stays in its page cache.

A change belongs to the connection, that is the incarnation of its session, that it came over. Once the session has been
resumed on another connection it is refused: its client sends it again, or is another worker that knows nothing of it.

There are no locks, so there is nothing to deadlock: two changes of the same thing break each other's sessions, and
the engine puts them in an order. The transaction may run on the engine's thread. It marks first and looks at the
holders then; the loop records a holder first and looks at the marks then: so one of them sees the other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from metaserver import wire
from metaserver.breaks import Breaking, Breaks
from metaserver.errors import Refused
from metaserver.holdings import Holder, Holdings, inode_key, names_key
from metaserver.opens import Opens
from metaserver.sessions import Feed, Name, Session, Sessions
from metaserver.volumes import Volume

_log = logging.getLogger(__name__)

#: Bitmaps (of about 400 bytes) that one session, and all sessions of a volume, may take up.
SESSION_BITMAPS: Final = 8192
VOLUME_BITMAPS: Final = 262_144
#: Names that a client is told not to keep of one reply; for more it is to drop everything.
MOST_UNSETTLED: Final = 4096


class Held(Exception):
    """Others hold what a transaction is about to change; it is to be tried again when they have dropped it."""

    def __init__(self, names: list[Name], inodes: list[int]) -> None:
        super().__init__(f"{len(names)} names and {len(inodes)} inodes are held")
        self.names = names
        self.inodes = inodes


class Grant(NamedTuple):
    """What a reply lets its client cache. ``name`` None: all names of the directory."""

    directory: int | None
    name: bytes | None
    inodes: list[int]

    def has(self, name: Name) -> bool:
        return name[0] == self.directory and self.name in (None, name[1])


class Change:
    """One change under way, of one session. The attributes are replaced, never changed: two threads look at them.

    ``author`` is the incarnation of the session that asked for it.
    """

    def __init__(self, session: Session, author: int, names: Iterable[Name], holdings: Holdings) -> None:
        self.session = session
        self.author = author
        self.names = frozenset(names)
        self.inodes: frozenset[int] = frozenset()
        #: What all others have dropped, and cannot get again before this change ends.
        self.broken: frozenset[Name | int] = frozenset()
        #: Other sessions that have inodes of this change open.
        self.openers: Mapping[int, frozenset[bytes]] = {}
        self.ended = asyncio.Event()
        self._holdings = holdings

    def check(self, inodes: Iterable[int]) -> None:
        """Raise :exc:`Held` if others hold the names of this change or these inodes. Called in the transaction.

        Raises :exc:`Refused` (STALE_SESSION) if the session was resumed: who resumes it sees what is marked here.
        """
        self.inodes = self.inodes.union(inodes)
        if not self.is_current:
            raise Refused(wire.ErrorCode.STALE_SESSION, "the session was resumed on another connection")
        names = [name for name in self.names - self.broken if self._is_held(names_key(name[0]))]
        held = [ino for ino in self.inodes - self.broken if self._is_held(inode_key(ino))]
        if names or held:
            raise Held(names, held)

    def opened_by(self, session: Session, inos: Iterable[int]) -> None:
        """Another session has these inodes open."""
        self.openers = {**self.openers, **{ino: self.openers.get(ino, frozenset()) | {session.id} for ino in inos}}

    def closed_by(self, session: Session, inos: Iterable[int]) -> None:
        """Another session has these inodes open no more."""
        for ino in self.openers.keys() & set(inos):
            self.openers = {**self.openers, ino: self.openers[ino] - {session.id}}

    @property
    def is_current(self) -> bool:
        """Whether it came over the connection that its session has now."""
        return self.author == self.session.incarnation

    def _is_held(self, key: int) -> bool:
        return self._holdings.is_held(key, self.session)


class _State:
    """The holdings of one volume and the changes under way."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.holdings = Holdings()
        self.opens = Opens()
        self.changes: dict[Change, None] = {}

    def renaming(self, session: Session, ino: int) -> Change | None:
        """Return a change of names under way, of another session, that touches an inode."""
        others = (change for change in self.changes if change.session is not session)
        return next((change for change in others if change.names and ino in change.inodes), None)

    def unsettled(self, since: int, grant: Grant, session: Session) -> tuple[list[Name], list[int]] | None:
        """Return what of a grant others are changing, or did since a version of the feed; ``None``: it is not known.

        A client drops what it changes itself as each reply comes, and when none comes. What it asked for over an
        earlier connection is another's.
        """
        others = [change for change in self.changes if change.session is not session or not change.is_current]
        if not others and self.feed.version == since:
            return [], []
        past = self.feed.after(since)
        if past is None:
            return None
        names: set[Name] = set()
        inodes: set[int] = set()
        for each_names, each_inodes in (
            *((change.names, change.inodes) for change in others),
            *((part.names, part.inodes) for part in past if part.author != session.incarnation),
        ):
            names.update(name for name in each_names if grant.has(name))
            inodes.update(each_inodes)
        if len(names) > MOST_UNSETTLED:
            return None
        return sorted(names), [ino for ino in grant.inodes if ino in inodes]


class Coherence:
    """The grants and changes of one server. ``evict`` ends a session, durably."""

    def __init__(self, sessions: Sessions, evict: Callable[[Session], Awaitable[None]]) -> None:
        self._sessions = sessions
        self.breaks = Breaks(sessions.clock, evict)
        self._states: dict[int, _State] = {}
        sessions.on_end.append(self._ended)

    def _state(self, volume: Volume) -> _State:
        state = self._states.get(volume.id)
        if state is None:
            state = self._states[volume.id] = _State(self._sessions.feed(volume))
        return state

    # Grants

    def version(self, volume: Volume) -> int:
        """Return what :meth:`grant` is to be told of a reply that is read from now on."""
        return self._state(volume).feed.version

    def grant(self, session: Session, since: int, grant: Grant, *, own: bool = False) -> wire.Break | None:
        """Record what a reply lets a session cache; return what is to be sent before the reply, if anything.

        ``since`` is the version before the reply was read. ``own``: it is the reply to a change of this session. To be
        called where the reply is sent, with no await between.
        """
        state = self._state(session.volume)
        self._hold(state, session, grant)
        unsettled = state.unsettled(since, grant, session)
        if unsettled is None:
            return wire.Break(0, [], [], True)
        names, inodes = unsettled
        written = [] if own else state.opens.by_others(session, grant.inodes)
        return wire.Break(0, names, inodes, False, written) if names or inodes or written else None

    def _hold(self, state: _State, session: Session, grant: Grant) -> None:
        keys = [inode_key(ino) for ino in grant.inodes]
        if grant.directory is not None:
            keys.append(names_key(grant.directory))
        state.holdings.hold(session.holder, keys)
        if len(session.holder.blocks) > SESSION_BITMAPS or state.holdings.bitmaps > VOLUME_BITMAPS:
            self._relieve(state, session)

    def _relieve(self, state: _State, session: Session) -> None:
        """Have the one who holds the most drop everything: the session itself, if it is over its own bound.

        Otherwise one of the identity whose sessions hold the most together: many of them do not push out another's few.
        """
        if len(session.holder.blocks) <= SESSION_BITMAPS:
            held: Counter[bytes] = Counter()
            here = self._sessions.of_volume(session.volume)
            for each in here:
                held[each.account] += len(each.holder.blocks)
            session = max(here, key=lambda each: (held[each.account], len(each.holder.blocks)), default=session)
        self.drop_everything(session)

    def drop_everything(self, session: Session) -> None:
        """Have a session drop all it has. What it is granted from now on counts apart."""
        holdings, old = self._state(session.volume).holdings, session.holder
        session.holder = Holder(session)

        def dropped(session: Session, still_open: Sequence[int]) -> None:
            holdings.drop(old)
            if not session.ended:
                holdings.hold(session.holder, map(inode_key, still_open))

        self.breaks.send([session], [], [], dropped, everything=True)

    def returned(self, session: Session, directories: Iterable[int], inodes: Iterable[int]) -> None:
        """A session has nothing in its caches of these inodes and of the names in these directories.

        What it was granted before this came it does not keep; what it asks for from now on it is granted again.
        """
        keys = itertools.chain(map(inode_key, inodes), map(names_key, directories))
        self._state(session.volume).holdings.release(session.holder, keys)

    def held(self, session: Session) -> tuple[int, int]:
        """Return how many directories' names, and how many inodes, a session may have cached."""
        return self._state(session.volume).holdings.count(session.holder)

    def reclaimed(self, session: Session) -> None:
        """A session of an earlier run is back: it may have anything in its caches."""
        self._state(session.volume).holdings.hold_everything(session.holder)

    def settle_reclaimed(self) -> None:
        """Have one of those who may have anything drop everything, so that they need not be told of each change."""
        for session in self._sessions.all():
            if session.holder.everything:
                _log.info("%s drops its caches, which are not known here", session.client)
                self.drop_everything(session)
                return

    def _ended(self, session: Session) -> None:
        """A session holds nothing any more and is waited for by nobody."""
        state = self._state(session.volume)
        state.holdings.drop(session.holder)
        state.opens.replace(session, ())
        for breaking in list(session.pending.values()):
            breaking.settle(session, dropped=breaking.message.everything)

    # Clients that are alone

    def alone(self, volume: Volume) -> list[Session]:
        """Return the sessions of a volume that keep something to themselves, perhaps.

        A client that is alone has changes of a new file's attributes wait for the file's first flush. Before another
        session is opened it is told, and commits them. Nobody else holds anything then, so that it waits for nobody;
        the other waits for it, for one lease at most, as for any break.
        """
        return [each for each in self._sessions.of_volume(volume) if each.was_alone and not each.evicted]

    def part(self, sessions: Sequence[Session]) -> Breaking:
        """Tell sessions that they are not alone any more."""
        for session in sessions:
            session.alone = False
        return self.breaks.send(sessions, [], [], _parted, joined=True)

    # Open files

    async def before_opening(self, session: Session, ino: int) -> None:
        """A session is about to open an inode: return when nobody is in the middle of unlinking it unasked.

        Who begins to from now on finds that the session holds it, and asks whether it has it open.
        """
        state = self._state(session.volume)
        state.holdings.hold(session.holder, [inode_key(ino)])
        while (change := state.renaming(session, ino)) is not None:
            await change.ended.wait()

    def reaping(self, session: Session, inos: Iterable[int]) -> None:
        """A session has these inodes open no more; it is about to say so in a change of its own."""
        for change in self._state(session.volume).changes:
            change.closed_by(session, inos)

    async def open_for_writing(self, session: Session, author: int, ino: int) -> None:
        """A session is about to open an inode for writing: have everybody else drop it."""
        self.opened(session, ino)
        change = self.begin(session, author, ())
        try:
            change.check([ino])
        except Held as held:
            await self.make_way(change, held)
        finally:
            self.end(change)

    def opened(self, session: Session, ino: int) -> None:
        """A session has an inode open for writing, which nobody else has in a cache."""
        self._state(session.volume).opens.add(session, ino)

    def closed(self, session: Session, inos: Iterable[int]) -> None:
        """A session has these inodes open for writing no more."""
        self._state(session.volume).opens.remove(session, inos)

    def has_open(self, session: Session, inos: Iterable[int]) -> None:
        """A session that comes back has just these inodes open for writing."""
        self._state(session.volume).opens.replace(session, inos)

    # Changes

    def begin(self, session: Session, author: int, names: Iterable[Name]) -> Change:
        """Return a change that is about to be tried; it is to be ended by :meth:`end`."""
        state = self._state(session.volume)
        change = Change(session, author, names, state.holdings)
        state.changes[change] = None
        return change

    def left_over(self, session: Session) -> tuple[list[Name], list[int]]:
        """Return the names and inodes of changes that came over earlier connections of a session and may be made."""
        mine = [each for each in self._state(session.volume).changes if each.session is session and not each.is_current]
        return [name for each in mine for name in each.names], [ino for each in mine for ino in each.inodes]

    async def make_way(self, change: Change, held: Held) -> None:
        """Have everybody else drop what a change touches, and wait until they have."""
        holdings = self._state(change.session.volume).holdings
        inode_keys = [inode_key(ino) for ino in held.inodes]
        holders: dict[Holder, None] = {}
        for key in (*inode_keys, *(names_key(directory) for directory, _ in held.names)):
            holders.update(dict.fromkeys(holdings.holders(key, change.session)))
        owners = [holder.owner for holder in holders]
        breaking = self.breaks.send(
            (owner for owner in owners if isinstance(owner, Session)),
            held.names,
            held.inodes,
            lambda session, still_open: self._made_way(change, held, session, still_open),
        )
        await self.breaks.wait(breaking)
        change.broken = change.broken.union(held.names, held.inodes)

    def _made_way(self, change: Change, held: Held, session: Session, still_open: Sequence[int]) -> None:
        """A session has dropped what a change touches. It goes on holding what is open there, to be asked again."""
        holdings, kept = self._state(session.volume).holdings, set(still_open)
        holdings.release(session.holder, [inode_key(ino) for ino in held.inodes if ino not in kept])
        change.opened_by(session, kept.intersection(held.inodes))

    def end(self, change: Change) -> None:
        """A change has its reply, or has failed."""
        self._state(change.session.volume).changes.pop(change, None)
        change.ended.set()

    def acknowledge(self, session: Session, number: int, still_open: Sequence[int] = ()) -> None:
        """A session has dropped what a break told; of the inodes, some may be open there."""
        breaking = session.pending.get(number)
        if breaking is not None:
            breaking.settle(session, dropped=True, still_open=still_open)


def _parted(session: Session, still_open: Sequence[int]) -> None:
    session.was_alone = False


def grant_of(request: wire.Request, reply: wire.Reply) -> Grant | None:
    """Return what the reply to a read lets its client cache."""
    if isinstance(reply, wire.Found):
        inodes = [reply.attributes.ino]
        return (
            Grant(request.parent, request.name, inodes)
            if isinstance(request, wire.Lookup)
            else Grant(None, None, inodes)
        )
    if isinstance(reply, wire.DirectoryPage):
        directory = reply.directory.ino
        return Grant(directory, None, [directory, *(entry.attributes.ino for entry in reply.entries)])
    if isinstance(reply, wire.Content):
        return Grant(None, None, [reply.attributes.ino])
    if isinstance(reply, wire.Failure) and isinstance(request, wire.Lookup):
        return Grant(request.parent, request.name, [])
    return None


def own_grants(request: wire.Request, names: Iterable[Name], inodes: list[int]) -> list[Grant]:
    """Return what the reply to a change lets its client cache. A directory just made is known to have no names."""
    if isinstance(request, wire.MakeFiles | wire.RemoveNames):
        first, *others = dict.fromkeys(directory for directory, _ in names)
        return [Grant(first, None, inodes), *(Grant(directory, None, []) for directory in others)]
    grants = [Grant(directory, name, inodes) for directory, name in names] or [Grant(None, None, inodes)]
    if isinstance(request, wire.MakeNode) and stat.S_ISDIR(request.mode):
        grants.append(Grant(inodes[0], None, inodes))
    return grants
