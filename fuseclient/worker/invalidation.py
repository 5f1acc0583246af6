"""Has the kernel drop what others are about to change, without ever waiting for what waits for that change.

Dropping an inode's attributes waits for nothing, dropping its pages for reads of them in flight, which wait for no
change. Dropping a name waits for the directory's lock, so for a change of this mount that is in flight there, and that
one may wait at the metaserver for the very change that is to be made way for. So where one is known to be in flight,
and when dropping a name takes too long, all names are expired instead, which takes no lock: each is then asked for
again, and answered by BPF.

A directory's listing goes with any of its names, and with it pages that the kernel keeps of it. A listing that is being
read there may put them back, with what it was told before, as long as it has the directory's lock: so the lock is
waited for first, by dropping a name; and if that takes too long, the pages are dropped once more when it is had. One
that was begun while a change elsewhere was under way is out of date as soon as that is made, and nobody waits for it to
be dropped; but the kernel uses what it keeps only when it was told of the end, and before that the pages are dropped.

Pages of a file that is open for writing here are dropped behind the caller's back: a write holds its page while it
waits for the metaserver. Until they are gone the inode must not enter the maps; ``dropping`` tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Final, Protocol

from metaserver.wire import ROOT_INO

_log = logging.getLogger(__name__)

#: Above this many names, all of them are expired at once.
NAMES_ONE_BY_ONE: Final = 256
#: Notifications on their way at once.
_AT_ONCE: Final = 64
#: Seconds after which a name that cannot be dropped is expired with all others, if a change is what it waits for, and
#: how many times as long what is not known is waited for.
_PATIENCE_S: Final = 0.03
_TURNS: Final = 30
#: Seconds between looks whether the kernel knows a file of whose making it is being told.
_MAKING_S: Final = 0.001
#: What no entry is called: dropping it waits for the directory's lock, and drops nothing.
_NO_NAME: Final = b"/"


class Kernel(Protocol):
    """What this needs of :class:`~fuseclient.worker.notifier.Notifier`."""

    async def invalidate_inode(self, ino: int) -> bool: ...
    async def invalidate_written(self, ino: int) -> bool: ...
    async def invalidate_unused(self, inos: array[int]) -> None: ...
    async def invalidate_attributes(self, ino: int) -> bool: ...
    async def invalidate_entry(self, parent: int, name: bytes) -> None: ...
    async def increment_epoch(self) -> bool: ...


class Invalidator:
    """The kernel's caches, for dropping from. ``is_written`` says whether a file is open for writing here."""

    def __init__(self, kernel: Kernel, is_written: Callable[[int], bool] = lambda ino: False) -> None:
        self._kernel = kernel
        self._is_written = is_written
        #: Changes of this mount in flight, by the directory or file whose lock they have.
        self.busy: Counter[int] = Counter()
        #: Files of whose making the kernel may not have been told yet: it has asked for nothing of them.
        self.making: set[int] = set()
        #: Inodes whose pages are being dropped behind the caller's back.
        self.dropping: Counter[int] = Counter()
        #: Set when there are fewer of them.
        self._dropped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def drop(self, names: Sequence[tuple[int, bytes]], inodes: Sequence[int]) -> None:
        """Return when the kernel has dropped these names and inodes. Names first: a lookup in flight is waited for."""
        await self._drop_names(names)
        listings = {parent for parent, _ in names}.difference(inodes)
        await _in_batches(self._kernel.invalidate_inode(ino) for ino in listings)
        unknown = await _in_batches(self._drop_inode(ino) for ino in inodes)
        if unknown:
            # A lookup that was answered before may be about to make the inode known, with what is out of date.
            await self._kernel.increment_epoch()

    async def _drop_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        if not names:
            return
        in_the_way = len(names) > NAMES_ONE_BY_ONE or any(self.busy[parent] for parent, _ in names)
        expired = in_the_way and await self._kernel.increment_epoch()
        if expired:
            names = self._one_of_each(names)
        one_by_one = asyncio.ensure_future(_in_batches(self._kernel.invalidate_entry(*each) for each in names))
        if await self._are_dropped(one_by_one, {parent for parent, _ in names}):
            one_by_one.result()
        elif expired or await self._kernel.increment_epoch():
            self._in_background(self._drop_late(one_by_one, {parent for parent, _ in names}))
        else:
            await one_by_one

    async def _are_dropped(self, dropping: asyncio.Future[bool], directories: Iterable[int]) -> bool:
        """Wait for names to be dropped, in vain as soon as a change is seen to have the lock of their directory.

        Whoever else has it, lists or looks up, and waits for nobody; what was told him must not outlive the wait.
        """
        for _ in range(_TURNS):
            await asyncio.wait({dropping}, timeout=_PATIENCE_S)
            if dropping.done() or any(self.busy[directory] for directory in directories):
                break
        return dropping.done()

    def _one_of_each(self, names: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Return a name of each directory whose lock may be had by listings. A change in flight has it for itself."""
        return [(parent, name) for parent, name in dict(names).items() if not self.busy[parent]]

    async def _drop_late(self, names: Awaitable[object], directories: Iterable[int]) -> None:
        """Names took too long to drop: drop their directories' pages when it is done, and keep these out until then."""
        try:
            with self.keeping_out(directories):
                await names
                await _in_batches(self._kernel.invalidate_inode(ino) for ino in directories)
        except OSError as error:
            _log.warning("a name was dropped late, or not: %s", error)

    async def _drop_inode(self, ino: int) -> bool:
        """Drop an inode; say whether the kernel did not know it."""
        if not self._is_written(ino):
            return not await self._kernel.invalidate_inode(ino)
        self.drop_pages_later(ino)
        while not await self._kernel.invalidate_attributes(ino):
            if ino not in self.making:
                return True
            await asyncio.sleep(_MAKING_S)  # the reply is on its way, with attributes that are to be kept
        return False

    async def doubt(self, names: Sequence[tuple[int, bytes]], inodes: Iterable[int]) -> None:
        """Have the kernel ask again for what a change of this mount was to change, which may have been made.

        Takes no lock: the request that is to be answered holds the directory's.
        """
        try:
            if names:
                await self._kernel.increment_epoch()
            await _in_batches(self._kernel.invalidate_attributes(ino) for ino in inodes)
        except OSError as error:
            _log.error("what may have been changed cannot be dropped: %s", error)

    def doubt_later(self, names: Sequence[tuple[int, bytes]], inodes: Iterable[int]) -> None:
        """Have the kernel ask again for these, soon."""
        self._in_background(self.doubt(names, inodes))

    async def everything(
        self, paged: Iterable[int], listed: Iterable[int] = (), told: Iterable[int] = (ROOT_INO,)
    ) -> None:
        """Return when the kernel has dropped every name, the files and directories that it may have pages of, and the
        attributes of what else it was told of: to the root, and to what is open, no name leads.
        """
        if not await self._kernel.increment_epoch():
            _log.warning("this kernel cannot expire all names at once; they expire with their time to live")
        await _in_batches(self._kernel.invalidate_attributes(ino) for ino in told)
        await _in_batches(self._drop_inode(ino) for ino in paged)
        await _in_batches(self._drop_listing(ino) for ino in listed)

    async def before_end(self, ino: int) -> None:
        """A directory's listing is about to be told to be at its end, and is kept by the kernel from then on.

        If it is being dropped, parts of it may be out of date: what there is of them must go before. The kernel takes
        a listing that lacks its pages for none.
        """
        if ino in self.dropping:
            await self._kernel.invalidate_inode(ino)

    async def _drop_listing(self, ino: int) -> None:
        if not self.busy[ino]:
            await self._drop_names([(ino, _NO_NAME)])
        await self._kernel.invalidate_inode(ino)

    async def drop_unused(self, inos: array[int]) -> None:
        """Return when the kernel has dropped what it has of inodes that nobody here has open, names aside."""
        await self._kernel.invalidate_unused(inos)

    @contextlib.contextmanager
    def keeping_out(self, inodes: Iterable[int]) -> Iterator[None]:
        """Have these count as being dropped, for as long as the body runs."""
        kept = list(inodes)
        self.dropping.update(kept)
        try:
            yield
        finally:
            for ino in kept:
                self.dropping[ino] -= 1
                if not self.dropping[ino]:
                    del self.dropping[ino]
            self._dropped.set()

    async def settled(self, ino: int) -> None:
        """Return when no pages of a file are being dropped behind anybody's back."""
        while ino in self.dropping:
            self._dropped.clear()
            await self._dropped.wait()

    async def drop_pages(self, ino: int) -> None:
        """Return when the kernel has written back and dropped an inode's pages."""
        if self._is_written(ino):
            await self._kernel.invalidate_written(ino)
        else:
            await self._kernel.invalidate_inode(ino)

    def drop_pages_later(self, ino: int) -> None:
        """Have the kernel drop an inode's pages, of a file that is written or has been; keep it out of the maps."""
        self._in_background(self._drop_pages(ino))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drop_pages(self, ino: int) -> None:
        with self.keeping_out([ino]):
            try:
                await self._kernel.invalidate_written(ino)
            except OSError as error:
                _log.error("the pages of inode %d cannot be dropped: %s", ino, error)


async def _in_batches(calls: Iterable[Awaitable[object]]) -> bool:
    """Await many, some at once; raise the first error when its batch is through, else say whether any was true."""
    remaining, any_true = iter(calls), False
    while batch := list(itertools.islice(remaining, _AT_ONCE)):
        results = await asyncio.gather(*batch, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
            any_true = any_true or bool(result)
    return any_true
