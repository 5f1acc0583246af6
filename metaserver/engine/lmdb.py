"""The LMDB engine: one directory, one process, durable when a write returns.

LMDB has one writer at a time, and a write transaction belongs to the thread that began it; so one thread writes. It
takes every transaction that waits, runs each as a nested transaction of one outer transaction, commits that with one
fsync and answers them all: the more writers, the fewer fsyncs each. Reads run on a thread of their own, because a page
that is not in memory must not hold up the event loop; those that wait together share one snapshot.

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


@dataclass(slots=True)
class _Job:
    """A body, the future that waits for it, and its outcome until the whole batch is known."""

    body: Callable[[Any], Any]
    future: asyncio.Future[Any]
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
    """A thread that takes jobs in batches and hands each batch to ``process``."""

    def __init__(self, name: str, process: Callable[[list[_Job]], None]) -> None:
        self._process = process
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, body: Callable[[Any], Any]) -> asyncio.Future[Any]:
        """Queue a body; the future has its outcome."""
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put(_Job(body, future))
        return future

    async def stop(self) -> None:
        """Let the thread finish what was queued, and wait for its end."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        more = True
        while more:
            jobs, more = self._take()
            if not jobs:
                continue
            try:
                self._process(jobs)
            except Exception as error:  # a bug; whoever waits learns of it, and the thread goes on
                _fail(jobs, error)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                assert self._loop is not None
                self._loop.call_soon_threadsafe(_answer, jobs)

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a job and return all that are there, and whether more will come."""
        jobs: list[_Job] = []
        job = self._jobs.get()
        with contextlib.suppress(Empty):
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

    def get(self, key: bytes) -> bytes | None:
        return self._view.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._view.range(start, end, limit, reverse)

    def space(self) -> Space:
        return self._view.space()

    def _put(self, key: bytes, value: bytes) -> None:
        self._txn.put(key, value)

    def _delete(self, key: bytes) -> None:
        self._txn.delete(key)


def _space(directory: str) -> Space:
    figures = os.statvfs(directory)
    return Space(figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize)


class LmdbEngine(Engine):
    """The engine in ``directory``, which is made if it is missing; raises EngineBusy and EngineUnusable."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = _lock(directory)
        try:
            self._env = _open(directory)
        except BaseException:
            os.close(self._lock)
            raise
        self._closed = False
        self._reader = _Worker("lmdb-read", self._read_batch)
        self._writer = _Worker("lmdb-write", self._write_batch)

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        result: T = await self._reader.submit(body)
        return result

    async def _attempt(self, body: Callable[[Transaction], T]) -> T:
        self._check_open()
        result: T = await self._writer.submit(body)
        return result

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

    def _write_batch(self, jobs: list[_Job]) -> None:
        """Run the bodies in one transaction and commit it; after a failed commit no body has succeeded."""
        try:
            with self._env.begin(write=True) as txn:
                for job in jobs:
                    self._run_nested(txn, job)
        except lmdb.Error as error:
            _log.error("LMDB could not commit: %s", error)
            _fail(jobs, _commit_error(error))

    def _run_nested(self, outer: lmdb.Transaction, job: _Job) -> None:
        inner = self._env.begin(write=True, parent=outer)
        done = False
        try:
            done = job.run(_LmdbTransaction(inner, self._directory))
            if isinstance(job.error, lmdb.MapFullError):
                job.error = EngineFull("LMDB's map is full")
        finally:
            inner.commit() if done else inner.abort()


def _fail(jobs: list[_Job], error: Exception) -> None:
    """Make every job that had no error of its own end in this one."""
    for job in jobs:
        job.error = job.error or error


def _commit_error(error: lmdb.Error) -> EngineError:
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


def _open(directory: str) -> lmdb.Environment:
    """Open the environment, and make a new one durable in its directory."""
    try:
        env = lmdb.open(directory, map_size=_MAP_BYTES, mode=0o600, max_spare_txns=2, readahead=False)
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
