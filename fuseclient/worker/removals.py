"""Names of files that were removed here and that the metaserver does not know of yet.

While this client is alone on its volume, nobody else can see what it removes. So, if the metaserver acknowledges before
it is durable anyway (``--durability interval``), the unlinking of a file is answered at once, if it is known here what
the name stands for: in a directory of which all names are known. Nothing can be in its way that the kernel has not
checked. The metaserver is told of many names in one request, soon.

:class:`Removals` is the way of the mount's other requests to the metaserver, too: each waits until all that was removed
before it is told. So no reply can show what this mount has removed, and everything is done in order, whatever it is
about. What is held back is told, too, before another client is let in (a Break that says ``joined``). With a worker
that dies it is lost. With a session that ends it is, too: others may have seen the names since, and count on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec

from fuseclient.data.caller import Reply
from fuseclient.worker.creations import Stream
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.orphans import Orphans
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Names held back at most.
MOST_NAMES: Final = 1024
#: Seconds that they gather at most, and after a failure.
GATHER_S: Final = 0.1
_RETRY_S: Final = 0.5
#: Refusals that leave it open what was done, or are of a session that is being replaced.
_OPEN: Final = (wire.ErrorCode.INTERNAL, wire.ErrorCode.STALE_SESSION, wire.ErrorCode.BUSY)


class Removals:
    """The names of one mount that are removed and held back.

    ``may_wait`` says whether names may be held back, ``is_busy`` whether an inode is in such use here that its removal
    may not. ``when_lost`` is told of each name that is not removed in the end, though its remover believes so.
    """

    #: Told of each inode that may have lost its last link.
    orphans: Orphans

    def __init__(
        self,
        session: Stream,
        feeder: Feeder,
        *,
        may_wait: Callable[[], bool],
        is_busy: Callable[[int], bool],
        when_lost: Callable[[wire.RemovedName], None],
    ) -> None:
        self._session = session
        self._feeder = feeder
        self._may_wait = may_wait
        self._is_busy = is_busy
        self._when_lost = when_lost
        #: What is held back, by number, oldest first; and when the newest was removed from each directory.
        self._held: dict[int, wire.RemovedName] = {}
        self._newest_ns: dict[int, int] = {}
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        #: The request under way.
        self._told: wire.RemoveNames | None = None
        #: The last attempt failed: nothing more is held back until one succeeds.
        self._failing: Exception | None = None
        #: Names that were removed here, and requests that told of them.
        self.names = self.requests = 0

    def figures(self) -> dict[str, int]:
        """Return how many names were removed here, by how many requests that became known, and how many are not yet."""
        return {"names": self.names, "requests": self.requests, "held": len(self._held)}

    def __contains__(self, name: tuple[int, bytes]) -> bool:
        """Whether a name, of a directory, was removed and is held back."""
        return any((each.parent, each.name) == name for each in self._held.values())

    def remove(self, parent: int, name: bytes, directory: wire.Attributes | None) -> bool:
        """Remove a name of a file that is there; False: the metaserver is to do it.

        ``directory``: what its directory is, if that is known.
        """
        if self._failing is not None or len(self._held) >= MOST_NAMES or not self._may_wait():
            return False
        ino = self._feeder.whole.find(parent, name)
        if ino is None or self._is_busy(ino):
            return False
        now_ns = time.time_ns()
        self._held[next(self._numbers)] = wire.RemovedName(parent, name, ino, now_ns)
        self._newest_ns[parent] = now_ns
        self._feeder.removed(parent, name, ino, directory)
        self.orphans.add(ino)
        self.names += 1
        if len(self._held) >= wire.MAX_REMOVED:
            self._start()
        elif self._timer is None and self._sending is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self._start)
        return True

    def overlay(self, attributes: wire.Attributes) -> wire.Attributes:
        """Return a directory's attributes as they will be when all that is held back is told."""
        newest_ns = self._newest_ns.get(attributes.ino)
        if newest_ns is None:
            return attributes
        mtime_ns, ctime_ns = max(attributes.mtime_ns, newest_ns), max(attributes.ctime_ns, newest_ns)
        return msgspec.structs.replace(attributes, mtime_ns=mtime_ns, ctime_ns=ctime_ns)

    # Order

    async def call(self, request: wire.Request, reply_type: type[Reply], /) -> Reply:
        """Call when all that was removed before is told; raise what is in the way of that, too."""
        if self._held:
            await self.settle()
        return await self._session.call(request, reply_type)

    async def stream(self, request: wire.FetchDirectory, /) -> AsyncGenerator[wire.DirectoryPage, None]:
        """Yield the pages of a directory fetch, as :meth:`call` does."""
        if self._held:
            await self.settle()
        async with contextlib.aclosing(self._session.stream(request)) as pages:
            async for page in pages:
                yield page

    async def settle(self) -> None:
        """Return when nothing is held back of what was when this was called; raise what is in the way."""
        newest = next(reversed(self._held), None)
        while newest in self._held:
            self._start()
            assert self._sending is not None
            await asyncio.wait({self._sending})
            if self._failing is not None and newest in self._held:
                raise self._failing

    # Telling

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sending is None and self._held:
            self._sending = asyncio.create_task(self._send(), name="removed names")

    async def _send(self) -> None:
        """Tell what is held back while there is enough of it."""
        self._failing = None
        try:
            while self._held:
                await self._tell(list(itertools.islice(self._held, wire.MAX_REMOVED)))
                if len(self._held) < wire.MAX_REMOVED:
                    break
        except Exception as error:
            if self._held:
                expected = isinstance(error, Refused | Disconnected)
                _log.error("%d names are not removed yet: %s", len(self._held), error, exc_info=not expected)
                self._failing = error
        finally:
            self._sending = self._told = None
            if self._held and self._timer is None:
                delay_s = GATHER_S if self._failing is None else _RETRY_S
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._start)

    async def _tell(self, numbers: list[int]) -> None:
        """Have names removed: together, or one by one if that is refused; what is refused then is lost."""
        names = [self._held[number] for number in numbers if number in self._held]
        if not names:  # the session has ended meanwhile
            return
        request = self._told = wire.RemoveNames(names)
        try:
            with self._feeder.begin() as token:
                changed = await self._session.call(request, wire.Changed)
                self._feeder.changed(token, changed.attributes)
        except Refused as error:
            if error.code in _OPEN:
                raise
            if len(numbers) > 1:
                for number in numbers:
                    await self._tell([number])
                return
            _log.error("%r, which was removed, is not: %s", request.names[0].name, error)
            self._lose(numbers)
            return
        self.requests += 1
        for attributes in changed.attributes:
            if attributes.nlink:
                self.orphans.linked(attributes.ino)
        self._done(numbers)

    def _done(self, numbers: list[int]) -> None:
        for number in numbers:
            self._held.pop(number, None)
        if not self._held:
            self._newest_ns.clear()

    def _lose(self, numbers: list[int]) -> None:
        """Names are there, though they were removed."""
        lost = [self._held[number] for number in numbers if number in self._held]
        self._done(numbers)
        for each in lost:
            self.orphans.linked(each.ino)
            self._when_lost(each)

    # The session

    def check(self, request: wire.Request) -> None:
        """Refuse to send what was held back under a session that is no more."""
        if isinstance(request, wire.RemoveNames) and request is not self._told:
            raise Refused(wire.ErrorCode.STALE_SESSION, "the session that it was removed in has ended")

    def session_lost(self) -> None:
        """The session has ended, and with it what was not told; all that is cached is dropped by the caller."""
        self._told = self._failing = None
        if self._held:
            _log.error("%d names that were removed just before are there again", len(self._held))
            self._lose(list(self._held))
