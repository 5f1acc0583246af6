"""The rounds of a check, and what it says meanwhile."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

from metaserver import events, garbage, keys
from metaserver.engine.base import Engine, Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.fsck import losses, repairs, slices
from metaserver.fsck.findings import Finding, Kind, Queue
from metaserver.fsck.scan import Scan, Totals
from metaserver.fsck.sorting import Sorter
from metaserver.inodes import Edit
from metaserver.records import unpack_number
from metaserver.volumes import Context, Volume

#: Rounds until what is still wrong is left as it is.
_ROUNDS: Final = 12
#: Repairs that are on their way at once.
_AT_ONCE: Final = 64
#: Seconds between two reports of progress; the clock is looked at every so many rows.
_PROGRESS_S: Final = 0.2
_PROGRESS_ROWS: Final = 512
#: Slices that one message tells of.
_SLICES_TOLD: Final = 1000

Losses = Iterable[tuple[int, int]]


class Interrupted(Exception):
    """Whoever started the check wants it to end."""


class Listener(Protocol):
    """Who is told what a check finds."""

    def progress(self, what: str, done: int, total: int) -> None:
        """So much of ``what`` is done; ``total`` is an estimate, 0 if there is none."""

    def finding(self, finding: Finding, repaired: bool) -> None: ...

    def slices(self, needed: list[tuple[int, int]]) -> None:
        """Slices by rising id with the bytes that are needed of their objects (-1: unused); an empty list ends them."""

    def losses(self) -> tuple[Losses, int]:
        """Return the lost objects by rising id, whether each is damaged (1) or missing (0), and the store's last id."""


class Check:
    """One check of a volume, with repairs if ``repair``. ``stop`` ends it soon by :exc:`Interrupted`."""

    def __init__(
        self, engine: Engine, volume: Volume, listener: Listener, stop: threading.Event, *, repair: bool
    ) -> None:
        self.totals = Totals()
        self.found = 0
        self.repaired = 0
        self._engine = engine
        self._volume = volume
        self._listener = listener
        self._stop = stop
        self._repair = repair
        self._has_begun = False
        self._ticks = itertools.count()
        self._told_s = 0.0

    async def run(self, *, store: bool) -> None:
        """Check the metadata and, if ``store``, ask the listener about the objects and look what their loss means."""
        scan = await (self._mend() if self._repair else self._scan(self._tell))
        try:
            self.totals = scan.totals
            if store:
                await self._check_store(scan)
        finally:
            scan.close()

    # Rounds

    async def _mend(self) -> Scan:
        """Scan and repair until nothing is found; return the last scan."""
        for left in reversed(range(_ROUNDS)):
            with Queue() as queue:
                scan = await self._scan(queue.add)
                if not queue:
                    break
                if not left:
                    for finding in queue:
                        self._tell(finding)
                    break
                scan.close()
                await self._begin_repairs()
                await self._apply(queue)
                await self._sweep()
        return scan

    async def _begin_repairs(self) -> None:
        """Tell those who follow the volume's events, once, that what comes now is not told one by one."""
        if not self._has_begun:
            await self._engine.write(lambda txn: events.record_repair(txn, self._volume, time.time_ns()))
            self._has_begun = True

    async def _scan(self, report: Callable[[Finding], None]) -> Scan:
        def body(snapshot: Snapshot) -> Scan:
            scan = Scan(snapshot, self._volume, report, self._tick)
            try:
                scan.run()
            except BaseException:
                scan.close()
                raise
            return scan

        return await self._engine.scan(body)

    async def _apply(self, findings: Iterable[Finding]) -> None:
        waiting = iter(findings)
        done = 0
        while batch := list(itertools.islice(waiting, _AT_ONCE)):
            self._check_stop()
            outcomes = await asyncio.gather(*map(self._apply_one, batch))
            for finding, repaired in zip(batch, outcomes, strict=True):
                if repaired:  # else it comes again in the next round
                    self._tell(finding, repaired=True)
            done += len(batch)
            self._progress("repairs", done, 0)

    async def _apply_one(self, finding: Finding) -> bool:
        def body(txn: Transaction) -> None:
            repairs.apply(self._edit(txn), finding.repair, finding.arguments)

        try:
            await self._engine.write(body)
        except Refused:
            return False
        return True

    async def _sweep(self) -> None:
        while await self._engine.write(lambda txn: garbage.sweep(txn, self._volume)):
            self._check_stop()

    def _edit(self, txn: Transaction) -> Edit:
        return Edit(txn, Context(self._volume, bytes(16), time.time_ns()))

    # Objects

    async def _check_store(self, scan: Scan) -> None:
        await self._engine.scan(functools.partial(self._tell_slices, scan.uses))
        lost, last = self._listener.losses()
        with Sorter(4) as sorted_losses, Queue() as queue:
            losses.sorted_losses(lost, scan.uses, sorted_losses)
            await self._engine.scan(
                lambda snapshot: self._find_losses(snapshot, sorted_losses, scan.links, last, queue)
            )
            for finding in queue:
                self._check_stop()
                if self._repair:
                    await self._begin_repairs()
                    await self._make_good(finding)
                self._tell(finding, repaired=self._repair)

    def _tell_slices(self, uses: Sorter, snapshot: Snapshot) -> None:
        for piece in _pieces(slices.needed(snapshot, self._volume, uses), _SLICES_TOLD):
            self._check_stop()
            self._listener.slices(piece)
        self._listener.slices([])

    def _find_losses(self, snapshot: Snapshot, lost: Sorter, links: Sorter, last: int, queue: Queue) -> None:
        for finding in losses.findings(snapshot, self._volume, lost, links):
            self._tick("losses", len(queue), 0)
            queue.add(finding)
        following = unpack_number(snapshot.get(keys.next_slice(self._volume.id)), 1)
        if following <= last:
            what = f"is {following}, and the store has object {last}"
            queue.add(Finding(Kind.WRONG_COUNTER, 0, "the next slice number", what, "raise_slices", [last + 1]))

    async def _make_good(self, finding: Finding) -> None:
        if finding.repair != losses.give_up.__name__:
            await self._apply_one(finding)
            return

        def body(txn: Transaction) -> bool:
            edit = self._edit(txn)
            more = losses.give_up(edit, *finding.arguments)
            edit.save()
            return more

        while await self._engine.write(body):
            self._check_stop()

    # Telling

    def _tell(self, finding: Finding, repaired: bool = False) -> None:
        self.found += 1
        self.repaired += repaired
        self._listener.finding(finding, repaired)

    def _tick(self, what: str, done: int, total: int) -> None:
        if next(self._ticks) % _PROGRESS_ROWS == 0:
            self._check_stop()
            self._progress(what, done, total)

    def _progress(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_S:
            self._told_s = now_s
            self._listener.progress(what, done, total)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted


def _pieces(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while piece := list(itertools.islice(items, size)):
        yield piece
