"""Files that are made here and that the metaserver does not know of yet.

While this client is alone on its volume, nobody else can see a name that it makes; so it answers the making of a file
itself, if it knows all names of the directory, with an inode number that was reserved before. Name, inode, attributes
and content go to the metaserver in one request and one transaction: when the file is flushed, is some seconds old, or
something else is asked for that has to do with it. Of a lazy metaserver (``--durability interval``) a flush does not
wait: what was closed gathers, and goes there many files at a time. Until it is on its way there, it can be given other
attributes, and another name in its directory, with nobody asked.

Two things keep this right. Every request of this mount passes :class:`Ordered`, which first has all that it depends on
committed. And what is held back is committed before another client is let in (a Break that says ``joined``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, NamedTuple, Protocol

import msgspec

from fuseclient.data.caller import Caller, Reply
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Files held back at most, open and closed, and bytes of content of the closed ones.
MOST_FILES: Final = 1024
MOST_BYTES: Final = 16 * 1024 * 1024
#: Seconds that closed files gather at most, and after a failure.
GATHER_S: Final = 0.1
_RETRY_S: Final = 0.5
#: Inode numbers reserved at once, and from how few on.
_RESERVED: Final = 1024
_FEW: Final = 256
#: Directories of which the owner is remembered.
_DIRECTORIES: Final = 4096
#: Refusals that say that a file cannot be made as it is, or is made already.
_TAKEN: Final = (wire.ErrorCode.EXISTS, wire.ErrorCode.INVALID)
#: After these there is nowhere to make it: its directory is gone.
_NOWHERE: Final = (wire.ErrorCode.NOT_FOUND, wire.ErrorCode.NOT_A_DIRECTORY)


class Stream(Caller, Protocol):
    """What reaches the metaserver."""

    def stream(self, request: wire.FetchDirectory, /) -> AsyncGenerator[wire.DirectoryPage, None]: ...


class Made(NamedTuple):
    """A file that is held back: what it is called, and when it was made, in ns since 1970."""

    parent: int
    name: bytes
    made_ns: int


class Creations:
    """The files of one mount that are held back.

    ``is_alone`` says whether files may be held back; ``is_lazy`` whether even closed ones may. ``publish`` commits a
    file that is open. ``when_lost`` is told of each file that was not made in the end, though its maker believes so;
    ``when_closed_lost``, too, if nobody has it open who would be told.
    """

    def __init__(
        self,
        caller: Caller,
        feeder: Feeder,
        *,
        is_alone: Callable[[], bool],
        is_lazy: Callable[[], bool],
        when_lost: Callable[[Made, int], None],
        when_closed_lost: Callable[[], None],
    ) -> None:
        self._caller = caller
        self._feeder = feeder
        self.is_alone = is_alone
        self._is_lazy = is_lazy
        self._when_lost = when_lost
        self._when_closed_lost = when_closed_lost
        self.publish: Callable[[int], Awaitable[None]]
        #: All that is held back, by inode and by name; and how many, and the newest, of each directory.
        self._made: dict[int, Made] = {}
        self._names: dict[tuple[int, bytes], int] = {}
        self._below: dict[int, tuple[int, int]] = {}
        #: Those of them that are closed, as they will be made, in the order of their closing.
        self._closed: dict[int, wire.NewFile] = {}
        self._bytes = 0
        #: Files that the metaserver was told of and may know, though it has not said so.
        self._told: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        #: The last attempt to commit closed files failed: nothing more is held back until one succeeds.
        self._failing: Exception | None = None
        #: Reserved inode numbers.
        self._numbers: list[int] = []
        self._reserving: asyncio.Task[None] | None = None
        #: Directories as they were last heard of.
        self._directories: OrderedDict[int, wire.Attributes] = OrderedDict()
        #: Files that were made here, and requests that made them.
        self.files = self.requests = 0

    # Making

    def make(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> wire.Attributes | None:
        """Return a new file, which is held back; None: the metaserver is to make it. It is to be opened at once."""
        directory = self._directories.get(parent)
        if directory is None or self._failing is not None or not self.is_alone():
            return None
        if not self._feeder.whole.lacks(parent, name) or len(self._made) >= MOST_FILES or self._bytes >= MOST_BYTES:
            return None
        if len(self._numbers) < _FEW:
            self._reserve()
        if not self._numbers:
            return None
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        ino, now_ns = self._numbers.pop(), time.time_ns()
        self._made[ino] = Made(parent, name, now_ns)
        self._names[parent, name] = ino
        self._below[parent] = (self._below[parent][0] + 1 if parent in self._below else 1, now_ns)
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        self.files += 1
        return wire.Attributes(ino, mode, 1, uid, gid, 0, 0, now_ns, now_ns, now_ns, wire.InodeFlag.INLINE, 1)

    async def learn(self, parent: int) -> None:
        """Find out what files of a directory inherit, if they could be held back but for that. Raises nothing."""
        if parent in self._directories or not self.is_alone():
            return
        try:
            with self._feeder.begin() as token:
                found = await self._caller.call(wire.GetAttributes(parent), wire.Found)
                if self._feeder.unchanged(token, parent):
                    self.observe(found.attributes)
        except (Refused, Disconnected) as error:
            _log.debug("directory %d is not known: %s", parent, error)

    def observe(self, attributes: wire.Attributes) -> None:
        """These are the attributes of an inode now."""
        if stat.S_ISDIR(attributes.mode):
            self._directories[attributes.ino] = attributes
            self._directories.move_to_end(attributes.ino)
            if len(self._directories) > _DIRECTORIES:
                self._directories.popitem(last=False)

    def directory(self, ino: int) -> wire.Attributes | None:
        """Return a directory as it was last heard of, if nobody may have changed it since."""
        return self._directories.get(ino)

    def forget(self, ino: int | None) -> None:
        """Others may have changed an inode; None: any."""
        if ino is None:
            self._directories.clear()
        else:
            self._directories.pop(ino, None)

    def _reserve(self) -> None:
        if self._reserving is None:
            self._reserving = asyncio.create_task(self._more_numbers(), name="inode numbers")

    async def _more_numbers(self) -> None:
        try:
            given = await self._caller.call(wire.ReserveInodes(_RESERVED), wire.InodesReserved)
            numbers = range(given.first, given.first + given.step * given.count, given.step)
            self._numbers[:0] = reversed(numbers)
        except (Refused, Disconnected) as error:
            _log.info("no inode numbers are reserved, so files are made one by one: %s", error)
        finally:
            self._reserving = None

    def figures(self) -> dict[str, int]:
        """Return how many files were made here, by how many requests they became known, and how many are not yet."""
        return {"files": self.files, "requests": self.requests, "held": len(self._made)}

    # What is held back

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, ino: int) -> bool:
        return ino in self._made

    def has_below(self, ino: int) -> bool:
        """Whether a directory has names that are held back."""
        return ino in self._below

    def find(self, parent: int, name: bytes) -> int | None:
        """Return the inode of a name that is held back."""
        return self._names.get((parent, name))

    def closed_file(self, ino: int) -> wire.Attributes | None:
        """Return the attributes of a file that is closed and held back."""
        file = self._closed.get(ino)
        return attributes_of(file) if file is not None else None

    def overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return a directory's attributes as they will be when all that is held back is committed."""
        if attributes.ino not in self._below:
            return attributes
        _, newest_ns = self._below[attributes.ino]
        mtime_ns, ctime_ns = max(attributes.mtime_ns, newest_ns), max(attributes.ctime_ns, newest_ns)
        return msgspec.structs.replace(attributes, mtime_ns=mtime_ns, ctime_ns=ctime_ns)

    def record(self, attributes: wire.Attributes, content: bytes, *, writing: bool) -> wire.NewFile:
        """Return what the metaserver is told of a file that is held back."""
        made = self._made[attributes.ino]
        return wire.NewFile(
            made.parent, made.name, attributes.ino, attributes.mode, attributes.uid, attributes.gid, made.made_ns,
            attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns, content, writing,
        )  # fmt: skip

    def _done(self, ino: int) -> Made | None:
        """A file is held back no more."""
        self._told.discard(ino)
        made = self._made.pop(ino, None)
        if made is None:
            return None
        self._names.pop((made.parent, made.name), None)
        count, newest_ns = self._below.pop(made.parent)
        if count > 1:
            self._below[made.parent] = count - 1, newest_ns
        return made

    def give_up(self, ino: int) -> None:
        """A file will never be made."""
        made = self._done(ino)
        if made is not None:
            self._when_lost(made, ino)

    # Committing

    async def commit(self, file: wire.NewFile, *, lazy: bool) -> wire.Attributes | None:
        """Have one file made; return what it is then. None: it was made before, when that was not told.

        Raises as a call does; NOT_FOUND: it cannot be made any more, and is held back no longer.
        """
        try:
            changed = await self._call(wire.MakeFiles([file], lazy))
        except Refused as error:
            if error.code in _TAKEN and await self._exists(file.ino):
                self._done(file.ino)
                return None
            if error.code in _TAKEN or error.code in _NOWHERE:
                self.give_up(file.ino)
                raise Refused(wire.ErrorCode.NOT_FOUND, f"{file.name!r} could not be made: {error}") from error
            raise
        return changed.attributes[0]

    async def _exists(self, ino: int) -> bool:
        try:
            await self._caller.call(wire.GetAttributes(ino), wire.Found)
        except Refused as error:
            if error.code != wire.ErrorCode.NOT_FOUND:
                raise
            return False
        return True

    async def _call(self, request: wire.MakeFiles) -> wire.Changed:
        """Have files made. What was put of them stays, as it is what they are; their directories have changed."""
        self._told.update(file.ino for file in request.files)
        with self._feeder.begin() as token:
            try:
                changed = await self._caller.call(request, wire.Changed)
            except (Refused, Disconnected):
                for parent in {file.parent for file in request.files}:
                    self._feeder.drop_inode(parent)
                raise
            self.requests += 1
            for file in request.files:
                self._done(file.ino)
            self._feeder.changed(token, changed.attributes[len(request.files) :])
            return changed

    # Closed files

    @property
    def may_wait(self) -> bool:
        """Whether a file that is held back may be closed before it is committed."""
        return self._failing is None and self._is_lazy() and self.is_alone()

    def closed(self, file: wire.NewFile) -> None:
        """A file that is held back was closed; it is made soon."""
        self._closed[file.ino] = file
        self._bytes += len(file.content)
        if self._sending is not None:
            return
        if len(self._closed) >= wire.MAX_NEW_FILES or self._bytes >= wire.MAX_NEW_BYTES:
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self._start)

    def _gathered(self, ino: int | None) -> wire.NewFile | None:
        """Return a closed file that nobody was told of yet, if it may go on waiting."""
        file = self._closed.get(ino) if ino is not None else None
        return file if file is not None and ino not in self._told and self.may_wait else None

    def change(self, request: wire.SetAttributes) -> tuple[wire.Attributes, bytes] | None:
        """Change attributes of a closed file that is held back; return what it is now, and its content.

        None, with nothing done: it is none, or its size is to be changed.
        """
        file = self._gathered(request.ino)
        if file is None or request.size is not None:
            return None
        given = {name: getattr(request, name) for name in ("uid", "gid", "atime_ns", "mtime_ns")}
        given = {name: value for name, value in given.items() if value is not None}
        if request.mode is not None:
            given["mode"] = stat.S_IFREG | stat.S_IMODE(request.mode)
        ctime_ns = max(time.time_ns(), file.ctime_ns + 1)
        file = self._closed[file.ino] = msgspec.structs.replace(file, ctime_ns=ctime_ns, **given)
        return attributes_of(file), file.content

    def rename(self, parent: int, name: bytes, new_name: bytes) -> tuple[wire.Attributes, bytes] | None:
        """Give a closed file that is held back another name; return what it is now, and its content.

        None, with nothing done: it is none, or the name may be taken.
        """
        file = self._gathered(self._names.get((parent, name)))
        if file is None or not self._feeder.whole.lacks(parent, new_name):
            return None
        count, newest_ns = self._below[parent]
        now_ns = max(time.time_ns(), file.ctime_ns + 1, newest_ns)
        del self._names[parent, name]
        self._names[parent, new_name] = file.ino
        self._made[file.ino] = Made(parent, new_name, now_ns)
        self._below[parent] = count, now_ns
        file = self._closed[file.ino] = msgspec.structs.replace(file, name=new_name, made_ns=now_ns, ctime_ns=now_ns)
        return attributes_of(file), file.content

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sending is None and self._closed:
            self._sending = asyncio.create_task(self._send(), name="new files")

    async def _send(self) -> None:
        """Commit closed files while there are enough of them."""
        try:
            while self._closed:
                await self._commit_some()
                if len(self._closed) < wire.MAX_NEW_FILES and self._bytes < wire.MAX_NEW_BYTES:
                    break
            self._failing = None
        except Exception as error:
            expected = isinstance(error, Refused | Disconnected)
            _log.error("%d new files are not made yet: %s", len(self._closed), error, exc_info=not expected)
            self._failing = error
        finally:
            self._sending = None
            if self._closed and self._timer is None:
                delay_s = GATHER_S if self._failing is None else _RETRY_S
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._start)

    async def _commit_some(self) -> None:
        batch, size = list[wire.NewFile](), 0
        for file in self._closed.values():
            size += len(file.content)
            if batch and (size > wire.MAX_NEW_BYTES or len(batch) == wire.MAX_NEW_FILES):
                break
            batch.append(file)
        try:
            await self._call(wire.MakeFiles(batch, lazy=True))
        except Refused as error:
            if error.code not in (*_TAKEN, *_NOWHERE):
                raise
            for file in batch:
                await self._commit_one(file)
        for file in batch:
            del self._closed[file.ino]
            self._bytes -= len(file.content)

    async def _commit_one(self, file: wire.NewFile) -> None:
        """Make one of those that could not be made together; what cannot be made is lost."""
        try:
            await self.commit(file, lazy=True)
        except Refused as error:
            if error.code != wire.ErrorCode.NOT_FOUND:
                raise
            _log.error("a file that was closed is lost: %s", error)
            self._when_closed_lost()

    async def commit_closed(self) -> None:
        """Return when none of the files that are closed now is held back; raise what is in the way."""
        newest = next(reversed(self._closed), None)
        while newest in self._closed:
            self._start()
            assert self._sending is not None
            await asyncio.wait({self._sending})
            if self._failing is not None and newest in self._closed:
                raise self._failing

    # Order

    async def commit_all(self) -> None:
        """Return when nothing is held back of what was when this was called; raise what is in the way."""
        await asyncio.gather(*(self.publish(ino) for ino in self._made if ino not in self._closed))
        await self.commit_closed()

    async def commit_inode(self, ino: int) -> None:
        """Return when a file is not held back; raise what is in the way."""
        if ino in self._closed:
            await self.commit_closed()
        elif ino in self._made:
            await self.publish(ino)

    async def _commit_below(self, ino: int) -> None:
        if ino in self._below:
            await self.commit_all()

    async def before(self, request: wire.Request) -> None:
        """Return when nothing is held back that a request depends on; raise what is in the way."""
        match request:
            case wire.Rename() | wire.Sync() | wire.GetStatistics() | wire.Remove(directory=True):
                await self.commit_all()
            case wire.Lookup(parent, name) | wire.MakeNode(parent, name) | wire.Remove(parent, name):
                await self._commit_name(parent, name)
            case wire.Link(ino, parent, name):
                await self.commit_inode(ino)
                await self._commit_name(parent, name)
            case wire.GetAttributes(ino) | wire.OpenFile(ino) | wire.GetXattr(ino) | wire.ListXattrs(ino):
                await self.commit_inode(ino)
            case wire.CopyRange(source=source, ino=ino):
                await self.commit_inode(source)
                await self.commit_inode(ino)
            case wire.FetchDirectory(ino, also=also):
                for directory in (ino, *also):
                    await self._commit_below(directory)
            case wire.Reap(inos):
                for ino in inos:
                    await self.commit_inode(ino)
            case _ if ino := getattr(request, "ino", 0):
                await self.commit_inode(ino)
                await self._commit_below(ino)

    async def _commit_name(self, parent: int, name: bytes) -> None:
        ino = self._names.get((parent, name))
        if ino is not None:
            await self.commit_inode(ino)


class Ordered:
    """The way of a mount's requests to the metaserver: each waits for what is held back that it depends on."""

    def __init__(self, session: Stream, creations: Creations) -> None:
        self._session = session
        self._creations = creations

    async def call(self, request: wire.Request, reply_type: type[Reply], /) -> Reply:
        """Call, in order."""
        if self._creations:
            await self._creations.before(request)
        return await self._session.call(request, reply_type)

    async def stream(self, request: wire.FetchDirectory, /) -> AsyncGenerator[wire.DirectoryPage, None]:
        """Yield the pages of a directory fetch, in order."""
        if self._creations:
            await self._creations.before(request)
        async with contextlib.aclosing(self._session.stream(request)) as pages:
            async for page in pages:
                yield page


def attributes_of(file: wire.NewFile) -> wire.Attributes:
    """Return the attributes that a file has when it is made."""
    size = len(file.content)
    return wire.Attributes(
        file.ino, file.mode, 1, file.uid, file.gid, 0, size, file.atime_ns, file.mtime_ns, file.ctime_ns,
        wire.InodeFlag.INLINE, 1, size,
    )  # fmt: skip
