"""Warms a tree: puts the metadata of all of it, and the content if that is wanted, where it is answered fastest.

Directories are fetched window by window straight into the kernel cache, some at a time, without a request of the
kernel's; content of small files comes with its directory, larger files are brought into the disk cache after that.
Between two pages everybody else has his turn. What is there already is passed over. What has been put is never evicted
for what would be put next: the walk adds up what fits, and leaves out the rest.

Nobody depends on a walk: when it is no more asked for (see fuseclient/warmup.py) it ends where it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fuseclient.data.keeping import Keeper
from fuseclient.data.reader import Reader
from fuseclient.errors import UserError
from fuseclient.warmup import Progress, Request
from fuseclient.worker.directories import Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.fetches import Session
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.warm_directories import DIRECTORY, INO, WarmDirectory
from fuseclient.worker.warm_fetching import MARK, PAGE_BYTES, DirectoryFetch, Files, Room, together
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

_log = logging.getLogger(__name__)

#: Directories that are fetched at once.
_AT_ONCE: Final = 2
#: Seconds after the last question when a walk ends.
SILENCE_S: Final = 5.0
#: Inodes looked for in the kernel cache before others have their turn.
_LOOKED_FOR: Final = 4096
#: Walks over the tree if everything is dropped meanwhile.
_ATTEMPTS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a walk needs."""

    session: Session
    feeder: Feeder
    directories: Directories
    cache: Cache
    reader: Reader
    #: Makes what brings files into the disk cache.
    keeper: Callable[[], Keeper]
    #: Bytes of content that one fetch may bring.
    data_budget: int


class Walk:
    """One walk over the tree below a directory."""

    def __init__(self, parts: Parts, root: int, *, data: bool) -> None:
        self._parts = parts
        self._root = root
        self._data = data
        self._began = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self.room = Room(self._parts.cache.room)
        self.progress = Progress(room_entries=self.room.entries, room_content_bytes=self.room.pages * PAGE_BYTES)
        self._pending = [self._root]
        self._busy = 0
        self._more = asyncio.Event()
        #: Entries of the tree, if that is known.
        self._expected = 0
        #: Inodes and sizes, in turn.
        self._files = array("Q")

    async def run(self) -> None:
        """Walk. Raises Refused and Disconnected."""
        for _ in range(_ATTEMPTS):
            epoch = self._parts.cache.epoch
            try:
                await self._run()
            finally:
                self.update()
            if self._parts.cache.epoch == epoch:
                return
            self._begin()  # all that was put is void
        raise UserError("the mount has lost its session several times meanwhile; see its log")

    async def _run(self) -> None:
        progress = self.progress
        if self._root == wire.ROOT_INO:
            statistics = await self._parts.session.call(wire.GetStatistics(), wire.Statistics)
            self._expected = max(1, statistics.inodes - 1)
        await together(self._walk() for _ in range(_AT_ONCE))
        if self._data:
            progress.files.files = len(self._files) // 2
            progress.files.bytes = sum(self._files[1::2])
            parts = self._parts
            keeper = parts.keeper()
            files = Files(parts.session, parts.feeder, parts.cache, parts.reader, keeper, self.room)
            await files.bring(self._files, progress)

    def update(self) -> None:
        """Bring ``progress`` up to date: the time since the beginning, and what is to be expected."""
        progress = self.progress
        progress.seconds = time.monotonic() - self._began
        visited = progress.directories + progress.directories_passed_over
        entries = progress.entries + progress.entries_passed_over
        ahead = entries * (len(self._pending) + self._busy) // visited if visited else 0
        progress.entries_expected = self._expected or entries + ahead

    async def _walk(self) -> None:
        while self._pending or self._busy:
            if not self._pending:
                self._more.clear()
                await self._more.wait()
                continue
            ino = self._pending.pop()
            self._busy += 1
            try:
                await self._visit(ino)
            finally:
                self._busy -= 1
                self._more.set()

    async def _visit(self, ino: int) -> None:
        try:
            known = self._parts.feeder.warm.get(ino)
            if known is None or not await self._is_there(ino, known):
                known = await self._fetch(ino)
            else:
                self._pass_over(known)
        except Refused as error:
            if error.code not in (wire.ErrorCode.NOT_FOUND, wire.ErrorCode.NOT_A_DIRECTORY):
                raise
            return
        self._pending += [each & INO for each in known.inodes if each & DIRECTORY]
        self._files += known.files

    async def _is_there(self, ino: int, known: WarmDirectory) -> bool:
        """Say whether what was put of a directory is still in the kernel cache."""
        if (self._data and not known.data) or len(known.inodes) > self.room.entries:
            return False
        cache = self._parts.cache
        if not cache.has_all(array("Q", [ino]), content=False):
            return False
        for begin in range(0, len(known.inodes), _LOOKED_FOR):
            if not cache.has_all(known.inodes[begin : begin + _LOOKED_FOR], content=self._data):
                return False
            await asyncio.sleep(0)
        return True

    def _pass_over(self, known: WarmDirectory) -> None:
        self.progress.directories_passed_over += 1
        self.progress.entries_passed_over += len(known.inodes)
        self.room.entries -= len(known.inodes) + MARK
        self.room.pages -= known.pages

    async def _fetch(self, ino: int) -> WarmDirectory:
        """Put a directory, as much of it as there is room for; return what was put."""
        parts, progress = self._parts, self.progress
        with parts.feeder.begin() as token:
            fetching = DirectoryFetch(parts.feeder, token, ino, self.room, progress, data=self._data)
            while not fetching.ended:
                await fetching.window(parts.session, parts.data_budget)
            put = fetching.result()
            if fetching.whole:
                progress.directories += 1
                parts.directories.fetched(ino)
                if parts.feeder.same_names(token, ino):
                    parts.feeder.warm.put(ino, put)
            else:
                progress.directories_left_out += 1
        return put


class Walks:
    """Answers the question "warmup": one walk at a time."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._job = ""
        self._walk: Walk | None = None
        self._task: asyncio.Task[None] | None = None
        self._silence: asyncio.TimerHandle | None = None

    async def answer(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Begin, go on with or end a walk, and say how far it is; raise :exc:`UserError`."""
        try:
            request = msgspec.convert(arguments, Request)
        except msgspec.ValidationError as error:
            raise UserError(f"not a question about warming: {error}") from None
        if request.begin:
            self._begin(request)
        if request.job != self._job or self._walk is None:
            raise UserError("the mount's worker was started again meanwhile; run it again to go on")
        if request.stop:
            await self.close()
        self._expect()
        return dict(msgspec.to_builtins(self._report(self._walk)))

    def _begin(self, request: Request) -> None:
        if self._task is not None and not self._task.done():
            raise UserError("this mount is being warmed already")
        if not self._parts.cache.room.entries:
            raise UserError("this mount has no kernel cache to be warmed (--accel off)")
        self._job = request.job
        self._walk = walk = Walk(self._parts, request.ino, data=request.data)
        self._task = asyncio.create_task(walk.run(), name=f"warm {request.ino}")

    def _expect(self) -> None:
        """End the walk if nobody asks for it any more."""
        if self._silence is not None:
            self._silence.cancel()
        self._silence = None
        if self._task is not None and not self._task.done():
            self._silence = asyncio.get_running_loop().call_later(SILENCE_S, self._task.cancel)

    def _report(self, walk: Walk) -> Progress:
        progress = walk.progress
        if self._task is not None and self._task.done():
            error = None if self._task.cancelled() else self._task.exception()
            progress.state = "stopped" if self._task.cancelled() else "failed" if error else "done"
            progress.problem = _problem(error) if error else None
        else:
            walk.update()
        return progress

    async def close(self) -> None:
        """End what runs."""
        if self._silence is not None:
            self._silence.cancel()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})


def _problem(error: BaseException) -> str:
    """Return why a walk failed, as a line."""
    if isinstance(error, UserError):
        return error.message
    if isinstance(error, Disconnected):
        return f"the metaserver cannot be reached: {error}"
    if not isinstance(error, Refused):
        _log.error("warming failed", exc_info=error)
        return "warming failed; see the mount's log"
    return str(error)
