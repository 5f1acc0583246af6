"""The parts that answer a mount's requests, put together and taken apart again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from fuseclient import levels
from fuseclient.config import WorkerConfig
from fuseclient.data import passthrough
from fuseclient.data.compaction import Compactor
from fuseclient.data.objects import StoreError, open_store
from fuseclient.data.ranges import Ranges
from fuseclient.data.unused import UnusedObjects
from fuseclient.data.writer import Writer
from fuseclient.worker import warming
from fuseclient.worker.changes import Changes, OldPages, OpenedVersions
from fuseclient.worker.closings import Closings
from fuseclient.worker.committing import Committing
from fuseclient.worker.content_ahead import ContentAhead
from fuseclient.worker.creations import Creations, Made, Ordered
from fuseclient.worker.directories import WINDOW, Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.invalidation import Invalidator, Kernel
from fuseclient.worker.known import Known
from fuseclient.worker.lease import Lease
from fuseclient.worker.lock_store import LockStore
from fuseclient.worker.locks import Locks
from fuseclient.worker.operations import Operations, Parts
from fuseclient.worker.orphans import Orphans
from fuseclient.worker.places import Places
from fuseclient.worker.reading import ReadPath
from fuseclient.worker.removals import Removals
from fuseclient.worker.returns import Returns
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.session import Acknowledge, Session
from fuseclient.worker.siblings import Siblings
from fuseclient.worker.told_lately import ToldLately
from fuseclient.worker.too_large import TooLarge
from fuseclient.worker.warming import Walks
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

#: Content that one directory fetch may bring, at most, in bytes; and at most this part of the pages.
_FETCH_DATA: Final = 16 * 1024 * 1024
_FETCH_SHARE: Final = 4
_PAGE: Final = 4096


class MountKernel(Kernel, passthrough.Kernel, Protocol):
    """What the parts need of :class:`~fuseclient.worker.notifier.Notifier`."""


class CannotStart(Exception):
    """The worker cannot serve; the text is one line for the user."""


class Mount:
    """A mount as its worker sees it: :meth:`open`, ``operations``, ``ranges`` and :meth:`close`."""

    operations: Operations
    ranges: Ranges

    def __init__(self, config: WorkerConfig, cache: Cache, kernel: MountKernel) -> None:
        self._config = config
        self._cache = cache
        self._notifier = kernel
        self._kernel = Invalidator(kernel, self._is_written)
        self.locks = Locks(cache, LockStore(config.locks_fd))
        self._changes: Changes | None = None
        #: What the session told while it was being opened, when there was nothing yet to tell.
        self._early: list[Callable[[Changes], None]] = []
        self._session = Session(
            config.address,
            config.volume,
            client=f"{socket.gethostname()}:{config.options.mountpoint}"[:256],
            on_changes=lambda renewed: self._tell(lambda changes: changes.apply(renewed)),
            on_renewed=lambda deadline_ns: self._tell(lambda changes: changes.renewed(deadline_ns)),
            on_lost=self._lost,
            on_break=self._broken,
            on_restarted=lambda: self._tell(lambda changes: changes.restarted()),
            writing=lambda: self._writer.open_inodes()[: wire.MAX_OPEN] if self._changes is not None else [],
            on_connected=lambda connection, resumed: self.locks.connected(connection, resumed=resumed),
            check_change=self._check_change,
            resume=bytes.fromhex(config.session) if config.session else None,
            known=Known(config.address, config.metaservers_fd),
        )
        self.locks.session = self._session

    def _check_change(self, request: wire.Request) -> None:
        self.locks.check_change(request)
        if self._changes is not None:
            self._removals.check(request)

    def _lost(self) -> None:
        self.locks.session_lost()
        self._tell(lambda changes: changes.lost())

    def _is_written(self, ino: int) -> bool:
        return self._changes is not None and self._writer.is_open(ino)

    def _broken(self, told: wire.Break, acknowledge: Acknowledge) -> None:
        """A break comes; if this worker has begun nothing yet, all there is are the maps of the one before it."""
        if self._changes is not None:
            self._changes.broken(told, acknowledge)
            return
        for parent, name in told.names:
            self._cache.drop_name(parent, name)
        for ino in told.inodes:
            self._cache.drop_inode(ino)
        if told.everything or told.joined:
            self._cache.bump_epoch()
            self._early.append(lambda changes: changes.apply(wire.Renewed(100, 0, [], [], True)))
        self._early_break = asyncio.create_task(self._drop_early(told, acknowledge))

    async def _drop_early(self, told: wire.Break, acknowledge: Acknowledge) -> None:
        if told.everything or told.joined:
            await self._kernel.everything(())
        await self._kernel.drop(told.names, told.inodes)
        still_open = [ino for ino in told.inodes if self._cache.is_open(ino)]
        self._tell(lambda changes: changes.suspect(still_open))
        acknowledge(still_open)

    def _tell(self, what: Callable[[Changes], None]) -> None:
        if self._changes is None:
            self._early.append(what)
        else:
            what(self._changes)

    async def open(self) -> None:
        """Open the session and the store, and make all that hangs on them; raise :exc:`CannotStart`."""
        try:
            opened = await self._session.open()
            self._store = open_store(opened.store)
        except (Refused, Disconnected, StoreError, ValueError) as error:
            await self._session.close()
            raise CannotStart(str(error)) from error
        self._assemble(opened)
        await self._reading.start()
        unused = UnusedObjects(
            self._session, self._store, opened.lease_ms / 1000, lambda: self._writer.uncommitted_bytes > 0
        )
        self._cleaning = asyncio.create_task(unused.run(), name="unused objects")
        self._compacting = asyncio.create_task(self._compactor.run(), name="compaction")
        self._returning = asyncio.create_task(self._returns.run(), name="returns")

    def _assemble(self, opened: wire.SessionOpened) -> None:
        config, cache, session = self._config, self._cache, self._session
        open_handles: Counter[int] = Counter()
        self._lease = lease = Lease(cache, config.options.kernel_ttl_s)
        kernel = self._kernel
        old_pages = OldPages(kernel)
        feeder = Feeder(
            cache,
            lambda ino: self._is_written(ino) or ino in kernel.dropping,
            writes_any=lambda: (self._changes is not None and self._writer.count > 0) or bool(kernel.dropping),
            inherits=config.session is not None and config.maps is not None,
            on_old_pages=old_pages.drop,
        )
        old_pages.feeder = feeder

        def is_alone() -> bool:
            return session.alone and lease.left_s() > 0

        def is_lazy() -> bool:
            return session.opened.lazy

        def removed_in_vain(lost: wire.RemovedName) -> None:
            feeder.drop_name(lost.parent, lost.name)
            feeder.drop_inode(lost.parent)
            feeder.drop_inode(lost.ino)
            kernel.doubt_later([(lost.parent, lost.name)], [lost.parent, lost.ino])
            writer.made_in_vain()

        removals = self._removals = Removals(
            session,
            feeder,
            may_wait=lambda: is_lazy() and is_alone(),
            is_busy=self._is_written,
            when_lost=removed_in_vain,
        )
        committing = Committing(removals, feeder)
        writer = self._writer = Writer(
            committing,
            self._store,
            opened.inline_limit,
            lambda changed: committing.committed(changed, writer.changed_elsewhere),
            is_lazy=is_lazy,
            changes=lambda: session.changes,
            took_over=config.session is not None,
        )
        writer.hooks.is_alone = is_alone

        def made_in_vain(made: Made, ino: int) -> None:
            feeder.drop_name(made.parent, made.name)
            feeder.drop_inode(made.parent)
            feeder.drop_inode(ino)
            kernel.doubt_later([(made.parent, made.name)], [made.parent, ino])

        creations = self._creations = Creations(
            removals,
            feeder,
            is_alone=is_alone,
            is_lazy=is_lazy,
            when_lost=made_in_vain,
            when_closed_lost=writer.made_in_vain,
        )
        creations.publish = writer.publish
        writer.hooks.held_files = creations
        ordered = Ordered(removals, creations)
        self._compactor = Compactor(ordered, self._store, feeder.drop_inode)
        writer.hooks.when_laid = self._compactor.laid
        writer.hooks.when_given_up = kernel.drop_pages_later

        def changed(attributes: wire.Attributes) -> None:
            writer.observe(attributes)
            creations.observe(attributes)

        feeder.on_changed = changed
        feeder.on_overtaken = writer.note
        feeder.overlay = lambda attributes: removals.overlay(creations.overlay(attributes))
        feeder.is_shown = lambda attributes: attributes.ino not in kernel.dropping and writer.show(attributes)
        writer.hooks.when_touched = feeder.written

        told_lately = ToldLately(asyncio.get_running_loop().time)

        def is_open(ino: int) -> bool:
            return ino in open_handles or cache.is_open(ino) or writer.is_open(ino) or ino in told_lately

        orphans = self._orphans = removals.orphans = Orphans(ordered, is_open)
        room = cache.room
        siblings = Siblings(cache.is_used, room.entries // 2, room.pages * _PAGE // 2)
        places = Places()
        self._directories = directories = Directories(
            ordered,
            feeder,
            window=_window(config),
            data_budget=_data_budget(config),
            is_live=lambda: lease.left_s() > 0,
            siblings=siblings,
            places=places,
            too_large=TooLarge(room.entries),
        )
        versions = OpenedVersions()

        def is_in_use(ino: int) -> bool:
            return is_open(ino) or ino in kernel.dropping or ino in kernel.busy or creations.has_below(ino)

        self._returns = Returns(session, feeder, directories, cache, kernel, versions, is_in_use)
        self._reading = reading = ReadPath(
            config, opened, caller=ordered, store=self._store, feeder=feeder, writer=writer, lease=lease,
            cache=cache, kernel=self._notifier,
        )  # fmt: skip
        drop_layout = feeder.on_drop

        def dropped(ino: int | None) -> None:
            drop_layout(ino)
            creations.forget(ino)

        feeder.on_drop = dropped
        through = reading.passthrough
        self._changes = Changes(
            feeder, directories, writer, orphans, lease, versions, kernel, through, removals, is_open
        )
        self._ahead = None if config.maps is None else ContentAhead(ordered, feeder, places, _data_budget(config))
        if self._ahead is not None:
            feeder.on_pages += [places.page, siblings.page]
        self._join_locks()
        self._walks = Walks(
            warming.Parts(
                session=ordered,
                feeder=feeder,
                directories=directories,
                cache=cache,
                reader=reading.reader,
                keeper=reading.keeper,
                data_budget=_data_budget(config),
            )
        )
        if opened.resumed and opened.alone:
            # The worker before may have shown what it had not told the metaserver of: that is lost with it.
            self._changes.woken()
        for each in self._early:
            each(self._changes)
        changing = Committing(ordered, feeder)
        self.ranges = Ranges(
            changing,
            writer,
            reading.reader,
            committed=lambda changed: changing.committed(changed, writer.changed_elsewhere),
            write_back=kernel.drop_pages,
        )
        self._closings = Closings(session)
        self.operations = Operations(
            Parts(
                session=ordered,
                feeder=feeder,
                directories=directories,
                writer=writer,
                creations=creations,
                removals=removals,
                reader=reading.reader,
                orphans=orphans,
                closings=self._closings,
                lease=lease,
                cache=cache,
                opened=versions,
                open_handles=open_handles,
                told_lately=told_lately,
                passthrough=through,
                on_read=reading.read,
                on_small_read=self._ahead.read if self._ahead is not None else lambda ino: None,
                generation=config.generation,
                kernel=kernel,
                locks=self.locks,
                may_remember=config.maps is not None,
                opens_nothing=config.opens_nothing,
            )
        )

    def _join_locks(self) -> None:
        """Locks have to do with data: see locks.py."""
        writer, kernel, through = self._writer, self._kernel, self._reading.passthrough

        async def publish(ino: int) -> None:
            await through.absorb(ino)
            await writer.publish(ino)

        async def refresh(ino: int) -> None:
            await kernel.settled(ino)
            if through.has(ino) and through.is_stale:
                await through.refresh()

        self.locks.publish, self.locks.refresh, self.locks.forfeit = publish, refresh, writer.forfeit

    def woken(self) -> None:
        """The machine was suspended until now."""
        self._tell(lambda changes: changes.woken())
        self._session.renew_now()

    @property
    def session_id(self) -> bytes:
        """The session to be resumed by the next worker."""
        return self._session.id or b""

    @property
    def answers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
        """What answers the channel's questions."""
        return {"figures": lambda _: self.figures(), "warmup": self._walks.answer}

    async def figures(self) -> dict[str, Any]:
        """Return what the channel shows of its worker, and needs to know to start the next."""
        cache = await asyncio.to_thread(self._cache.figures)
        return {
            "session": self.session_id.hex(),
            "lease_remaining_s": self._lease.left_s(),
            "uncommitted_bytes": self._writer.uncommitted_bytes,
            "files_being_written": self._writer.count,
            "filling": cache.get("filling", {}),
            "levels": levels.figures(),
            "directories": self._directories.figures(),
            "content_ahead": self._ahead.figures() if self._ahead is not None else {},
            "leases": self._returns.figures(),
            "new_files": self._creations.figures(),
            "removed_names": self._removals.figures(),
            "compaction": self._compactor.figures(),
            "locks": self.locks.figures(),
            **self._reading.figures(),
        }

    async def close(self, *, farewell: bool = True) -> None:
        """Commit all that was written, and end the session; without a ``farewell`` it ends with its lease."""
        self._cleaning.cancel()
        self._compacting.cancel()
        self._returning.cancel()
        await self._walks.close()
        if self._ahead is not None:
            await self._ahead.close()
        await self._reading.passthrough.absorb_all()
        await self._writer.flush_all()
        with contextlib.suppress(Refused, Disconnected):
            await self._removals.settle()
        await self._closings.close()
        self._orphans.close()
        await self._session.close(farewell=farewell)
        await self._reading.close()
        self._store.close()


def _window(config: WorkerConfig) -> int | None:
    return None if config.maps is None else WINDOW


def _data_budget(config: WorkerConfig) -> int:
    """Return how many bytes of content one fetch may bring: a part of what the pages hold."""
    return 0 if config.maps is None else min(_FETCH_DATA, config.maps.page_count * _PAGE // _FETCH_SHARE)
