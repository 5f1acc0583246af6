"""What is known of one file that is open for writing: what is gathered of it and on its way, and what others did.

What is written gathers in ``dirty``. From there it goes to ``flushing``, if it is written to the metaserver itself, or
is ``staged``, as objects whose uploads run; if it cannot be committed it comes back, below what was written meanwhile.
Nothing here awaits: ``dirty``, ``flushing``, ``staged`` and the memory that they use change together, so whoever comes
between two awaits sees every byte once. What is gathered of a file is either all appended, one run of bytes then, or
none of it is.

What others change is known by breaks: what they say of a file makes its attributes ``stale``, and only attributes that
were asked for after the last of them make it known again.
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from fuseclient.data.extents import Extents
from fuseclient.data.objects import MAX_OBJECT
from fuseclient.data.uploads import Upload
from metaserver import wire

#: From so many bytes or extents on, a file's are staged.
FLUSH_BYTES: Final = MAX_OBJECT
FLUSH_EXTENTS: Final = 256
#: Objects of one file that may be staged; with so many its writers wait.
STAGED: Final = 8
#: Attributes of which a change may wait.
_DEFERRED: Final = ("mode", "uid", "gid", "atime_ns", "mtime_ns")


@dataclass(slots=True)
class Memory:
    """The memory that all files share, in bytes: how much there is, and what is written and not yet committed."""

    limit: int
    used: int = 0

    def has_room(self, length: int) -> bool:
        """Say whether so many bytes more may be gathered; one write always may, however long it is."""
        return not self.used or self.used + length <= self.limit


@dataclass(eq=False, slots=True)
class OpenFile:
    """One file, by inode, whoever and however many have it open for writing."""

    #: The newest known from the metaserver.
    attributes: wire.Attributes
    memory: Memory
    #: Others changed the file: ``attributes`` are to be asked for again before they decide anything.
    stale: bool = False
    #: The metaserver may have lost changes: an older version than the one known can be the newest.
    reset: bool = False
    #: How often others are known to have changed it.
    breaks: int = 0
    writers: int = 0
    #: Its last writer has gone, and nothing of it is to be written any more.
    forgotten: bool = False
    dirty: Extents = field(default_factory=Extents)
    #: What is being written inline.
    flushing: Extents | None = None
    staged: deque[Upload] = field(default_factory=deque)
    #: What is not yet committed was appended.
    appended: bool = False
    #: Writes to its end that are being waited for.
    appending: int = 0
    #: When the newest byte not yet committed was written, in ns since 1970.
    written_ns: int = 0
    #: Of a failure in the background that nobody was told of yet.
    error: Exception | None = None
    #: Held while something is committed.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    timer: asyncio.TimerHandle | None = None
    #: The task that commits what is staged.
    work: asyncio.Task[None] | None = None
    #: It was made here and not flushed since: changes of its attributes wait for that, too.
    is_new: bool = False
    #: It was made here, and the metaserver is not told of it yet.
    held: bool = False
    #: Its attributes are in the maps, because nothing was done to it yet.
    shown: bool = False
    #: It may be written to without a word, so that they must not be,
    granted: bool = False
    #: of which so many bytes were used, and taken, that nobody was told of;
    taken: int = 0
    #: and be closed without a word, now;
    closes_ahead: bool = False
    #: or it may have been, as long as it is held: then it is not given up, whatever stands in the way.
    trusted: bool = False
    #: Its attributes may be changed without a word, as long as it is held.
    changes_ahead: bool = False
    #: Changes of its attributes that wait.
    pending: wire.SetAttributes | None = None
    #: How often it was written to since it was made.
    writes: int = 0
    #: Changes of it were acknowledged that may not be durable yet.
    unsynced: bool = False
    #: Syncs under way that are to make them durable.
    syncing: int = 0
    #: Of what is lost or may be, and how many of those who had the file open are to be told of it still.
    loss: Exception | None = None
    owed: int = 0
    #: The whole content, when the last flush happened to hold it.
    content: bytes | None = None

    # What is gathered

    def uncommitted(self) -> list[Extents | Upload]:
        """Return the bytes that are not committed, in the order of the writes."""
        return [each for each in (*self.staged, self.flushing, self.dirty) if each is not None and each.bytes]

    @property
    def uncommitted_bytes(self) -> int:
        """How many those are."""
        return sum(each.bytes for each in self.uncommitted())

    @property
    def is_committed(self) -> bool:
        """Whether the metaserver knows of it, and of all that was written to it and of its attributes."""
        return not (self.uncommitted() or self.pending or self.held)

    @property
    def is_full(self) -> bool:
        """Whether enough is gathered to be staged."""
        return self.dirty.bytes >= FLUSH_BYTES or len(self.dirty) >= FLUSH_EXTENTS

    @property
    def has_enough_staged(self) -> bool:
        """Whether who writes to it has to wait for what is on its way."""
        return len(self.staged) >= STAGED and self.is_full and self.work is not None

    @property
    def end(self) -> int:
        """The offset where what is appended is gathered for."""
        return max((each.end for each in self.uncommitted()), default=self.attributes.size)

    def concerns(self, offset: int, length: int) -> bool:
        """Say whether a read sees something of what is not committed: bytes, or a hole that they make."""
        size = self.attributes.size
        batches = self.uncommitted()
        return any((offset + length > size and each.end > size) or each.overlaps(offset, length) for each in batches)

    def gather(self, offset: int, data: bytes | memoryview, made_ns: int | None = None) -> None:
        """Lay a write over what is gathered; a change of the time of the last write that waits is overtaken by it.

        ``made_ns``: when it was made, in ns since 1970, if not now.
        """
        before = self.dirty.bytes
        self.dirty.write(offset, data)
        self.memory.used += self.dirty.bytes - before
        self.written_ns = max(made_ns or time.time_ns(), self.attributes.ctime_ns + 1)
        if self.pending is not None:
            self.written_ns = max(self.written_ns, (self.pending.changed_ns or 0) + 1)
            self.pending = msgspec.structs.replace(self.pending, mtime_ns=None)
        self.content = None

    def begin_inline(self) -> Extents:
        """Return what is gathered, which is being written inline from now on."""
        self.flushing, self.dirty = self.dirty, Extents()
        return self.flushing

    def end_inline(self) -> None:
        """What was being written inline is committed."""
        assert self.flushing is not None
        self.memory.used -= self.flushing.bytes
        self.flushing = None

    def regather(self) -> None:
        """Put what was being written inline back below what was written since."""
        assert self.flushing is not None
        before, below, above = self.uncommitted_bytes, self.flushing, self.dirty
        for offset, data in above:
            below.write(offset, data)
        self.dirty, self.flushing, self.stale = below, None, True
        self.memory.used += self.dirty.bytes - before

    def committed(self, group: list[Upload]) -> None:
        """The first of what is staged is committed."""
        for each in group:
            self.staged.popleft()
            self.memory.used -= each.bytes

    def move_to(self, size: int) -> None:
        """Have what was appended follow the ``size`` bytes that the file holds now."""
        distance = size - min(offset for each in self.uncommitted() for offset, _ in _pieces(each))
        for upload in self.staged:
            upload.move(distance)
        moved = Extents()
        for offset, data in self.dirty:
            moved.write(offset + distance, data)
        self.dirty = moved

    def cut(self, size: int) -> None:
        """Give up what was gathered beyond a size that the file has been cut to."""
        kept, dropped = Extents(), self.dirty
        for offset, data in dropped:
            kept.write(offset, memoryview(data)[: max(0, size - offset)])
        self.dirty = kept
        self.memory.used += kept.bytes - dropped.bytes

    # What failed

    def fail(self, error: Exception, *, gone: bool) -> None:
        """Take back what is on its way, below what was written since; all of it is to be tried again.

        ``gone``: the file is no more; then there is nowhere to write it to, and its writers are owed the error.
        """
        before, batches = self.uncommitted_bytes, self.uncommitted()
        self.dirty, self.flushing, self.staged = Extents(), None, deque()
        if gone and (batches or self.held):
            self.lose(error)
        for offset, data in (piece for each in batches for piece in _pieces(each)):
            if not gone:
                self.dirty.write(offset, data)
        self.memory.used += self.dirty.bytes - before
        self.error, self.stale, self.content = error, True, None
        if gone:
            self.pending, self.held = None, False

    def raise_error(self) -> None:
        """Raise the error of the background, if there is one that nobody was told of; it is told of now."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def lose(self, loss: Exception) -> None:
        """Something that was written is lost, or may be: each of its writers is to be told."""
        self.loss, self.owed = loss, self.writers

    def tell_loss(self, *, for_reader: bool) -> None:
        """Raise what is lost as long as a writer is to be told; ``for_reader``: this is none of them."""
        if self.owed and self.loss is not None:
            self.owed -= not for_reader
            raise self.loss

    # Attributes

    def observe(self, attributes: wire.Attributes) -> None:
        """Take attributes that nothing is known to have overtaken."""
        if attributes.version >= self.attributes.version or self.reset:
            self.note(attributes)
            self.stale = self.reset = False

    def note(self, attributes: wire.Attributes) -> None:
        """Take attributes if they are newer; what was changed elsewhere since may be newer still."""
        known = self.attributes.version
        if attributes.version > known or (self.reset and attributes.version != known):
            self.attributes, self.content = attributes, None

    def changed_elsewhere(self) -> None:
        """Another client changed it."""
        self.stale = True
        self.breaks += 1
        self.content = None

    def defer(self, request: wire.SetAttributes) -> None:
        """Have a change of attributes, but not of the size, wait with those that do; it is made now, or says when."""
        changed_ns = max(request.changed_ns or time.time_ns(), self.overlay().ctime_ns + 1)
        before = self.pending or wire.SetAttributes(request.ino)
        self.pending = msgspec.structs.replace(before, changed_ns=changed_ns, **_given(request))

    def overlay(self) -> wire.Attributes:
        """Return the attributes as they will be when all that is written, and what waits, is committed."""
        shown = self.attributes
        if ends := [each.end for each in self.uncommitted()]:
            size, ctime_ns = max(shown.size, *ends), max(shown.ctime_ns, self.written_ns)
            stored = min(size, shown.stored + self.uncommitted_bytes)
            shown = msgspec.structs.replace(
                shown, size=size, mtime_ns=self.written_ns, ctime_ns=ctime_ns, stored=stored
            )
        return shown if self.pending is None else _with(shown, self.pending)


def whole_content(extents: Extents) -> bytes:
    """Return the whole content of a file that holds nothing else."""
    content = b""
    for offset, data in extents:
        content = content.ljust(offset, b"\0") + data
    return content


def _pieces(batch: Extents | Upload) -> Iterator[tuple[int, bytearray | memoryview]]:
    return iter(batch) if isinstance(batch, Extents) else iter(batch.pieces)


def _given(request: wire.SetAttributes) -> dict[str, int]:
    return {name: getattr(request, name) for name in _DEFERRED if getattr(request, name) is not None}


def _with(attributes: wire.Attributes, pending: wire.SetAttributes) -> wire.Attributes:
    """Return attributes as they will be after a change that waits."""
    given = _given(pending)
    if pending.mode is not None:
        given["mode"] = stat.S_IFMT(attributes.mode) | stat.S_IMODE(pending.mode)
    ctime_ns = max(attributes.ctime_ns, pending.changed_ns or 0)
    return msgspec.structs.replace(attributes, ctime_ns=ctime_ns, **given)
