"""The LMDB engine: one directory, one process, durable when a write returns.

LMDB has one writer at a time, and a write transaction is begun and committed by the same thread; so one thread writes.
It takes every transaction that waits, runs each within one outer transaction, commits that with one fsync and answers
them all: the more writers, the fewer fsyncs each. What a body writes is put into the outer transaction when it has
returned, so one that fails leaves nothing behind. Reads run on a thread of their own, because a page that is not in
memory must not hold up the event loop; those that wait together share one snapshot.

While the writer's thread has nothing to do, its outer transaction lies open, and a body runs in it at once on the
loop's thread: handing a few microseconds' work to another thread and back costs ten times as much as the work. LMDB
wants a lock to be given back by the thread that took it, and only one at a time to use a transaction; both hold, as
the thread waits meanwhile. What a body reads is near what was just written, so in memory. Only the commit is handed
over.

A *lazy* write is answered before it is committed: the outer transaction stays open for up to ``LAZY_S`` (in a lazy
engine, where every write is lazy, ``INTERVAL_S``), or until a write that is not lazy, or a sync, and whoever reads
meanwhile reads in it, on the writer's thread. So the making of a file and the writing of its content share an fsync.
A crash of the process, or of the machine, undoes what was acknowledged in that time, and no more; LMDB's own order of
writes is untouched, so its file is never damaged. (With MDB_NOSYNC a crash of the process would undo nothing, but one
of the machine could leave the file unreadable.) If such a commit fails, what it held is lost, and ``losses`` counts
that. To make that unlikely, commits are not put off while space is short.

Both threads hand their results to the loop in one call a batch. Nothing is shared between them but LMDB's environment,
which is safe to share.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar, cast

import lmdb

from metaserver.engine.base import Engine, Row, Snapshot, Space, Transaction
from metaserver.errors import EngineBusy, EngineClosed, EngineError, EngineFull, EngineUnusable, Unknown

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes of address space to map; the file is as long as what was written.
_MAP_BYTES: Final = 256 * 2**30
#: The most transactions that share one commit.
_BATCH: Final = 128
#: How long a lazy engine, and another one with lazy writes, may put off a commit, in seconds; and for how many writes.
INTERVAL_S: Final = 0.1
LAZY_S: Final = 0.01
_MOST_HELD: Final = 4096
#: A part of the map that only transactions may use that do not make the data larger, so that it can be made smaller
#: again: in parts and in pages, at least and at most. And how many bytes more do not count as larger.
_RESERVED_PART: Final = 16
_RESERVED_PAGES: Final = (128, 16384)
_NO_LARGER: Final = 64
#: Bytes of the map that the writing of one key may take up beside its value.
_WRITE_COST: Final = 16 * 1024
#: With less free than this, in bytes of the file system or as a part of the map, no commit is put off.
_AMPLE_BYTES: Final = 64 * 1024 * 1024
_AMPLE_PART: Final = 8
#: Bytes of zeros that are laid behind the last page at once, and by one call; half of them is when to lay more.
_FILLED_BYTES: Final = 8 * 1024 * 1024
_FILLED_STEP: Final = 1024 * 1024
#: The part of the map's free bytes that an outer transaction may take up before it is looked at closely.
_SPARE_PART: Final = 4


@dataclass(slots=True)
class _Job:
    """A body, the future that waits for it, and its outcome until the whole batch is known."""

    body: Callable[[Any], Any]
    #: None: nobody waits in another thread.
    future: asyncio.Future[Any] | None
    reads: bool = False
    syncs: bool = False
    lazy: bool = False
    result: Any = None
    error: Exception | None = None

    def run(self, view: Snapshot) -> bool:
        """Run the body and keep what it returns or raises; False if it raised."""
        try:
            self.result = self.body(view)
        except Exception as error:
            self.error = error
        return self.error is None

    def answer(self) -> None:
        """Tell the waiting task, if it still waits; on the loop's thread."""
        if self.future is None or self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class _Worker:
    """A thread that takes jobs in batches and hands each batch to ``process``.

    ``then`` is called when a batch was answered, and ``last`` at the thread's end.
    """

    def __init__(
        self,
        name: str,
        process: Callable[[list[_Job]], None],
        then: Callable[[], None] = lambda: None,
        last: Callable[[], None] = lambda: None,
    ) -> None:
        self._process = process
        self._then = then
        self._last = last
        self._waiting = 0
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether every job was answered: the thread does nothing until the next one."""
        return self._waiting == 0

    def submit(
        self, body: Callable[[Any], Any], *, reads: bool = False, syncs: bool = False, lazy: bool = False
    ) -> asyncio.Future[Any]:
        """Queue a body; the future has its outcome."""
        self._loop = asyncio.get_running_loop()
        self._waiting += 1
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put(_Job(body, future, reads, syncs, lazy))
        return future

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back on the event loop; on this thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            assert self._loop is not None
            self._loop.call_soon_threadsafe(callback, *arguments)

    async def stop(self) -> None:
        """Let the thread finish what was queued, and wait for its end."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        more = True
        while more:
            jobs, more = self._take()
            try:
                self._process(jobs)
            except Exception as error:  # a bug; whoever waits learns of it, and the thread goes on
                _log.exception("the engine's thread failed")
                _fail(jobs, error)
            if not jobs:
                continue
            self.call(self._answer, jobs)
            self._then()
        self._last()

    def _answer(self, jobs: list[_Job]) -> None:
        self._waiting -= len(jobs)
        for job in jobs:
            job.answer()

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a job; return all jobs that are there, and whether more will come."""
        jobs: list[_Job] = []
        with contextlib.suppress(Empty):
            job = self._jobs.get()
            while job is not None:
                jobs.append(job)
                if len(jobs) == _BATCH:
                    return jobs, True
                job = self._jobs.get_nowait()
            return jobs, False
        return jobs, True


class _LmdbView:
    """Reading, the same in snapshots and in transactions."""

    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        self._txn = txn
        self._directory = directory

    def get(self, key: bytes) -> bytes | None:
        return cast(bytes | None, self._txn.get(key))

    def range(self, start: bytes, end: bytes, limit: int | None, reverse: bool) -> list[Row]:
        rows: list[Row] = []
        if limit == 0:
            return rows
        with self._txn.cursor() as cursor:
            for row in self._backward(cursor, end) if reverse else self._forward(cursor, start):
                if row[0] < start or row[0] >= end:
                    break
                rows.append(row)
                if len(rows) == limit:
                    break
        return rows

    @staticmethod
    def _forward(cursor: lmdb.Cursor, start: bytes) -> Any:
        return cursor.iternext() if cursor.set_range(start) else ()

    @staticmethod
    def _backward(cursor: lmdb.Cursor, end: bytes) -> Any:
        if cursor.set_range(end):
            return cursor.iterprev() if cursor.prev() else ()
        return cursor.iterprev() if cursor.last() else ()

    def space(self) -> Space:
        return _space(self._directory)


class _LmdbSnapshot(Snapshot):
    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        self._view = _LmdbView(txn, directory)

    def end(self) -> None:
        """Let go of the transaction, and so of its place among LMDB's readers, of which there are few.

        An exception that a body raised keeps its frames, and this view, until the next garbage collection.
        """
        del self._view

    def get(self, key: bytes) -> bytes | None:
        return self._view.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._view.range(start, end, limit, reverse)

    def space(self) -> Space:
        return self._view.space()


class _LmdbTransaction(Transaction):
    """What a body sees; what it writes is kept here until :meth:`apply`."""

    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        super().__init__()
        self._view = _LmdbView(txn, directory)
        self._writes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        return self._writes[key] if key in self._writes else self._view.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        own = {key: value for key, value in self._writes.items() if start <= key < end}
        if not own:
            return self._view.range(start, end, limit, reverse)
        stored = self._view.range(start, end, None if limit is None else limit + len(own), reverse)
        rows = [row for row in stored if row[0] not in own]
        rows += [(key, value) for key, value in own.items() if value is not None]
        return sorted(rows, reverse=reverse)[:limit]

    def space(self) -> Space:
        return self._view.space()

    def _put(self, key: bytes, value: bytes) -> None:
        self._writes[key] = value

    def _delete(self, key: bytes) -> None:
        self._writes[key] = None

    @property
    def cost(self) -> int:
        """Bytes of the map that the writes may take up at most, by estimate: each may split pages on its way."""
        return sum(_WRITE_COST + len(value or b"") for value in self._writes.values())

    def apply(self, txn: lmdb.Transaction) -> int:
        """Write what was kept; return how many bytes of keys and values the data has become larger by."""
        growth = 0
        for key, value in self._writes.items():
            old = txn.get(key)
            growth -= 0 if old is None else len(key) + len(old)
            if value is None:
                txn.delete(key)
            else:
                growth += len(key) + len(value)
                txn.put(key, value)
        return growth


def _space(directory: str) -> Space:
    figures = os.statvfs(directory)
    return Space(figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize)


class LmdbEngine(Engine):
    """The engine in ``directory``, which is made if it is missing; raises EngineBusy and EngineUnusable.

    ``map_bytes``: how large its file can become.
    """

    def __init__(self, directory: str, *, lazy: bool = False, map_bytes: int | None = None) -> None:
        self._directory = directory
        self._lazy = lazy
        self._map_bytes = map_bytes or _MAP_BYTES
        self._lock = _lock(directory)
        try:
            self._env = _open(directory, self._map_bytes)
        except BaseException:
            os.close(self._lock)
            raise
        self._closed = False
        self._main = self._env.open_db()
        self._page_bytes: int = self._env.stat()["psize"]
        self._usable_pages = _usable_pages(self._map_bytes, self._page_bytes)
        #: How far the file is known to reach.
        self._filled = 0
        #: The outer transaction, how many writes it holds, and how many bytes of the map they may take up before each
        #: of them has to be a nested transaction. The writer's thread's, or while that is idle the loop's.
        self._outer: lmdb.Transaction | None = None
        self._held = 0
        self._spare = 0
        #: What went wrong in it on the loop's thread.
        self._failure: Exception | None = None
        #: How many of its writes were answered, though they are not committed.
        self._acknowledged = 0
        #: The loop's, that sees to their commit.
        self._timer: asyncio.TimerHandle | None = None
        self._losses = 0
        #: Asked for by the writer after each commit: who set it before finds that commit, or is told of it.
        self._watcher: Callable[[], object] | None = None
        self._reader = _Worker("lmdb-read", self._read_batch)
        self._writer = _Worker("lmdb-write", self._write_batch, self._prepare, self._end_outer)

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
        if self._acknowledged:
            seen: T = await self._writer.submit(body, reads=True)
            return seen
        return await self.read_durable(body)

    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        result: T = await self._reader.submit(body)
        return result

    def watch(self, callback: Callable[[], object] | None) -> None:
        self._watcher = callback

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        self._check_open()
        lazy = lazy or self._lazy
        if self._writer.is_idle and self._outer is not None:
            return await self._write_here(self._outer, body, lazy)
        result: T = await self._writer.submit(body, lazy=lazy)
        self._commit_in_time()
        return result

    async def _write_here(self, outer: lmdb.Transaction, body: Callable[[Transaction], T], lazy: bool) -> T:
        """Run a body on this thread, with the writer's idle, and have that commit it, now or later."""
        job = _Job(body, None, lazy=lazy)
        try:
            self._run_in(outer, job)
        except Exception as error:
            self._failure = error
            await self._commit_soon()
        if job.error is not None:
            raise job.error
        if lazy and self._held < _MOST_HELD and self._is_ample():
            self._acknowledged += 1
            self._commit_in_time()
        elif self._held:
            await self._commit_soon()
        return cast(T, job.result)

    def _commit_in_time(self) -> None:
        if self._acknowledged and self._timer is None:
            delay_s = INTERVAL_S if self._lazy else LAZY_S
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._in_time)

    def _in_time(self) -> None:
        self._timer = None
        if self._acknowledged:
            # Who is to know of a failure finds it in the losses.
            self._commit_soon().add_done_callback(lambda done: done.cancelled() or done.exception())

    def _commit_soon(self) -> asyncio.Future[None]:
        return self._writer.submit(lambda _: None, reads=True, syncs=True)

    async def sync(self) -> None:
        self._check_open()
        if self._acknowledged:
            await self._commit_soon()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._reader.stop()
        await self._writer.stop()
        self._env.close()
        os.close(self._lock)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")

    def _read_batch(self, jobs: list[_Job]) -> None:
        try:
            view = _LmdbSnapshot(self._env.begin(), self._directory)
        except lmdb.Error as error:
            _fail(jobs, EngineError(f"LMDB: {error}"))
            return
        for job in jobs:
            job.run(view)
        view.end()

    # The writer's thread

    def _write_batch(self, jobs: list[_Job]) -> None:
        """Run the bodies in the outer transaction and commit it, now or later; if that fails none has succeeded."""
        acknowledged = self._acknowledged
        try:
            if self._failure is not None:
                raise self._failure
            outer = self._outer or self._begin()
            for job in jobs:
                if job.reads:
                    job.run(_LmdbSnapshot(outer, self._directory))
                else:
                    self._run_in(outer, job)
            if self._is_wanted(jobs) or self._held >= _MOST_HELD:
                self._commit(outer)
            else:
                self._acknowledged += sum(job.lazy and job.error is None for job in jobs)
        except Exception as error:
            self._lose(jobs, error, acknowledged)

    def _is_wanted(self, jobs: list[_Job]) -> bool:
        """Say whether a commit is not to be put off."""
        return any(job.syncs or not (job.reads or job.lazy) for job in jobs) or not self._is_ample()

    def _begin(self) -> lmdb.Transaction:
        used = int(self._env.info()["last_pgno"])
        self._held, self._spare = 0, (self._usable_pages - used) * self._page_bytes // _SPARE_PART
        # The loop's thread uses it as soon as it is seen there.
        outer = self._outer = self._env.begin(write=True)
        return outer

    def _commit(self, outer: lmdb.Transaction) -> None:
        """Commit what is held."""
        if self._held:
            outer.commit()
            self._outer, self._acknowledged, self._held = None, 0, 0
            if self._watcher is not None:
                self._writer.call(self._watcher)

    def _prepare(self) -> None:
        """Lay the next transaction open, after making sure of the file's next pages."""
        if self._outer is not None:
            return
        try:
            self._fill_ahead()
            self._begin()
        except (lmdb.Error, OSError) as error:  # the next batch begins one, or says what is in the way
            _log.debug("the next transaction is not yet begun: %s", error)

    def _fill_ahead(self) -> None:
        """Have zeros behind the last page, so that a commit only writes into a file that is long enough.

        A commit that makes the file longer waits for the file system's journal, too, and takes twice as long.
        """
        used = (int(self._env.info()["last_pgno"]) + 1) * self._page_bytes
        if used + _FILLED_BYTES // 2 < self._filled or _space(self._directory).free < _AMPLE_BYTES:
            return
        end = min(used + _FILLED_BYTES, self._map_bytes)
        with open(os.path.join(self._directory, "data.mdb"), "r+b", buffering=0) as file:
            self._filled = max(self._filled, used, os.fstat(file.fileno()).st_size)
            while self._filled < end:
                self._filled += os.pwrite(file.fileno(), bytes(min(_FILLED_STEP, end - self._filled)), self._filled)
            os.fdatasync(file.fileno())

    def _lose(self, jobs: list[_Job], error: Exception, acknowledged: int) -> None:
        """A commit failed: of these jobs nothing is done, and what was held before is lost."""
        _log.error("LMDB could not commit: %s", error, exc_info=None if isinstance(error, lmdb.Error) else error)
        if acknowledged:
            _log.error("%d transactions that were acknowledged just before are lost", acknowledged)
            self._losses += 1
        outer, self._outer, self._failure = self._outer, None, None
        self._held = self._acknowledged = 0
        if outer is not None:
            outer.abort()
        _fail(jobs, _commit_error(error))

    def _end_outer(self) -> None:
        """The thread's last: commit what is held."""
        try:
            if self._outer is not None:
                self._outer.commit() if self._held else self._outer.abort()
        except lmdb.Error as error:
            self._lose([], error, self._acknowledged)
        self._outer = None

    # Either thread

    def _is_ample(self) -> bool:
        """Say whether there is so much space that what is put off will not fail for the lack of it."""
        return self._spare > self._map_bytes // _AMPLE_PART // _SPARE_PART and (
            _space(self._directory).free > _AMPLE_BYTES
        )

    def _is_full(self, txn: lmdb.Transaction) -> bool:
        """Say whether what is in use, free pages between them left out, has come to the reserved part of the map."""
        figures = txn.stat(self._main)
        used = figures["branch_pages"] + figures["leaf_pages"] + figures["overflow_pages"]
        return bool(used > self._usable_pages)

    def _run_in(self, outer: lmdb.Transaction, job: _Job) -> None:
        """Run a body and write what it wrote into the outer transaction; what is raised is that one's failure."""
        txn = _LmdbTransaction(outer, self._directory)
        if not job.run(txn):
            return
        cost = txn.cost
        if not cost:
            return
        self._spare -= cost
        if self._spare > 0:
            txn.apply(outer)
            self._held += 1
        else:
            self._apply_nested(outer, txn, job)

    def _apply_nested(self, outer: lmdb.Transaction, txn: _LmdbTransaction, job: _Job) -> None:
        """Write it in a transaction of its own, which a map that is full undoes."""
        inner = self._env.begin(write=True, parent=outer)
        done = False
        try:
            growth = txn.apply(inner)
            done = not (growth > _NO_LARGER and self._is_full(inner))
            self._held += done
        except lmdb.MapFullError:
            pass
        finally:
            inner.commit() if done else inner.abort()
        if not done:
            job.error = EngineFull("LMDB's map is full")


def _usable_pages(map_bytes: int, page_bytes: int) -> int:
    """Return how many pages of the map may be used by transactions that make the data larger."""
    pages = map_bytes // page_bytes
    least, most = _RESERVED_PAGES
    return pages - min(most, max(least, pages // _RESERVED_PART))


def _fail(jobs: list[_Job], error: Exception) -> None:
    """Make every job that had no error of its own end in this one."""
    for job in jobs:
        job.error = job.error or error


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
            _sync_directory(path)
    except lmdb.Error as error:
        raise EngineUnusable(f"{directory}: not an LMDB directory of this metaserver: {error}") from None
    return env


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
