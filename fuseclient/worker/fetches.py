"""A fetch of a directory, or of a part of it, under way or done: what it puts into the maps, and who waits for what.

Its token lives as long as somebody reads from it, so that nothing is told of what was dropped since it was asked for.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from msgspec.structs import astuple

from fuseclient.data.caller import Caller
from fuseclient.levels import Level, reach
from fuseclient.worker.feeding import Feeder, comes_with_directory
from fuseclient.worker.listings import Entry
from metaserver import wire


class Session(Caller, Protocol):
    """What reaches the metaserver."""

    def stream(self, request: wire.FetchDirectory, /) -> AsyncIterator[wire.DirectoryPage]:
        """Yield the pages of a directory fetch."""
        ...


@dataclass(frozen=True)
class Answer:
    """What a name stands for; None: nothing. If not ``fresh``, it changed meanwhile and must not be kept."""

    attributes: wire.Attributes | None
    fresh: bool


class Content(NamedTuple):
    """A small file, whole."""

    attributes: wire.Attributes
    data: bytes


def cookie_of(entry: Entry) -> int:
    """Return what entries of a listing are ordered by."""
    return entry.cookie


class Fetch:
    """One fetch, under way or done. Its token lives as long as somebody reads from it."""

    def __init__(self, request: wire.FetchDirectory, feeder: Feeder) -> None:
        self.request = request
        self.entries: list[Entry] = []
        self.names: dict[bytes, wire.Attributes] = {}
        #: The directory's version: that of its newest entry, at most.
        self.version = 0
        #: Of content.
        self.bytes = 0
        #: The cookies of the first and the last small file that came without its content, 0: there is none; and the
        #: bytes of them all.
        self.first_without = self.last_without = self.bytes_without = 0
        #: Files that are being read, and what they are, as soon as that has come.
        self._wanted: dict[int, Content | None] = {}
        #: Called once, when all has come that will come.
        self.on_end: Callable[[Fetch], object] = lambda fetch: None
        #: It began at the directory's first entry / the directory's listing ended in it.
        self.whole = False
        self.complete = False
        self.done = False
        self.error: Exception | None = None
        self.generation = feeder.generation
        self._losses = feeder.losses(request.ino)
        self._feeder = feeder
        self._token = feeder.begin()
        self._users = 1
        self._progress = asyncio.Event()

    def __enter__(self) -> Fetch:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            self._token.end()
            self.names, self._wanted = {}, {}

    async def run(
        self,
        session: Session,
        beside: Mapping[int, Fetch] | None = None,
        on_last: Callable[[wire.DirectoryPage], object] = lambda page: None,
    ) -> None:
        """Read all pages into the maps and into here, or into the fetches of what comes ``beside``.

        This is the first user of them all, from the beginning. ``on_last`` is told of the last page before it is read.
        """
        beside = beside or {}
        try:
            async for page in session.stream(self.request):
                if page.last:
                    on_last(page)
                fetch = beside.get(page.directory.ino, self)
                if fetch.done:
                    continue
                fetch._add(page)
                if page.complete:
                    fetch._end()
        except Exception as error:
            self.error = error
        finally:
            for fetch in (self, *beside.values()):
                fetch._end()

    def _end(self) -> None:
        if self.done:
            return
        self.entries.sort(key=cookie_of)
        self._put_listing()
        if self.error is None and self.whole and self.complete:
            names = {entry.name: entry.attributes.ino for entry in self.entries}
            self._feeder.know_whole(self._token, self.request.ino, names, self._losses)
        self.done = True
        self.on_end(self)
        self._progress.set()
        self.__exit__()

    @property
    def came(self) -> bool:
        """Whether it was answered: what was to come beside another may not have."""
        return self.version > 0 or self.error is not None

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody but who reads the pages still reads from it."""
        return self._users > (not self.done)

    def _put_listing(self) -> None:
        """Put what these entries add to the directory's listing, if they follow a known one."""
        after = self._begins
        if self.error is None and after is not None:
            self._feeder.listing(self._token, self.request.ino, after, self.entries, complete=self.complete)

    @property
    def _begins(self) -> int | None:
        """The cookie that all entries follow, or None if they are those around a name."""
        if self.request.around is None:
            return self.request.cookie
        return 0 if self.whole else None

    def _add(self, page: wire.DirectoryPage) -> None:
        self._feeder.page(self._token, page)
        self.version = page.directory.version
        for name, cookie, attributes, data in map(astuple, page.entries):
            self.entries.append(Entry(name, cookie, attributes))
            self.names[name] = attributes
            if data:
                self.bytes += len(data)
                if attributes.ino in self._wanted:
                    self._wanted[attributes.ino] = Content(attributes, bytes(data))
            elif data is None and comes_with_directory(attributes):
                self.first_without = min(self.first_without or cookie, cookie)
                self.last_without = max(self.last_without, cookie)
                self.bytes_without += attributes.size
        self.whole, self.complete = page.whole, page.complete
        self._progress.set()

    async def advanced(self) -> None:
        """Wait for another page, or for the end; raise what ended it early."""
        if not self.done:
            reach(Level.METASERVER)
            self._progress.clear()
            await self._progress.wait()
        if self.error is not None:
            raise self.error

    async def answer(self, name: bytes) -> Answer | None:
        """Return what a name stands for, or None if this fetch does not say; to be called by a user."""
        while name not in self.names and not self.done:
            await self.advanced()
        if self.error is not None and name not in self.names:
            raise self.error
        attributes = self.names.get(name)
        parent = self.request.ino
        if attributes is not None:
            fresh = self._feeder.fresh(self._token, parent, name, attributes.ino)
            return Answer(attributes, True) if fresh else None
        if self.whole and self.complete and self._feeder.absent(self._token, parent, name):
            return Answer(None, True)
        return None

    async def content(self, ino: int) -> Content | None:
        """Return a small file if it comes from now on, and is still as it came; to be called by a user."""
        self._wanted.setdefault(ino, None)
        while (found := self._wanted[ino]) is None and not self.done:
            await self.advanced()
        return found if found is not None and self._feeder.may_keep(self._token, found.attributes) else None

    def may_bring(self, cookie: int) -> bool:
        """Say whether it may still bring the content of a file."""
        return not self.done and self.request.data_budget > 0 and self.request.cookie < cookie

    def is_fresh(self, entry: Entry) -> bool:
        """Say whether nothing of an entry was dropped since it was fetched."""
        if self.generation == self._feeder.generation:
            return True
        return self._feeder.fresh(self._token, self.request.ino, entry.name, entry.attributes.ino)

    def after(self, cookie: int) -> list[Entry]:
        """Return the entries read so far that follow a cookie; of a fetch around a name, none before its end."""
        if self.request.around is not None and not self.done:
            return []
        return self.entries[self._index(cookie) :]

    def _index(self, cookie: int) -> int:
        return bisect_right(self.entries, cookie, key=cookie_of)

    def serves(self, cookie: int) -> bool:
        """Say whether the listing after a cookie can be read here: nothing was dropped since, and it is covered."""
        if self.generation != self._feeder.generation or self.error is not None:
            return False
        begins = self._begins
        covered = begins is not None and begins <= cookie
        return covered and (not self.done or self.complete or self._index(cookie) < len(self.entries))
