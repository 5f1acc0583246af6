"""``bpfuse fsck``: the metaserver's check of its engine, joined with a look into the store.

The engine is checked by a child process, ``python -m metaserver fsck``, which has it to itself. It tells which slices
there are; the store's objects are compared with them here, and the child is told which are lost, since it alone knows
of which files they were.
"""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from fuseclient import runtime
from fuseclient.data.objects import ObjectStore
from fuseclient.errors import UserError
from fuseclient.maintenance import job, stores
from fuseclient.maintenance.comparison import Comparer, Comparison, Needed
from fuseclient.maintenance.job import Amount, Finding, Job, Message, Totals
from fuseclient.volumes import Embedded, Remote, parse_volume

#: The exit code of a check that could not be made: 1 is that of one that found something.
CANNOT_CHECK: Final = 2
#: Ids in one message, and objects that are deleted at once.
_BATCH: Final = 1000


class Listener(Protocol):
    """Who is told what a check finds."""

    def progress(self, what: str, done: int, total: int) -> None:
        """So much of ``what`` is done; ``total`` is an estimate, 0 if there is none."""

    def finding(self, finding: Finding) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do. ``engine``: the URL of the engine of a volume that is named ``bpfuse://...``."""

    repair: bool = False
    #: Look into the store, too; and read and check every object that is needed.
    store: bool = True
    verify: bool = False
    engine: str | None = None
    #: Repair even if not one object that is needed is there.
    accept_empty_store: bool = False


@dataclass
class Outcome:
    """What a check came to."""

    url: str
    found: int = 0
    repaired: int = 0
    totals: Totals | None = None
    #: Of the store; ``None``: it was not looked into.
    objects: Amount | None = None
    #: Objects that wait to be deleted (``bpfuse gc``).
    unused: Amount = field(default_factory=Amount)

    @property
    def remaining(self) -> int:
        return self.found - self.repaired


async def check(url: str, options: Options, listener: Listener) -> Outcome:
    """Check a volume that nobody has mounted; raise :exc:`UserError` (exit code 2) if that cannot be done."""
    logging.getLogger("fuseclient").addHandler(logging.NullHandler())  # what it would say is a finding here
    flags = ["--repair"] * options.repair + ["--store"] * options.store
    try:
        volume = parse_volume(url)
        engine_url = _engine_of(volume, options.engine)
        async with job.started("fsck", engine_url, volume.name, flags) as child:
            return await _Check(Outcome(volume.url), child, options, listener).run()
    except UserError as error:
        raise UserError(error.message, CANNOT_CHECK) from None


def _engine_of(volume: Embedded | Remote, engine: str | None) -> str:
    if isinstance(volume, Remote):
        if engine is None:
            raise UserError(
                f"{volume.url} is checked without its metaserver, which changes it all the time: stop that, and run"
                f" on its machine: bpfuse fsck {volume.url} --engine lmdb:///directory (bpfuse gc works meanwhile, too)"
            )
        return engine
    if engine is not None:
        raise UserError(f"--engine is for volumes of a metaserver; {volume.url} has its own")
    if not volume.is_formatted():
        raise UserError(f"{volume.directory} is not a volume; make one with: bpfuse format {volume.url}")
    for record in runtime.live_records():
        if record.url == volume.url:
            raise UserError(f"{volume.url} is mounted at {record.mountpoint}: unmount it first")
    return volume.engine_url


class _Check:
    def __init__(self, outcome: Outcome, child: Job, options: Options, listener: Listener) -> None:
        self._outcome = outcome
        self._child = child
        self._options = options
        self._listener = listener
        self._store_url = ""
        self._messages = child.messages()

    async def run(self) -> Outcome:
        with contextlib.ExitStack() as stack:
            comparison: Comparison | None = None
            store: ObjectStore | None = None
            async for message in self._messages:
                if message.volume is not None:
                    self._store_url = message.volume.store
                    if self._options.store:
                        store = stack.enter_context(stores.opened(self._store_url))
                        await stores.must_belong(store, self._store_url, bytes.fromhex(message.volume.identity))
                elif message.slices is not None and store is not None:
                    comparison = await self._compare(store, message)
                else:
                    self._hear(message)
            if comparison is not None and store is not None:
                await self._clean(store, comparison)
        return self._outcome

    def _hear(self, message: Message) -> None:
        if message.progress is not None:
            self._listener.progress(*message.progress)
        elif message.finding is not None:
            self._find(message.finding)
        elif message.summary is not None:
            self._outcome.totals = message.summary

    def _find(self, finding: Finding) -> None:
        self._outcome.found += 1
        self._outcome.repaired += finding.repaired
        self._listener.finding(finding)

    # The store

    async def _compare(self, store: ObjectStore, first: Message) -> Comparison:
        """Compare the store with the slices that the child tells of, and tell it what is lost."""
        result = await Comparer(
            store,
            self._needed(first),
            lambda done: self._listener.progress("objects", done, 0),
            verify=self._options.verify,
        ).run()
        self._check_plausible(result)
        await self._tell(missing=result.missing)
        await self._tell(damaged=result.damaged)
        await self._child.send(last=result.last)
        self._outcome.objects, self._outcome.unused = result.objects, result.unused
        return result

    def _check_plausible(self, result: Comparison) -> None:
        """Raise :exc:`UserError` rather than give up all data because the store is not the one that it was."""
        if not self._options.repair or self._options.accept_empty_store:
            return
        if result.missing and result.objects.count == len(result.leaked_ids):
            raise UserError(
                f"the store {self._store_url} is empty of all {len(result.missing)} objects that files need: nothing is"
                " given up; is it the right one, and mounted? If they are lost indeed: --accept-empty-store"
            )

    async def _needed(self, first: Message) -> AsyncIterator[Needed]:
        """Yield the slices of this message and of those that follow, up to the empty one."""
        message = first
        while message.slices:
            for each in message.slices:
                yield each
            message = await anext(self._messages)
            while message.slices is None:
                self._hear(message)
                message = await anext(self._messages)

    async def _tell(self, **lost: array[int]) -> None:
        for what, ids in lost.items():
            for start in range(0, len(ids), _BATCH):
                await self._child.send(**{what: list(ids[start : start + _BATCH])})

    async def _clean(self, store: ObjectStore, comparison: Comparison) -> None:
        """Tell of the objects that belong to nothing and, to repair that, delete them."""
        sizes = comparison.leaked_sizes
        for start in range(0, len(comparison.leaked_ids), _BATCH):
            batch = comparison.leaked_ids[start : start + _BATCH]
            whats = [f"has {size} bytes, and no file uses it" for size in sizes[start : start + _BATCH]]
            await self._delete(store, "leaked-object", batch, whats)
        for start in range(0, len(comparison.unfinished_ids), _BATCH):
            batch = comparison.unfinished_ids[start : start + _BATCH]
            await self._delete(store, "unfinished-object", batch, ["was never stored to its end"] * len(batch))

    async def _delete(self, store: ObjectStore, kind: str, batch: array[int], whats: list[str]) -> None:
        if self._options.repair:
            await store.delete(batch)
        for slice_id, what in zip(batch, whats, strict=True):
            self._find(Finding(kind, None, store.where(slice_id), what, self._options.repair))
