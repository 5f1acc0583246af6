"""An engine whose rows are in a store elsewhere: what is the same for etcd, PostgreSQL and MySQL.

**Transactions run here.** A body runs on the event loop, at once and to its end, on rows that are at hand; what is
missing is fetched, and it is run again (see views.py). Its writes are laid over the rows for the bodies that come after
it, and go into the batch that waits. One batch is being committed at a time, in one request; so the slower the store
answers, the more transactions share a request. What depends on a batch is answered when that is committed.

**What makes it serialisable.** Every commit compares the tip's version with the one that all rows at hand are of. So
two transactions of this process never conflict, and one of another process between is noticed whatever it wrote, rows
that were inserted into or deleted from a range included: everything at hand is dropped then (a new *generation*), and
the bodies run again. One process writes at a time in any case (see fencing.py), and this is cheapest for it.

**Rows at hand** are a cache, with what this process commits laid over it, and what was fetched for a body that still
runs. That they are still current has to be asked for once during each read, which costs a round trip; reads that wait
share one. It does not have to be asked for while this process has the authority (see remote_authority.py). A body
that reads much does so in the store as it was at one moment, on a thread of its own (:meth:`scan`).

A directory that is made here is known to have no entries but those that are made after it, here: so a name that is made
in it need not be asked for (:meth:`Transaction.is_new`).

**A lost answer.** A commit whose answer was lost is sent again as it was. If the first had been made the second is
refused, as the tip has moved, and the tip tells that it was ours. If the store stays away for too long, the outcome is
unknown; before anything else is done then, the tip is moved on, so that a commit that is still on its way fails.

All state is the event loop's; each ``await`` is a place where everything may have changed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar, cast

from metaserver.engine.base import Engine, Row, Snapshot, Space, Transaction
from metaserver.engine.store import (
    Compacted,
    Found,
    Lost,
    Moved,
    Past,
    Query,
    Store,
    Tip,
    Writes,
    is_last,
    is_marked,
    marked,
)
from metaserver.engine.views import Cache, Hand, Memo, Missing, RemoteSnapshot, RemoteTransaction, touches
from metaserver.errors import (
    Conflict,
    EngineClosed,
    EngineError,
    EngineUnavailable,
    EngineUnusable,
    LimitExceeded,
    Unknown,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes of rows that are kept at hand.
CACHE_BYTES: Final = 64 * 1024 * 1024
#: Seconds that a store may stay away before what waits for it fails; and at the first request.
PATIENCE_S: Final = 20.0
FIRST_PATIENCE_S: Final = 10.0
#: Seconds that closing waits for a commit that is under way.
_CLOSE_S: Final = 2.0
#: Seconds of the first and of the longest pause before a request is sent again.
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 0.5
#: Fetches for one reading body before it gets a moment of the store to itself.
_MOST_FETCHES: Final = 8
#: Times that a body is run again because the past that it read was compacted.
_SCANS: Final = 3
#: Own commits that are remembered: a fetch that was under way while they were made is brought up to date with them.
_REMEMBERED: Final = 64
#: Keys that are asked for at once are read as a range if they are so many; of that, at most so many times as many rows.
_DENSE_KEYS: Final = 16
_DENSE: Final = 3
#: How far such keys may lie apart.
_APART: Final = 16
#: Seconds for which the figures of the store's space are good.
_SPACE_S: Final = 5.0


class _Batch:
    """Writes that are committed together. ``done`` is set, or fails, when that is known."""

    def __init__(self) -> None:
        self.writes: dict[bytes, bytes | None] = {}
        self.new: list[bytes] = []
        self.bytes = 0
        self.transactions = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_take_note)

    def add(self, writes: Writes, new: Sequence[bytes], size: int) -> None:
        self.writes.update(writes)
        self.new += new
        self.bytes += size
        self.transactions += 1

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class RemoteEngine(Engine):
    """The engine on a store. ``name`` says which, without secrets."""

    def __init__(self, store: Store, name: str, *, patience_s: float = PATIENCE_S) -> None:
        self.store = store
        self._name = name
        self._patience_s = patience_s
        self._instance = os.urandom(8)
        self._number = 0
        #: The tip that everything at hand is of; ``None``: it has to be asked for. A generation ends when it is lost.
        self._tip: Tip | None = None
        self._generation = 0
        #: A commit of an unknown outcome may be on its way.
        self._is_uncertain = False
        self._synchronizing = asyncio.Lock()
        self._cache = Cache(CACHE_BYTES)
        self._memos: set[Memo] = set()
        #: The last commits: the version that each was based on, its own, and what it wrote.
        self._own: deque[tuple[int, int, Writes]] = deque(maxlen=_REMEMBERED)
        self._space: tuple[float, Space] | None = None
        #: Batches in the order of their commits; the first of them, if it is under way; what all of them write.
        self._batches: deque[_Batch] = deque()
        self._under_way: _Batch | None = None
        self._pending: dict[bytes, bytes | None] = {}
        self._most_writes = store.most_writes
        self._committer: asyncio.Task[None] | None = None
        self._check: asyncio.Task[None] | None = None
        self._next_check: asyncio.Task[None] | None = None
        self._watcher: Callable[[], object] | None = None
        self._has_met = False
        self._closed = False
        #: Until when, on the clock that counts suspend, nobody else can have committed anything.
        self._trusted_s = 0.0
        #: Requests to the store, and bodies that had to run again for rows that were not at hand.
        self.requests = 0

    # The seam

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        memo, has_fetched = Memo(), False
        try:
            for _ in range(_MOST_FETCHES):
                generation = await self._synchronize(memo)
                try:
                    result, error = body(RemoteSnapshot(self._hand(memo, {}))), None
                except Missing as missing:
                    await self._fetch(memo, missing)
                    has_fetched = has_fetched or not missing.space
                    continue
                except Exception as raised:
                    result, error = cast(T, None), raised
                if not has_fetched:  # it may be out of date
                    await self._verify()
                if generation == self._generation:
                    return _outcome(result, error)
        finally:
            self._memos.discard(memo)
        return await self.scan(body)

    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        return await self.read(body)

    async def scan(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        loop = asyncio.get_running_loop()
        for attempt in range(_SCANS):
            try:
                async with self.store.past() as past:
                    space = await self._patiently(self.store.space)
                    return await asyncio.to_thread(body, _PastSnapshot(past, space, loop))
            except Compacted:
                _log.warning("%s: the past that was being read is compacted: beginning anew", self._name)
            except Lost as lost:
                _log.warning("%s: %s: beginning to read anew", self._name, lost)
                await asyncio.sleep(_LONGEST_PAUSE_S * attempt)
        raise EngineUnavailable(f"{self._name}: it could not be read from beginning to end")

    def watch(self, callback: Callable[[], object] | None) -> None:
        self._watcher = callback

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        memo = Memo()
        try:
            while True:
                generation = await self._synchronize(memo)
                txn = RemoteTransaction(self._hand(memo, self._pending))
                try:
                    result, error = body(txn), None
                except Missing as missing:
                    await self._fetch(memo, missing)
                    continue
                except Conflict:
                    raise
                except Exception as raised:
                    result, error = cast(T, None), raised
                await self._settle({} if error else txn.writes, txn.new, generation)
                return _outcome(result, error)
        finally:
            self._memos.discard(memo)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        committer = self._committer
        if committer is not None:
            await asyncio.wait({committer}, timeout=_CLOSE_S)
        await self.store.close()
        if committer is not None:  # what it waits for has failed
            await asyncio.wait({committer})

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")

    def trust(self, until_s: float) -> None:
        """Until then (CLOCK_BOOTTIME, in seconds) nobody else commits: rows at hand are current without being asked."""
        self._trusted_s = until_s

    # Rows at hand

    def _hand(self, memo: Memo, pending: Writes) -> Hand:
        now = asyncio.get_running_loop().time()
        space = self._space[1] if self._space is not None and now - self._space[0] < _SPACE_S else None
        return Hand(self._cache, memo, space, pending)

    async def _synchronize(self, memo: Memo) -> int:
        """See that a tip is known and that what was fetched is of its generation, which is returned."""
        self._check_open()
        if self._tip is None:
            async with self._synchronizing:
                while self._tip is None:
                    await self._find_tip()
        memo.reset(self._generation)
        self._memos.add(memo)
        return self._generation

    async def _find_tip(self) -> None:
        tip = (await self._patiently(lambda: self.store.fetch((), ()))).tip
        if self._is_uncertain:
            self._number += 1
            marks = marked(tip.marks, self._instance, self._number)
            version = tip.version
            try:
                tip = Tip(await self._patiently(lambda: self.store.commit(version, marks, {})), marks)
            except Moved:
                return
            self._is_uncertain = False
        self._begin(tip)

    def _begin(self, tip: Tip | None) -> None:
        """Begin a generation: nothing that is at hand, or was to be committed on top of it, is good any more."""
        self._tip = tip
        self._generation += 1
        self._cache.clear()
        self._own.clear()
        self._pending.clear()
        while self._batches:
            self._batches.popleft().fail(Conflict("another process has changed the store"))

    async def _fetch(self, memo: Memo, missing: Missing) -> None:
        """Fetch what a body misses; not all of it may be there then, as its generation can end meanwhile."""
        if missing.space:
            self._space = asyncio.get_running_loop().time(), await self._patiently(self.store.space)
            return
        keys, generation = missing.keys, self._generation
        if dense := _range_of(keys):
            found = await self._found((), (dense,))
            if generation != self._generation or not self._bring_up_to_date(found):
                return
            if (rows := found.ranges.pop(dense, None)) is not None:
                values, (_, end) = dict(rows), dense.covered(rows)
                found.values = {key: values.get(key) for key in keys if key < end}
                self._lay_out(memo, found)
                keys = [key for key in keys if key >= end]
            if not keys:
                return
        found = await self._found(keys, missing.queries)
        if generation == self._generation and self._bring_up_to_date(found):
            self._lay_out(memo, found)

    def _lay_out(self, memo: Memo, found: Found) -> None:
        memo.add(found)
        self._cache.update(found.values)

    async def _found(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        """Ask the store; a tip that is not known begins a generation."""
        known = self._tip
        found = await self._patiently(lambda: self.store.fetch(keys, queries))
        while self._tip is not None and found.tip.version > self._tip.version and self._under_way is not None:
            await asyncio.wait({self._under_way.done})  # it may be its
        if self._tip is not None and found.tip.version > self._tip.version:
            self._begin(found.tip)
        elif known is not None and found.tip.version < known.version:
            _log.error("%s: the store has gone back from version %d", self._name, known.version)
            if self._under_way is None:
                self._begin(None)
        return found

    def _bring_up_to_date(self, found: Found) -> bool:
        """Apply what this process has committed since; False if that is not known any more."""
        assert self._tip is not None
        if found.tip.version != self._tip.version and not (self._own and self._own[0][0] <= found.tip.version):
            return False
        for _, version, writes in self._own:
            if version > found.tip.version:
                found.values.update({key: writes[key] for key in writes.keys() & found.values.keys()})
                for query in [q for q, rows in found.ranges.items() if touches(writes, *q.covered(rows))]:
                    del found.ranges[query]
        return True

    async def _verify(self) -> None:
        """Return when the tip was asked for after this call. Those who wait share one request."""
        if time.clock_gettime(time.CLOCK_BOOTTIME) < self._trusted_s:
            return
        if self._next_check is None:
            self._next_check = asyncio.create_task(self._ask(self._check))
            self._next_check.add_done_callback(_take_note)
        await asyncio.shield(self._next_check)

    async def _ask(self, former: asyncio.Task[None] | None) -> None:
        if former is not None and not former.done():
            await asyncio.wait({former})
        self._check, self._next_check = self._next_check, None
        await self._found((), ())

    # Commits

    async def _settle(self, writes: Writes, new: Sequence[bytes], generation: int) -> None:
        """Return when writes are committed, and all that their body has seen; raise :exc:`Conflict` if it is not."""
        if writes:
            await asyncio.shield(self._join(writes, new).done)
            return
        if self._batches:
            await asyncio.wait({self._batches[-1].done})
        if generation == self._generation:
            await self._verify()
        if generation != self._generation:
            raise Conflict("another process has changed the store, or what was not committed yet was seen")

    def _join(self, writes: Writes, new: Sequence[bytes]) -> _Batch:
        """Put writes into the batch that waits, and see that it is committed."""
        size = sum(len(key) + len(value or b"") for key, value in writes.items())
        batch = self._batches[-1] if self._batches else None
        if batch is None or batch is self._under_way or not self._fits(batch, writes, size):
            batch = _Batch()
            self._batches.append(batch)
        batch.add(writes, new, size)
        self._pending.update(writes)
        if self._committer is None:
            self._committer = asyncio.create_task(self._commit_all(), name="commits")
        return batch

    def _fits(self, batch: _Batch, writes: Writes, size: int) -> bool:
        if batch.bytes + size > self.store.most_bytes:
            return False
        return len(batch.writes.keys() | writes.keys()) <= self._most_writes

    async def _commit_all(self) -> None:
        try:
            await asyncio.sleep(0)  # who is ready now comes along
            while self._batches:
                await self._commit_first()
        except Exception as error:  # a bug; whoever waits learns of it
            _log.exception("%s: committing failed", self._name)
            self._begin_after(error)
        finally:
            self._committer = None

    async def _commit_first(self) -> None:
        batch = self._under_way = self._batches[0]
        assert self._tip is not None
        self._number += 1
        marks = marked(self._tip.marks, self._instance, self._number)
        try:
            version = await self._commit(self._tip.version, marks, batch.writes)
            outcome: Exception | Tip = Tip(version, marks)
        except Exception as error:
            outcome = error
        self._under_way = None
        if isinstance(outcome, Tip):
            self._committed(batch, outcome)
        elif isinstance(outcome, Moved):
            self._moved(batch, outcome.tip)
        elif isinstance(outcome, LimitExceeded):
            self._too_large(batch, outcome)
        else:
            self._begin_after(outcome)

    async def _commit(self, version: int, marks: bytes, writes: Writes) -> int:
        """Commit, as often as answers are lost; raise :exc:`Unknown` when patience is at its end.

        A refusal says nothing of those that were sent before it: one of them may have been made, or still be.
        """
        loop = asyncio.get_running_loop()
        end, pause = loop.time() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                self.requests += 1
                return await self.store.commit(version, marks, writes)
            except (Moved, EngineError) as error:
                if pause == _FIRST_PAUSE_S or (isinstance(error, Moved) and error.tip is not None):
                    raise
                self._is_uncertain = True
                raise Unknown(f"{self._name}: {error}") from None
            except Lost as lost:
                if self._closed or loop.time() + pause > end:
                    self._is_uncertain = True
                    raise Unknown(f"{self._name}: {lost}") from None
                _log.warning("%s: %s: sending a commit again", self._name, lost)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _committed(self, batch: _Batch, tip: Tip) -> None:
        """A batch is stored: what it wrote is at hand, and whoever waits for it is told."""
        assert self._tip is not None
        self._own.append((self._tip.version, tip.version, batch.writes))
        self._tip = tip
        self._batches.popleft()
        for prefix in batch.new:
            self._cache.is_new(prefix)
        self._cache.update(batch.writes)
        for memo in self._memos:
            memo.apply(batch.writes)
        self._pending.clear()
        for later in self._batches:
            self._pending.update(later.writes)
        batch.done.set_result(None)
        if self._watcher is not None:
            self._watcher()

    def _moved(self, batch: _Batch, tip: Tip | None) -> None:
        """The tip is not the one that the first batch was based on: it was committed before, or is not at all."""
        if tip is not None and is_last(tip.marks, self._instance, self._number):
            self._committed(batch, tip)
            return
        if tip is not None and is_marked(tip.marks, self._instance, self._number):
            self._committed(batch, tip)
        _log.info("%s: another process has changed the store", self._name)
        self._begin(tip)

    def _too_large(self, batch: _Batch, error: LimitExceeded) -> None:
        """The store takes less than it should: smaller batches from now on; one transaction cannot be divided."""
        if batch.transactions > 1:
            self._most_writes = max(1, len(batch.writes) // 2)
            _log.warning("%s: %s: committing at most %d rows at once", self._name, error, self._most_writes)
        else:
            batch.fail(error)
        self._begin(self._tip)

    def _begin_after(self, error: Exception) -> None:
        """Nobody knows how the first batch ended: it fails with this error, and those after it run again."""
        if self._batches:
            self._batches[0].fail(error)
        self._begin(None)

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the store something, again and again while it does not answer."""
        loop = asyncio.get_running_loop()
        patience_s = self._patience_s if self._has_met else min(self._patience_s, FIRST_PATIENCE_S)
        end, pause = loop.time() + patience_s, _FIRST_PAUSE_S
        while True:
            try:
                self.requests += 1
                answer = await ask()
                self._has_met = True
                return answer
            except (Lost, Compacted) as lost:
                if self._closed or loop.time() + pause > end:
                    text = f"{self._name} does not answer: {lost}"
                    raise EngineUnavailable(text) if self._has_met else EngineUnusable(text) from None
                if pause == _FIRST_PAUSE_S:
                    _log.warning("%s: %s: asking again", self._name, lost)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)


def _range_of(keys: Sequence[bytes]) -> Query | None:
    """Return the range of keys of which most are asked for: a store reads that faster than one key after another.

    Keys end in numbers of eight bytes, which tell how close they are. They may lie apart, as inodes of one shard do:
    there are others between them, or not, so the range is bounded.
    """
    if len(keys) < _DENSE_KEYS:
        return None
    first, last = min(keys), max(keys)
    if first[:-8] != last[:-8] or any(len(key) != len(first) for key in keys):
        return None
    distance, most = int.from_bytes(last[-8:]) - int.from_bytes(first[-8:]), _DENSE * len(keys)
    return Query(first, last + b"\0", most) if distance < most * _APART else None


def _take_note(done: asyncio.Future[None]) -> None:
    """Take an error as told, though nobody may be waiting any more."""
    if not done.cancelled():
        done.exception()


def _outcome(result: T, error: Exception | None) -> T:
    if error is not None:
        raise error
    return result


class _PastSnapshot(Snapshot):
    """A moment of the store, for a body on another thread: it waits for each answer."""

    def __init__(self, past: Past, space: Space, loop: asyncio.AbstractEventLoop) -> None:
        self._past = past
        self._space = space
        self._loop = loop

    def _ask(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        return asyncio.run_coroutine_threadsafe(self._past.fetch(keys, queries), self._loop).result()

    def get(self, key: bytes) -> bytes | None:
        return self._ask((key,), ()).values[key]

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        values = self._ask(keys, ()).values if keys else {}
        return [values[key] for key in keys]

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        if limit == 0 or start >= end:
            return []
        query = Query(start, end, limit, reverse)
        return self._ask((), (query,)).ranges[query]

    def space(self) -> Space:
        return self._space
