"""Threads of the LMDB engine, which do what waits for them together and tell the event loop in one call a batch."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

from metaserver.engine.base import Snapshot

_log = logging.getLogger(__name__)

#: The most jobs of a batch.
_BATCH: Final = 128


class Due(enum.IntEnum):
    """What is to be true of all that was written, when a job is answered."""

    LATER = 0
    DURABLE = 1
    COMMITTED = 2


@dataclass(slots=True)
class Job:
    """A body, the future that waits for it, and its outcome until the whole batch is known."""

    body: Callable[[Any], Any]
    #: None: nobody waits in another thread.
    future: asyncio.Future[Any] | None
    due: Due
    reads: bool
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


def fail(jobs: list[Job], error: Exception) -> None:
    """Make every job that had no error of its own end in this one."""
    for job in jobs:
        job.error = job.error or error


class Thread:
    """A thread that takes jobs in batches and hands each batch to ``process``.

    ``then`` is called when a batch was answered, and ``last`` at the thread's end.
    """

    def __init__(
        self,
        name: str,
        process: Callable[[list[Job]], None],
        then: Callable[[], None] = lambda: None,
        last: Callable[[], None] = lambda: None,
    ) -> None:
        self._process = process
        self._then = then
        self._last = last
        self._waiting = 0
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether every job was answered: the thread does nothing until the next one."""
        return self._waiting == 0

    def submit(
        self,
        body: Callable[[Any], Any] = lambda _: None,
        due: Due = Due.LATER,
        *,
        reads: bool = True,
        future: asyncio.Future[Any] | None = None,
    ) -> asyncio.Future[Any]:
        """Queue a body; the future, a new one if none is given, has its outcome."""
        self._loop = asyncio.get_running_loop()
        self._waiting += 1
        future = future or self._loop.create_future()
        self._jobs.put(Job(body, future, due, reads))
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
                fail(jobs, error)
            if not jobs:
                continue
            self.call(self._answer, jobs)
            self._then()
        self._last()

    def _answer(self, jobs: list[Job]) -> None:
        self._waiting -= len(jobs)
        for job in jobs:
            job.answer()

    def _take(self) -> tuple[list[Job], bool]:
        """Wait for a job; return all jobs that are there, and whether more will come."""
        jobs: list[Job] = []
        with contextlib.suppress(Empty):
            job = self._jobs.get()
            while job is not None:
                jobs.append(job)
                if len(jobs) == _BATCH:
                    return jobs, True
                job = self._jobs.get_nowait()
            return jobs, False
        return jobs, True
