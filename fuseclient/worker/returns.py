"""Gives back to the metaserver what the kernel cache has given up: so a client holds about as much as it caches.

What the maps have evicted may be in other caches still, so it is not given back at once, and not if it is used:

* the kernel's names and attributes were told with a time-to-live that ends with the lease: so a lease's length is
  waited for after the eviction, from when on the kernel has nothing that was told before it;
* what it was told since, by a put into the maps or by the worker, is noted by the feeder (``touched``,
  ``touched_names``), and waits anew; what lies in the maps again will be evicted again;
* the kernel's pages, of files and of listings, have no end: they are dropped first;
* an inode that is open, or written, is held: who unlinks it elsewhere must ask here;
* the worker forgets it at that moment, as if it had been told to by a break. Replies under way, to what was asked for
  before, enter no cache then (guard.py); what is asked for later, on the same connection, is granted again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from fuseclient.worker.changes import OpenedVersions
from fuseclient.worker.directories import Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.inode_set import InodeSet
from fuseclient.worker.invalidation import Invalidator
from fuseclient.worker.session import boottime_ns

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

_log = logging.getLogger(__name__)

#: What was evicted within this part of a lease waits together.
_TOGETHER: Final = 10
#: Seconds between looks for what was evicted, at most.
_INTERVAL_S: Final = 1.0
#: Inodes, or directories, that are given back by one message.
_BATCH: Final = 512


class Session(Protocol):
    """What reaches the metaserver."""

    @property
    def lease_s(self) -> float: ...
    async def may_tell(self) -> bool: ...
    def return_leases(self, directories: list[int], inodes: list[int]) -> bool: ...


class _Evicted:
    """What was evicted within a while; nothing that the kernel was told of it before that is kept at ``until_ns``."""

    def __init__(self, now_ns: int) -> None:
        self.began_ns = now_ns
        self.until_ns = now_ns
        self.inodes = InodeSet()
        self.directories: set[int] = set()


class Returns:
    """The returns of one mount. ``is_in_use`` says of an inode whether it is open or being changed here."""

    def __init__(
        self,
        session: Session,
        feeder: Feeder,
        directories: Directories,
        cache: Cache,
        kernel: Invalidator,
        opened: OpenedVersions,
        is_in_use: Callable[[int], bool],
        clock: Callable[[], int] = boottime_ns,
    ) -> None:
        self._session = session
        self._feeder = feeder
        self._directories = directories
        self._cache = cache
        self._kernel = kernel
        self._opened = opened
        self._is_in_use = is_in_use
        self._clock = clock
        self._waiting: deque[_Evicted] = deque()
        #: What cannot be given back yet.
        self._inodes_again: set[int] = set()
        self._directories_again: set[int] = set()
        self._longest_ns = 0
        self._returned_inodes = self._returned_directories = self._kept = self._untold = 0

    async def run(self) -> None:
        """Work until cancelled, or until the channel is gone."""
        try:
            while True:
                await asyncio.sleep(min(_INTERVAL_S, self._session.lease_s / _TOGETHER))
                self._take()
                await self._return_due()
        except ConnectionError as error:
            _log.info("no leases are returned any more: %s", error)

    def _wait_ns(self) -> int:
        """Return for how long the kernel may keep what it is told now, at most."""
        self._longest_ns = max(self._longest_ns, round(self._session.lease_s * 1e9))
        return self._longest_ns

    def _take(self) -> None:
        """What was evicted since the last time begins to wait. What waits already is touched if it was put since."""
        evicted, now_ns, wait_ns = self._cache.take_evicted(), self._clock(), self._wait_ns()
        self._untold += not evicted.all_known
        inodes = InodeSet(itertools.chain(evicted.inodes, self._inodes_again))
        directories = self._directories_again.union(evicted.directories)
        self._inodes_again, self._directories_again = set(), set()
        if not inodes and not directories:
            return
        for each in self._waiting:
            inodes.subtract(each.inodes)
            directories -= each.directories
        self._feeder.untouched(inodes, directories)
        if not self._waiting or now_ns - self._waiting[-1].began_ns > wait_ns // _TOGETHER:
            self._waiting.append(_Evicted(now_ns))
        last = self._waiting[-1]
        last.until_ns = now_ns + wait_ns
        last.inodes.update(inodes)
        last.directories |= directories

    async def _return_due(self) -> None:
        while self._waiting and self._waiting[0].until_ns <= self._clock():
            due = self._waiting.popleft()
            for inodes, directories in itertools.zip_longest(_batches(due.inodes), _batches(due.directories)):
                await self._return(array("Q", inodes or ()), list(directories or ()))

    async def _return(self, inodes: array[int], directories: list[int]) -> None:
        idle = self._idle(inodes, directories)
        self._forget(*idle)
        try:
            await self._kernel.drop_unused(array("Q", itertools.chain(*idle)))
        except ConnectionError:
            raise
        except OSError as error:
            _log.error("what was evicted cannot be dropped, so it is not given back: %s", error)
            self._keep(*idle)
            return
        if not await self._session.may_tell():
            self._keep(*idle)
            return
        inodes, directories = self._idle(*idle)
        self._forget(inodes, directories)
        if not inodes and not directories:
            return
        if self._session.return_leases(directories, list(inodes)):
            self._returned_inodes += len(inodes)
            self._returned_directories += len(directories)
        else:
            self._keep(inodes, directories)

    def _idle(self, inodes: array[int], directories: list[int]) -> tuple[array[int], list[int]]:
        """Return those that are in no cache, but for the kernel's pages, and that nobody uses; the others wait anew."""
        idle = array("Q")
        for ino in self._cache.missing(inodes):
            if self._is_touched(ino) or self._is_used(ino):
                self._keep((ino,), ())
            else:
                idle.append(ino)
        unused = []
        for ino in directories:
            if self._cache.is_used(ino) is not None:
                continue
            if self._is_relisted(ino) or self._is_used(ino) or self._directories.is_fetching(ino):
                self._keep((), (ino,))
            else:
                unused.append(ino)
        return idle, unused

    def _is_touched(self, ino: int) -> bool:
        return ino in self._feeder.touched

    def _is_relisted(self, ino: int) -> bool:
        return ino in self._feeder.touched_names

    def _is_used(self, ino: int) -> bool:
        return self._is_in_use(ino)

    def _keep(self, inodes: Iterable[int], directories: Iterable[int]) -> None:
        """These wait anew, from the next look on."""
        before = len(self._inodes_again) + len(self._directories_again)
        self._inodes_again.update(inodes)
        self._directories_again.update(directories)
        self._kept += len(self._inodes_again) + len(self._directories_again) - before

    def _forget(self, inodes: Iterable[int], directories: Iterable[int]) -> None:
        for ino in inodes:
            self._feeder.drop_inode(ino)
            self._opened.forget(ino)
        for ino in directories:
            self._feeder.drop_names(ino)

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows: inodes and directories given back, and inodes that wait; how often one was in
        use when its time had come; and how often some of what was evicted was not told, and stays held.
        """
        return {
            "returned_inodes": self._returned_inodes,
            "returned_directories": self._returned_directories,
            "waiting_inodes": sum(len(each.inodes) for each in self._waiting),
            "kept": self._kept,
            "untold": self._untold,
        }


def _batches(inos: Iterable[int]) -> Iterator[list[int]]:
    remaining = iter(inos)
    while batch := list(itertools.islice(remaining, _BATCH)):
        yield batch
