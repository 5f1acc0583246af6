"""Names to inodes, and listings: the misses of the kernel, turned into fetches of whole directories.

The first miss below a directory fetches it: entries, attributes and small content go into the maps as they come, and
whoever waits for a name is answered by the page that brings it. With it come directories beside it, while it pays
(siblings.py). Later misses in it are names that the maps have evicted, or that are absent; each asks for itself, and
after enough evicted ones the directory is fetched again.

Of a directory of more than WINDOW entries the first miss fetches those from the name on. Later ones ask for their name
alone, and as soon as names are asked for in the listing's order the next ones are fetched ahead, more each time.

Who lists a directory is told names and attributes. The content of its small files is left out until one of them is
read (left_out.py): then it is fetched, with that of directories beside it, while it pays. Where files were read in a
directory that had been listed, the next listing beside it brings content at once. A name that is looked up brings
content, too: it is a file about to be opened as often as not.

A listing reads the same fetches, and keeps the last few for the rest of the listing, as long as nothing whatever is
dropped from the caches; after that it goes on with a small fetch of its own, until one is read to its end. It ends with
the entries that were there when it began: who renames or makes one for each that he reads comes to an end too.

Without maps (``window`` None) nothing is kept and nothing fetched ahead: each request is one request to the metaserver.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from fuseclient.worker.feeding import Feeder
from fuseclient.worker.fetches import Answer, Content, Fetch, Session, cookie_of
from fuseclient.worker.left_out import LeftOut, Stretch
from fuseclient.worker.listings import Entry
from fuseclient.worker.places import Places
from fuseclient.worker.rpc import Disconnected, Refused
from fuseclient.worker.siblings import Siblings
from fuseclient.worker.too_large import TooLarge
from metaserver import wire

#: Entries fetched at once.
WINDOW: Final = wire.MAX_FETCH
#: Entries fetched for one READDIR that no window serves.
PAGE: Final = 256
#: Evicted names asked for one by one before a directory is fetched again.
MISSES: Final = 16
_KNOWN_DIRECTORIES: Final = 65536
_KNOWN_LISTINGS: Final = 1024
#: Windows of listings that are kept for who goes on reading them, and the entries of them all; those fetched ahead.
_KEPT_WINDOWS: Final = 64
_KEPT_ENTRIES: Final = 8 * WINDOW
_NEXT_WINDOWS: Final = 8
#: Names asked for in order after which a large directory is fetched ahead; entries that may be left out between two of
#: them; entries of the first window.
_IN_ORDER: Final = 2
_SLACK: Final = 16
_FIRST_WINDOW: Final = 64
#: Large directories of which it is known in what order they are read, or how much content is to be fetched next.
_LARGE: Final = 1024
#: Bytes of content up to which a directory is fetched whole because a file of it is read, and those beside it, too: who
#: reads waits for what comes before his file.
_WHOLE_BYTES: Final = 4 << 20
#: Bytes of content that the first fetch of a part of a directory brings, because a file is read.
_FIRST_BYTES: Final = 128 << 10
_COUNTED: Final = ("fetches", "windows", "in_order", "names", "small", "without_content", "content_read", "unasked")


async def _answer(fetch: Fetch, name: bytes) -> Answer | None:
    """Return what a fetch tells of a name; nothing of a directory that may be searched, but not listed."""
    try:
        return await fetch.answer(name)
    except Refused as refused:
        if refused.code is not wire.ErrorCode.ACCESS_DENIED:
            raise
        return None


class Listing(NamedTuple):
    """Some entries that follow a cookie; ``complete``: there are no more after them.

    ``is_fresh`` says of one of them whether it may be kept; to be asked when it is used.
    """

    entries: list[Entry]
    complete: bool
    is_fresh: Callable[[Entry], bool]


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
        places: Places | None = None,
        too_large: TooLarge | None = None,
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
        self._places = places
        self._too_large = too_large
        self._left_out = LeftOut()
        #: Of directories fetched in part because files are read: the bytes of content that the next such fetch brings.
        self._budgets: OrderedDict[int, int] = OrderedDict()
        self._fetches: dict[int, Fetch] = {}
        self._large: OrderedDict[int, _Order] = OrderedDict()
        self._counts = dict.fromkeys(_COUNTED, 0)
        #: Windows of listings that were fetched ahead.
        self._next: OrderedDict[int, Fetch] = OrderedDict()
        self._windows: OrderedDict[int, Fetch] = OrderedDict()
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
                self._start(parent, cookie, None, limit=order.limit)
                order.limit = min(2 * order.limit, WINDOW)
        elif parent in self._misses:
            self._misses[parent] += 1
            if self._misses[parent] >= MISSES:
                del self._misses[parent]

    async def listing(self, ino: int, cookie: int) -> Listing:
        """Return at least one of the entries that follow a cookie, or say that there are none."""
        fetch = self._listed(ino, cookie)
        if fetch is None:
            fetch = Fetch(self._request(ino, cookie, PAGE, None, budget=0), self._feeder)
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

    def _listed(self, ino: int, cookie: int) -> Fetch | None:
        """Return the fetch, which may begin with this, that serves a listing; None: a small one is to be made."""
        if self._window is None:
            return None
        known = [each for each in (self._windows.get(ino), self._next.get(ino), self._fetches.get(ino)) if each]
        for fetch in known:
            if fetch.serves(cookie):
                return fetch
        if cookie and any(fetch.generation != self._feeder.generation for fetch in known):
            return None
        return self._list(ino, cookie)

    def _list(self, ino: int, cookie: int) -> Fetch:
        """Fetch entries that follow a cookie; without content, as far as one can tell that it is not wanted."""
        content = bool(self._data_budget and self._siblings and cookie == 0 and self._siblings.are_read(ino))
        return self._start(ino, cookie, None, budget=None if content else 0)

    def _read_ahead(self, fetch: Fetch, cookie: int) -> None:
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
            self._next[ino] = self._list(ino, last)
            self._next.move_to_end(ino)
            if len(self._next) > _NEXT_WINDOWS:
                self._next.popitem(last=False)

    def _ended(self, ino: int, cookie: int, fetch: Fetch, entries: list[Entry]) -> Listing:
        """Leave out what has come into the directory since its listing began."""
        if cookie == 0 or ino not in self._ends:
            self._ends[ino] = fetch.version
            if len(self._ends) > _KNOWN_LISTINGS:
                self._ends.popitem(last=False)
        end = self._ends[ino]
        self._ends.move_to_end(ino)
        if entries and entries[-1].cookie > end:
            entries = entries[: bisect_right(entries, end, key=cookie_of)]
            complete = True
        else:
            complete = fetch.done and fetch.complete
        if complete and not entries:
            del self._ends[ino]
        return Listing(entries, complete, fetch.is_fresh)

    async def content(self, ino: int) -> Content | None:
        """Return a small file that is read, if its content was left out when it was listed, or is on its way.

        None: it is to be read by itself.
        """
        place = self._places.find(ino) if self._places is not None and (self._left_out or self._fetches) else None
        if place is None:
            return None
        parent, cookie = place.window.parent, place.cookie
        fetch = self._fetches.get(parent)
        if fetch is None or not fetch.may_bring(cookie):
            stretch = self._left_out.find(parent, cookie)
            if stretch is None or not self._data_budget:
                return None
            fetch = self._bring(parent, cookie, stretch)
        try:
            with fetch:
                found = await fetch.content(ino)
            later = self._fetches.get(parent)
            if found is None and later is not None and later is not fetch and later.may_bring(cookie):
                with later:  # there was no room for it: what follows begins with what is waited for
                    found = await later.content(ino)
        except (Refused, Disconnected):
            return None
        return found if self._is_live() else None

    def _bring(self, parent: int, cookie: int, stretch: Stretch) -> Fetch:
        """Fetch the content of a directory, if none has come so far and it is not too much; else of the files
        from one on, to the stretch's end, and more each time."""
        self._counts["content_read"] += 1
        if stretch.whole:
            return self._start(parent, 0, None, is_read=True)
        budget = self._budgets.pop(parent, _FIRST_BYTES)
        self._budgets[parent] = 2 * budget
        if len(self._budgets) > _LARGE:
            self._budgets.popitem(last=False)
        limit = min(WINDOW, stretch.last - cookie + 1)
        return self._start(parent, cookie - 1, None, limit=limit, budget=budget)

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
        self._left_out.clear()
        self._budgets.clear()
        if self._siblings is not None:
            self._siblings.clear()

    def _keep(self, fetch: Fetch) -> None:
        if self._next.get(fetch.request.ino) is fetch:
            del self._next[fetch.request.ino]
        self._windows[fetch.request.ino] = fetch
        self._windows.move_to_end(fetch.request.ino)
        kept = sum(len(each.entries) for each in self._windows.values())
        while len(self._windows) > 1 and (len(self._windows) > _KEPT_WINDOWS or kept > _KEPT_ENTRIES):
            _, oldest = self._windows.popitem(last=False)
            kept -= len(oldest.entries)

    def _keep_small(self, fetch: Fetch) -> None:
        """A small fetch is the window from now on: if nothing is dropped until its end, a large one follows."""
        ino = fetch.request.ino
        if self._window is not None and fetch.error is None and fetch.generation == self._feeder.generation:
            self._next.pop(ino, None)
            self._keep(fetch)

    def _join(self, ino: int, around: bytes) -> Fetch:
        fetch = self._fetches.get(ino)
        return fetch if fetch is not None else self._start(ino, 0, around)

    def _start(
        self,
        ino: int,
        cookie: int,
        around: bytes | None,
        *,
        limit: int | None = None,
        budget: int | None = None,
        is_read: bool = False,
    ) -> Fetch:
        """Begin to fetch entries of a directory, and all of others beside it.

        ``budget``: bytes of content; None: as many as a fetch may bring. ``is_read``: the names are known, and a file
        of it is being read.
        """
        budget = self._data_budget if budget is None else min(budget, self._data_budget)
        also = self._also(ino, content=is_read) if limit is None and cookie == 0 else ()
        request = self._request(ino, cookie, limit or self._window or PAGE, around, also, budget=budget)
        return self._begin(request, self._finish, content=is_read)

    def _begin(self, request: wire.FetchDirectory, on_end: Callable[[Fetch], object], *, content: bool) -> Fetch:
        budget = request.data_budget
        fetch = self._fetches[request.ino] = Fetch(request, self._feeder)
        fetch.on_end = on_end
        beside = {
            each: Fetch(self._request(each, 0, WINDOW, None, budget=budget), self._feeder) for each in request.also
        }
        for each in beside.values():
            each.on_end = self._came_beside
        self._fetches.update(beside)

        def on_last(page: wire.DirectoryPage) -> None:
            self._go_on(fetch, beside, page, content=content)

        task = asyncio.create_task(fetch.run(self._session, beside, on_last), name=f"fetch {request.ino}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._counts["fetches"] += 1
        self._counts["without_content"] += not budget
        return fetch

    def _go_on(self, fetch: Fetch, beside: dict[int, Fetch], last: wire.DirectoryPage, *, content: bool) -> None:
        """Go on with the directories beside a fetch for which it had no room; those that are waited for come first.

        Asked for as its last page comes: so reader, worker and metaserver work at the same time.
        """
        came, request = last.directory.ino, fetch.request
        rest = [ino for ino, each in beside.items() if not each.came and ino != came]
        whole = last.complete if came == request.ino else fetch.complete
        if self._siblings is None or not whole or (beside and len(rest) == len(beside)):
            return
        rest.sort(key=lambda ino: not beside[ino].is_waited_for)
        following = self._siblings.following(came, rest, self._is_known(content), content=content)
        if following:
            first, *also = following
            request = self._request(first, 0, WINDOW, None, also, budget=request.data_budget)
            self._begin(request, self._came_beside, content=content)
            self._counts["unasked"] += 1

    def _also(self, ino: int, *, content: bool) -> list[int]:
        if self._siblings is None or self._window is None:
            return []
        return self._siblings.missed(ino, self._is_known(content), content=content)

    def _is_known(self, content: bool) -> Callable[[int], bool]:
        """Return what says of a directory whether it is not to be fetched, or not for the sake of its content."""

        def is_known(each: int) -> bool:
            known = each in self._misses and not (content and self._left_out.is_whole(each))
            return known or each in self._fetches

        return is_known

    def _request(
        self, ino: int, cookie: int, limit: int, around: bytes | None, also: Sequence[int] = (), *, budget: int
    ) -> wire.FetchDirectory:
        return wire.FetchDirectory(ino, cookie, limit, wire.MAX_INLINE if budget else 0, budget, around, list(also))

    def _finish(self, fetch: Fetch) -> None:
        self._note(fetch)
        if fetch.error is None and fetch.whole:
            self._keep(fetch)

    def _came_beside(self, fetch: Fetch) -> None:
        self._note(fetch)
        if fetch.error is None and fetch.complete:
            self._keep(fetch)  # who lists it may have asked just before it came
        if fetch.complete and self._siblings is not None:
            self._siblings.brought(fetch.request.ino, len(fetch.entries), fetch.bytes)

    def _note(self, fetch: Fetch) -> None:
        ino = fetch.request.ino
        if self._fetches.get(ino) is fetch:
            del self._fetches[ino]
        if fetch.error is not None or not fetch.came:
            if fetch.error is not None:
                self._left_out.forget(ino)
            return
        self._note_left_out(fetch)
        if self._too_large is not None and fetch.entries and (fetch.whole or fetch.request.around is None):
            after = 0 if fetch.whole else fetch.request.cookie
            self._too_large.fetched(ino, after, fetch.entries[-1].cookie, len(fetch.entries))
        if not fetch.complete:
            self._note_large(fetch)
        self.fetched(ino)

    def _note_left_out(self, fetch: Fetch) -> None:
        """Note what content is still to come. What was asked for in vain is not asked for again."""
        ino, tried = fetch.request.ino, fetch.request.data_budget > 0
        if tried and fetch.entries:
            self._left_out.take(ino, fetch.entries[0].cookie, fetch.entries[-1].cookie)
        if fetch.first_without and tried and not fetch.bytes:
            self._left_out.forget(ino)
        elif fetch.first_without:
            fits = fetch.bytes_without <= min(_WHOLE_BYTES, self._data_budget)
            whole = fetch.whole and fetch.complete and not tried and fits
            self._left_out.put(ino, Stretch(fetch.first_without, fetch.last_without, whole))

    def _note_large(self, fetch: Fetch) -> None:
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
        names asked for one by one, small parts of listings, fetches without content, those for a file that is read,
        those that follow another before anything is missed; directories too large for the kernel cache; and what came
        beside other directories.
        """
        counts = {**self._counts, "too_large": self._too_large.count if self._too_large is not None else 0}
        return {**counts, **self._siblings.figures()} if self._siblings is not None else counts
