"""The LMDB engine: one directory, one process, durable when a write returns.

LMDB has one writer at a time, and a write transaction is begun and committed by the same thread; so one thread writes.
It takes every transaction that waits, runs each within one outer transaction, makes that durable and answers them all:
the more writers, the fewer synchronous writes each. What a body writes is put into the outer transaction when it has
returned, so one that fails leaves nothing behind.

Durable is what a log says (lmdb_log.py), one synchronous write of a record with what was written since the last one.
LMDB's own commit, which takes two and more pages, follows within ``LAZY_S`` (``INTERVAL_S`` in a lazy engine) for all
of that time, or when the log is full. Until then the outer transaction stays open, and whoever reads reads in it, on
the writer's thread. If a commit fails, the next outer transaction begins with what the log has; and so does the engine,
when it is opened after a crash. Where space is short nothing is put off, and LMDB's commit alone says what is durable.

Reads of what is committed run on a thread of their own, because a page that is not in memory must not hold up the event
loop; those that wait together share one snapshot.

While the writer's thread has nothing to do, its outer transaction lies open, and a body runs in it at once on the
loop's thread: handing a few microseconds' work to another thread and back costs ten times as much as the work. LMDB
wants a lock to be given back by the thread that took it, and only one at a time to use a transaction; both hold, as
the thread waits meanwhile. What a body reads is near what was just written, so in memory.

So is the synchronous write: it is made by the loop's thread, when the turn of the loop ends, for all that came in it
(as Redis does it for appendfsync always), as long as the last one was quick: it takes less than handing it over does.
On a slow device the loop must not wait, and it is the writer's.

A *lazy* write (in a lazy engine, every one) is answered before it is durable: with the next write that is not lazy, a
sync, or LMDB's commit it is. So the making of a file and the writing of its content share a record of the log. A crash
of the process, or of the machine, undoes what was acknowledged in that time, and no more; LMDB's own order of writes is
untouched, so its file is never damaged. (With MDB_NOSYNC a crash of the process would undo nothing, but one of the
machine could leave the file unreadable.) If a commit fails, the lazy writes that it held are lost, and ``losses``
counts that.

Both threads hand their results to the loop in one call a batch. Nothing is shared between them but LMDB's environment,
which is safe to share.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import lmdb

from metaserver.engine.base import Engine, Snapshot, Transaction
from metaserver.engine.lmdb_jobs import Due, Job, Thread, fail
from metaserver.engine.lmdb_log import CommitLog, sync_directory
from metaserver.engine.lmdb_views import LmdbSnapshot, LmdbTransaction, apply, cost, space
from metaserver.errors import EngineBusy, EngineClosed, EngineError, EngineFull, EngineUnusable, Unknown

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes of address space to map; the file is as long as what was written.
_MAP_BYTES: Final = 256 * 2**30
#: How long a lazy engine, and another one, may put off a commit, in seconds; for how many writes, and of how many
#: bytes that are not durable.
INTERVAL_S: Final = 0.1
LAZY_S: Final = 0.01
_MOST_HELD: Final = 4096
_MOST_HELD_BYTES: Final = 16 * 1024 * 1024
#: A part of the map that only transactions may use that do not make the data larger, so that it can be made smaller
#: again: in parts and in pages, at least and at most. And how many bytes more do not count as larger.
_RESERVED_PART: Final = 16
_RESERVED_PAGES: Final = (128, 16384)
_NO_LARGER: Final = 64
#: With less free than this, in bytes of the file system or as a part of the map, no commit is put off.
_AMPLE_BYTES: Final = 64 * 1024 * 1024
_AMPLE_PART: Final = 8
#: Bytes of zeros that are laid behind the last page at once, and by one call; half of them is when to lay more.
_FILLED_BYTES: Final = 8 * 1024 * 1024
_FILLED_STEP: Final = 1024 * 1024
#: The part of the map's free bytes that an outer transaction may take up before it is looked at closely.
_SPARE_PART: Final = 4
#: A synchronous write that takes no longer, in seconds, is made by the loop's thread.
_QUICK_S: Final = 0.001
#: LMDB's own file, in its directory, and the log's.
_DATA: Final = "data.mdb"
_LOG: Final = "log"


class LmdbEngine(Engine):
    """The engine in ``directory``, which is made if it is missing; raises EngineBusy and EngineUnusable.

    ``map_bytes``: how large its file can become.
    """

    def __init__(self, directory: str, *, lazy: bool = False, map_bytes: int | None = None) -> None:
        self._directory = directory
        self._lazy = lazy
        self._map_bytes = map_bytes or _MAP_BYTES
        self._lock = _lock(directory)
        self._log = CommitLog(os.path.join(directory, _LOG))
        try:
            self._env = _open(directory, self._map_bytes)
            self._recover()
        except BaseException:
            os.close(self._lock)
            raise
        self._closed = False
        self._main = self._env.open_db()
        self._page_bytes: int = self._env.stat()["psize"]
        self._usable_pages = _usable_pages(self._map_bytes, self._page_bytes)
        #: How far the file is known to reach.
        self._filled = 0
        #: The outer transaction, how many writes wait for its commit, and how many bytes of the map it may take up
        #: before each of them has to be a nested transaction. The writer's thread's, or while that is idle the loop's.
        self._outer: lmdb.Transaction | None = None
        self._held = 0
        self._spare = 0
        #: What went wrong in it on the loop's thread.
        self._failure: Exception | None = None
        #: How many writes were answered, though they are not durable.
        self._acknowledged = 0
        #: Those who wait for the end of the loop's turn, when what they wrote becomes durable; the writer is idle.
        self._waiting: list[asyncio.Future[Any]] = []
        #: The loop's, that sees to the commit.
        self._timer: asyncio.TimerHandle | None = None
        self._losses = 0
        #: Asked for by the writer each time that more is durable: who set it before finds that, or is told of it.
        self._watcher: Callable[[], object] | None = None
        self._reader = Thread("lmdb-read", self._read_batch)
        self._writer = Thread("lmdb-write", self._write_batch, self._prepare, self._end_outer)

    def _recover(self) -> None:
        """Commit what the log has of the transaction that a crash has cut off."""
        last = int(self._env.info()["last_txnid"])
        found = 0
        try:
            with self._env.begin(write=True) as txn:
                for record in self._log.records(last + 1):
                    for writes in record:
                        apply(writes, txn)
                    found += 1
        except (lmdb.Error, OSError) as error:
            self._env.close()
            raise EngineUnusable(f"{self._directory}: what its log has cannot be written: {error}") from None
        if found:
            _log.info("%s: %d records of the log were written, which a crash had cut off", self._directory, found)

    @property
    def is_lazy(self) -> bool:
        return self._lazy

    @property
    def puts_off(self) -> bool:
        return True

    @property
    def losses(self) -> int:
        return self._losses

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        # The writer's thread takes this back only when it has committed, and a snapshot taken later has it all.
        if self._held:
            seen: T = await self._submit(body)
            return seen
        return await self._read_committed(body)

    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        if self._log.written:
            await self._submit(due=Due.COMMITTED)
        return await self._read_committed(body)

    async def scan(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        if self._held:
            await self._submit(due=Due.COMMITTED)
        return await self._read_committed(body)

    async def _read_committed(self, body: Callable[[Snapshot], T]) -> T:
        result: T = await self._reader.submit(body)
        return result

    def watch(self, callback: Callable[[], object] | None) -> None:
        self._watcher = callback

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        self._check_open()
        due = Due.LATER if lazy or self._lazy else Due.DURABLE
        try:
            if self._writer.is_idle and self._outer is not None:
                return await self._write_here(self._outer, body, due)
            result: T = await self._submit(body, due, reads=False)
            return result
        finally:
            self._commit_in_time()

    async def _write_here(self, outer: lmdb.Transaction, body: Callable[[Transaction], T], due: Due) -> T:
        """Run a body on this thread, with the writer's idle, and make that durable, now or later.

        What it has seen is durable before it is answered, as if it had waited for the writer.
        """
        job = Job(body, None, due, reads=False)
        try:
            self._run_in(outer, job)
        except Exception as error:
            self._failure = error
            await self._submit(due=due)
        succeeded = job.error is None
        if succeeded and (self._is_much() or not self._is_ample()):
            await self._submit(due=Due.COMMITTED)
        elif self._waiting or (succeeded and due is Due.DURABLE and self._log.is_behind):
            await self._turn_ended()
        elif succeeded and due is Due.LATER:
            self._acknowledged += 1
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    def _turn_ended(self) -> asyncio.Future[Any]:
        """Return what is done when the loop's turn has ended, and what was written in it is durable."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._end_turn)
        self._waiting.append(loop.create_future())
        return self._waiting[-1]

    def _end_turn(self) -> None:
        if not self._waiting:  # the writer was given something to do, and this first
            return
        outer = self._outer
        if outer is None or self._log.took_s > _QUICK_S or not self._write_log(outer):
            self._hand_over()
            return
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _hand_over(self) -> None:
        """Have the writer make durable what is waited for."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            self._writer.submit(due=Due.DURABLE, future=future)

    def _submit(
        self, body: Callable[[Any], Any] = lambda _: None, due: Due = Due.LATER, *, reads: bool = True
    ) -> asyncio.Future[Any]:
        """Give the writer something to do, after what is waited for here: it fails if that one's commit does."""
        self._hand_over()
        return self._writer.submit(body, due, reads=reads)

    def _commit_in_time(self) -> None:
        if self._held and self._timer is None:
            delay_s = INTERVAL_S if self._lazy else LAZY_S
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._in_time)

    def _in_time(self) -> None:
        self._timer = None
        if self._held:
            # Who is to know of a failure finds it in the losses.
            done = self._submit(due=Due.COMMITTED)
            done.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def sync(self) -> None:
        self._check_open()
        if self._acknowledged:
            await self._submit(due=Due.DURABLE)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._reader.stop()  # and the turn ends meanwhile, so that the writer has all that is waited for
        await self._writer.stop()
        self._log.close()
        self._env.close()
        os.close(self._lock)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")

    def _read_batch(self, jobs: list[Job]) -> None:
        try:
            view = LmdbSnapshot(self._env.begin(), self._directory)
        except lmdb.Error as error:
            fail(jobs, EngineError(f"LMDB: {error}"))
            return
        for job in jobs:
            job.run(view)
        view.end()

    # The writer's thread

    def _write_batch(self, jobs: list[Job]) -> None:
        """Run the bodies in the outer transaction and do for it what is due; if that fails none has succeeded."""
        acknowledged = self._acknowledged
        try:
            if self._failure is not None:
                raise self._failure
            outer = self._outer or self._begin()
            for job in jobs:
                if job.reads:
                    job.run(LmdbSnapshot(outer, self._directory))
                else:
                    self._run_in(outer, job)
            due = max(job.due for job in jobs) if jobs else Due.LATER
            if due is Due.COMMITTED or self._is_much() or not self._is_ample():
                self._commit(outer)
            elif due is Due.DURABLE:
                self._make_durable(outer)
            else:
                self._acknowledged += sum(not job.reads and job.error is None for job in jobs)
        except Exception as error:
            self._lose(jobs, error, acknowledged)

    def _begin(self) -> lmdb.Transaction:
        """Begin the outer transaction, with what the log has of one whose commit failed."""
        used = int(self._env.info()["last_pgno"])
        self._spare = (self._usable_pages - used) * self._page_bytes // _SPARE_PART
        outer = self._env.begin(write=True)
        try:
            for writes in self._log.written:
                self._spare -= cost(writes)
                apply(writes, outer)
        except BaseException:
            outer.abort()
            raise
        # The loop's thread uses it as soon as it is seen there.
        self._outer = outer
        return outer

    def _make_durable(self, outer: lmdb.Transaction) -> None:
        """Write what is not durable into the log, or commit it."""
        if not self._write_log(outer):
            self._commit(outer)

    def _commit(self, outer: lmdb.Transaction) -> None:
        """Commit what is held."""
        if not self._held:
            return
        news = self._log.is_behind
        outer.commit()
        self._log.committed()
        self._outer, self._acknowledged, self._held = None, 0, 0
        self._tell(news)

    def _tell(self, news: bool) -> None:
        if news and self._watcher is not None:
            self._writer.call(self._watcher)

    def _prepare(self) -> None:
        """Lay the next transaction open, after making sure of the next pages of the file, and of the log."""
        if self._outer is not None:
            return
        try:
            if space(self._directory).free > _AMPLE_BYTES:
                self._fill_ahead()
                self._log.lay()
            self._begin()
        except (lmdb.Error, OSError) as error:  # the next batch begins one, or says what is in the way
            _log.debug("the next transaction is not yet begun: %s", error)

    def _fill_ahead(self) -> None:
        """Have zeros behind the last page, so that a commit only writes into a file that is long enough.

        A commit that makes the file longer waits for the file system's journal, too, and takes twice as long.
        """
        used = (int(self._env.info()["last_pgno"]) + 1) * self._page_bytes
        if used + _FILLED_BYTES // 2 < self._filled:
            return
        end = min(used + _FILLED_BYTES, self._map_bytes)
        with open(os.path.join(self._directory, _DATA), "r+b", buffering=0) as file:
            self._filled = max(self._filled, used, os.fstat(file.fileno()).st_size)
            while self._filled < end:
                self._filled += os.pwrite(file.fileno(), bytes(min(_FILLED_STEP, end - self._filled)), self._filled)
            os.fdatasync(file.fileno())

    def _lose(self, jobs: list[Job], error: Exception, acknowledged: int) -> None:
        """A commit failed: of these jobs nothing is done, and what was held before is lost, unless the log has it."""
        _log.error("LMDB could not commit: %s", error, exc_info=None if isinstance(error, lmdb.Error) else error)
        if acknowledged:
            _log.error("%d transactions that were acknowledged just before are lost", acknowledged)
            self._losses += 1
        outer, self._outer, self._failure = self._outer, None, None
        self._log.forget()
        self._held, self._acknowledged = len(self._log.written), 0
        if outer is not None:
            outer.abort()
        fail(jobs, Unknown(f"LMDB: {error}") if self._log.is_uncertain else _commit_error(error))

    def _end_outer(self) -> None:
        """The thread's last: commit what is held."""
        try:
            if self._outer is not None:
                self._outer.commit() if self._held else self._outer.abort()
        except lmdb.Error as error:
            self._lose([], error, self._acknowledged)
        self._outer = None

    # Either thread

    def _write_log(self, outer: lmdb.Transaction) -> bool:
        """Write what is not durable into the log; False: it is to be committed."""
        news = self._log.is_behind
        try:
            done = self._log.write(outer.id())
        except OSError as error:
            _log.warning("%s: the log cannot be written, so each change is committed: %s", self._directory, error)
            return False
        if done:
            self._acknowledged = 0
            self._tell(news)
        return done

    def _is_much(self) -> bool:
        """Say whether what is held is to be committed, however little time has gone by."""
        return self._held >= _MOST_HELD or self._log.noted_bytes >= _MOST_HELD_BYTES

    def _is_ample(self) -> bool:
        """Say whether there is so much space that what is put off will not fail for the lack of it."""
        return self._spare > self._map_bytes // _AMPLE_PART // _SPARE_PART and (
            space(self._directory).free > _AMPLE_BYTES
        )

    def _is_full(self, txn: lmdb.Transaction) -> bool:
        """Say whether what is in use, free pages between them left out, has come to the reserved part of the map."""
        figures = txn.stat(self._main)
        used = figures["branch_pages"] + figures["leaf_pages"] + figures["overflow_pages"]
        return bool(used > self._usable_pages)

    def _run_in(self, outer: lmdb.Transaction, job: Job) -> None:
        """Run a body and write what it wrote into the outer transaction; what is raised is that one's failure."""
        txn = LmdbTransaction(outer, self._directory)
        if not job.run(txn) or not txn.writes:
            return
        self._spare -= cost(txn.writes)
        if self._spare > 0:
            apply(txn.writes, outer)
        elif not self._apply_nested(outer, txn):
            job.error = EngineFull("LMDB's map is full")
            return
        self._held += 1
        self._log.note(txn.writes)

    def _apply_nested(self, outer: lmdb.Transaction, txn: LmdbTransaction) -> bool:
        """Write it in a transaction of its own, which a map that is full undoes; say whether it was not."""
        inner = self._env.begin(write=True, parent=outer)
        done = False
        try:
            growth = apply(txn.writes, inner)
            done = not (growth > _NO_LARGER and self._is_full(inner))
        except lmdb.MapFullError:
            pass
        finally:
            inner.commit() if done else inner.abort()
        return done


def _usable_pages(map_bytes: int, page_bytes: int) -> int:
    """Return how many pages of the map may be used by transactions that make the data larger."""
    pages = map_bytes // page_bytes
    least, most = _RESERVED_PAGES
    return pages - min(most, max(least, pages // _RESERVED_PART))


def _commit_error(error: Exception) -> EngineError:
    """Return what a failed commit means: without space the pages before the meta page could not be written."""
    if isinstance(error, lmdb.MapFullError | lmdb.DiskError):
        return EngineFull(f"LMDB: {error}")
    return Unknown(f"LMDB: {error}")


def _lock(directory: str) -> int:
    """Return a descriptor that holds the directory for this process."""
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise EngineUnusable(f"{directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise EngineBusy(f"{directory} is in use by another metaserver") from None
    return descriptor


def _open(directory: str, map_bytes: int) -> lmdb.Environment:
    """Open the environment, and make a new one durable in its directory."""
    try:
        # The kernel reads ahead: a directory is fetched with its files' content, which was mostly written together.
        # Page by page the fetch of one that is not in memory waits for the disk several times an entry.
        env = lmdb.open(directory, map_size=map_bytes, mode=0o600, max_spare_txns=2, readahead=True)
        for path in (directory, os.path.dirname(directory)):
            sync_directory(path)
    except lmdb.Error as error:
        raise EngineUnusable(f"{directory}: not an LMDB directory of this metaserver: {error}") from None
    return env
