"""A store in memory for remote engines, whose answers can be lost, before the work is done or after."""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Sequence

from metaserver.engine.base import Space
from metaserver.engine.store import Found, Lost, Moved, Past, Query, Store, Tip, Writes
from metaserver.errors import LimitExceeded


class Rows(Past):
    """Rows, and the tip that they are of."""

    def __init__(self, rows: dict[bytes, bytes], tip: Tip) -> None:
        self.rows = rows
        self.tip = tip
        self._sorted = sorted(rows)

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        await asyncio.sleep(0)
        found = Found(self.tip, {key: self.rows.get(key) for key in keys})
        for query in queries:
            inside = self._sorted[bisect_left(self._sorted, query.start) : bisect_left(self._sorted, query.end)]
            chosen = (inside[::-1] if query.reverse else inside)[: query.limit]
            found.ranges[query] = [(key, self.rows[key]) for key in chosen]
        return found


class LocalStore(Store):
    """The store. ``before`` and ``after`` are called around each commit, and may raise :exc:`Lost`."""

    most_writes = 127
    most_bytes = 1_400_000

    def __init__(self) -> None:
        self.now = Rows({}, Tip(0, b""))
        self.commits = self.fetches = 0
        self.before: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None
        self.is_away = False

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        await asyncio.sleep(0)
        self._check()
        self.fetches += 1
        return await self.now.fetch(keys, queries)

    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        await asyncio.sleep(0)
        self._check()
        self.before()
        self.commits += 1
        if len(writes) > self.most_writes:
            raise LimitExceeded("too many writes")
        if version != self.now.tip.version:
            raise Moved(self.now.tip)
        rows = {key: value for key, value in (self.now.rows | dict(writes)).items() if value is not None}
        self.now = Rows(rows, Tip(version + 1, marks))
        self.after()
        await asyncio.sleep(0)
        return version + 1

    @contextlib.asynccontextmanager
    async def past(self) -> AsyncIterator[Past]:
        self._check()
        yield self.now

    async def space(self) -> Space:
        return Space(2**30, 2**29)

    async def close(self) -> None:
        pass

    def _check(self) -> None:
        if self.is_away:
            raise Lost("it is away")
