"""What each request means: which volume and session it concerns, and which verb of the namespace answers it.

Reads run on the engine's snapshot, writes in its transactions. In its transaction a write looks at the server's epoch
and its session's record and deadline again, because it may have waited there; whether it was made before; and who else
holds what it touches (see coherence.py). A committed change is in the volume's feed before its reply goes out.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from importlib import metadata
from typing import Any, Final, NamedTuple, TypeVar, cast

import msgspec

from metaserver import events, fencing, identities, listing, namespace, new_files, wire
from metaserver.coherence import Change, Coherence, Grant, Held, grant_of, own_grants
from metaserver.connection import Answer, Caller, Limits, failure
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused, Unknown
from metaserver.fenced_engine import FencedEngine
from metaserver.fencing import SessionRecord, Slot, Tenure
from metaserver.following import Followers
from metaserver.gate import Account, Gate
from metaserver.grace import Grace
from metaserver.guard import Guard, root_of
from metaserver.janitor import Janitor
from metaserver.locking import Locking, LockRequest
from metaserver.namespace import Context
from metaserver.sessions import Session, Sessions, changed_inodes, changed_names, must_own
from metaserver.status import Overview
from metaserver.unlinked import Unlinked, most_left
from metaserver.volumes import Volume

_T = TypeVar("_T")

#: What a metaserver calls itself.
SOFTWARE: Final = f"bpfuse-metaserver {metadata.version('bpfuse')}"
#: Times that a commit whose outcome is unknown is looked for.
_RESOLUTIONS: Final = 3


def _too_many(txn: Transaction, context: Context, request: wire.Request) -> wire.Reply:
    """In place of a verb that may leave another unlinked inode behind."""
    raise Refused(wire.ErrorCode.NO_SPACE, "the identity keeps too many unlinked files")


def _outward(guard: Guard, answer: Answer) -> Answer:
    """Return an answer as a guarded session is to see it."""
    notice = None if answer.notice is None else cast(wire.Break, guard.outward(answer.notice))
    return Answer(guard.outward(answer.reply), notice)


class _Outcome(NamedTuple):
    """What a write came to; ``repeated``: it was made before, and this is what was said then."""

    reply: wire.Reply
    repeated: bool


class Service:
    """The requests of all connections of one server. ``wall`` is the time of day, in nanoseconds since 1970."""

    #: Set before the first connection is accepted.
    grace: Grace
    #: An earlier run ended without a farewell: what it acknowledged last may be lost, and in its clients' caches.
    may_have_lost: bool = False

    def __init__(
        self,
        engine: FencedEngine,
        tenure: Tenure,
        sessions: Sessions,
        coherence: Coherence,
        janitor: Janitor,
        gate: Gate,
        limits: Limits,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._engine = engine
        self._tenure = tenure
        self._sessions = sessions
        self._coherence = coherence
        self._janitor = janitor
        self._gate = gate
        self._limits = limits
        gate.on_end = lambda account: self._revoke_sessions(account.owner)
        self._locking = Locking(sessions, lambda: self.grace)
        self._unlinked = Unlinked(engine, sessions)
        self._losses = engine.losses
        self._wall = wall
        self._followers = Followers(engine)
        self._overview = Overview(tenure, sessions, coherence, janitor.evictions)
        #: Returns where clients can reach the metaservers of the engine.
        self.metaservers: Callable[[], list[str]] = list

    def welcome(self) -> wire.Welcome:
        """Return the answer to a Hello; its epoch is this run's own."""
        return wire.Welcome(wire.PROTOCOL_VERSION, SOFTWARE, self._tenure.epoch, metaservers=self.metaservers())

    def acknowledge(self, caller: Caller, request: wire.Acknowledge) -> None:
        """Take note that a client has dropped what a break told."""
        session = caller.bound()
        if session is not None:
            self._coherence.acknowledge(session, request.number, request.open)

    def returned(self, caller: Caller, request: wire.ReturnLeases) -> None:
        """Take note of what a client has given up. Of an earlier connection of its session it says nothing any more."""
        session = caller.bound()
        if session is None:
            return
        directories, inodes = request.directories, request.inodes
        if session.guard is not None:
            directories, inodes = session.guard.numbers_inward(directories), session.guard.numbers_inward(inodes)
        self._coherence.returned(session, directories, inodes)

    async def answer(self, caller: Caller, frame: wire.Frame) -> Answer:
        """Answer any request that is not streamed, nor a Hello; raise :exc:`~metaserver.errors.Refused`."""
        self._notice_losses()
        session = caller.bound()
        if session is None or (guard := session.guard) is None:
            return await self._answer(caller, frame)
        request = guard.inward(frame.request)
        if isinstance(request, LockRequest):
            await self._check(session, request)
            forbidden = await self._forbidden(session, guard, request)
            return _outward(guard, Answer(self._locking.answer(caller.session(), request, forbidden)))
        return _outward(guard, await self._answer(caller, msgspec.structs.replace(frame, request=request)))

    async def _answer(self, caller: Caller, frame: wire.Frame) -> Answer:
        request = frame.request
        if isinstance(request, wire.OpenFile):
            return await self._open_file(caller, request)
        if (verb := namespace.READS.get(type(request))) is not None:
            return await self._read(caller, verb, request)
        if (change := namespace.WRITES.get(type(request))) is not None:
            return await self._write(caller, change, frame)
        return Answer(await self._manage(caller, request))

    async def _manage(self, caller: Caller, request: wire.Request) -> wire.Reply:
        if isinstance(request, wire.Renew):
            return await self._renew(caller, request)
        if isinstance(request, wire.ClosedForWriting):
            self._coherence.closed(caller.session(), request.inos)
            return wire.Done()
        if isinstance(request, LockRequest):
            return self._locking.answer(caller.session(), request)
        if isinstance(request, wire.Sync):
            return await self._sync(caller)
        if isinstance(request, wire.ReserveInodes):
            return await self._reserve(caller.session(), request)
        if isinstance(request, wire.OpenSession):
            return await self._open_session(caller, request)
        if isinstance(request, wire.CloseSession):
            return await self._close_session(caller)
        if isinstance(request, wire.CreateVolume):
            caller.must_be_admin()
            return await self._create_volume(request)
        if isinstance(request, wire.CreateIdentity | wire.RevokeIdentity | wire.ListIdentities):
            caller.must_be_admin()
            return await self._manage_identities(request)
        if isinstance(request, wire.GetStatus):
            return await self._status(caller, request)
        if isinstance(request, wire.EvictSession):
            caller.must_be_admin()
            self._overview.evict(await self._volume(request.volume), request.session)
            return wire.Done()
        raise Refused(wire.ErrorCode.INVALID, f"a {type(request).__name__} has no place here")

    # Reads

    async def pages(self, caller: Caller, request: wire.FetchDirectory) -> AsyncIterator[Answer]:
        """Yield the pages of a directory fetch, those of each directory of one snapshot."""
        session = caller.session()
        guard = session.guard
        unended: tuple[int, wire.DirectoryPage] | None = None

        def answer(since: int, page: wire.DirectoryPage) -> Answer:
            granted = self._granted(session, since, request, page)
            return granted if guard is None else _outward(guard, granted)

        async for since, pages, is_end in self._directories(session, request):
            pages.reverse()
            while pages:
                page = pages.pop()
                yield answer(since, page if is_end else listing.not_last(page))
            unended = None if is_end else (since, page)
        if unended is not None:
            yield answer(unended[0], listing.end_after(unended[1]))

    async def _directories(
        self, session: Session, request: wire.FetchDirectory
    ) -> AsyncIterator[tuple[int, list[wire.DirectoryPage], bool]]:
        """Yield the pages of the directory asked for, and of others up to the first that does not fit in; each with the
        version before, and whether they are the last for sure: none waits for what may come after it."""
        since, left = self._coherence.version(session.volume), request
        pages = await self._directory(session, request)
        yield since, list(pages), not request.also
        for number, ino in enumerate(request.also, 1):
            if (rest := listing.left_over(left, pages)) is None:
                return
            since, left = self._coherence.version(session.volume), listing.whole_of(rest, ino)
            try:
                pages = await self._directory(session, left)
            except Refused:  # it is gone, or not for this session
                left, pages = rest, []
                continue
            if not listing.is_whole(left, pages):
                return
            yield since, list(pages), number == len(request.also)

    async def _directory(self, session: Session, request: wire.FetchDirectory) -> list[wire.DirectoryPage]:
        guard = session.guard
        inward = request if guard is None else cast(wire.FetchDirectory, guard.inward(request))
        pages: list[wire.DirectoryPage] = await self._look(session, namespace.READS[wire.FetchDirectory], inward)
        return pages

    def events(self, caller: Caller, request: wire.FollowEvents) -> AsyncGenerator[wire.EventPage, None]:
        """Yield the pages of a stream of events; raise :exc:`~metaserver.errors.Refused`."""
        caller.must_see(request.volume)
        if caller.account.identity.subtree.strip(b"/"):
            raise Refused(wire.ErrorCode.ACCESS_DENIED, "events tell of more than the identity's part of the volume")
        return self._followers.pages(request)

    async def _read(self, caller: Caller, verb: Callable[..., Any], request: wire.Request) -> Answer:
        session = caller.session()
        since = self._coherence.version(session.volume)
        try:
            reply = await self._look(session, verb, request)
        except Refused as refused:
            if refused.code is not wire.ErrorCode.NOT_FOUND:
                raise
            reply = failure(refused.code, refused.message)
        return self._granted(session, since, request, reply)

    async def _open_file(self, caller: Caller, request: wire.OpenFile) -> Answer:
        session = caller.session()
        if session.guard is not None:
            await self._check(session, request)
        if request.writing:
            await self._coherence.open_for_writing(session, caller.incarnation, request.ino)
        await self._coherence.before_opening(session, request.ino)
        answer = await self._read(caller, namespace.READS[wire.OpenFile], request)
        if request.writing and isinstance(answer.reply, wire.Failure):
            self._coherence.closed(session, [request.ino])
        return answer

    async def _look(self, session: Session, verb: Callable[..., Any], request: wire.Request) -> Any:
        context, guard = Context(session.volume, session.id, self._wall()), session.guard
        if guard is None:
            return await self._engine.read(lambda snapshot: verb(snapshot, context, request))

        def body(snapshot: Snapshot) -> Any:
            guard.check(snapshot, context, request)
            reply = verb(snapshot, context, request)
            guard.tells(snapshot, context, request, reply)
            return reply

        return await self._engine.read(body)

    async def _check(self, session: Session, request: wire.Request) -> None:
        """Raise :exc:`~metaserver.errors.Refused` for what a session may not do."""
        context, guard = Context(session.volume, session.id, self._wall()), session.guard
        if guard is not None:
            await self._engine.read(lambda snapshot: guard.check(snapshot, context, request))

    async def _forbidden(self, session: Session, guard: Guard, request: LockRequest) -> set[int]:
        """Return the indexes of locks that a session tells of, and may not have."""
        if not isinstance(request, wire.HoldLocks):
            return set()
        return await self._engine.read(lambda snapshot: guard.forbidden(snapshot, session.volume, request.locks))

    def _granted(self, session: Session, since: int, request: wire.Request, reply: wire.Reply) -> Answer:
        self._notice_losses()
        grant = grant_of(request, reply)
        return Answer(reply, self._coherence.grant(session, since, grant) if grant is not None else None)

    # Writes

    async def _write(self, caller: Caller, verb: Callable[..., Any], frame: wire.Frame) -> Answer:
        session, author = caller.session(), caller.incarnation
        if isinstance(frame.request, wire.Reap):
            self._coherence.reaping(session, frame.request.inos)
        await self.grace.over()
        left = most_left(frame.request)
        may_remove = not left or await self._unlinked.has_room(session, left)
        change = self._coherence.begin(session, author, changed_names(frame.request))
        try:
            since, outcome = await self._commit(change, verb if may_remove else _too_many, frame)
            return self._committed(change, since, frame.request, outcome)
        finally:
            self._coherence.end(change)

    async def _commit(self, change: Change, verb: Callable[..., Any], frame: wire.Frame) -> tuple[int, _Outcome]:
        """Commit a change when nobody else holds what it touches; return the version before, and the outcome."""
        resolutions = _RESOLUTIONS if frame.sequence else 0
        lazy = getattr(frame.request, "lazy", False)
        while True:
            since = self._coherence.version(change.session.volume)
            try:
                return since, await self._engine.write(self._body(change, verb, frame), lazy=lazy)
            except Held as held:
                await self._coherence.make_way(change, held)
            except Unknown:
                self._sessions.feed(change.session.volume).forget_all()
                if not resolutions:
                    raise
                resolutions -= 1

    def _body(self, change: Change, verb: Callable[..., Any], frame: wire.Frame) -> Callable[[Transaction], _Outcome]:
        session = change.session
        now_ns = self._wall()
        slot = Slot(session.id, frame.slot, frame.sequence)

        def body(txn: Transaction) -> _Outcome:
            self._may_commit(txn, session)
            before = fencing.outcome(txn, slot)
            if before is not None:
                return _Outcome(before, True)
            context = Context(session.volume, session.id, now_ns, change.openers)
            if session.guard is not None:
                session.guard.check(txn, context, frame.request)
            reply: wire.Reply = verb(txn, context, frame.request)
            if session.guard is not None:
                session.guard.tells(txn, context, frame.request, reply)
            change.check(changed_inodes(frame.request, reply))
            events.record(txn, context, session.client, frame.request, reply)
            fencing.remember(txn, slot, reply)
            return _Outcome(reply, False)

        return body

    def _may_commit(self, txn: Transaction, session: Session) -> None:
        """The fence, beside the engine's own of this server: raise unless the session may still change anything."""
        session.check()
        fencing.check_session(txn, session.id)

    def _committed(self, change: Change, since: int, request: wire.Request, outcome: _Outcome) -> Answer:
        session, inodes = change.session, changed_inodes(request, outcome.reply)
        for ino in _opened_by(request, inodes) if change.is_current else ():
            self._coherence.opened(session, ino)
        if outcome.repeated:
            return Answer(outcome.reply, wire.Break(0, list(change.names), inodes))
        grant = self._grant_own(change, since, own_grants(request, change.names, inodes))
        if inodes:
            self._sessions.committed(session.volume, change.author, change.names, inodes)
        self._janitor.changed(session.volume)
        return Answer(outcome.reply, grant)

    def _grant_own(self, change: Change, since: int, grants: list[Grant]) -> wire.Break | None:
        """Grant what a change's own reply tells; return what of it is not to be kept."""
        self._notice_losses()
        notices = [self._coherence.grant(change.session, since, grant, own=True) for grant in grants]
        refused = [notice for notice in notices if notice is not None]
        if not refused:
            return None
        names = [name for notice in refused for name in notice.names]
        return wire.Break(0, names, refused[0].inodes, any(notice.everything for notice in refused))

    # Sessions and volumes

    async def _renew(self, caller: Caller, request: wire.Renew) -> wire.Renewed:
        """Extend the lease: only past breaks that were acknowledged, and only within this server's tenure."""
        session = caller.session()
        await self._coherence.breaks.settled(session)
        now_ns = self._sessions.clock()
        await self._engine.check()
        session = caller.session()
        renewed = self._sessions.renew(session, request.seen, now_ns, self._coherence.left_over(session))
        self._locking.is_known(session)
        return msgspec.structs.replace(renewed, metaservers=self.metaservers())

    def _notice_losses(self) -> None:
        """If the engine has lost what it had acknowledged, have everybody drop everything."""
        if self._losses != self._engine.losses:
            self._losses = self._engine.losses
            self._sessions.forget_everything()
            for session in self._sessions.all():
                self._coherence.drop_everything(session)

    async def _sync(self, caller: Caller) -> wire.Done:
        session = caller.session()
        try:
            await self._engine.sync()
        finally:
            lost, session.losses = session.losses != self._engine.losses, self._engine.losses
        if lost:
            raise Refused(wire.ErrorCode.INTERNAL, "changes that were acknowledged could not be made durable")
        return wire.Done()

    async def _reserve(self, session: Session, request: wire.ReserveInodes) -> wire.InodesReserved:
        """Reserve inode numbers, durably: a crash may not give them to another."""
        if session.guard is not None:
            raise Refused(wire.ErrorCode.ACCESS_DENIED, "the identity's files are made one by one")
        context = Context(session.volume, session.id, self._wall())
        reserved: list[wire.InodesReserved] = []

        def body(txn: Transaction) -> None:
            self._may_commit(txn, session)
            reserved[:] = [new_files.reserve_inodes(txn, context, request)]

        await self._write_durably(body)
        return reserved[0]

    async def _open_session(self, caller: Caller, request: wire.OpenSession) -> wire.SessionOpened:
        caller.must_see(request.volume)
        volume = await self._volume(request.volume)
        caller.must_be_free()
        owner = caller.account.owner
        session = self._sessions.resume(volume, request.resume, owner) or await self._reclaim(volume, request, owner)
        resumed = session is not None
        if session is None:
            self._must_have_room(caller.account)
            session = await self._open_new(volume, request.client, owner)
        session.is_revoked = caller.account.is_revoked
        caller.must_be_free()
        await self._set_guard(caller.account, session)
        caller.must_be_free()
        self._coherence.has_open(session, await self._reached(session, request.writing))
        session.software = request.software
        caller.bind(session)
        return wire.SessionOpened(
            session.id,
            self._sessions.lease_ns // 1_000_000,
            self._sessions.feed(volume).version,
            volume.store,
            volume.inline_limit,
            resumed,
            volume.identity,
            self._engine.is_lazy,
            session.alone and session.guard is None,
            self._engine.puts_off,
            caller.account.identity.read_only,
        )

    async def _set_guard(self, account: Account, session: Session) -> None:
        """Set the bounds of a session that is opened, or is used by another connection."""
        identity, before = account.identity, session.guard
        is_confined = bool(identity.subtree.strip(b"/"))
        if not (is_confined or identity.read_only or account.squash is not wire.Squash.NONE):
            session.guard = None
            return
        root = wire.ROOT_INO
        if is_confined and before is None:
            root = await self._engine.read(lambda snapshot: root_of(snapshot, session.volume, identity.subtree))
        guard = Guard(identity, account.squash, root)
        if before is not None:
            guard.go_on_from(before)
        session.guard = guard

    async def _reached(self, session: Session, inos: list[int]) -> list[int]:
        """Return those of these inodes that a session may reach."""
        context, guard = Context(session.volume, session.id, self._wall()), session.guard
        if guard is None or not guard.is_confined:
            return inos
        return await self._engine.read(lambda snapshot: [ino for ino in inos if guard.reaches(snapshot, context, ino)])

    def _must_have_room(self, account: Account) -> None:
        if not account.is_named:
            return
        if sum(each.owner == account.owner for each in self._sessions.all()) >= self._limits.identity_sessions:
            raise Refused(wire.ErrorCode.BUSY, f"{account.identity.name} has {self._limits.identity_sessions} sessions")

    async def _open_new(self, volume: Volume, client: str, owner: bytes) -> Session:
        if self.grace.misses_one_alone(volume.id):
            await self.grace.over()
        while alone := self._coherence.alone(volume):
            await self._coherence.breaks.wait(self._coherence.part(alone))
            for each in alone:
                await self._record(each, is_new=False)
        session = self._sessions.open(volume, client, owner)
        session.alone = session.was_alone = self._sessions.of_volume(volume) == [session] and self.grace.is_over
        session.losses = self._engine.losses
        try:
            await self._record(session)
        except BaseException:
            self._sessions.end(session)
            raise
        return session

    async def _reclaim(self, volume: Volume, request: wire.OpenSession, owner: bytes) -> Session | None:
        """Return a session of an earlier run whose client comes back in time."""
        record = self.grace.missing(request.resume) if request.resume is not None else None
        if record is None or record.volume != volume.id:
            return None
        must_own(owner, record.owner)
        session = self._sessions.reclaim(record.id, volume, request.client, owner)
        session.losses = self._engine.losses
        self._coherence.reclaimed(session)
        session.was_alone = record.alone
        if record.alone:
            self._coherence.part([session])
        if self.may_have_lost:
            self._coherence.drop_everything(session)
        self.grace.came_back(record.id)
        await self._record(session)
        return session

    async def _record(self, session: Session, *, is_new: bool = True) -> None:
        """Store a session, durably: as long as it may use its caches, a later run of the server must know of it."""
        record = SessionRecord(session.id, session.volume.id, self._sessions.lease_ns, session.was_alone, session.owner)

        def body(txn: Transaction) -> None:
            if is_new or fencing.is_recorded(txn, session.id):
                fencing.put_session(txn, record)

        await self._write_durably(body)

    async def _write_durably(self, body: Callable[[Transaction], _T]) -> _T:
        outcome = await self._engine.write(body)
        await self._engine.sync()
        return outcome

    async def _volume(self, name: str) -> Volume:
        return await self._engine.read(lambda snapshot: namespace.open_volume(snapshot, name))

    async def _status(self, caller: Caller, request: wire.GetStatus) -> wire.Status:
        if request.volume is not None:
            caller.must_see(request.volume)
        volume = None if request.volume is None else await self._volume(request.volume)
        status = self._overview.status(SOFTWARE, self.grace, volume)
        status = msgspec.structs.replace(status, metaservers=self.metaservers())
        if caller.account.identity.admin:
            return status
        own = {each.id for each in self._sessions.all() if each.owner == caller.account.owner}
        sessions = [each for each in status.sessions if each.session in own]
        return msgspec.structs.replace(status, sessions=sessions, evicted=[])

    async def _close_session(self, caller: Caller) -> wire.Done:
        await self._janitor.end(caller.session())
        return wire.Done()

    async def _create_volume(self, request: wire.CreateVolume) -> wire.Done:
        await self._write_durably(lambda txn: namespace.create_volume(txn, request, self._wall()))
        return wire.Done()

    # Identities

    async def _manage_identities(
        self, request: wire.CreateIdentity | wire.RevokeIdentity | wire.ListIdentities
    ) -> wire.Reply:
        if isinstance(request, wire.ListIdentities):
            return wire.Identities(await self._engine.read(lambda snapshot: identities.listed(snapshot, request.after)))
        if isinstance(request, wire.CreateIdentity):
            serial = os.urandom(8)
            await self._write_durably(lambda txn: identities.create(txn, request, serial))
        else:
            revoked = await self._write_durably(lambda txn: identities.revoke(txn, request.name))
            self._gate.revoked(request.name)
            self._revoke_sessions(revoked.serial)
        return wire.Done()

    def _revoke_sessions(self, owner: bytes) -> None:
        """Do nothing more for an identity's sessions. They hold up others until their lease has run out, at most."""
        for session in self._sessions.all():
            if session.owner == owner:
                session.is_revoked = True


def _opened_by(request: wire.Request, inodes: list[int]) -> list[int]:
    """Return which of the inodes that a request has changed it leaves open for writing."""
    if isinstance(request, wire.MakeFiles):
        return [file.ino for file in request.files if file.writing]
    return inodes[:1] if getattr(request, "writing", False) else []
