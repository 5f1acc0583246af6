"""Fetching a directory: entries, attributes and small content in one go, cut into pages.

The one hot read of the metaserver: a few microseconds an entry, so it reads records straight into wire messages.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import Final

import msgspec

from metaserver import keys, wire
from metaserver.engine.base import Row, Snapshot
from metaserver.inodes import find_entry, load_directory
from metaserver.records import unpack_attributes, unpack_listed
from metaserver.volumes import Context, Volume
from metaserver.wire import Attributes, DirectoryEntry, DirectoryPage, InodeFlag

#: As a plain integer, which is a hundred times as fast: it is asked of each entry.
_INLINE: Final = int(InodeFlag.INLINE)
#: The bits of a mode that say what an inode is.
_TYPE: Final = 0o170000
#: Bytes of content that one fetch sends at most, whatever its budget: all of it is in memory at once.
_MAX_BUDGET: Final = 16 * 1024 * 1024
#: What an entry takes in a page beside its name and data, in bytes.
_ENTRY_BYTES: Final = 112


def fetch_directory(snapshot: Snapshot, context: Context, request: wire.FetchDirectory) -> list[DirectoryPage]:
    """Return the pages of a fetch, at least one; entries in the listing's order.

    An entry asked for by ``around`` that would not be in the first page is put in front of it instead.
    """
    volume = context.volume
    directory = load_directory(snapshot, volume, request.ino).attributes()
    rows, whole = _rows(snapshot, volume, request)
    complete = len(rows) <= request.limit
    entries = _Reader(snapshot, volume, request).entries(rows[: request.limit])
    pages = _pages(entries, request.around)
    return [
        DirectoryPage(directory, page, last, last and complete, whole)
        for page, last in zip(pages, [False] * (len(pages) - 1) + [True], strict=True)
    ]


def left_over(request: wire.FetchDirectory, pages: list[DirectoryPage]) -> wire.FetchDirectory | None:
    """Return a request with what the answer to another leaves of its limit and budget; None: nothing."""
    entries = sum(len(page.entries) for page in pages)
    sent = sum(len(entry.data or b"") for page in pages for entry in page.entries)
    budget = min(request.data_budget, _MAX_BUDGET)
    if entries >= request.limit or (budget and sent >= budget):
        return None
    return msgspec.structs.replace(request, limit=request.limit - entries, data_budget=budget - sent)


def whole_of(request: wire.FetchDirectory, ino: int) -> wire.FetchDirectory:
    """Return a request for all of another directory, with the same limit and budget."""
    return msgspec.structs.replace(request, ino=ino, cookie=0, around=None, also=[])


def is_whole(request: wire.FetchDirectory, pages: list[DirectoryPage]) -> bool:
    """Say whether all entries came, with all content that was asked for."""
    return pages[-1].complete and not any(
        entry.data is None and _is_wanted(request, entry.attributes) for page in pages for entry in page.entries
    )


def _is_wanted(request: wire.FetchDirectory, attributes: Attributes) -> bool:
    inline = attributes.flags & _INLINE and stat.S_ISREG(attributes.mode)
    return bool(inline and 0 < attributes.size <= request.data_limit)


def not_last(page: DirectoryPage) -> DirectoryPage:
    """Return a page as one that others follow."""
    return msgspec.structs.replace(page, last=False) if page.last else page


def end_after(page: DirectoryPage) -> DirectoryPage:
    """Return a last page that says no more than the one before it."""
    return msgspec.structs.replace(page, entries=[], last=True)


def _rows(snapshot: Snapshot, volume: Volume, request: wire.FetchDirectory) -> tuple[list[Row], bool]:
    """Return the listing's rows to send and one more if there is one, and whether they begin with the first."""
    limit = request.limit + 1
    if request.around is None:
        start, end = keys.listing_from(volume.id, request.ino, request.cookie + 1)
        return snapshot.range(start, end, limit), request.cookie == 0
    rows = snapshot.range(*keys.listing_from(volume.id, request.ino, 0), limit)
    entry = find_entry(snapshot, volume, request.ino, request.around) if len(rows) == limit else None
    if entry is None or entry.cookie == keys.listing_cookie(rows[0][0]):
        return rows, True
    return snapshot.range(*keys.listing_from(volume.id, request.ino, entry.cookie), limit), False


class _Reader:
    """Turns rows of the listing into entries, with content as far as the budget goes.

    Records are read all at once, and then content: where a read is a round trip, a fetch has three.
    """

    def __init__(self, snapshot: Snapshot, volume: Volume, request: wire.FetchDirectory) -> None:
        self._get_many = snapshot.get_many
        self._volume = volume.id
        self._data_limit = request.data_limit
        self._budget = min(request.data_budget, _MAX_BUDGET)
        self._first = request.around

    def entries(self, rows: list[Row]) -> list[DirectoryEntry]:
        """Return the rows' entries in their order; the one asked for takes from the budget first."""
        listed = [unpack_listed(value) for _, value in rows]
        records = self._get_many([keys.inode(self._volume, ino) for ino, _ in listed])
        entries = []
        for (key, _), (ino, name), record in zip(rows, listed, records, strict=True):
            assert record is not None, f"the entry {name!r} has no inode {ino}"
            entries.append((name, keys.listing_cookie(key), unpack_attributes(ino, record)))
        content = self._content([(name, attributes) for name, _, attributes in entries])
        return [
            DirectoryEntry(name, cookie, attributes, content.get(at))
            for at, (name, cookie, attributes) in enumerate(entries)
        ]

    def _content(self, entries: list[tuple[bytes, Attributes]]) -> dict[int, bytes | None]:
        """Return the content of those entries, by their place, whose content is sent."""
        order: Iterable[int] = range(len(entries))
        if self._first is not None:
            order = sorted(order, key=lambda at: entries[at][0] != self._first)
        sent = [(at, entries[at][1]) for at in order if self._is_sent(entries[at][1])]
        content: dict[int, bytes | None] = {at: b"" for at, attributes in sent if not attributes.size}
        stored = [(at, attributes) for at, attributes in sent if attributes.size]
        found = self._get_many([keys.content(self._volume, attributes.ino) for _, attributes in stored])
        for (at, attributes), data in zip(stored, found, strict=True):
            content[at] = data if stat.S_ISLNK(attributes.mode) else (data or b"").ljust(attributes.size, b"\0")
        return content

    def _is_sent(self, attributes: Attributes) -> bool:
        kind, size = attributes.mode & _TYPE, attributes.size
        if kind == stat.S_IFLNK:
            return True
        if kind != stat.S_IFREG or not attributes.flags & _INLINE or size > self._data_limit:
            return False
        if size > self._budget:
            return False
        self._budget -= size
        return True


def _pages(entries: list[DirectoryEntry], around: bytes | None) -> list[list[DirectoryEntry]]:
    pages = _cut(entries)
    if around is None or len(pages) == 1 or any(entry.name == around for entry in pages[0]):
        return pages
    return _cut(sorted(entries, key=lambda entry: entry.name != around))


def _cut(entries: list[DirectoryEntry]) -> list[list[DirectoryEntry]]:
    """Cut entries into pages of at most PAGE_BYTES, or one entry."""
    pages: list[list[DirectoryEntry]] = [[]]
    room = wire.PAGE_BYTES
    for entry in entries:
        size = _ENTRY_BYTES + len(entry.name) + len(entry.data or b"")
        if size > room and pages[-1]:
            pages.append([])
            room = wire.PAGE_BYTES
        pages[-1].append(entry)
        room -= size
    return pages
