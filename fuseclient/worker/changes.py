"""What other clients change leaves every cache of this one before they may change it.

A break says what: the worker's own state and the BPF maps are dropped as it is read, so before any reply that came
after it; then, in a task of its own and off the request path, the kernel's caches; then it is acknowledged. A break
that fails is not acknowledged, and the session ends with its lease. What the kernel reads from a backing file cannot
be taken back while it is open: that file is made equal to the new content as soon as there is any.

The session also tells, with a renewal, what it changed itself without getting the reply. That is dropped the same way,
and only then does the new deadline reach the maps and the replies. Meanwhile the old one holds; if it passes, requests
go to the metaserver, which is slow and right.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Final

from fuseclient.data.objects import StoreError
from fuseclient.data.passthrough import Passthrough
from fuseclient.data.writer import Writer
from fuseclient.worker.directories import Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.inode_set import InodeSet
from fuseclient.worker.invalidation import Invalidator
from fuseclient.worker.lease import Lease
from fuseclient.worker.orphans import Orphans
from fuseclient.worker.removals import Removals
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.session import Acknowledge
from metaserver import wire

_log = logging.getLogger(__name__)

_OPENED: Final = 65536
#: Files whose pages are dropped at once.
_AT_ONCE: Final = 64
#: Seconds between looks whether a change that was made way for is made.
_REFRESH_S: Final = 0.05


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

    def __init__(self, kernel: Invalidator) -> None:
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
                await asyncio.gather(*map(self._drop, batch))
        except OSError as error:
            _log.error("the kernel's pages cannot be dropped, so the files are not cached: %s", error)
            self._waiting.clear()
        finally:
            self._task = None

    async def _drop(self, ino: int) -> None:
        with self.feeder.begin() as token:
            del self._waiting[ino]
            await self._kernel.drop_pages(ino)
            self.feeder.pages_dropped(token, ino)


class Changes:
    """The session's callbacks: :meth:`broken`, :meth:`apply`, :meth:`renewed` and :meth:`lost`."""

    def __init__(
        self,
        feeder: Feeder,
        directories: Directories,
        writer: Writer,
        orphans: Orphans,
        lease: Lease,
        opened: OpenedVersions,
        kernel: Invalidator,
        passthrough: Passthrough,
        removals: Removals,
        is_open: Callable[[int], bool],
    ) -> None:
        self._feeder = feeder
        self._directories = directories
        self._writer = writer
        self._orphans = orphans
        self._lease = lease
        self._opened = opened
        self._kernel = kernel
        self._passthrough = passthrough
        self._removals = removals
        self._is_open = is_open
        self._pending: deque[Callable[[], Awaitable[None]]] = deque()
        #: The deadline to be used when nothing is pending any more.
        self._deadline_ns = 0
        self._task: asyncio.Task[None] | None = None
        self._breaking: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Task[None] | None = None

    def broken(self, told: wire.Break, acknowledge: Acknowledge) -> None:
        """Somebody is about to change something: drop it everywhere, then acknowledge. Waits for no request."""
        if told.everything:
            paged = self._drop_everything()
            self._later(_then(lambda: acknowledge(self._still_open(paged)[: wire.MAX_OPEN])))
            return
        for ino in told.written:
            self._feeder.drop_inode(ino)
            self._opened.forget(ino)
        if told.number or told.names or told.inodes:
            self._drop(told.names, told.inodes)
            keeping_out = contextlib.ExitStack()
            if not told.number:
                keeping_out.enter_context(self._keeping_out(told))
            self._in_background(self._break(told, acknowledge, keeping_out))

    def _keeping_out(self, told: wire.Break) -> contextlib.AbstractContextManager[None]:
        """Nobody waits for this break, so what it tells, and the directories, may be put again before: keep it out."""
        inodes = {*told.inodes, *(parent for parent, _ in told.names)}
        for ino in inodes:
            self._feeder.drop_inode(ino)
        return self._kernel.keeping_out(inodes)

    async def _break(self, told: wire.Break, acknowledge: Acknowledge, keeping_out: contextlib.ExitStack) -> None:
        """Have the kernel drop what a break told, and end ``keeping_out`` then."""
        try:
            with keeping_out:
                if told.joined:
                    await self._removals.settle()
                    await self._writer.commit_deferred()
                await self._kernel.drop(told.names, told.inodes)
        except ConnectionError as error:
            _log.info("the kernel's caches can be dropped no more, so the session ends with its lease: %s", error)
        except Exception as error:
            _log.error("what others wait for cannot be done, so the session will end: %s", error)
        else:
            acknowledge(self._still_open(told.inodes))
            self._refresh_soon()

    def _still_open(self, inodes: Iterable[int]) -> list[int]:
        """Return those of these inodes that are open here: they may be orphans soon, and are to be reaped then."""
        still_open = [ino for ino in inodes if self._is_open(ino)]
        self.suspect(still_open)
        return still_open

    def suspect(self, inodes: Iterable[int]) -> None:
        """These are open here, and may be unlinked elsewhere."""
        for ino in inodes:
            self._orphans.suspect(ino)
            self._feeder.paged.add(ino)

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="break")
        self._breaking.add(task)
        task.add_done_callback(self._breaking.discard)

    def apply(self, renewed: wire.Renewed) -> None:
        """Something changed without a reply: drop it here, and have the kernel drop it."""
        if renewed.everything:
            self._drop_everything()
            return
        self._drop(renewed.names, renewed.inodes)
        self._later(lambda: self._kernel.drop(renewed.names, renewed.inodes))

    def _drop(self, names: Sequence[tuple[int, bytes]], inodes: Sequence[int]) -> None:
        """Drop these from the worker's state and from the maps."""
        for parent, name in names:
            self._feeder.drop_name(parent, name)
        for ino in inodes:
            self._feeder.drop_inode(ino)
            self._writer.changed_elsewhere(ino)
            self._opened.forget(ino)
        self._passthrough.changed_elsewhere(inodes)

    def lost(self) -> None:
        """The session is gone: nothing cached under it may be used, and its orphans are no more."""
        self._orphans.clear()
        self._removals.session_lost()
        self._writer.acknowledged_lost()
        self._deadline_ns = 0
        self._drop_everything()

    def woken(self) -> None:
        """The machine slept: the kernel's times to live did not run, so all is dropped; the lease may run yet."""
        self._drop_everything()

    def restarted(self) -> None:
        """The session goes on at another run of the metaserver, which may lack what was acknowledged lazily."""
        self._writer.acknowledged_lost()

    def renewed(self, deadline_ns: int) -> None:
        """The lease runs until ``deadline_ns``: use it when the kernel has dropped what is to be dropped."""
        self._deadline_ns = deadline_ns
        if not self._pending:
            self._use_deadline()
        elif self._task is None:
            self._start()
        self._orphans.retry()

    def _use_deadline(self) -> None:
        """Nothing is pending: use the lease, or first bring up to date what the kernel reads by itself."""
        if self._passthrough.is_stale:
            self._refresh_soon()
        else:
            self._lease.move(self._deadline_ns)

    async def settle(self) -> None:
        """Wait until nothing is pending."""
        while running := self._breaking | {task for task in (self._task, self._refreshing) if task and not task.done()}:
            await asyncio.wait(running)

    def _drop_everything(self) -> InodeSet:
        """Drop all there is; return the files that the kernel may have pages of."""
        self._lease.move(0)
        paged, listed, told = (each.take() for each in (self._feeder.paged, self._feeder.listed, self._feeder.told))
        self._feeder.drop_everything()
        self._directories.forget_everything()
        self._writer.everything_changed()
        self._opened.clear()
        self._passthrough.changed_elsewhere(None)
        self._later(lambda: self._kernel.everything(paged, listed, told))
        return paged

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
            self._use_deadline()
        except Exception as error:
            _log.error("what others changed cannot be dropped, so the lease is not used: %s", error)
        finally:
            self._task = None

    def _refresh_soon(self) -> None:
        """Bring what the kernel reads by itself up to date, as soon as the change that was made way for is made."""
        if self._passthrough.is_stale and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh(), name="refresh")

    async def _refresh(self) -> None:
        try:
            await self._passthrough.refresh()
            if not self._pending:
                self._lease.move(self._deadline_ns)
            while self._passthrough.is_stale:
                await asyncio.sleep(_REFRESH_S)
                await self._passthrough.refresh()
        except (Refused, Disconnected, StoreError) as error:
            _log.warning("what others changed is not yet in the files that the kernel reads: %s", error)


def _then(call: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        call()

    return work
