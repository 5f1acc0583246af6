"""When the content of the next small files is fetched: the decisions, with a directory that is played."""

from __future__ import annotations

import asyncio
import contextlib
import random
import stat
from collections.abc import AsyncIterator
from typing import Any, cast

from fuseclient.worker.content_ahead import ContentAhead
from fuseclient.worker.places import Places
from metaserver import wire

SIZE = 4096
PARENT = 5
FIRST_INO = 100


class Directory:
    """A directory of small files, and what a client has in its maps of them. It is session and feeder in one."""

    def __init__(self, count: int) -> None:
        self.entries = [wire.DirectoryEntry(b"%d" % n, 3 * n + 3, _attributes(FIRST_INO + n)) for n in range(count)]
        self.put: set[int] = set()
        self.fetches: list[wire.FetchDirectory] = []
        self.misses = 0
        self.places = Places()
        self.ahead = ContentAhead(cast(Any, self), cast(Any, self), self.places, 8 << 20)
        for begin in range(0, count, 1000):
            self.places.page(_page(self.entries[begin : begin + 1000]))

    async def stream(self, request: wire.FetchDirectory) -> AsyncIterator[wire.DirectoryPage]:
        self.fetches.append(request)
        budget = request.data_budget
        found = [entry for entry in self.entries if entry.cookie > request.cookie][: request.limit]
        entries = []
        for entry in found:
            data = bytes(SIZE) if budget >= SIZE else None
            budget -= SIZE
            entries.append(wire.DirectoryEntry(entry.name, entry.cookie, entry.attributes, data))
        yield _page(entries[:50])
        yield _page(entries[50:])

    def begin(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def page(self, token: None, page: wire.DirectoryPage) -> None:
        self.put.update(entry.attributes.ino for entry in page.entries if entry.data is not None)
        self.places.page(page)

    async def read(self, number: int) -> None:
        """Read a file: the worker hears of it if its content is not in the maps."""
        if FIRST_INO + number not in self.put:
            self.misses += 1
            self.ahead.read(FIRST_INO + number)
            for _ in range(5):
                await asyncio.sleep(0)


def _attributes(ino: int) -> wire.Attributes:
    return wire.Attributes(ino, stat.S_IFREG | 0o644, 1, 0, 0, 0, SIZE, 0, 0, 0, wire.InodeFlag.INLINE, 1)


def _page(entries: list[wire.DirectoryEntry]) -> wire.DirectoryPage:
    directory = wire.Attributes(PARENT, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    return wire.DirectoryPage(directory, entries, True, False, False)


async def test_what_is_read_in_order_is_brought_in_ever_larger_parts() -> None:
    directory = Directory(4000)
    for number in range(4000):
        await directory.read(number)
    budgets = [request.data_budget for request in directory.fetches]
    assert budgets[:3] == [1 << 20, 2 << 20, 4 << 20]
    assert max(budgets) == 8 << 20
    assert directory.misses == 3 + len(budgets) - 1
    figures = directory.ahead.figures()
    assert figures["files"] == 4000 - directory.misses
    assert figures["bytes"] == SIZE * figures["files"]
    assert (figures["fetches"], figures["paid"], figures["wasted"]) == (len(budgets), len(budgets) - 1, 0)


async def test_some_files_may_be_left_out() -> None:
    directory = Directory(1000)
    for number in range(0, 1000, 3):
        await directory.read(number)
    assert directory.misses < 20
    assert directory.ahead.figures()["wasted"] == 0


async def test_another_order_brings_nothing() -> None:
    directory = Directory(1000)
    for number in random.Random(3).sample(range(1000), 600):
        await directory.read(number)
    assert directory.fetches == []
    backwards = Directory(100)
    for number in reversed(range(100)):
        await backwards.read(number)
    assert backwards.fetches == []


async def test_it_is_switched_off_when_it_does_not_pay_and_tried_again() -> None:
    """Three files are read in order, and then others somewhere else, again and again."""
    directory = Directory(4000)
    for begin in range(0, 4000, 40):
        directory.put.clear()
        for number in range(begin, begin + 3):
            await directory.read(number)
    assert len(directory.fetches) == 4
    figures = directory.ahead.figures()
    assert (figures["paid"], figures["wasted"], figures["switched_off"]) == (0, 4, 1)
    for number in [0] * 1000:
        directory.put.clear()
        await directory.read(number)
    directory.put.clear()
    for number in range(10, 15):
        await directory.read(number)
    assert len(directory.fetches) == 5


async def test_content_that_does_not_stay_is_waste() -> None:
    """What is brought is overtaken at once: reads of it come to the worker."""
    directory = Directory(600)
    for number in range(600):
        directory.put.clear()
        await directory.read(number)
    figures = directory.ahead.figures()
    assert figures["switched_off"] == 1
    assert len(directory.fetches) == 4


async def test_an_end_stops_what_is_under_way() -> None:
    directory = Directory(100)
    for number in range(3):
        directory.ahead.read(FIRST_INO + number)
    await directory.ahead.close()
    assert directory.fetches == []
    assert directory.put == set()
