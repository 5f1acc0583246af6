"""What a walk that warms a tree fetches: one directory, by windows; and the files that do not come with directories.

Each takes from the room that the walk has left.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from array import array
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fuseclient.data.keeping import Keeper, Kept
from fuseclient.data.reader import Reader
from fuseclient.data.store_errors import StoreError
from fuseclient.warmup import Progress
from fuseclient.worker.feeding import Feeder, comes_with_directory
from fuseclient.worker.fetches import Session
from fuseclient.worker.guard import Token
from fuseclient.worker.rpc import Refused
from fuseclient.worker.warm_directories import DIRECTORY, WarmDirectory
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient import kernel_cache

_log = logging.getLogger(__name__)

PAGE_BYTES: Final = 4096
#: Entries fetched at once: who asks for something meanwhile waits for such a fetch or two, here and at the metaserver.
_WINDOW: Final = 1024
#: What an entry takes up in a listing beside its name, in bytes.
_LISTED_BYTES: Final = 36
#: Entries that it takes up to say that a directory is whole.
MARK: Final = 1
#: Files that are brought at once.
_FILES_AT_ONCE: Final = 4


class Room:
    """What is left of the kernel cache for a walk: entries, and pages."""

    def __init__(self, room: kernel_cache.Room) -> None:
        self.entries = room.entries
        self.pages = room.pages


class DirectoryFetch:
    """The fetch of one directory, from its first entry to its last or to the end of the room."""

    def __init__(self, feeder: Feeder, token: Token, ino: int, room: Room, progress: Progress, *, data: bool) -> None:
        self._feeder = feeder
        self._token = token
        self._ino = ino
        self._room = room
        self._progress = progress
        self._data = data
        self._cookie = 0
        self._limit = _WINDOW
        self._inodes = array("Q")
        self._files = array("Q")
        self._pages = 0
        self._listed_bytes = 0
        self._lists = room.pages > 0
        self._losses = feeder.losses(ino)
        #: Nothing more is to be fetched; and all of it is there.
        self.ended = self.whole = False

    async def window(self, session: Session, data_budget: int) -> None:
        """Fetch and put the next entries. Raises what the session does."""
        limit = min(self._limit, max(0, self._room.entries))
        if not limit:
            self.ended = True
            return
        budget = min(data_budget, max(0, self._room.pages) * PAGE_BYTES) if self._data else 0
        request = wire.FetchDirectory(self._ino, self._cookie, limit, wire.MAX_INLINE if budget else 0, budget)
        entries: list[wire.DirectoryEntry] = []
        complete = cut = False
        self._room.entries -= limit
        try:
            async for page in session.stream(request):
                if not cut:
                    whole = self._with_content(page) if budget else page
                    cut = whole is not page
                    self._feeder.page(self._token, whole)
                    entries += whole.entries
                complete = page.last and page.complete and not cut
                await asyncio.sleep(0)
        finally:
            self._room.entries += limit - len(entries)
        self._limit = max(1, len(entries)) if cut else min(_WINDOW, 2 * self._limit)
        self._took(entries, complete=complete)

    def _with_content(self, page: wire.DirectoryPage) -> wire.DirectoryPage:
        """Return the part of a page before the first file for whose content the budget was too small."""
        for index, entry in enumerate(page.entries):
            if entry.data is None and comes_with_directory(entry.attributes):
                return msgspec.structs.replace(page, entries=page.entries[:index])
        return page

    def _took(self, entries: Sequence[wire.DirectoryEntry], *, complete: bool) -> None:
        self._list(entries, complete=complete)
        content = self._progress.content
        pages = 0
        for entry in entries:
            attributes, data = entry.attributes, entry.data
            mode = attributes.mode
            if data:
                pages += -(-len(data) // PAGE_BYTES)
                content.files += 1
                content.bytes += len(data)
            elif self._data and stat.S_ISREG(mode) and attributes.size:
                self._without_content(attributes)
            self._inodes.append(attributes.ino | DIRECTORY if stat.S_ISDIR(mode) else attributes.ino)
        self._room.pages -= pages
        self._pages += pages
        self._progress.entries += len(entries)
        self._cookie = entries[-1].cookie if entries else self._cookie
        self.ended = self.whole = complete
        if complete:
            self._room.entries -= MARK
            self._feeder.put_whole(self._token, self._ino, self._losses)

    def _without_content(self, attributes: wire.Attributes) -> None:
        if comes_with_directory(attributes):
            self._progress.content_left_out.add(attributes.size)
        else:
            self._files.extend((attributes.ino, attributes.size))

    def _list(self, entries: Sequence[wire.DirectoryEntry], *, complete: bool) -> None:
        """Put these entries of the directory's listing, as long as there is room for it."""
        self._listed_bytes += sum(len(entry.name) for entry in entries) + _LISTED_BYTES * len(entries)
        pages = -(-self._listed_bytes // PAGE_BYTES)
        self._lists = self._lists and self._room.pages >= pages
        if self._lists:
            self._feeder.listing(self._token, self._ino, self._cookie, entries, complete=complete)
            if complete:
                self._room.pages -= pages
                self._pages += pages

    def result(self) -> WarmDirectory:
        """Return what was put."""
        return WarmDirectory(self._inodes, self._files, self._pages, self._data)


class Files:
    """Brings files, one by one: small ones into the kernel cache, others into the disk cache."""

    def __init__(
        self,
        session: Session,
        feeder: Feeder,
        cache: kernel_cache.Cache,
        reader: Reader,
        keeper: Keeper,
        room: Room,
    ) -> None:
        self._session = session
        self._feeder = feeder
        self._cache = cache
        self._reader = reader
        self._keeper = keeper
        self._room = room

    async def bring(self, files: array[int], progress: Progress) -> None:
        """Bring these: inodes and sizes, in turn. Raises Disconnected."""
        progress.room_disk_bytes = self._keeper.limit_bytes
        remaining = iter(zip(files[0::2], files[1::2], strict=True))

        async def work() -> None:
            for ino, size in remaining:
                await self._bring(ino, size, progress)

        await together(work() for _ in range(_FILES_AT_ONCE))

    async def _bring(self, ino: int, size: int, progress: Progress) -> None:
        try:
            (await self._outcome(ino, progress)).add(size)
        except (Refused, StoreError) as error:
            if isinstance(error, StoreError) or error.code is not wire.ErrorCode.NOT_FOUND:
                _log.warning("inode %d cannot be warmed: %s", ino, error)
                progress.files_failed.add(size)

    async def _outcome(self, ino: int, progress: Progress) -> Any:
        """Bring one; return where it is to be counted."""
        attributes = (await self._session.call(wire.GetAttributes(ino), wire.Found)).attributes
        if attributes.size <= wire.MAX_INLINE:
            return await self._put(attributes, progress)
        kept = await self._keeper.bring(attributes)
        return {
            Kept.BROUGHT: progress.files_brought,
            Kept.WAS_THERE: progress.files_passed_over,
            Kept.NO_ROOM: progress.files_left_out,
            Kept.NO_PLACE: progress.files_in_store,
        }[kept]

    async def _put(self, attributes: wire.Attributes, progress: Progress) -> Any:
        """Put a small file into the kernel cache, as a read of it does."""
        if self._cache.has_all(array("Q", [attributes.ino]), content=True):
            return progress.files_passed_over
        pages = -(-attributes.size // PAGE_BYTES)
        if self._room.pages < pages:
            return progress.content_left_out
        self._room.pages -= pages
        with self._feeder.begin() as token:
            reading = await self._reader.read(attributes.ino, 0, attributes.size)
            self._feeder.inode(token, reading.attributes, reading.content)
        return progress.content


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of these at once; raise the first error, when the others have been given up."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
