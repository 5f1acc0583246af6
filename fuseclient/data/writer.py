"""Gathering of writes: what is written stays in memory until it is in the object store and committed.

The :class:`Writer` knows the files that are open for writing, and is what others call. What is known of one file is in
open_file.py, its commits are in committing.py, what may be done to it without asking in grants.py, and what of it is
durable, or lost, in durability.py.

Memory is what bounds it: a file may have ``STAGED`` objects on their way and all files together ``TOTAL_BYTES``;
beyond that writers wait. (A staging file was measured and left out: writing 4 MiB objects through one took 2.3 times
as long, and it would make nothing durable that an acknowledged fsync does not.)

A file that was made here is new until its first flush. It was made lazily, or is *held*: the metaserver is not told of
it yet (see held.py), and is with its first commit. If this client is the only one of the volume (see writer_hooks.py),
changes of its attributes wait for that flush and go with its content; and its first bytes are sent ahead of it if new
files were written to once of late. So a small file takes one request to the metaserver and one fsync there.

Concurrency: everything runs on the event loop. :meth:`Writer.settled` holds a file's lock, so it keeps commits away
from a change of its size or times.

Errors: what could not be committed is tried again by each flush, fsync and close, which so either makes everything safe
or says what is in the way. A failure in the background is told by the next write, too. Nothing more is taken than
memory allows, so a writer that goes on is refused with the same error. Only when the last handle is closed in spite of
the error is the data given up, and the log says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from fuseclient.data import grants
from fuseclient.data.caller import Caller
from fuseclient.data.committing import Committer
from fuseclient.data.durability import Durability
from fuseclient.data.grants import NO_GRANT, Grant
from fuseclient.data.objects import StoreError
from fuseclient.data.open_file import Memory, OpenFile
from fuseclient.data.uploads import Objects, Uploads
from fuseclient.data.writer_hooks import WriterHooks
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

#: All files together, in bytes; beyond it writers wait.
TOTAL_BYTES: Final = 64 * 1024 * 1024
#: What has waited this long, in seconds, is flushed.
FLUSH_AGE_S: Final = 5.0
#: The most that experience with new files counts.
_SURE: Final = 8


@dataclass(frozen=True)
class Closed:
    """What is known of a file when its last writer has gone: attributes, and the whole content if it is at hand."""

    attributes: wire.Attributes
    content: bytes | None


class Writer:
    """The files open for writing. ``committed`` is told of each reply that changed a file, before a flush returns.

    ``is_lazy`` says whether the metaserver acknowledges before it is durable; ``changes`` counts what it acknowledged;
    ``took_over`` says whether there was another worker before.
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
        took_over: bool = False,
        flush_age_s: float = FLUSH_AGE_S,
        total_bytes: int = TOTAL_BYTES,
    ) -> None:
        self._inline_limit = inline_limit
        self._memory = Memory(total_bytes)
        self._files: dict[int, OpenFile] = {}
        #: What the mount is asked and told.
        self.hooks = WriterHooks()
        self._uploads = Uploads(caller, store)
        self._durability = Durability(caller, is_lazy, changes, took_over=took_over)
        self._committer = Committer(
            caller, self._uploads, inline_limit, committed, self._durability, self.hooks, flush_age_s
        )
        #: Positive: most new files were written to once of late.
        self._single_writes = 1

    @property
    def uncommitted_bytes(self) -> int:
        """How many bytes are written and not yet committed, of all files."""
        return self._memory.used

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
            file = OpenFile(attributes, self._memory, is_new=is_new, unsynced=lazily, held=held)
            self._files[attributes.ino] = file
        file.observe(attributes)
        file.writers += 1
        if held:
            self._committer.start_timer(file)

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
        if file is None or not (file.is_new or file.held) or request.size is not None or not self.hooks.is_alone():
            return None
        self._touch(file)
        file.defer(request)
        self._committer.start_timer(file)
        return file.overlay()

    async def commit_deferred(self) -> None:
        """Commit what is held back: new files, and changes of attributes that wait, with what was written before.

        Raises what is in the way. This client is not alone any more, so there are no new ones.
        """
        if ahead := [file for file in self._files.values() if file.closes_ahead or file.changes_ahead]:
            await self.hooks.withdraw(0)
            for file in ahead:
                file.closes_ahead = file.changes_ahead = False
        await self.hooks.held_files.commit_all()
        pending = [file for file in self._files.values() if file.pending is not None]
        await asyncio.gather(*(self._committer.drain(file) for file in pending))

    def show(self, attributes: wire.Attributes) -> bool:
        """Say whether these are the attributes of an open file as everybody may see them: it is new and as it was made.

        ``when_touched`` is called as soon as that is no more.
        """
        file = self._files.get(attributes.ino)
        if file is None:
            return False
        untouched = file.is_new and not file.writes and not file.uncommitted() and file.pending is None
        file.shown = untouched and not file.granted and not file.stale and file.attributes == attributes
        return file.shown

    def _touch(self, file: OpenFile) -> None:
        if file.shown:
            file.shown = False
            self.hooks.when_touched(file.attributes)

    async def close(self, ino: int) -> Closed | None:
        """Flush, and count one writer less. What is known of the file if this was the last one, else None."""
        file = self._files[ino]
        if self.may_wait(ino):
            return self.close_settled(ino)
        drained = await self._committer.drain_quietly(file)
        file.writers -= 1
        while file.writers == 0 and drained and not file.is_committed:
            drained = await self._committer.drain_quietly(file)
        return self._closed(file)

    def is_settled(self, ino: int) -> bool:
        """Say whether an open file need not be waited for to be closed: :meth:`close_settled` will do."""
        file = self._files[ino]
        return (file.is_committed and not file.lock.locked()) or self.may_wait(ino)

    def may_wait(self, ino: int) -> bool:
        """Say whether a file is held back and may be closed so, with all that was written."""
        file = self._files.get(ino)
        if file is None or not file.held or file.error is not None or file.staged or file.lock.locked():
            return False
        return file.dirty.end <= self._inline_limit and self.hooks.held_files.may_wait

    def close_settled(self, ino: int) -> Closed | None:
        """Close a file that is settled; as :meth:`close`."""
        file = self._files[ino]
        file.writers -= 1
        return self._closed(file)

    def _closed(self, file: OpenFile) -> Closed | None:
        ino = file.attributes.ino
        if file.writers or self._files.get(ino) is not file:
            return None
        made_later = self.may_wait(ino) or (file.held and file.trusted)
        del self._files[ino]
        if made_later:
            return Closed(*self._committer.make_later(file))
        self._committer.give_up(file)
        return None if file.stale else Closed(file.attributes, file.content)

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

    async def _write(self, file: OpenFile, offset: int | None, data: bytes) -> None:
        file.raise_error()
        await self._make_room(file, len(data))
        if offset is None:
            await self._committer.current(file)
        while file.uncommitted() and file.appended != (offset is None):
            await self._committer.drain(file)
        file.appended = offset is None
        self._take(file, file.end if offset is None else offset, data)

    def write_now(self, ino: int, offset: int, data: bytes | memoryview) -> bool:
        """Gather a write that need not wait for anything; else return False, with nothing done."""
        file = self._files[ino]
        if file.error is not None or not self._memory.has_room(len(data)) or file.has_enough_staged:
            return False
        if file.appended and file.uncommitted():
            return False
        file.appended = False
        self._take(file, offset, data)
        return True

    def grant(self, ino: int, *, changes: bool = False) -> Grant:
        """Return what may be done to a file without a word of it; it holds as grants.py says.

        ``changes``: who is granted it knows the attributes, and all that was done since to those of a new file.
        """
        file = self._files.get(ino)
        if file is None or not grants.may_grant(file):
            return NO_GRANT
        self._touch(file)
        return grants.grant(file, self._inline_limit if self.may_wait(ino) else None, changes=changes)

    def renewal(self, ino: int) -> int:
        """Return by how much what was granted of a file is to be renewed, now that as much of it was taken."""
        return grants.renewal(self._files[ino])

    def write_posted(self, ino: int, offset: int, data: memoryview, made_ns: int | None = None) -> None:
        """Gather a write that :meth:`grant` allowed, and that was answered, at ``made_ns``."""
        file = self._files[ino]
        grants.take_posted(file, len(data))
        self._take(file, offset, data, made_ns)

    def change_posted(self, request: wire.SetAttributes) -> None:
        """Have a change of attributes wait that :meth:`grant` allowed, and that was answered."""
        file = self._files[request.ino]
        if not file.held:
            raise RuntimeError(f"inode {request.ino} was changed without a word although others may know of it")
        file.defer(request)
        self._committer.start_timer(file)

    def end_changes(self, ino: int) -> None:
        """What was asked of a file has ended that its attributes may be changed without a word."""
        file = self._files.get(ino)
        if file is not None:
            file.changes_ahead = False

    def _take(self, file: OpenFile, offset: int, data: bytes | memoryview, made_ns: int | None = None) -> None:
        self._touch(file)
        file.gather(offset, data, made_ns)
        self._committer.start_timer(file)
        if file.dirty.end > self._inline_limit:
            file.closes_ahead = file.trusted = False  # who granted that knows
        self._committer.stage_whole(file)
        if file.is_new:
            file.writes += 1
            self._write_ahead(file)

    async def _make_room(self, file: OpenFile, length: int) -> None:
        while not self._memory.has_room(length):
            largest = max(self._files.values(), key=lambda each: each.uncommitted_bytes)
            if not await self._committer.drain_quietly(largest):
                assert largest.error is not None
                error = largest.error
                if largest is file:
                    file.error = None
                raise error
        while file.has_enough_staged:
            assert file.work is not None
            await asyncio.wait({file.work})
            file.raise_error()

    def _write_ahead(self, file: OpenFile) -> None:
        """Commit the first bytes of a new small file at once, if such files were written once and closed of late."""
        if file.writes != 1 or (file.held and self.hooks.held_files.may_wait):
            return
        if file.dirty.end <= self._inline_limit and self._single_writes > 0:
            self._committer.drain_soon(file)

    def _learn(self, file: OpenFile) -> None:
        """A new file is flushed for the first time: remember whether writing it ahead was right, or would have been."""
        if file.is_new and file.writes:
            single = file.writes == 1 and file.pending is None
            self._single_writes = (
                min(_SURE, self._single_writes + 1) if single else max(-_SURE, self._single_writes - 2)
            )
        file.is_new = False

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

    async def _flush(self, file: OpenFile, for_reader: bool) -> None:
        self._learn(file)
        try:
            await self._committer.drain(file)
        except BaseException as error:
            file.trusted = False
            if error is file.loss:
                file.tell_loss(for_reader=for_reader)
            raise
        finally:
            file.error = None
        if file.unsynced and not self._durability.is_lazy():
            await self._durability.sync_file(file)
        file.tell_loss(for_reader=for_reader)

    async def sync(self, ino: int | None, *, for_reader: bool = False) -> None:
        """Return when all that was written to a file, or changed anywhere, is durable: fsync. Raises as ``flush``.

        What the metaserver acknowledged and may have lost, if it was of no open file, is told of once.
        """
        file = self._files.get(ino) if ino is not None else None
        if file is None:
            await self.hooks.held_files.commit_all()
            await self._durability.sync_all()
            return
        await self._flush(file, for_reader)
        if file.unsynced:
            await self._durability.sync_file(file)
            file.tell_loss(for_reader=for_reader)

    def acknowledged_lost(self) -> None:
        """The session has ended, or its metaserver: what that had acknowledged lazily may be lost."""
        self._durability.acknowledged_lost(self._files.values())

    def made_in_vain(self) -> None:
        """A file that was closed could not be made in the end."""
        self._durability.lost()

    async def publish(self, ino: int) -> None:
        """Return when all that was written is committed, durable or not; raise what is in the way."""
        file = self._files.get(ino)
        if file is not None:
            await self._committer.drain(file)

    def forfeit(self, ino: int) -> None:
        """What was written and is not committed is refused from now on: find that out, and give it up."""
        file = self._files.get(ino)
        if file is not None and file.uncommitted():
            self._committer.drain_soon(file)

    async def flush_all(self) -> None:
        """Flush every file; errors stay with their files."""
        await asyncio.gather(*(self._committer.drain_quietly(file) for file in self._files.values()))
        with contextlib.suppress(Refused, Disconnected):
            await self.hooks.held_files.commit_closed()
        await self._uploads.settle()

    async def before_read(self, ino: int, offset: int, length: int) -> None:
        """Return when the metaserver knows of all that was written to the range, and of the size that a read of it
        sees; raise the error if it cannot be."""
        file = self._files.get(ino)
        if file is None:
            return
        if file.held or file.concerns(offset, length):
            await self._committer.drain(file)

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
                await self._committer.drain_locked(file, lazy=True)
            except (Refused, Disconnected, StoreError):
                if size is None or file.held:
                    raise
            yield

    def cut(self, ino: int, size: int) -> None:
        """The file has been cut, in a settled context: what was gathered and not committed beyond its size goes."""
        file = self._files.get(ino)
        if file is not None and file.dirty.end > size:
            file.cut(size)

    def observe(self, attributes: wire.Attributes) -> None:
        """An inode has been changed by this client."""
        file = self._files.get(attributes.ino)
        if file is not None:
            file.observe(attributes)

    def note(self, attributes: wire.Attributes) -> None:
        """These were an inode's attributes after a change by this client; there may be newer ones."""
        file = self._files.get(attributes.ino)
        if file is not None:
            file.note(attributes)

    def overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return a file's attributes as they will be when all that is written is committed."""
        file = self._files.get(attributes.ino)
        if file is None:
            return attributes
        file.note(attributes)
        return file.overlay()

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
            file.changed_elsewhere()

    def everything_changed(self) -> None:
        """Other clients may have changed anything."""
        for file in self._files.values():
            file.changed_elsewhere()
            file.reset = True
