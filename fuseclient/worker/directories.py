"""Names to inodes, and listings: the misses of the kernel, turned into fetches of whole directories.

The first miss below a directory fetches it: entries, attributes and small content go into the maps as they come, and
whoever waits for a name is answered by the page that brings it. With it come directories beside it, while it pays
(siblings.py). Later misses in it are names that the maps have evicted, or that are absent; each asks for itself, and
after enough evicted ones the directory is fetched again.

Of a directory of more than WINDOW entries the first miss fetches those from the name on. Later ones ask for their name
alone, and as soon as names are asked for in the listing's order the next ones are fetched ahead, more each time.

A listing reads the same fetches, and keeps the last few for the rest of the listing, as long as nothing whatever is
dropped from the caches; after that it goes on with a small fetch of its own, until one is read to its end. It ends with
the entries that were there when it began: who renames or makes one for each that he reads comes to an end too.

Without maps (``window`` None) nothing is kept and nothing fetched ahead: each request is one request to the metaserver.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from fuseclient.data.caller import Caller
from fuseclient.levels import Level, reach
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.listings import Entry
from fuseclient.worker.rpc import Refused
from fuseclient.worker.siblings import Siblings
from metaserver import wire

#: Entries fetched at once.
WINDOW: Final = wire.MAX_FETCH
#: Entries fetched for one READDIR that no window serves.
PAGE: Final = 256
#: Evicted names asked for one by one before a directory is fetched again.
MISSES: Final = 16
_KNOWN_DIRECTORIES: Final = 65536
_KNOWN_LISTINGS: Final = 1024
_KEPT_WINDOWS: Final = 8
#: Names asked for in order after which a large directory is fetched ahead; entries that may be left out between two of
#: them; entries of the first window.
_IN_ORDER: Final = 2
_SLACK: Final = 16
_FIRST_WINDOW: Final = 64
#: Large directories of which it is known in what order they are read.
_LARGE: Final = 1024


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


async def _answer(fetch: _Fetch, name: bytes) -> Answer | None:
    """Return what a fetch tells of a name; nothing of a directory that may be searched, but not listed."""
    try:
        return await fetch.answer(name)
    except Refused as refused:
        if refused.code is not wire.ErrorCode.ACCESS_DENIED:
            raise
        return None


def _cookie(entry: Entry) -> int:
    return entry.cookie


class Listing(NamedTuple):
    """Some entries that follow a cookie; ``complete``: there are no more after them.

    ``is_fresh`` says of one of them whether it may be kept; to be asked when it is used.
    """

    entries: list[Entry]
    complete: bool
    is_fresh: Callable[[Entry], bool]


class _Fetch:
    """One fetch, under way or done. Its token lives as long as somebody reads from it."""

    def __init__(self, request: wire.FetchDirectory, feeder: Feeder) -> None:
        self.request = request
        self.entries: list[Entry] = []
        self.names: dict[bytes, wire.Attributes] = {}
        #: The directory's version: that of its newest entry, at most.
        self.version = 0
        #: Of content.
        self.bytes = 0
        #: Called once, when all has come that will come.
        self.on_end: Callable[[_Fetch], object] = lambda fetch: None
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

    def __enter__(self) -> _Fetch:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            self._token.end()
            self.names = {}

    async def run(self, session: Session, beside: Mapping[int, _Fetch] | None = None) -> None:
        """Read all pages into the maps and into here, or into the fetches of what comes ``beside``.

        This is the first user of them all, from the beginning.
        """
        beside = beside or {}
        try:
            async for page in session.stream(self.request):
                fetch = beside.get(page.directory.ino, self)
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
        self.entries.sort(key=_cookie)
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
        self.bytes += sum(len(entry.data) for entry in page.entries if entry.data)
        for entry in page.entries:
            self.entries.append(Entry(entry.name, entry.cookie, entry.attributes))
            self.names[entry.name] = entry.attributes
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
        return bisect_right(self.entries, cookie, key=_cookie)

    def serves(self, cookie: int) -> bool:
        """Say whether the listing after a cookie can be read here: nothing was dropped since, and it is covered."""
        if self.generation != self._feeder.generation or self.error is not None:
            return False
        begins = self._begins
        covered = begins is not None and begins <= cookie
        return covered and (not self.done or self.complete or self._index(cookie) < len(self.entries))


@dataclass
class _Order:
    """Names asked for in a large directory: the last one's cookie, or from where to where they were fetched last."""

    begin: int = 0
    cookie: int = 0
    count: int = 0
    limit: int = _FIRST_WINDOW

    def follows(self, cookie: int) -> bool:
        """Note that a name was asked for; say whether they are asked for in order."""
        if self.begin < cookie <= self.cookie:  # it was on its way
            return False
        if self.cookie < cookie <= self.cookie + _SLACK:
            self.count += 1
        else:
            self.count, self.limit = 0, _FIRST_WINDOW
        self.begin = self.cookie = cookie
        return self.count >= _IN_ORDER


class Directories:
    """Looks names up and lists directories. ``siblings`` says what is fetched beside what is asked for."""

    def __init__(
        self,
        session: Session,
        feeder: Feeder,
        *,
        window: int | None,
        data_budget: int,
        is_live: Callable[[], bool] = lambda: True,
        siblings: Siblings | None = None,
    ) -> None:
        self._session = session
        self._feeder = feeder
        self._window = window
        self._data_budget = data_budget
        #: Whether there is a lease, and what is known of whole directories can be relied upon.
        self._is_live = is_live
        #: Of directories that were fetched: how many evicted names were asked for since.
        self._misses: OrderedDict[int, int] = OrderedDict()
        self._siblings = siblings
        self._fetches: dict[int, _Fetch] = {}
        self._large: OrderedDict[int, _Order] = OrderedDict()
        self._counts = dict.fromkeys(("fetches", "windows", "in_order", "names", "small"), 0)
        #: Windows of listings that were fetched ahead.
        self._next: OrderedDict[int, _Fetch] = OrderedDict()
        self._windows: OrderedDict[int, _Fetch] = OrderedDict()
        #: Of directories that are being listed: the version at the last beginning, and so the last cookie to be told.
        self._ends: OrderedDict[int, int] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def lookup(self, parent: int, name: bytes) -> Answer:
        """Return what a name stands for, and put it in the maps."""
        if self.lacks(parent, name):
            return Answer(None, True)
        while self._window is not None and parent not in self._misses:
            with self._join(parent, around=name) as fetch:
                answer = await _answer(fetch, name)
            if answer is not None:
                return answer
            if fetch.came:
                break
        return await self._lookup_one(parent, name)

    def lacks(self, parent: int, name: bytes) -> bool:
        """Say whether it is known that a directory has no such name; then the maps know it, too."""
        if self._window is None or not self._feeder.whole.lacks(parent, name) or not self._is_live():
            return False
        with self._feeder.begin() as token:
            return self._feeder.absent(token, parent, name)

    async def _lookup_one(self, parent: int, name: bytes) -> Answer:
        self._counts["names"] += 1
        with self._feeder.begin() as token:
            try:
                found = await self._session.call(wire.Lookup(parent, name), wire.Found)
            except Refused as error:
                if error.code != wire.ErrorCode.NOT_FOUND:
                    raise
                return Answer(None, self._feeder.absent(token, parent, name))
            self._count_miss(parent, found.cookie)
            return Answer(found.attributes, self._feeder.found(token, parent, name, found.attributes))

    def _count_miss(self, parent: int, cookie: int) -> None:
        order = self._large.get(parent)
        if order is not None:
            if order.follows(cookie) and parent not in self._fetches:
                self._counts["in_order"] += 1
                self._start(parent, cookie, None, order.limit)
                order.limit = min(2 * order.limit, WINDOW)
        elif parent in self._misses:
            self._misses[parent] += 1
            if self._misses[parent] >= MISSES:
                del self._misses[parent]

    async def listing(self, ino: int, cookie: int) -> Listing:
        """Return at least one of the entries that follow a cookie, or say that there are none."""
        fetch = self._listed(ino, cookie)
        if fetch is None:
            fetch = _Fetch(self._request(ino, cookie, PAGE, None, data=False), self._feeder)
            self._counts["small"] += 1
            await fetch.run(self._session)
            entries = fetch.entries
            self._keep_small(fetch)
        else:
            self._keep(fetch)
            with fetch:
                while not (entries := fetch.after(cookie)) and not fetch.done:
                    await fetch.advanced()
            self._read_ahead(fetch, cookie)
        if fetch.error is not None:
            raise fetch.error
        return self._ended(ino, cookie, fetch, entries)

    def _listed(self, ino: int, cookie: int) -> _Fetch | None:
        """Return the fetch, which may begin with this, that serves a listing; None: a small one is to be made."""
        if self._window is None:
            return None
        known = [each for each in (self._windows.get(ino), self._next.get(ino), self._fetches.get(ino)) if each]
        for fetch in known:
            if fetch.serves(cookie):
                return fetch
        if cookie and any(fetch.generation != self._feeder.generation for fetch in known):
            return None
        return self._start(ino, cookie, None)

    def _read_ahead(self, fetch: _Fetch, cookie: int) -> None:
        """Fetch the next window of a listing when half of this one has been read."""
        ino = fetch.request.ino
        if not cookie or not fetch.done or fetch.complete or not fetch.entries or not fetch.serves(cookie):
            return
        later = self._next.get(ino)
        last = fetch.entries[-1].cookie
        if later is fetch or (later is not None and later.serves(last)) or ino in self._fetches:
            return
        if 2 * len(fetch.after(cookie)) <= len(fetch.entries):
            self._counts["in_order"] += 1
            self._next[ino] = self._start(ino, last, None)
            self._next.move_to_end(ino)
            if len(self._next) > _KEPT_WINDOWS:
                self._next.popitem(last=False)

    def _ended(self, ino: int, cookie: int, fetch: _Fetch, entries: list[Entry]) -> Listing:
        """Leave out what has come into the directory since its listing began."""
        if cookie == 0 or ino not in self._ends:
            self._ends[ino] = fetch.version
            if len(self._ends) > _KNOWN_LISTINGS:
                self._ends.popitem(last=False)
        end = self._ends[ino]
        self._ends.move_to_end(ino)
        if entries and entries[-1].cookie > end:
            entries = entries[: bisect_right(entries, end, key=_cookie)]
            complete = True
        else:
            complete = fetch.done and fetch.complete
        if complete and not entries:
            del self._ends[ino]
        return Listing(entries, complete, fetch.is_fresh)

    def fetched(self, ino: int) -> None:
        """All of a directory has been put into the maps."""
        self._misses[ino] = 0
        self._misses.move_to_end(ino)
        if len(self._misses) > _KNOWN_DIRECTORIES:
            self._misses.popitem(last=False)

    def is_fetching(self, ino: int) -> bool:
        """Say whether a fetch of a directory is under way."""
        return ino in self._fetches

    def forget_everything(self) -> None:
        """Fetch each directory anew at its next miss."""
        self._misses.clear()
        self._windows.clear()
        self._next.clear()
        self._large.clear()
        if self._siblings is not None:
            self._siblings.clear()

    def _keep(self, fetch: _Fetch) -> None:
        if self._next.get(fetch.request.ino) is fetch:
            del self._next[fetch.request.ino]
        self._windows[fetch.request.ino] = fetch
        self._windows.move_to_end(fetch.request.ino)
        if len(self._windows) > _KEPT_WINDOWS:
            self._windows.popitem(last=False)

    def _keep_small(self, fetch: _Fetch) -> None:
        """A small fetch is the window from now on: if nothing is dropped until its end, a large one follows."""
        ino = fetch.request.ino
        if self._window is not None and fetch.error is None and fetch.generation == self._feeder.generation:
            self._next.pop(ino, None)
            self._keep(fetch)

    def _join(self, ino: int, around: bytes) -> _Fetch:
        fetch = self._fetches.get(ino)
        return fetch if fetch is not None else self._start(ino, 0, around)

    def _start(self, ino: int, cookie: int, around: bytes | None, limit: int | None = None) -> _Fetch:
        also = self._also(ino) if limit is None and cookie == 0 else []
        request = self._request(ino, cookie, limit or self._window or PAGE, around, also, data=True)
        fetch = self._fetches[ino] = _Fetch(request, self._feeder)
        beside = {each: _Fetch(self._request(each, 0, WINDOW, None, data=True), self._feeder) for each in also}
        for each in beside.values():
            each.on_end = self._came_beside
        fetch.on_end = self._finish
        self._fetches.update(beside)
        task = asyncio.create_task(fetch.run(self._session, beside), name=f"fetch {ino}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._counts["fetches"] += 1
        return fetch

    def _also(self, ino: int) -> list[int]:
        if self._siblings is None or self._window is None:
            return []
        return self._siblings.missed(ino, lambda each: each in self._misses or each in self._fetches)

    def _request(
        self, ino: int, cookie: int, limit: int, around: bytes | None, also: Sequence[int] = (), *, data: bool
    ) -> wire.FetchDirectory:
        data_limit, budget = (wire.MAX_INLINE, self._data_budget) if data else (0, 0)
        return wire.FetchDirectory(ino, cookie, limit, data_limit, budget, around, list(also))

    def _finish(self, fetch: _Fetch) -> None:
        self._note(fetch)
        if fetch.error is None and fetch.whole:
            self._keep(fetch)

    def _came_beside(self, fetch: _Fetch) -> None:
        self._note(fetch)
        if fetch.complete and self._siblings is not None:
            self._siblings.brought(fetch.request.ino, len(fetch.entries), fetch.bytes)

    def _note(self, fetch: _Fetch) -> None:
        ino = fetch.request.ino
        if self._fetches.get(ino) is fetch:
            del self._fetches[ino]
        if fetch.error is not None or not fetch.came:
            return
        if not fetch.complete:
            self._note_large(fetch)
        self.fetched(ino)

    def _note_large(self, fetch: _Fetch) -> None:
        """A directory has more entries than one fetch brought: go on behind them, if they are asked for in order."""
        self._counts["windows"] += 1
        order = self._large.setdefault(fetch.request.ino, _Order())
        self._large.move_to_end(fetch.request.ino)
        if fetch.entries:  # what follows the first window is as likely to be asked for as not
            order.begin, order.cookie = fetch.entries[0].cookie, fetch.entries[-1].cookie
            order.count = _IN_ORDER
        if len(self._large) > _LARGE:
            self._large.popitem(last=False)

    def figures(self) -> dict[str, int]:
        """Return what ``stats`` shows: fetches, those of parts of large directories, those made ahead of a reader,
        names asked for one by one, and small parts of listings; and what came beside other directories."""
        return {**self._counts, **(self._siblings.figures() if self._siblings is not None else {})}
