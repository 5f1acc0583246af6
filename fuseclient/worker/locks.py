"""The advisory locks of this mount's programs: asked for at the metaserver, and kept for as long as its session lives.

Locks and data: before a lock is given up, or made shared, what was written to its file is committed; and before one is
said to be granted, what the one before committed is where the kernel reads. So whoever locks, reads, changes, writes
and unlocks sees what the others did, without fsync. (Not through shared mappings: those need msync.)

This mount's part of the truth is in the store, which outlives the worker. A worker that begins, and one that comes back
to another run of the metaserver, or that could not tell it of an unlock, tells all it holds, before it renews; what the
metaserver does not let it have is lost.

Lost is what was held when the session ended, too. Somebody else may have the lock then, so the program must not go on
as if it had: each further request for a lock of the owner fails, until it has closed the file; and if it was an
exclusive one, what was written to the file and is not committed is given up, and this mount takes no writes to the file
until then. Reads go on: they tell what is true now.

Everything runs on the event loop; between the word that a lock is granted and the note of it there is no await.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol

from fuseclient.worker import signals
from fuseclient.worker.lock_store import Held, Key, LockStore
from fuseclient.worker.rpc import Connection, Disconnected, Refused
from metaserver import wire
from metaserver.wire import LockOutcome

if TYPE_CHECKING:
    from fuseclient.data.caller import Reply
    from fuseclient.kernel_cache import Cache

_log = logging.getLogger(__name__)

#: Changes of what a file holds.
_WRITES: Final = (wire.WriteInline, wire.CommitSlices, wire.Allocate, wire.CopyRange)


class Lost(Exception):
    """The lock, or another one of the same owner and file, was lost with the session."""


class Caller(Protocol):
    """What this needs of :class:`~fuseclient.worker.session.Session`."""

    id: bytes | None

    async def call(self, request: wire.Request, reply_type: type[Reply], /) -> Reply: ...


async def _nothing(ino: int) -> None:
    """What is to be done with a file's data while there are no parts that have any."""


class Locks:
    """The locks of one mount. ``session`` is to be set before use, the others when there is data.

    ``publish`` commits what was written to a file; ``refresh`` returns when the kernel reads what is committed;
    ``forfeit`` gives up what was written to a file and is not committed.
    """

    session: Caller
    publish: Callable[[int], Awaitable[object]] = staticmethod(_nothing)
    refresh: Callable[[int], Awaitable[object]] = staticmethod(_nothing)

    def __init__(self, cache: Cache, store: LockStore) -> None:
        self._cache = cache
        self._store = store
        self._held: dict[Key, list[Held]] = {}
        self._lost: dict[Key, list[Held]] = {}
        #: How many keys of an inode hold or have lost something.
        self._inos: Counter[int] = Counter()
        #: Inodes of which an exclusive lock is lost.
        self._forfeited: Counter[int] = Counter()
        self.forfeit: Callable[[int], object] = lambda ino: None
        for held, lost in store.records():
            (self._lost if lost else self._held).setdefault(held.key, []).append(held)
        for key in self._held.keys() | self._lost.keys():
            self._inos[key.ino] += 1
        self._forfeited.update(key.ino for key, held in self._lost.items() if _any_exclusive(held))
        #: The run of the metaserver that knows what is held here, and whether it does not know all.
        self._run: int | None = None
        self._diverged = False
        self._numbers = itertools.count(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        #: By number, those who wait for a word of the metaserver; ``None`` is the word to ask again.
        self._waits: dict[int, asyncio.Future[LockOutcome | None]] = {}
        #: How many of them wait for others to give something up.
        self._queued = 0
        self.lost_count = 0
        #: Waits that ended by a signal of which the kernel had not told.
        self.unsaid_signals = 0

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows."""
        ranges = sum(len(held) for held in self._held.values())
        return {
            "held": ranges,
            "waiting": self._queued,
            "lost": self.lost_count,
            "unsaid_signals": self.unsaid_signals,
        }

    # Requests

    async def test(self, wanted: Held) -> wire.Lock | None:
        """Return the lock that is in the way of one; raises as :meth:`take` does."""
        self._check(wanted.key)
        return (await self.session.call(wire.TestLock(_lock_of(wanted)), wire.LockIs)).lock

    def own(self, key: Key, start: int, end: int) -> Held | None:
        """Return what an owner holds itself of a range, the first of it; raises as :meth:`take` does."""
        self._check(key)
        return next((held for held in self._held.get(key, ()) if held.start <= end and start <= held.end), None)

    async def take(self, wanted: Held, interrupted: asyncio.Event | None, tid: int = 0) -> LockOutcome:
        """Take a lock; with ``interrupted``, wait for it until that is set. Never WAITING; CANCELLED: interrupted.

        ``tid``: the thread that waits, if that is known. Raises :exc:`Lost`, and what a call or a commit raises.
        """
        self._check(wanted.key)
        key = wanted.key
        if not wanted.exclusive and _any_exclusive(self._held.get(key, ())):
            await self.publish(key.ino)
        if not self._store.has_room(len(self._held.get(key, ())) + 3):
            return LockOutcome.FULL
        outcome = await self._ask(wanted, interrupted, tid)
        if outcome is LockOutcome.GRANTED:
            await self.refresh(key.ino)
        return outcome

    async def unlock(self, key: Key, start: int, end: int) -> LockOutcome:
        """Give up a range; raises as :meth:`take` does. If what was written cannot be committed it is given up, too."""
        self._check(key)
        try:
            await self.publish(key.ino)
        finally:
            outcome = await self._give_up(key, start, end)
        return outcome

    async def closed(self, ino: int, owner: int) -> None:
        """A program has closed the file: its ranges are free."""
        await self._end([Key(ino, False, owner)])

    async def released(self, ino: int, fh: int | None, flock_owner: int | None) -> None:
        """An open file has ended: what was locked through it, if it can be told by its handle, is free."""
        ends = [key for key in (*self._held, *self._lost) if key.ino == ino and self._is_of(key, fh)]
        if flock_owner is not None:
            ends.append(Key(ino, True, flock_owner))
        await self._end(dict.fromkeys(ends))

    def has(self, ino: int) -> bool:
        """Whether programs hold, or have lost, locks of an inode."""
        return ino in self._inos

    def may_write(self, ino: int) -> bool:
        """Whether no exclusive lock of a file is lost; see the beginning of this module."""
        return ino not in self._forfeited

    def check_change(self, request: wire.Request) -> None:
        """Raise :exc:`~fuseclient.worker.rpc.Refused` (LOST_LOCK) for what was written under a lock that is lost."""
        writes = isinstance(request, _WRITES) or (isinstance(request, wire.SetAttributes) and request.size is not None)
        if writes and not self.may_write(request.ino):  # type: ignore[union-attr]
            raise Refused(wire.ErrorCode.LOST_LOCK, "written under a lock that was lost")

    def _is_of(self, key: Key, fh: int | None) -> bool:
        return any(each.fh == fh for each in (*self._held.get(key, ()), *self._lost.get(key, ())))

    def _check(self, key: Key) -> None:
        if key in self._lost:
            raise Lost(f"a lock of inode {key.ino} was lost with the session")

    # Asking

    async def _ask(self, wanted: Held, interrupted: asyncio.Event | None, tid: int) -> LockOutcome:
        """Ask until there is an answer that counts, and take note of it."""
        number = next(self._numbers)
        while True:
            session = self.session.id
            self._waits[number] = word = asyncio.get_running_loop().create_future()
            try:
                outcome = await self._ask_once(wanted, number, word, interrupted, tid)
            finally:
                self._waits.pop(number, None)
            self._check(wanted.key)
            if outcome is None or session != self.session.id:
                continue  # the connection, or the session, that it was said in is gone
            if outcome is LockOutcome.GRANTED:
                self._note(wanted)
            elif wanted.key.flock and outcome is not LockOutcome.FULL:
                self._note_no_conversion(wanted)
            return outcome

    async def _ask_once(
        self,
        wanted: Held,
        number: int,
        word: asyncio.Future[LockOutcome | None],
        interrupted: asyncio.Event | None,
        tid: int,
    ) -> LockOutcome | None:
        request = wire.SetLock(_lock_of(wanted), number, interrupted is not None)
        outcome: LockOutcome | None = (await self.session.call(request, wire.LockAnswer)).outcome
        if outcome is not LockOutcome.WAITING:
            return outcome
        if wanted.key.flock:
            self._note_no_conversion(wanted)
        if interrupted is None or await self._word_comes(word, interrupted, tid):
            outcome = await word
            return None if outcome is LockOutcome.CANCELLED else outcome
        await self.session.call(wire.CancelLock(number), wire.LockAnswer)
        if word.done() and (outcome := word.result()) is not None and outcome is not LockOutcome.CANCELLED:
            return outcome
        # It is waited for no more. Whether it was granted, and the word of it lost, is found out by trying.
        last = wire.SetLock(_lock_of(wanted), number)
        tried = (await self.session.call(last, wire.LockAnswer)).outcome
        return tried if tried is LockOutcome.GRANTED else LockOutcome.CANCELLED

    async def _word_comes(self, word: asyncio.Future[LockOutcome | None], interrupted: asyncio.Event, tid: int) -> bool:
        """Wait for a word or an interruption; say whether there is the word."""
        interruption = asyncio.ensure_future(interrupted.wait())
        signal = asyncio.ensure_future(signals.come(tid))
        self._queued += 1
        try:
            waited: set[asyncio.Future[Any]] = {word, interruption, signal}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            self.unsaid_signals += signal.done() and not (word.done() or interruption.done())
        finally:
            self._queued -= 1
            interruption.cancel()
            signal.cancel()
        return word.done()

    def _settled(self, settled: wire.LockSettled) -> None:
        word = self._waits.get(settled.number)
        if word is not None and not word.done():
            word.set_result(settled.outcome)

    async def _give_up(self, key: Key, start: int, end: int) -> LockOutcome:
        request = wire.SetLock(wire.Lock(key.ino, key.owner, key.flock, start, end, False), 0, unlock=True)
        try:
            outcome = (await self.session.call(request, wire.LockAnswer)).outcome
        except (Disconnected, Refused):
            self._diverged = True
            self._put(key, _without(self._held.get(key, []), start, end))
            raise
        if outcome is LockOutcome.GRANTED:
            self._put(key, _without(self._held.get(key, []), start, end))
        return outcome

    async def _end(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if (lost := self._lost.pop(key, None)) is not None:
                self._store.replace(key, [])
                self._count(key, -1)
                if _any_exclusive(lost):
                    self._forfeited = self._forfeited - Counter([key.ino])
            if key in self._held:
                try:
                    await self._give_up(key, 0, wire.LAST_BYTE)
                except (Disconnected, Refused) as error:
                    _log.warning("a lock of inode %d is given up later, with the session at last: %s", key.ino, error)

    # What is held

    def _note(self, taken: Held) -> None:
        self._put(taken.key, _with(self._held.get(taken.key, []), taken))

    def _note_no_conversion(self, wanted: Held) -> None:
        """A flock is given up before it is converted, so if that fails there is none."""
        before = self._held.get(wanted.key)
        if before and before[0].exclusive != wanted.exclusive:
            self._put(wanted.key, [])

    def _put(self, key: Key, held: list[Held]) -> None:
        if held and key not in self._held:
            self._count(key, 1)
        self._store.replace(key, held)
        if held:
            self._held[key] = held
        elif self._held.pop(key, None):
            self._count(key, -1)

    def _count(self, key: Key, change: int) -> None:
        """Have the kernel tell when the file is closed, as long as there are any."""
        if change > 0 and not self._inos[key.ino]:
            self._cache.locked(key.ino)
        self._inos[key.ino] += change
        if not self._inos[key.ino]:
            del self._inos[key.ino]
            self._cache.unlocked(key.ino)

    # The session

    async def connected(self, connection: Connection, *, resumed: bool) -> None:
        """There is a connection: tell what is held if that may not be known, and have those who wait ask again."""
        connection.on_lock_settled(self._settled)
        run = connection.welcome.server_epoch
        if resumed and (run != self._run or self._diverged):
            self._diverged = False
            await self._tell(connection)
        self._run = run
        for word in self._waits.values():
            if not word.done():
                word.set_result(None)

    async def _tell(self, connection: Connection) -> None:
        told = [each for held in self._held.values() for each in held]
        batches = [told[at : at + wire.MAX_LOCKS] for at in range(0, len(told), wire.MAX_LOCKS)] or [[]]
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            request = wire.HoldLocks([_lock_of(each) for each in batch], last)
            answer = await connection.call(request, wire.LocksLost)
        self._lose({told[index].key for index in answer.indexes if index < len(told)})

    def session_lost(self) -> None:
        """The session has ended, and all locks with it."""
        self._diverged = False
        self._lose(set(self._held))

    def _lose(self, keys: set[Key]) -> None:
        """These are lost: what is written to their files is refused from now on, what was is given up."""
        if not keys:
            return
        _log.error(
            "locks of %d files were lost with the session; their holders get EIO", len({key.ino for key in keys})
        )
        self.lost_count += len(keys)
        for key in keys:
            held = self._held.pop(key)
            self._store.replace(key, held if self._store.has_room(len(held)) else held[:0], lost=True)
            self._lost[key] = held
            if _any_exclusive(held):
                self._forfeited[key.ino] += 1
        for ino in {key.ino for key in keys if key.ino in self._forfeited}:
            self.forfeit(ino)

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()


def _lock_of(held: Held) -> wire.Lock:
    key = held.key
    return wire.Lock(key.ino, key.owner, key.flock, held.start, held.end, held.exclusive, held.pid)


def _any_exclusive(held: Iterable[Held]) -> bool:
    return any(each.exclusive for each in held)


def _without(held: list[Held], start: int, end: int) -> list[Held]:
    """Return ranges without a part."""
    kept = [each for each in held if each.end < start or each.start > end]
    for each in held:
        if each.start < start <= each.end:
            kept.append(each._replace(end=start - 1))
        if each.start <= end < each.end:
            kept.append(each._replace(start=end + 1))
    return kept


def _with(held: list[Held], new: Held) -> list[Held]:
    """Return ranges with another laid over them, and merged with those of its kind beside it."""
    kept = _without(held, new.start, new.end)
    for each in [each for each in kept if each.exclusive == new.exclusive]:
        if each.end + 1 == new.start:
            new = new._replace(start=each.start)
            kept.remove(each)
        elif new.end + 1 == each.start:
            new = new._replace(end=each.end)
            kept.remove(each)
    return [*kept, new]
