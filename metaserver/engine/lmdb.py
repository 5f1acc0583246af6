"""The LMDB engine: one directory, one process, durable when a write returns.

LMDB has one writer at a time, and a write transaction belongs to the thread that began it; so one thread writes. It
takes every transaction that waits, runs each as a nested transaction of one outer transaction, commits that with one
fsync and answers them all: the more writers, the fewer fsyncs each. Reads run on a thread of their own, because a page
that is not in memory must not hold up the event loop; those that wait together share one snapshot.

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
import time
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
#: With less free than this, in bytes of the file system or as a part of the map, no commit is put off.
_AMPLE_BYTES: Final = 64 * 1024 * 1024
_AMPLE_PART: Final = 8


@dataclass(slots=True)
class _Job:
    """A body, the future that waits for it, and its outcome until the whole batch is known."""

    body: Callable[[Any], Any]
    future: asyncio.Future[Any]
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
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


def _answer(jobs: list[_Job]) -> None:
    for job in jobs:
        job.answer()


class _Worker:
    """A thread that takes jobs in batches and hands each batch to ``process``, and an empty one when it is ``due``.

    ``due`` gives the seconds until then; without it, or if it gives ``None``, that is never.
    """

    def __init__(
        self, name: str, process: Callable[[list[_Job]], None], due: Callable[[], float | None] = lambda: None
    ) -> None:
        self._process = process
        self._due = due
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, body: Callable[[Any], Any], *, reads: bool = False, syncs: bool = False, lazy: bool = False
    ) -> asyncio.Future[Any]:
        """Queue a body; the future has its outcome."""
        self._loop = asyncio.get_running_loop()
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
            if jobs:
                self.call(_answer, jobs)

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a job, or until it is due; return all jobs that are there, and whether more will come."""
        jobs: list[_Job] = []
        with contextlib.suppress(Empty):
            job = self._jobs.get(timeout=self._due())
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

    def get(self, key: bytes) -> bytes | None:
        return self._view.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._view.range(start, end, limit, reverse)

    def space(self) -> Space:
        return self._view.space()


class _LmdbTransaction(Transaction):
    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        super().__init__()
        self._txn = txn
        self._view = _LmdbView(txn, directory)
        #: Bytes of keys and values that the data has become larger by.
        self.growth = 0

    def get(self, key: bytes) -> bytes | None:
        return self._view.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._view.range(start, end, limit, reverse)

    def space(self) -> Space:
        return self._view.space()

    def _put(self, key: bytes, value: bytes) -> None:
        old = self._txn.get(key)
        self.growth += len(value) - len(old) if old is not None else len(key) + len(value)
        self._txn.put(key, value)

    def _delete(self, key: bytes) -> None:
        old = self._txn.pop(key)
        self.growth -= len(key) + len(old) if old is not None else 0


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
        self._usable_pages = _usable_pages(self._map_bytes, self._env.stat()["psize"])
        #: The writer's: the outer transaction, when it is to be committed (monotonic), and how much it holds.
        self._outer: lmdb.Transaction | None = None
        self._due_s = 0.0
        self._held = 0
        #: Whether writes were answered that are not committed.
        self._acknowledged = False
        self._losses = 0
        #: Read by the writer after each commit: what a reader finds then, or was told of after.
        self._watcher: Callable[[], object] | None = None
        self._reader = _Worker("lmdb-read", self._read_batch)
        self._writer = _Worker("lmdb-write", self._write_batch, self._seconds_left)

    @property
    def is_lazy(self) -> bool:
        return self._lazy

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
        result: T = await self._writer.submit(body, lazy=lazy or self._lazy)
        return result

    async def sync(self) -> None:
        self._check_open()
        if self._acknowledged:
            await self._writer.submit(lambda _: None, reads=True, syncs=True)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._reader.stop()
        await self._writer.stop()
        self._env.close()
        os.close(self._lock)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")

    def _read_batch(self, jobs: list[_Job]) -> None:
        try:
            with self._env.begin() as txn:
                view = _LmdbSnapshot(txn, self._directory)
                for job in jobs:
                    job.run(view)
        except lmdb.Error as error:
            _fail(jobs, EngineError(f"LMDB: {error}"))

    # The writer's thread

    def _seconds_left(self) -> float | None:
        return None if self._outer is None else max(0.0, self._due_s - time.monotonic())

    def _write_batch(self, jobs: list[_Job]) -> None:
        """Run the bodies in one transaction and commit it, now or later; after a failed commit none has succeeded."""
        if not jobs and self._outer is None:
            return
        acknowledged = self._held if self._outer is not None else 0
        wanted = not jobs or any(job.syncs or not (job.reads or job.lazy) for job in jobs)
        try:
            outer = self._outer or self._begin()
            for job in jobs:
                if job.reads:
                    job.run(_LmdbSnapshot(outer, self._directory))
                else:
                    self._run_nested(outer, job)
                    self._held += 1
            if wanted or self._held >= _MOST_HELD or self._seconds_left() == 0.0:
                outer.commit()
                self._outer, self._acknowledged = None, False
                if self._watcher is not None:
                    self._writer.call(self._watcher)
            else:
                self._acknowledged = True
        except Exception as error:
            self._lose(jobs, error, acknowledged)

    def _begin(self) -> lmdb.Transaction:
        delay_s = (INTERVAL_S if self._lazy else LAZY_S) if self._has_ample_space() else 0.0
        self._held = 0
        self._outer = self._env.begin(write=True)
        self._due_s = time.monotonic() + delay_s
        return self._outer

    def _lose(self, jobs: list[_Job], error: Exception, acknowledged: int) -> None:
        """A commit failed: of these jobs nothing is done, and what was acknowledged in it before is lost."""
        _log.error("LMDB could not commit: %s", error, exc_info=None if isinstance(error, lmdb.Error) else error)
        if acknowledged:
            _log.error("%d transactions that were acknowledged just before are lost", acknowledged)
            self._losses += 1
        outer, self._outer, self._acknowledged = self._outer, None, False
        if outer is not None:
            outer.abort()
        _fail(jobs, _commit_error(error))

    def _has_ample_space(self) -> bool:
        used = int(self._env.info()["last_pgno"]) * int(self._env.stat()["psize"])
        return _space(self._directory).free > _AMPLE_BYTES and self._map_bytes - used > self._map_bytes // _AMPLE_PART

    def _is_full(self, txn: lmdb.Transaction) -> bool:
        """Say whether what is in use, free pages between them left out, has come to the reserved part of the map."""
        figures = txn.stat(self._main)
        used = figures["branch_pages"] + figures["leaf_pages"] + figures["overflow_pages"]
        return bool(used > self._usable_pages)

    def _run_nested(self, outer: lmdb.Transaction, job: _Job) -> None:
        inner = self._env.begin(write=True, parent=outer)
        done = False
        try:
            txn = _LmdbTransaction(inner, self._directory)
            done = job.run(txn)
            if isinstance(job.error, lmdb.MapFullError) or (done and txn.growth > _NO_LARGER and self._is_full(inner)):
                job.error, done = EngineFull("LMDB's map is full"), False
        finally:
            inner.commit() if done else inner.abort()


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
        env = lmdb.open(directory, map_size=map_bytes, mode=0o600, max_spare_txns=2, readahead=False)
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
