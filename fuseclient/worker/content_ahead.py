"""Content of small files that will be read next, put into the kernel's maps while a directory is read in order.

A read of a small file comes to the worker when its content is not in the maps: it did not come with its directory (a
fetch brings some MiB of content at most, a listing's or a warm-up's perhaps none), or was overtaken. If the files of a
directory are read one after the other, one fetch brings the content of the next ones, which BPF then answers.

It is put into the maps and not into the page cache (FUSE_NOTIFY_STORE), because that was measured to cost more than it
saves: for a file of 4, 16 and 64 KiB, storing takes 12 to 13, 22 to 37 and 56 to 67 us of CPU in the worker and the
channel, and a read that BPF answers no more than 5 to 6, 10 and 24 us over one of the page cache.

It goes on only while it pays. A fetch has paid when the first read that comes here again is of the file behind what it
brought; if another file is read instead, or some of those that it brought, it was wasted. What pays brings more the
next time; too much waste switches everything off for a while. A file of 16 KiB that is read in order takes 130 us of
CPU in all processes then, instead of 480 to 580. What is put is guarded like all that is fetched (feeding.py).
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from fuseclient.worker.feeding import Feeder, comes_with_directory
from fuseclient.worker.fetches import Session
from fuseclient.worker.places import Places, Window
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Reads in order after which the next files are fetched, and files that may be left out between two of them.
_BEGIN: Final = 3
_SLACK: Final = 4
#: Reads of files just brought that were on their way already, or of other readers, before it counts as wasted.
_STRAYS: Final = 8
#: Bytes of content that the first fetch for a directory brings at most.
_FIRST_BYTES: Final = 1 << 20
#: Files that one fetch brings at most.
_FILES: Final = 512
#: Directories that are being read.
_RUNS: Final = 64
#: More fetches wasted than paid, lately, that switch it off; and for how many reads.
_WASTE: Final = 4
_PAUSE: Final = 1000


@dataclass
class _Run:
    """A directory that is being read: ``cookie`` is that of the last file read, or brought."""

    cookie: int
    count: int = 1
    budget: int = _FIRST_BYTES
    #: Where what was brought last begins, whether it is still to be judged, and how many of its files were read here.
    behind: int = 0
    brought: bool = False
    strays: int = 0
    task: asyncio.Task[None] | None = None


class ContentAhead:
    """Told of each small file that the worker reads by itself, of which ``places`` says where it is. ``most_bytes``: of
    one fetch."""

    def __init__(self, session: Session, feeder: Feeder, places: Places, most_bytes: int) -> None:
        self._session = session
        self._feeder = feeder
        self._most_bytes = most_bytes
        self._places = places
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        #: Fetches paid less fetches wasted, within bounds; and reads that nothing is done for.
        self._balance = 0
        self._paused = 0
        self._fetches = self._files = self._bytes = self._paid = self._wasted = self._pauses = 0

    def read(self, ino: int) -> None:
        """The worker has read the beginning of a small file."""
        if self._paused:
            self._paused -= 1
            return
        place = self._places.find(ino)
        if place is None:
            return
        window, index = place.window, place.index
        run = self._runs.get(window.parent)
        if run is None:
            run = self._begin(window, index)
        elif run.task is not None or self._is_stray(run, window.cookies[index]):
            return
        elif not self._follows(run, window, index):
            self._judge(run, paid=False)
            run = self._begin(window, index)
        else:
            self._judge(run, paid=True)
            run.cookie = window.cookies[index]
            run.count += 1
        if run.count >= _BEGIN and not self._paused:
            run.task = asyncio.create_task(self._bring(window.parent, run), name=f"content ahead {window.parent}")

    def _begin(self, window: Window, index: int) -> _Run:
        run = self._runs[window.parent] = _Run(window.cookies[index])
        self._runs.move_to_end(window.parent)
        if len(self._runs) > _RUNS:
            _, oldest = self._runs.popitem(last=False)
            if oldest.task is not None:
                oldest.task.cancel()
        return run

    @staticmethod
    def _is_stray(run: _Run, cookie: int) -> bool:
        if not run.brought or not run.behind < cookie <= run.cookie:
            return False
        run.strays += 1
        return run.strays <= _STRAYS

    @staticmethod
    def _follows(run: _Run, window: Window, index: int) -> bool:
        behind = index - bisect_right(window.cookies, run.cookie)
        return 0 <= behind <= _SLACK

    def _judge(self, run: _Run, *, paid: bool) -> None:
        """Say whether what was brought last has been read."""
        if not run.brought:
            return
        run.brought = False
        self._paid += paid
        self._wasted += not paid
        self._balance = min(_WASTE, self._balance + 1) if paid else self._balance - 1
        run.budget = min(2 * run.budget, self._most_bytes)
        if self._balance <= -_WASTE:
            self._balance, self._paused = 0, _PAUSE
            self._pauses += 1

    async def _bring(self, parent: int, run: _Run) -> None:
        """Put the content of the files behind the last one read."""
        budget = min(run.budget, self._most_bytes)
        request = wire.FetchDirectory(parent, run.cookie, _FILES, wire.MAX_INLINE, budget)
        self._fetches += 1
        run.behind, run.strays, whole = run.cookie, 0, True
        try:
            with self._feeder.begin() as token:
                async for page in self._session.stream(request):
                    self._feeder.page(token, page)
                    whole = whole and self._came(page, run)
                    run.brought = True
        except (Refused, Disconnected) as error:
            _log.debug("content of directory %d is not brought: %s", parent, error)
        finally:
            run.task = None

    def _came(self, page: wire.DirectoryPage, run: _Run) -> bool:
        """Count what a page has brought, up to the first file that came without its content; False if there is one."""
        for entry in page.entries:
            if comes_with_directory(entry.attributes):
                if entry.data is None:
                    return False
                self._files += 1
                self._bytes += len(entry.data)
            run.cookie = entry.cookie
        return True

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows."""
        return {
            "fetches": self._fetches,
            "files": self._files,
            "bytes": self._bytes,
            "paid": self._paid,
            "wasted": self._wasted,
            "switched_off": self._pauses,
        }

    async def close(self) -> None:
        """Bring nothing more."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
