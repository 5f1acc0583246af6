"""What all operations of a mount are made of, and how they answer and change."""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from fuseclient.data.grants import Grant
from fuseclient.data.passthrough import Passthrough
from fuseclient.data.reader import Reader
from fuseclient.data.writer import Writer
from fuseclient.worker import handles
from fuseclient.worker.attributes import entry_of
from fuseclient.worker.changes import OpenedVersions
from fuseclient.worker.closings import Closings
from fuseclient.worker.creations import Creations
from fuseclient.worker.directories import Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.fetches import Session
from fuseclient.worker.guard import Token
from fuseclient.worker.invalidation import Invalidator
from fuseclient.worker.lease import Lease
from fuseclient.worker.locks import Locks
from fuseclient.worker.orphans import Orphans
from fuseclient.worker.removals import Removals
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.told_lately import ToldLately
from fuseclient.worker.xattrs import Xattrs
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the operations are made of."""

    session: Session
    feeder: Feeder
    directories: Directories
    writer: Writer
    creations: Creations
    removals: Removals
    reader: Reader
    orphans: Orphans
    closings: Closings
    lease: Lease
    cache: Cache
    opened: OpenedVersions
    kernel: Invalidator
    locks: Locks
    #: Handles given out by this worker and not yet released, by inode.
    open_handles: Counter[int]
    told_lately: ToldLately
    passthrough: Passthrough
    #: Told of each read that was answered from objects: of which file, and how many bytes.
    on_read: Callable[[wire.Attributes, int], None]
    #: Told of each small file whose beginning was not answered in the kernel.
    on_small_read: Callable[[int], None]
    #: Of the worker; part of its handles.
    generation: int
    #: False: each request is answered by the metaserver.
    may_remember: bool
    #: OPEN, OPENDIR and FLUSH are answered ENOSYS: the kernel sends no more of them.
    opens_nothing: bool


class Begun(NamedTuple):
    """A file that was made here, and is open; ``grant`` is what may be done to it without waiting."""

    opened: FileInfo
    entry: EntryAttributes
    grant: Grant


class Base(pyfuse3.Operations):
    """What every operation uses; made of ``parts``."""

    supports_dot_lookup = False

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._session = parts.session
        self._feeder = parts.feeder
        self._directories = parts.directories
        self._writer = parts.writer
        self._creations = parts.creations
        self._removals = parts.removals
        self._reader = parts.reader
        self._orphans = parts.orphans
        self._closings = parts.closings
        self._lease = parts.lease
        self._cache = parts.cache
        self._opened = parts.opened
        self._kernel = parts.kernel
        self._locks = parts.locks
        self._open_handles = parts.open_handles
        self._told_lately = parts.told_lately
        #: By thread, what was last answered so that the kernel looks again.
        self._looks_again: dict[int, tuple[int, bytes]] = {}
        self._serials = handles.Serials()
        self._passthrough = parts.passthrough
        self._on_read = parts.on_read
        self._on_small_read = parts.on_small_read
        self._generation = parts.generation % handles.GENERATIONS
        self._may_remember = parts.may_remember
        self._xattrs = Xattrs(parts.session, parts.feeder, parts.cache)
        self._opens_nothing = parts.opens_nothing
        #: Takes what was sent on the other socket (extra_ops.py) before the request at hand, writes above all.
        self.catch_up: Callable[[], None] = lambda: None
        #: Writing handles of earlier workers that are used here, and those of them whose loss was reported.
        self._adopted: set[int] = set()
        self._reported: set[int] = set()

    def _named(self, token: Token, parent: int, name: bytes, changed: wire.Changed) -> bool:
        """A name was given to the first inode of a reply: put both; say whether they may be kept."""
        ino = changed.attributes[0].ino
        fresh = self._feeder.fresh(token, parent, name, ino)
        self._feeder.changed(token, changed.attributes)
        self._feeder.named(token, parent, name, ino)
        return fresh

    @contextlib.asynccontextmanager
    async def _changing(self, *names: tuple[int, bytes], inodes: Sequence[int] = ()) -> AsyncIterator[Token]:
        """A change of this mount: gives the token for its reply.

        If it fails the names are dropped, because the kernel asked for it because of what it holds of them; and if it
        is not known whether it was made the inodes are, too, and the kernel is to ask for all of them again.
        """
        directories = [parent for parent, _ in names]
        locked = (*directories, *inodes)
        self._kernel.busy.update(locked)
        try:
            with self._feeder.begin() as token:
                yield token
        except (Refused, Disconnected) as error:
            for parent, name in names:
                self._feeder.drop_name(parent, name)
            if isinstance(error, Disconnected) or error.code is wire.ErrorCode.INTERNAL:
                for ino in locked:
                    self._feeder.drop_inode(ino)
                await self._kernel.doubt(names, locked)
            raise
        except BaseException:
            for parent, name in names:
                self._feeder.drop_name(parent, name)
            raise
        finally:
            self._kernel.busy.subtract(locked)
            for ino in locked:
                if not self._kernel.busy[ino]:
                    del self._kernel.busy[ino]

    def _note_orphan(self, attributes: wire.Attributes) -> None:
        if attributes.nlink == 0:
            self._orphans.add(attributes.ino)

    def _entry(self, attributes: wire.Attributes, fresh: bool = True) -> EntryAttributes:
        if fresh:
            self._feeder.tells(attributes)
        return entry_of(self._overlay(attributes), self._lease.ttl_s() if fresh else 0.0)

    def _overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return attributes as they will be when all that was done here is committed."""
        return self._creations.overlay(self._writer.overlay(attributes))

    def _changed_entry(self, attributes: wire.Attributes, fresh: bool = True) -> EntryAttributes:
        """Return what a change is answered with.

        The kernel takes such attributes whatever it was told to drop since the request was sent, so they are not for
        keeping: a break may overtake the reply on its way. The next to ask is answered by BPF.
        """
        entry = self._entry(attributes, fresh)
        entry.attr_timeout = 0.0
        return entry


def check_name(name: bytes) -> None:
    """The kernel lets longer names through than a directory holds; it never sends any other bad one."""
    if len(name) > wire.MAX_NAME:
        raise FUSEError(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise FUSEError(errno.EINVAL)
