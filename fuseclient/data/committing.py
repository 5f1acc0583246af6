"""Committing what is gathered of open files: inline, or as objects that are stored first.

As soon as a file has a whole object, the object is *staged*: its upload begins, and several run at once. Objects are
committed in the order of the writes, as many at a time as are stored by then, so each one is durable before the
metaserver is told of it. A file that stays within the inline limit is written to the metaserver itself. Extents that
lie apart share an object. A file that is held back is made with its first commit, and its attributes go with it.

What is appended (O_APPEND) goes where the file ends when it is committed, whoever else appends to it: the metaserver
refuses it if that is not where it was gathered for, and it is moved and committed again.

A file's ``lock`` is held while something is committed, so commits of one file follow each other.

Errors: what cannot be stored or committed is kept, and tried again after ``flush_age_s``, as is whatever has waited so
long. The error is left in the file.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Final

import msgspec

from fuseclient.data.caller import Caller
from fuseclient.data.durability import Durability
from fuseclient.data.extents import Extents
from fuseclient.data.objects import MAX_OBJECT, StoreError
from fuseclient.data.open_file import STAGED, OpenFile, whole_content
from fuseclient.data.uploads import COMMIT_CHUNKS, UNKNOWN, Upload, Uploads, pack
from fuseclient.data.writer_hooks import WriterHooks
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

_ATTEMPTS: Final = 16
#: Refusals that mean somebody else changed the file meanwhile: look again.
_OVERTAKEN: Final = (wire.ErrorCode.BUSY, wire.ErrorCode.INVALID)
#: Refusals after which there is nowhere to write to: the file is no more, or not this client's to write any more.
_NOWHERE: Final = (wire.ErrorCode.NOT_FOUND, wire.ErrorCode.LOST_LOCK)
#: Objects, and slices, of one commit.
_COMMIT_OBJECTS: Final = 16
_COMMIT_SLICES: Final = 512


class Committer:
    """Commits files, when asked to or in the background. ``committed`` is told of each reply that changed a file."""

    def __init__(
        self,
        caller: Caller,
        uploads: Uploads,
        inline_limit: int,
        committed: Callable[[wire.Changed], None],
        durability: Durability,
        hooks: WriterHooks,
        flush_age_s: float,
    ) -> None:
        self._caller = caller
        self._uploads = uploads
        self._inline_limit = inline_limit
        self._committed = committed
        self._durability = durability
        self._hooks = hooks
        self._flush_age_s = flush_age_s
        self._tasks: set[asyncio.Task[None]] = set()

    # All of a file

    async def drain(self, file: OpenFile) -> None:
        """Commit all that is gathered; raises what is in the way, and leaves it in the file, too."""
        async with file.lock:
            await self.drain_locked(file, lazy=False)

    async def drain_quietly(self, file: OpenFile) -> bool:
        """Commit all that is gathered; False if that failed, with the error left in the file."""
        try:
            await self.drain(file)
        except Exception:
            return False
        return True

    def drain_soon(self, file: OpenFile) -> None:
        """Commit all that is gathered, in the background."""
        self._in_background(self._drain_old(file))

    async def _drain_old(self, file: OpenFile) -> None:
        await self.drain_quietly(file)

    async def drain_locked(self, file: OpenFile, *, lazy: bool) -> None:
        """As :meth:`drain`, by who holds the file's lock; ``lazy``: it need not be durable yet."""
        self.stop_timer(file)
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

    def _failed(self, file: OpenFile, error: Exception) -> None:
        expected = isinstance(error, Refused | Disconnected | StoreError)
        _log.error("writing to inode %d failed: %s", file.attributes.ino, error, exc_info=None if expected else error)
        unknown = isinstance(error, Disconnected) or (isinstance(error, Refused) and error.code in UNKNOWN)
        (self._uploads.abandon if unknown else self._uploads.discard)(file.staged)
        file.fail(error, gone=isinstance(error, Refused) and error.code in _NOWHERE)
        if file.dirty or file.pending or file.held:
            self.start_timer(file)

    # What nobody has open any more

    def make_later(self, file: OpenFile) -> tuple[wire.Attributes, bytes]:
        """Have a closed file that is held back made later, with all that was written. Returns what it will be then."""
        content, shown = whole_content(file.dirty), file.overlay()
        self._forget(file)
        file.memory.used -= file.dirty.bytes
        file.dirty, file.held, file.pending = Extents(), False, None
        held_files = self._hooks.held_files
        held_files.closed(held_files.record(shown, content, writing=False))
        return shown, content

    def give_up(self, file: OpenFile) -> None:
        """Commit nothing more of a closed file; what could not be committed is lost, and the log says so."""
        self._forget(file)
        if file.held:
            _log.error("inode %d was closed and could not be made: %s", file.attributes.ino, file.error)
            file.held, file.stale = False, True
            self._hooks.held_files.give_up(file.attributes.ino)
        if file.dirty or file.staged:
            _log.error("data written to inode %d was lost: %s", file.attributes.ino, file.error)
            self._uploads.discard(file.staged)
            file.memory.used -= file.uncommitted_bytes
            file.stale = True
            self._hooks.when_given_up(file.attributes.ino)

    def _forget(self, file: OpenFile) -> None:
        self.stop_timer(file)
        file.forgotten = True

    # In the background

    def start_timer(self, file: OpenFile) -> None:
        """Have a file drained when something of it has waited for ``flush_age_s``."""
        if file.timer is None:
            loop = asyncio.get_running_loop()
            file.timer = loop.call_later(self._flush_age_s, self._grown_old, file)

    def stop_timer(self, file: OpenFile) -> None:
        """Nothing waits any more."""
        if file.timer is not None:
            file.timer.cancel()
            file.timer = None

    def _grown_old(self, file: OpenFile) -> None:
        file.timer = None
        self.drain_soon(file)

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stage_whole(self, file: OpenFile) -> None:
        """Stage whole objects, as many as may be, and have them committed; the rest goes on growing."""
        while file.is_full and len(file.staged) < STAGED:
            self._stage(file, file.dirty.take_units(MAX_OBJECT))
        if file.staged and file.work is None:
            file.work = self._in_background(self._commit_some(file))

    def _stage(self, file: OpenFile, batch: Extents) -> None:
        """Stage a batch, which was taken out of ``dirty`` or is all of it."""
        if batch is file.dirty:
            file.dirty = Extents()
        file.staged += [self._uploads.start(pieces) for pieces in pack(batch)]

    async def _commit_some(self, file: OpenFile) -> None:
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
        if file.error is None and not file.forgotten:
            self.stage_whole(file)

    # What the metaserver knows

    async def current(self, file: OpenFile) -> wire.Attributes:
        """Return a file's attributes, asking for them if others changed it; raises as a call does."""
        if file.stale:
            breaks = file.breaks
            found = await self._caller.call(wire.GetAttributes(file.attributes.ino), wire.Found)
            file.note(found.attributes)
            if file.breaks == breaks:
                file.stale = file.reset = False
        return file.attributes

    def _changed(self, file: OpenFile, changed: wire.Changed, lazy: bool = False) -> None:
        self._durability.acknowledged(file, lazy=lazy)
        file.observe(changed.attributes[0])
        self._committed(changed)

    async def _move_to_end(self, file: OpenFile) -> None:
        """Have what was appended follow what the file holds now."""
        if file.appended:
            file.move_to((await self.current(file)).size)

    # Inline

    async def _is_inline(self, file: OpenFile) -> bool:
        attributes = await self.current(file)
        return bool(attributes.flags & wire.InodeFlag.INLINE) and file.dirty.end <= self._inline_limit

    async def _commit_inline(self, file: OpenFile, lazy: bool) -> None:
        """Write what is gathered to the metaserver; if the file is not inline any more, leave it as it was."""
        flushing = file.begin_inline()
        for offset, buffer in flushing:
            data = bytes(buffer)
            then = file.pending if len(flushing) == 1 else None
            end = offset if file.appended else None
            request = wire.WriteInline(file.attributes.ino, offset, data, file.written_ns, lazy, then, end)
            try:
                changed = await self._caller.call(request, wire.Changed)
            except Refused as error:
                if error.code != wire.ErrorCode.TOO_LARGE and not (file.appended and error.code in _OVERTAKEN):
                    raise
                file.regather()
                await self._move_to_end(file)
                return
            if then is not None and file.pending is then:
                file.pending = None
            self._changed(file, changed, lazy)
            if offset == 0 and file.attributes.size == len(data) and not file.dirty:
                file.content = data
        file.end_inline()

    async def _commit_held(self, file: OpenFile, lazy: bool) -> None:
        """Have a file made that was held back, with its attributes, and its content if that is small."""
        if file.closes_ahead or file.changes_ahead:
            await self._hooks.withdraw(file.attributes.ino)
            file.closes_ahead = file.changes_ahead = False
        content = b""
        if not file.staged and file.dirty.end <= self._inline_limit:
            content = whole_content(file.begin_inline())
        pending, breaks = file.pending, file.breaks
        held_files = self._hooks.held_files
        made = await held_files.commit(held_files.record(file.overlay(), content, writing=True), lazy=lazy)
        file.held = False
        if made is None:
            if file.flushing is not None:
                file.regather()
            file.stale = True
            return
        if file.flushing is not None:
            file.end_inline()
            if file.pending is pending:  # else it comes after what is still to be written
                file.pending = None
        self._durability.acknowledged(file, lazy=lazy)
        file.attributes, file.stale = made, file.breaks != breaks
        if not (file.dirty or file.staged or file.stale):
            file.content = content

    async def _commit_pending(self, file: OpenFile, lazy: bool) -> None:
        """Make the changes of attributes that waited."""
        pending = file.pending
        assert pending is not None
        changed = await self._caller.call(msgspec.structs.replace(pending, lazy=lazy), wire.Changed)
        if file.pending is pending:
            file.pending = None
        self._changed(file, changed, lazy)

    # Objects

    async def _commit_staged(self, file: OpenFile) -> None:
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
        file.committed(group)

    async def _commit(self, file: OpenFile, group: list[Upload]) -> None:
        """Commit objects that are stored, over what is inline, if anything is."""
        attributes = await self.current(file)
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
        self._hooks.when_laid(ino, slices)


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
