"""Gathering of writes: what is written stays in memory until it is in the object store and committed.

One :class:`_File` for each inode that is open for writing. What is written gathers in ``dirty``. As soon as that has a
whole object, the object is *staged*: its upload begins, and several run at once. Objects are committed in the order
of the writes, as many at a time as are stored by then, so each one is durable before the metaserver is told of it. A
file that stays within the inline limit is written to the metaserver itself. Extents that lie apart share an object.

Memory is what bounds it: a file may have ``STAGED`` objects on their way and all files together ``TOTAL_BYTES``;
beyond that writers wait. (A staging file was measured and left out: writing 4 MiB objects through one took 2.3 times
as long, and it would make nothing durable that an acknowledged fsync does not.)

A file that was made here is new until its first flush. It was made lazily, or is *held*: the metaserver is not told of
it yet (see held.py), and is with its first commit. If this client is the only one of the volume (see ``is_alone``),
changes of its attributes wait for that flush and go with its content; and its first bytes are sent ahead of it if new
files were written to once of late. So a small file takes one request to the metaserver and one fsync there.

Concurrency: everything runs on the event loop. A file's ``lock`` is held while something is committed, so commits of
one file follow each other, and :meth:`Writer.settled` keeps them away from a change of its size or times. ``dirty``,
``flushing``, ``staged`` and ``bytes`` change without an await between them.

What is appended (O_APPEND) goes where the file ends when it is committed, whoever else appends to it: the metaserver
refuses it if that is not where it was gathered for, and it is moved and committed again. What is gathered of a file is
either all appended, one run of bytes then, or none of it is.

Errors: what cannot be stored or committed is kept, below what is written meanwhile, and tried again: after
``flush_age_s``, and by each flush, fsync and close, which so either makes everything safe or says what is in the way.
A failure in the background is told by the next write, too. Nothing more is taken than memory allows, so a writer that
goes on is refused with the same error. Only when the last handle is closed in spite of the error is the data given
up, and the log says so.

Posted writes are answered before they come here: :meth:`Writer.grant` has promised to take them. They are gathered
whatever stands in the way, which the next one that waits is told of, or a flush, as of what else is gathered. So is the
closing of a file that is held back and may wait, which fails in nothing: until it is committed, for which that promise
is taken back first, it is never given up.

What others change is known by breaks: what they say of a file makes its attributes ``stale``, and only attributes that
were asked for after the last of them make it known again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from fuseclient.data.caller import Caller
from fuseclient.data.extents import Extents
from fuseclient.data.held import HeldFiles, NoneHeld
from fuseclient.data.objects import MAX_OBJECT, StoreError
from fuseclient.data.uploads import COMMIT_CHUNKS, UNKNOWN, Objects, Upload, Uploads, pack
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: From so many bytes or extents on, a file's are staged.
FLUSH_BYTES: Final = MAX_OBJECT
FLUSH_EXTENTS: Final = 256
#: Objects of one file that may be staged; with so many its writers wait.
STAGED: Final = 8
#: All files together, in bytes; beyond it writers wait.
TOTAL_BYTES: Final = 64 * 1024 * 1024
#: What may be posted to one file before a write waits again, in bytes; to as many files as the channel remembers.
CREDIT_BYTES: Final = 2 * 1024 * 1024
#: Whoever posts is told when so much of it was taken, so that he need not wait; a multiple of what is told in.
RENEW_BYTES: Final = CREDIT_BYTES // 4
#: What has waited this long, in seconds, is flushed.
FLUSH_AGE_S: Final = 5.0
_ATTEMPTS: Final = 16
#: Attributes of which a change may wait.
_DEFERRED: Final = ("mode", "uid", "gid", "atime_ns", "mtime_ns")
#: Refusals that mean somebody else changed the file meanwhile: look again.
_OVERTAKEN: Final = (wire.ErrorCode.BUSY, wire.ErrorCode.INVALID)
#: Refusals after which there is nowhere to write to: the file is no more, or not this client's to write any more.
_NOWHERE: Final = (wire.ErrorCode.NOT_FOUND, wire.ErrorCode.LOST_LOCK)
#: The most that experience with new files counts.
_SURE: Final = 8
_LOST: Final = StoreError("the metaserver may have lost changes that it had acknowledged")
#: Objects, and slices, of one commit.
_COMMIT_OBJECTS: Final = 16
_COMMIT_SLICES: Final = 512


@dataclass(eq=False, slots=True)
class _File:
    #: The newest known from the metaserver.
    attributes: wire.Attributes
    #: Others changed the file: ``attributes`` are to be asked for again before they decide anything.
    stale: bool = False
    #: The metaserver may have lost changes: an older version than the one known can be the newest.
    reset: bool = False
    #: How often others are known to have changed it.
    breaks: int = 0
    writers: int = 0
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
    #: Those that wait.
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


class Grant(NamedTuple):
    """What may be done to a file without a word: so many bytes be written, and it be closed up to a size, in bytes."""

    credit: int
    closes: int


NO_GRANT: Final = Grant(0, 0)


@dataclass(frozen=True)
class Closed:
    """What is known of a file when its last writer has gone: attributes, and the whole content if it is at hand."""

    attributes: wire.Attributes
    content: bytes | None


class Writer:
    """The files open for writing. ``committed`` is told of each reply that changed a file, before a flush returns.

    ``is_lazy`` says whether the metaserver acknowledges before it is durable; ``changes`` counts what it acknowledged.
    """

    def __init__(
        self,
        caller: Caller,
        store: Objects,
        inline_limit: int,
        committed: Callable[[wire.Changed], None],
        *,
        is_lazy: Callable[[], bool] = lambda: False,
        changes: Callable[[], int] = lambda: 1,
        flush_age_s: float = FLUSH_AGE_S,
        total_bytes: int = TOTAL_BYTES,
    ) -> None:
        self._caller = caller
        self._inline_limit = inline_limit
        self._committed = committed
        self._is_lazy = is_lazy
        self._changes = changes
        self._flush_age_s = flush_age_s
        self._total_bytes = total_bytes
        self._files: dict[int, _File] = {}
        self._uploads = Uploads(caller, store)
        self._tasks: set[asyncio.Task[None]] = set()
        #: A lazy metaserver may have lost changes of which no open file knows.
        self._lost = False
        #: Positive: most new files were written to once of late.
        self._single_writes = 1
        #: How many changes are known to be durable.
        self._durable_changes = 0
        #: Bytes written and not yet committed, of all files.
        self.bytes = 0
        self.held_files: HeldFiles = NoneHeld()
        #: Whether no other client sees the volume, nor will before :meth:`commit_deferred` has returned.
        self.is_alone: Callable[[], bool] = lambda: False
        #: Called with the inode of a file of which data was given up: the kernel may have it in its pages.
        self.when_given_up: Callable[[int], None] = lambda ino: None
        #: Called with the attributes of a file that was shown, when they are about to be true no more.
        self.when_touched: Callable[[wire.Attributes], None] = lambda attributes: None
        #: Called with an inode, or 0 for all, to take back what was granted of it; what was done so has come on return.
        self.withdraw: Callable[[int], Awaitable[None]] = _nothing
        #: Called with the inode of each commit of slices, and how many they were.
        self.when_laid: Callable[[int, list[wire.Slice]], None] = lambda ino, slices: None

    @property
    def count(self) -> int:
        """How many files are open for writing."""
        return len(self._files)

    def is_open(self, ino: int) -> bool:
        """Whether a file is open for writing."""
        return ino in self._files

    def open_inodes(self) -> list[int]:
        """Return the files that are open for writing."""
        return list(self._files)

    def open(self, attributes: wire.Attributes, *, is_new: bool = False, held: bool = False) -> None:
        """Count one more writer of a file; each is to be ended by :meth:`close`.

        ``is_new``: it was just made, lazily, so it is durable only after a flush; ``held``: it is held back.
        """
        file = self._files.get(attributes.ino)
        if file is None:
            lazily = is_new and not held
            file = self._files[attributes.ino] = _File(attributes, is_new=is_new, unsynced=lazily, held=held)
        self._observe(file, attributes)
        file.writers += 1
        if held:
            self._start_timer(file)

    def will_sync(self, ino: int) -> bool:
        """Say whether a file is open for writing. A change of it may be lazy then: its closing makes it durable."""
        file = self._files.get(ino)
        if file is not None:
            file.unsynced = True
        return file is not None

    def defer(self, request: wire.SetAttributes) -> wire.Attributes | None:
        """Have a change of attributes wait for the flush of a new file that nobody else can see.

        None: it is not new, or others can, or its size is to be changed.
        """
        file = self._files.get(request.ino)
        if file is None or not (file.is_new or file.held) or request.size is not None or not self.is_alone():
            return None
        changed_ns = max(time.time_ns(), self.overlay(file.attributes).ctime_ns + 1)
        given = {name: getattr(request, name) for name in _DEFERRED if getattr(request, name) is not None}
        self._touch(file)
        before = file.pending or wire.SetAttributes(request.ino)
        file.pending = msgspec.structs.replace(before, changed_ns=changed_ns, **given)
        self._start_timer(file)
        return self.overlay(file.attributes)

    async def commit_deferred(self) -> None:
        """Commit what is held back: new files, and changes of attributes that wait, with what was written before.

        Raises what is in the way. This client is not alone any more, so there are no new ones.
        """
        if ahead := [file for file in self._files.values() if file.closes_ahead]:
            await self.withdraw(0)
            for file in ahead:
                file.closes_ahead = False
        await self.held_files.commit_all()
        await asyncio.gather(*(self._drain(file) for file in self._files.values() if file.pending is not None))

    def show(self, attributes: wire.Attributes) -> bool:
        """Say whether these are the attributes of an open file as everybody may see them: it is new and as it was made.

        ``when_touched`` is called as soon as that is no more.
        """
        file = self._files.get(attributes.ino)
        if file is None:
            return False
        untouched = file.is_new and not file.writes and not _uncommitted(file) and file.pending is None
        file.shown = untouched and not file.granted and not file.stale and file.attributes == attributes
        return file.shown

    def _touch(self, file: _File) -> None:
        if file.shown:
            file.shown = False
            self.when_touched(file.attributes)

    async def close(self, ino: int) -> Closed | None:
        """Flush, and count one writer less. What is known of the file if this was the last one, else None."""
        file = self._files[ino]
        if self.may_wait(ino):
            return self.close_settled(ino)
        drained = await self._drain_quietly(file)
        file.writers -= 1
        while file.writers == 0 and drained and (_uncommitted(file) or file.pending or file.held):
            drained = await self._drain_quietly(file)
        return self._closed(file)

    def is_settled(self, ino: int) -> bool:
        """Say whether an open file need not be waited for to be closed: :meth:`close_settled` will do."""
        file = self._files[ino]
        waits = file.lock.locked() or file.dirty or file.staged or file.flushing or file.pending or file.held
        return not waits or self.may_wait(ino)

    def may_wait(self, ino: int) -> bool:
        """Say whether a file is held back and may be closed so, with all that was written."""
        file = self._files.get(ino)
        if file is None or not file.held or file.error is not None or file.staged or file.lock.locked():
            return False
        return file.dirty.end <= self._inline_limit and self.held_files.may_wait

    def close_settled(self, ino: int) -> Closed | None:
        """Close a file that is settled; as :meth:`close`."""
        file = self._files[ino]
        file.writers -= 1
        return self._closed(file)

    def _closed(self, file: _File) -> Closed | None:
        ino = file.attributes.ino
        if file.writers or self._files.get(ino) is not file:
            return None
        if self.may_wait(ino) or (file.held and file.trusted):
            return self._closed_held(file)
        del self._files[ino]
        self._give_up(file)
        return None if file.stale else Closed(file.attributes, file.content)

    def _closed_held(self, file: _File) -> Closed:
        """The last writer of a file that is held back has gone: it is made later, with all that was written."""
        content, shown = _content(file.dirty), self.overlay(file.attributes)
        self._stop_timer(file)
        del self._files[shown.ino]
        self.bytes -= file.dirty.bytes
        file.dirty, file.held, file.pending = Extents(), False, None
        self.held_files.closed(self.held_files.record(shown, content, writing=False))
        return Closed(shown, content)

    def _give_up(self, file: _File) -> None:
        """Forget a file that nobody has open; what could not be committed is lost."""
        self._stop_timer(file)
        if file.held:
            _log.error("inode %d was closed and could not be made: %s", file.attributes.ino, file.error)
            file.held, file.stale = False, True
            self.held_files.give_up(file.attributes.ino)
        if file.dirty or file.staged:
            _log.error("data written to inode %d was lost: %s", file.attributes.ino, file.error)
            self._uploads.discard(file.staged)
            self.bytes -= _held(file)
            file.stale = True
            self.when_given_up(file.attributes.ino)

    # Writing

    async def write(self, ino: int, offset: int, data: bytes) -> None:
        """Gather a write; raises an error of the background, once, or one that leaves no room, instead."""
        await self._write(self._files[ino], offset, data)

    async def append(self, ino: int, data: bytes) -> None:
        """Gather a write to the end of a file, wherever that is when it is committed; raises as :meth:`write`."""
        file = self._files[ino]
        file.appending += 1
        try:
            await self._write(file, None, data)
        finally:
            file.appending -= 1

    async def _write(self, file: _File, offset: int | None, data: bytes) -> None:
        _raise_error(file)
        await self._make_room(file, len(data))
        if offset is None:
            await self._current(file)
        while _uncommitted(file) and file.appended != (offset is None):
            await self._drain(file)
        file.appended = offset is None
        self._take(file, self._end(file) if offset is None else offset, data)

    def write_now(self, ino: int, offset: int, data: bytes | memoryview) -> bool:
        """Gather a write that need not wait for anything; else return False, with nothing done."""
        file = self._files[ino]
        if file.error is not None or not self._has_memory(len(data)) or _has_enough_staged(file):
            return False
        if file.appended and _uncommitted(file):
            return False
        file.appended = False
        self._take(file, offset, data)
        return True

    def grant(self, ino: int) -> Grant:
        """Return what may be done to a file without a word of it.

        It holds until something is appended to it, a handle of it is closed, or it is taken back (``withdraw``).
        """
        file = self._files.get(ino)
        if file is None or not self._may_grant(file):
            return NO_GRANT
        file.taken = 0
        self._touch(file)
        file.granted = True
        if not self.may_wait(ino):
            return Grant(CREDIT_BYTES, 0)
        file.closes_ahead = file.trusted = True
        return Grant(CREDIT_BYTES, self._inline_limit)

    def _may_grant(self, file: _File) -> bool:
        if file.error is not None or file.loss is not None or file.appending or _has_enough_staged(file):
            return False
        return not (file.appended and _uncommitted(file)) and self._has_memory(CREDIT_BYTES)

    def renewal(self, ino: int) -> int:
        """Return by how much what was granted of a file is to be renewed, now that as much of it was taken."""
        file = self._files[ino]
        if file.taken < RENEW_BYTES or not self._may_grant(file):
            return 0
        renewed = file.taken // RENEW_BYTES * RENEW_BYTES
        file.taken -= renewed
        return renewed

    def write_posted(self, ino: int, offset: int, data: memoryview) -> None:
        """Gather a write that :meth:`grant` allowed, and that was answered."""
        file = self._files[ino]
        if file.appended and _uncommitted(file):
            raise RuntimeError(f"a write to inode {ino} was posted although something is appended")
        file.appended = False
        file.taken += len(data)
        self._take(file, offset, data)

    def _take(self, file: _File, offset: int, data: bytes | memoryview) -> None:
        self._touch(file)
        self._gather(file, offset, data)
        if file.dirty.end > self._inline_limit:
            file.closes_ahead = file.trusted = False  # who granted that knows
        self._stage_whole(file)
        if file.is_new:
            file.writes += 1
            self._write_ahead(file)

    def _end(self, file: _File) -> int:
        """Return where what is appended is gathered for."""
        return max((each.end for each in _uncommitted(file)), default=file.attributes.size)

    async def _make_room(self, file: _File, length: int) -> None:
        while not self._has_memory(length):
            largest = max(self._files.values(), key=_held)
            if not await self._drain_quietly(largest):
                assert largest.error is not None
                error = largest.error
                if largest is file:
                    file.error = None
                raise error
        while _has_enough_staged(file):
            assert file.work is not None
            await asyncio.wait({file.work})
            _raise_error(file)

    def _has_memory(self, length: int) -> bool:
        return not self.bytes or self.bytes + length <= self._total_bytes

    def _write_ahead(self, file: _File) -> None:
        """Commit the first bytes of a new small file at once, if such files were written once and closed of late."""
        if file.writes != 1 or (file.held and self.held_files.may_wait):
            return
        if file.dirty.end <= self._inline_limit and self._single_writes > 0:
            self._in_background(self._drain_old(file))

    def _learn(self, file: _File) -> None:
        """A new file is flushed for the first time: remember whether writing it ahead was right, or would have been."""
        if file.is_new and file.writes:
            single = file.writes == 1 and file.pending is None
            self._single_writes = (
                min(_SURE, self._single_writes + 1) if single else max(-_SURE, self._single_writes - 2)
            )
        file.is_new = False

    def _gather(self, file: _File, offset: int, data: bytes | memoryview) -> None:
        before = file.dirty.bytes
        file.dirty.write(offset, data)
        self.bytes += file.dirty.bytes - before
        file.written_ns = max(time.time_ns(), file.attributes.ctime_ns + 1)
        if file.pending is not None:
            file.written_ns = max(file.written_ns, (file.pending.changed_ns or 0) + 1)
            file.pending = msgspec.structs.replace(file.pending, mtime_ns=None)
        file.content = None
        self._start_timer(file)

    def _start_timer(self, file: _File) -> None:
        if file.timer is None:
            loop = asyncio.get_running_loop()
            file.timer = loop.call_later(self._flush_age_s, self._grown_old, file)

    def _stop_timer(self, file: _File) -> None:
        if file.timer is not None:
            file.timer.cancel()
            file.timer = None

    def _grown_old(self, file: _File) -> None:
        file.timer = None
        self._in_background(self._drain_old(file))

    async def _drain_old(self, file: _File) -> None:
        await self._drain_quietly(file)

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Flushing

    async def flush(self, ino: int, *, for_reader: bool = False) -> None:
        """Return when all that was written is committed; raise what is in the way, each time it is.

        It is durable then, unless the metaserver is lazy. What is lost, because the file is no more or because the
        metaserver may have lost what it had acknowledged, is told of once for each writer. ``for_reader``: through a
        handle that cannot write, so that a writer is to be told still.
        """
        file = self._files.get(ino)
        if file is not None and not self.flush_now(ino):
            await self._flush(file, for_reader)

    def flush_now(self, ino: int) -> bool:
        """Flush a file that is held back and may wait; else return False, with nothing done."""
        if not self.may_wait(ino):
            return False
        self._learn(self._files[ino])
        return True

    async def _flush(self, file: _File, for_reader: bool) -> None:
        self._learn(file)
        try:
            await self._drain(file)
        except BaseException as error:
            file.trusted = False
            if error is file.loss:
                _tell_loss(file, for_reader)
            raise
        finally:
            file.error = None
        if file.unsynced and not self._is_lazy():
            await self._make_durable(file)
        _tell_loss(file, for_reader)

    async def sync(self, ino: int | None, *, for_reader: bool = False) -> None:
        """Return when all that was written to a file, or changed anywhere, is durable: fsync. Raises as ``flush``.

        What the metaserver acknowledged and may have lost, if it was of no open file, is told of once.
        """
        file = self._files.get(ino) if ino is not None else None
        if file is None:
            await self.held_files.commit_all()
            await self._call_sync()
            lost, self._lost = self._lost, False
            if lost:
                raise _LOST
            return
        await self._flush(file, for_reader)
        if file.unsynced:
            await self._make_durable(file)
            _tell_loss(file, for_reader)

    async def _make_durable(self, file: _File) -> None:
        file.unsynced = False
        file.syncing += 1
        try:
            await self._call_sync()
        except BaseException:
            file.unsynced = True
            raise
        finally:
            file.syncing -= 1

    async def _call_sync(self) -> None:
        changes = self._changes()
        await self._caller.call(wire.Sync(), wire.Done)
        self._durable_changes = changes

    def acknowledged_lost(self) -> None:
        """The session has ended, or its metaserver: what that had acknowledged lazily may be lost."""
        self._lost |= self._is_lazy() and self._changes() != self._durable_changes
        self._durable_changes = self._changes()
        for file in self._files.values():
            if file.unsynced or file.syncing:
                file.loss, file.owed = _LOST, file.writers

    def made_in_vain(self) -> None:
        """A file that was closed could not be made in the end."""
        self._lost = True

    async def publish(self, ino: int) -> None:
        """Return when all that was written is committed, durable or not; raise what is in the way."""
        file = self._files.get(ino)
        if file is not None:
            await self._drain(file)

    def forfeit(self, ino: int) -> None:
        """What was written and is not committed is refused from now on: find that out, and give it up."""
        file = self._files.get(ino)
        if file is not None and _uncommitted(file):
            self._in_background(self._drain_old(file))

    async def flush_all(self) -> None:
        """Flush every file; errors stay with their files."""
        await asyncio.gather(*(self._drain_quietly(file) for file in self._files.values()))
        with contextlib.suppress(Refused, Disconnected):
            await self.held_files.commit_closed()
        await self._uploads.settle()

    async def before_read(self, ino: int, offset: int, length: int) -> None:
        """Return when the metaserver knows of all that was written to the range, and of the size that a read of it
        sees; raise the error if it cannot be."""
        file = self._files.get(ino)
        if file is None:
            return
        if file.held or any(_concerns(each, offset, length, file) for each in _uncommitted(file)):
            await self._drain(file)

    @contextlib.asynccontextmanager
    async def settled(self, ino: int, size: int | None = None) -> AsyncIterator[None]:
        """A context in which nothing written before is uncommitted and nothing written since is committed.

        If that cannot be it raises; but for a change to ``size``, after which :meth:`cut` is to be called.
        """
        file = self._files.get(ino)
        if file is None:
            yield
            return
        async with file.lock:
            try:
                await self._drain_locked(file, lazy=True)
            except (Refused, Disconnected, StoreError):
                if size is None or file.held:
                    raise
            yield

    def cut(self, ino: int, size: int) -> None:
        """The file has been cut, in a settled context: what was gathered and not committed beyond its size goes."""
        file = self._files.get(ino)
        if file is not None and file.dirty.end > size:
            self._cut(file, size)

    def observe(self, attributes: wire.Attributes) -> None:
        """An inode has been changed by this client."""
        file = self._files.get(attributes.ino)
        if file is not None:
            self._observe(file, attributes)

    def note(self, attributes: wire.Attributes) -> None:
        """These were an inode's attributes after a change by this client; there may be newer ones."""
        file = self._files.get(attributes.ino)
        if file is not None:
            self._note(file, attributes)

    def overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return a file's attributes as they will be when all that is written is committed."""
        file = self._files.get(attributes.ino)
        if file is None:
            return attributes
        self._note(file, attributes)
        shown = file.attributes
        if ends := [each.end for each in _uncommitted(file)]:
            size, ctime_ns = max(shown.size, *ends), max(shown.ctime_ns, file.written_ns)
            stored = min(size, shown.stored + _held(file))
            shown = msgspec.structs.replace(
                shown, size=size, mtime_ns=file.written_ns, ctime_ns=ctime_ns, stored=stored
            )
        return shown if file.pending is None else _with(shown, file.pending)

    def known(self, ino: int) -> wire.Attributes | None:
        """Return the attributes last heard of a file that is open for writing, unless others changed it since."""
        file = self._files.get(ino)
        return file.attributes if file is not None and not file.stale else None

    def known_new(self, ino: int) -> wire.Attributes | None:
        """Return what is known of a file that was made here and not flushed since, unless others changed it."""
        file = self._files.get(ino)
        is_new = file is not None and (file.is_new or file.held)
        return file.attributes if file is not None and is_new and not file.stale else None

    def changed_elsewhere(self, ino: int) -> None:
        """Another client changed this inode."""
        file = self._files.get(ino)
        if file is not None:
            file.stale = True
            file.breaks += 1
            file.content = None

    def everything_changed(self) -> None:
        """Other clients may have changed anything."""
        for ino, file in self._files.items():
            self.changed_elsewhere(ino)
            file.reset = True

    def _observe(self, file: _File, attributes: wire.Attributes) -> None:
        """Take attributes that nothing is known to have overtaken."""
        if attributes.version >= file.attributes.version or file.reset:
            self._note(file, attributes)
            file.stale = file.reset = False

    def _note(self, file: _File, attributes: wire.Attributes) -> None:
        """Take attributes if they are newer; what was changed elsewhere since may be newer still."""
        known = file.attributes.version
        if attributes.version > known or (file.reset and attributes.version != known):
            file.attributes, file.content = attributes, None

    # Committing

    async def _drain(self, file: _File) -> None:
        """Commit all that is gathered; an error is left in the file, too."""
        async with file.lock:
            await self._drain_locked(file, lazy=False)

    async def _drain_quietly(self, file: _File) -> bool:
        """Commit all that is gathered; False if that failed, with the error left in the file."""
        try:
            await self._drain(file)
        except Exception:
            return False
        return True

    async def _drain_locked(self, file: _File, *, lazy: bool) -> None:
        self._stop_timer(file)
        try:
            while file.dirty or file.staged or file.pending or file.held:
                if file.held:
                    await self._commit_held(file, lazy)
                elif not (file.dirty or file.staged):
                    await self._commit_pending(file, lazy)
                elif not file.staged and await self._is_inline(file):
                    await self._commit_inline(file, lazy)
                else:
                    self._stage(file, file.dirty)
                    await self._commit_staged(file)
        except Exception as error:
            self._failed(file, error)
            raise

    def _stage_whole(self, file: _File) -> None:
        """Stage whole objects, as many as may be, and have them committed; the rest goes on growing."""
        while _is_full(file) and len(file.staged) < STAGED:
            self._stage(file, file.dirty.take_units(MAX_OBJECT))
        if file.staged and file.work is None:
            file.work = self._in_background(self._commit_some(file))

    def _stage(self, file: _File, batch: Extents) -> None:
        """Stage a batch, which was taken out of ``dirty`` or is all of it."""
        if batch is file.dirty:
            file.dirty = Extents()
        file.staged += [self._uploads.start(pieces) for pieces in pack(batch)]

    async def _commit_some(self, file: _File) -> None:
        """Commit what is staged up to now, then have the next do so. An error is left in the file."""
        try:
            async with file.lock:
                if file.held:
                    await self._commit_held(file, lazy=True)
                if file.staged:
                    await self._commit_staged(file)
        except Exception as error:
            self._failed(file, error)
        finally:
            file.work = None
        if file.error is None and file.attributes.ino in self._files:
            self._stage_whole(file)

    def _failed(self, file: _File, error: Exception) -> None:
        """Take back what is on its way, below what was written since; all of it is tried again later.

        But if the file is no more: then there is nowhere to write it to.
        """
        expected = isinstance(error, Refused | Disconnected | StoreError)
        _log.error("writing to inode %d failed: %s", file.attributes.ino, error, exc_info=None if expected else error)
        before = _held(file)
        unknown = isinstance(error, Disconnected) or (isinstance(error, Refused) and error.code in UNKNOWN)
        (self._uploads.abandon if unknown else self._uploads.discard)(file.staged)
        batches = _uncommitted(file)
        file.dirty, file.flushing, file.staged = Extents(), None, deque()
        gone = isinstance(error, Refused) and error.code in _NOWHERE
        if gone and (batches or file.held):
            file.loss, file.owed = error, file.writers
        for offset, data in (piece for each in batches for piece in _pieces(each)):
            if not gone:
                file.dirty.write(offset, data)
        self.bytes += file.dirty.bytes - before
        file.error, file.stale, file.content = error, True, None
        if gone:
            file.pending, file.held = None, False
        if file.dirty or file.pending or file.held:
            self._start_timer(file)

    def _cut(self, file: _File, size: int) -> None:
        """Give up what was gathered beyond a size that the file has been cut to."""
        kept, dropped = Extents(), file.dirty
        for offset, data in dropped:
            kept.write(offset, memoryview(data)[: max(0, size - offset)])
        file.dirty = kept
        self.bytes += kept.bytes - dropped.bytes

    async def _current(self, file: _File) -> wire.Attributes:
        if file.stale:
            breaks = file.breaks
            found = await self._caller.call(wire.GetAttributes(file.attributes.ino), wire.Found)
            self._note(file, found.attributes)
            if file.breaks == breaks:
                file.stale = file.reset = False
        return file.attributes

    def _changed(self, file: _File, changed: wire.Changed, lazy: bool = False) -> None:
        file.unsynced = lazy or self._is_lazy()
        self._observe(file, changed.attributes[0])
        self._committed(changed)

    async def _is_inline(self, file: _File) -> bool:
        attributes = await self._current(file)
        return bool(attributes.flags & wire.InodeFlag.INLINE) and file.dirty.end <= self._inline_limit

    async def _commit_inline(self, file: _File, lazy: bool) -> None:
        """Write what is gathered to the metaserver; if the file is not inline any more, leave it as it was."""
        file.flushing, file.dirty = file.dirty, Extents()
        for offset, buffer in file.flushing:
            data = bytes(buffer)
            then = file.pending if len(file.flushing) == 1 else None
            end = offset if file.appended else None
            request = wire.WriteInline(file.attributes.ino, offset, data, file.written_ns, lazy, then, end)
            try:
                changed = await self._caller.call(request, wire.Changed)
            except Refused as error:
                if error.code != wire.ErrorCode.TOO_LARGE and not (file.appended and error.code in _OVERTAKEN):
                    raise
                self._regather(file)
                await self._move_to_end(file)
                return
            if then is not None and file.pending is then:
                file.pending = None
            self._changed(file, changed, lazy)
            if offset == 0 and file.attributes.size == len(data) and not file.dirty:
                file.content = data
        self.bytes -= file.flushing.bytes
        file.flushing = None

    async def _commit_held(self, file: _File, lazy: bool) -> None:
        """Have a file made that was held back, with its attributes, and its content if that is small."""
        if file.closes_ahead:
            await self.withdraw(file.attributes.ino)
            file.closes_ahead = False
        content = b""
        if not file.staged and file.dirty.end <= self._inline_limit:
            file.flushing, file.dirty = file.dirty, Extents()
            content = _content(file.flushing)
        pending, breaks = file.pending, file.breaks
        record = self.held_files.record(self.overlay(file.attributes), content, writing=True)
        made = await self.held_files.commit(record, lazy=lazy)
        file.held = False
        if made is None:
            if file.flushing is not None:
                self._regather(file)
            file.stale = True
            return
        if file.flushing is not None:
            self.bytes -= file.flushing.bytes
            file.flushing = None
            if file.pending is pending:  # else it comes after what is still to be written
                file.pending = None
        file.unsynced = lazy or self._is_lazy()
        file.attributes, file.stale = made, file.breaks != breaks
        if not (file.dirty or file.staged or file.stale):
            file.content = content

    async def _commit_pending(self, file: _File, lazy: bool) -> None:
        """Make the changes of attributes that waited."""
        pending = file.pending
        assert pending is not None
        changed = await self._caller.call(msgspec.structs.replace(pending, lazy=lazy), wire.Changed)
        if file.pending is pending:
            file.pending = None
        self._changed(file, changed, lazy)

    async def _move_to_end(self, file: _File) -> None:
        """Have what was appended follow what the file holds now."""
        if not file.appended:
            return
        size = (await self._current(file)).size
        distance = size - min(offset for each in _uncommitted(file) for offset, _ in _pieces(each))
        for upload in file.staged:
            upload.move(distance)
        moved = Extents()
        for offset, data in file.dirty:
            moved.write(offset + distance, data)
        file.dirty = moved

    def _regather(self, file: _File) -> None:
        """Put what was being written inline back below what was written since."""
        assert file.flushing is not None
        before, below, above = _held(file), file.flushing, file.dirty
        for offset, data in above:
            below.write(offset, data)
        file.dirty, file.flushing, file.stale = below, None, True
        self.bytes += file.dirty.bytes - before

    async def _commit_staged(self, file: _File) -> None:
        """Wait for the first of the staged objects to be stored, and commit it with those that are by then."""
        await asyncio.shield(file.staged[0].task)
        group = _group(file.staged)
        for _ in range(_ATTEMPTS):
            try:
                await self._commit(file, group)
                break
            except Refused as error:
                if error.code not in _OVERTAKEN:
                    raise
                refusal, file.stale = error, True
                await self._move_to_end(file)
        else:
            raise refusal
        for each in group:
            file.staged.popleft()
            self.bytes -= each.bytes

    async def _commit(self, file: _File, group: list[Upload]) -> None:
        """Commit objects that are stored, over what is inline, if anything is."""
        attributes = await self._current(file)
        ino, version, below = attributes.ino, 0, list[Upload]()
        replaces = bool(attributes.flags & wire.InodeFlag.INLINE and attributes.size)
        if replaces:
            content = await self._caller.call(wire.GetContent(ino, 0, wire.MAX_INLINE), wire.Content)
            if content.inline is None:
                raise Refused(wire.ErrorCode.BUSY, "the file is inline no more")
            version = content.attributes.version
            if content.inline:
                below.append(self._uploads.start([(0, memoryview(content.inline))]))
                await below[0].task
        slices = [each for upload in (*below, *group) for each in upload.slices()]
        end = max(each.end for each in group)
        appended_at = group[0].pieces[0][0] if file.appended else None
        request = wire.CommitSlices(ino, slices, end, replaces, version, file.written_ns, appended_at)
        try:
            self._changed(file, await self._caller.call(request, wire.Changed))
        except Refused as error:
            if error.code not in UNKNOWN:
                self._uploads.discard(below)
            raise
        self.when_laid(ino, slices)


async def _nothing(ino: int) -> None:
    """Nobody was granted anything."""


def _content(extents: Extents) -> bytes:
    """Return the whole content of a file that holds nothing else."""
    content = b""
    for offset, data in extents:
        content = content.ljust(offset, b"\0") + data
    return content


def _group(staged: deque[Upload]) -> list[Upload]:
    """Return the first of what is staged, and those after it that are stored and fit into one commit with it."""
    group, chunks, slices = list[Upload](), set[int](), 0
    for each in staged:
        chunks |= each.chunks
        slices += len(each.pieces)
        full = len(chunks) > COMMIT_CHUNKS or slices > _COMMIT_SLICES or len(group) == _COMMIT_OBJECTS
        if group and (full or not each.is_stored):
            break
        group.append(each)
    return group


def _pieces(batch: Extents | Upload) -> Iterator[tuple[int, bytearray | memoryview]]:
    return iter(batch) if isinstance(batch, Extents) else iter(batch.pieces)


def _concerns(batch: Extents | Upload, offset: int, length: int, file: _File) -> bool:
    """Say whether a read sees something of what is not committed: bytes, or a hole that they make."""
    behind = offset + length > file.attributes.size and batch.end > file.attributes.size
    return behind or batch.overlaps(offset, length)


def _uncommitted(file: _File) -> list[Extents | Upload]:
    """Return what is not committed, in the order of the writes."""
    return [each for each in (*file.staged, file.flushing, file.dirty) if each is not None and each.bytes]


def _held(file: _File) -> int:
    return sum(each.bytes for each in _uncommitted(file))


def _is_full(file: _File) -> bool:
    return file.dirty.bytes >= FLUSH_BYTES or len(file.dirty) >= FLUSH_EXTENTS


def _has_enough_staged(file: _File) -> bool:
    return len(file.staged) >= STAGED and _is_full(file) and file.work is not None


def _with(attributes: wire.Attributes, pending: wire.SetAttributes) -> wire.Attributes:
    """Return attributes as they will be after a change that waits."""
    given = {name: getattr(pending, name) for name in _DEFERRED if getattr(pending, name) is not None}
    if pending.mode is not None:
        given["mode"] = stat.S_IFMT(attributes.mode) | stat.S_IMODE(pending.mode)
    ctime_ns = max(attributes.ctime_ns, pending.changed_ns or 0)
    return msgspec.structs.replace(attributes, ctime_ns=ctime_ns, **given)


def _raise_error(file: _File) -> None:
    error, file.error = file.error, None
    if error is not None:
        raise error


def _tell_loss(file: _File, for_reader: bool) -> None:
    if file.owed and file.loss is not None:
        file.owed -= not for_reader
        raise file.loss
