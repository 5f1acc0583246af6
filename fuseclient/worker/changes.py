"""What other clients changed leaves every cache of this one before the lease is used any longer.

The session tells of changes with each renewal. The worker's own state and the BPF maps are dropped at once. The
kernel's caches are dropped by notifications, which can wait for an inode's lock and so for requests in flight; a task
does that, off the request path, and only when it is through does the new deadline reach the maps and the replies.
Meanwhile the old one holds; if it passes, requests go to the metaserver, which is slow and right.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Protocol

from fuseclient.data.passthrough import Passthrough
from fuseclient.data.writer import Writer
from fuseclient.worker.directories import Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.lease import Lease
from fuseclient.worker.orphans import Orphans
from metaserver import wire

_log = logging.getLogger(__name__)

#: Above this many names, all of them are expired at once.
_NAMES_ONE_BY_ONE: Final = 256
#: Notifications on their way at once.
_AT_ONCE: Final = 64
_OPENED: Final = 65536


class Kernel(Protocol):
    """What this needs of :class:`~fuseclient.worker.notifier.Notifier`."""

    async def invalidate_inode(self, ino: int) -> None: ...
    async def invalidate_entry(self, parent: int, name: bytes) -> None: ...
    async def increment_epoch(self) -> bool: ...


class OpenedVersions:
    """The version that each file had when it was last opened here: unchanged, its pages may stay. Bounded."""

    def __init__(self) -> None:
        self._versions: OrderedDict[int, int] = OrderedDict()

    def opened(self, ino: int, version: int) -> bool:
        """Note an open; say whether the file is what it was at the one before."""
        unchanged = self._versions.get(ino) == version
        self._versions[ino] = version
        self._versions.move_to_end(ino)
        if len(self._versions) > _OPENED:
            self._versions.popitem(last=False)
        return unchanged

    def forget(self, ino: int) -> None:
        """The file was changed elsewhere."""
        self._versions.pop(ino, None)

    def clear(self) -> None:
        """Any file may have been changed."""
        self._versions.clear()


class OldPages:
    """Has the kernel drop the pages of files one by one, in the background; ``feeder`` is told of each."""

    def __init__(self, kernel: Kernel) -> None:
        self.feeder: Feeder
        self._kernel = kernel
        self._waiting: dict[int, None] = {}
        self._task: asyncio.Task[None] | None = None

    def drop(self, ino: int) -> None:
        """Drop a file's pages soon."""
        self._waiting[ino] = None
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="old pages")

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch = list(itertools.islice(self._waiting, _AT_ONCE))
                await _in_batches(self._drop(ino) for ino in batch)
        except OSError as error:
            _log.error("the kernel's pages cannot be dropped, so the files are not cached: %s", error)
            self._waiting.clear()
        finally:
            self._task = None

    async def _drop(self, ino: int) -> None:
        with self.feeder.begin() as token:
            del self._waiting[ino]
            await self._kernel.invalidate_inode(ino)
            self.feeder.pages_dropped(token, ino)


class Changes:
    """The session's three callbacks: :meth:`apply`, :meth:`renewed` and :meth:`lost`."""

    def __init__(
        self,
        feeder: Feeder,
        directories: Directories,
        writer: Writer,
        orphans: Orphans,
        lease: Lease,
        opened: OpenedVersions,
        kernel: Kernel,
        passthrough: Passthrough,
    ) -> None:
        self._feeder = feeder
        self._directories = directories
        self._writer = writer
        self._orphans = orphans
        self._lease = lease
        self._opened = opened
        self._kernel = kernel
        self._passthrough = passthrough
        self._pending: deque[Callable[[], Awaitable[None]]] = deque()
        #: The deadline to be used when nothing is pending any more.
        self._deadline_ns = 0
        self._task: asyncio.Task[None] | None = None

    def apply(self, renewed: wire.Renewed) -> None:
        """Others changed something: drop it here, and have the kernel drop it."""
        if renewed.everything:
            self._drop_everything()
            return
        for parent, name in renewed.names:
            self._feeder.drop_name(parent, name)
        for ino in renewed.inodes:
            self._feeder.drop_inode(ino)
            self._writer.changed_elsewhere(ino)
            self._opened.forget(ino)
        self._passthrough.changed_elsewhere(renewed.inodes)
        self._later(lambda: self._invalidate(renewed.names, renewed.inodes))

    def lost(self) -> None:
        """The session is gone: nothing cached under it may be used, and its orphans are no more."""
        self._orphans.clear()
        self._writer.session_lost()
        self._deadline_ns = 0
        self._drop_everything()

    def renewed(self, deadline_ns: int) -> None:
        """The lease runs until ``deadline_ns``: use it when the kernel has dropped what is to be dropped."""
        self._deadline_ns = deadline_ns
        if self._passthrough.is_stale and not self._pending:
            self._pending.append(self._passthrough.refresh)
        if not self._pending:
            self._lease.move(deadline_ns)
        elif self._task is None:
            self._start()
        self._orphans.retry()

    async def settle(self) -> None:
        """Wait until nothing is pending."""
        while self._task is not None:
            await asyncio.wait({self._task})

    def _drop_everything(self) -> None:
        self._lease.move(0)
        paged = self._feeder.paged.take()
        self._feeder.drop_everything()
        self._directories.forget_everything()
        self._writer.everything_changed()
        self._opened.clear()
        self._passthrough.changed_elsewhere(None)
        self._later(lambda: self._invalidate_everything(paged))

    def _later(self, action: Callable[[], Awaitable[None]]) -> None:
        self._pending.append(action)
        if self._task is None:
            self._start()

    def _start(self) -> None:
        self._task = asyncio.create_task(self._work(), name="changes")

    async def _work(self) -> None:
        """Do what is pending. What fails stays, and is tried again at the next renewal."""
        try:
            while self._pending:
                await self._pending[0]()
                self._pending.popleft()
            self._lease.move(self._deadline_ns)
        except Exception as error:
            _log.error("what others changed cannot be dropped, so the lease is not used: %s", error)
        finally:
            self._task = None

    async def _invalidate(self, names: Sequence[tuple[int, bytes]], inodes: Sequence[int]) -> None:
        if len(names) <= _NAMES_ONE_BY_ONE or not await self._kernel.increment_epoch():
            await _in_batches(self._kernel.invalidate_entry(*each) for each in names)
        await _in_batches(self._kernel.invalidate_inode(ino) for ino in inodes)
        await self._passthrough.refresh()

    async def _invalidate_everything(self, paged: Iterable[int]) -> None:
        if not await self._kernel.increment_epoch():
            _log.warning("this kernel cannot expire all names at once; they expire with their time to live")
        await _in_batches(self._kernel.invalidate_inode(ino) for ino in paged)
        await self._passthrough.refresh()


async def _in_batches(calls: Iterable[Awaitable[None]]) -> None:
    """Await many, some at once; raise the first error when its batch is through."""
    remaining = iter(calls)
    while batch := list(itertools.islice(remaining, _AT_ONCE)):
        results = await asyncio.gather(*batch, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
