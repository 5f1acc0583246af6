"""Inodes that were unlinked, here or elsewhere while they were open here, and live on until nobody uses them.

The kernel says by FORGET that it uses an inode no more. But handles that the BPF program gave out are counted by a
hash of the inode, and a RELEASE can be handled after the FORGET; so an inode that is forgotten and seems open waits
for its last close or for the next renewal. What is never reaped here is reaped when the session ends.

Another client that unlinks an inode asks first whether it is open here (see changes.py), and from then on it may be an
orphan: it is reaped with its last close, which does no harm if it has links.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final

from fuseclient.data.caller import Caller
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.told_lately import WITHIN_S
from metaserver import wire

_log = logging.getLogger(__name__)

BATCH: Final = 64
BATCH_S: Final = 0.1


class Orphans:
    """Reaps orphans in batches: of ``BATCH`` inodes, or of what came in ``BATCH_S`` seconds."""

    def __init__(self, caller: Caller, is_open: Callable[[int], bool]) -> None:
        self._caller = caller
        self._is_open = is_open
        self._orphans: set[int] = set()
        #: Forgotten by the kernel, but perhaps open.
        self._waiting: set[int] = set()
        self._due: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        #: Of those that may only have been about to be opened.
        self._looks: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, ino: int) -> bool:
        return ino in self._orphans

    def add(self, ino: int) -> None:
        """An inode's last link was removed."""
        self._orphans.add(ino)

    def suspect(self, ino: int) -> None:
        """An inode that is open here may be about to lose its last link elsewhere."""
        self._due.discard(ino)
        if ino not in self._orphans:
            self._orphans.add(ino)
            self._waiting.add(ino)
            # It may only have been about to be opened: see told_lately.py.
            self._looks[ino] = asyncio.get_running_loop().call_later(WITHIN_S, self._look, ino)

    def _look(self, ino: int) -> None:
        self._looks.pop(ino, None)
        self.closed(ino)

    def linked(self, ino: int) -> None:
        """An inode has a link (again)."""
        self._orphans.discard(ino)
        self._waiting.discard(ino)
        self._due.discard(ino)

    def forgotten(self, inos: Iterable[int]) -> None:
        """The kernel uses these inodes no more; most are no orphans."""
        for ino in inos:
            if ino in self._orphans:
                self._waiting.add(ino)
                self.closed(ino)

    def closed(self, ino: int) -> None:
        """A handle of the inode was released."""
        if ino in self._waiting and not self._is_open(ino):
            self._waiting.discard(ino)
            self._orphans.discard(ino)
            self._due.add(ino)
            self._schedule()

    def retry(self) -> None:
        """Look again at those that seemed open, and try again what failed."""
        for ino in list(self._waiting):
            self.closed(ino)
        if self._due:
            self._schedule()

    def clear(self) -> None:
        """The session has ended, and all its orphans with it."""
        for each in (self._orphans, self._waiting, self._due):
            each.clear()

    def close(self) -> None:
        """Reap no more: what is left is reaped when the session ends."""
        for each in self._looks.values():
            each.cancel()
        self._looks.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        if len(self._due) >= BATCH:
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BATCH_S, self._start)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._due:
            batch, self._due = self._due, set()
            task = asyncio.create_task(self._reap(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _reap(self, batch: set[int]) -> None:
        try:
            await self._caller.call(wire.Reap(sorted(batch)), wire.Done)
        except (Refused, Disconnected) as error:
            _log.warning("%d unlinked inodes are not deleted for now: %s", len(batch), error)
            self._due |= batch
