"""The in-memory engine: for tests, and the model of an engine that runs transactions optimistically.

Bodies run on the event loop and see the store as it is; a transaction commits one turn of the loop later, as one over
a network would, unless what it read was changed meanwhile. So every conflict that an optimistic engine can have is
had here too, and the conformance suite finds what the conflict set misses.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from metaserver.engine.authority import Candidate
from metaserver.engine.base import Engine, Row, Snapshot, Space, Transaction
from metaserver.errors import Conflict, EngineBusy, EngineClosed

T = TypeVar("T")

#: The size, in bytes, that the engine claims to have; nothing enforces it.
_TOTAL: Final = 2**30


class Store:
    """Sorted keys, their values, and the keys of each commit that a running transaction may conflict with.

    Several engines may work on one, as several metaservers do on a database; ``holder`` has the authority.
    """

    holder: MemoryCandidate | None = None

    def __init__(self) -> None:
        #: Who has said that he stands.
        self.standing: dict[MemoryCandidate, None] = {}
        self.keys: list[bytes] = []
        self.values: dict[bytes, bytes] = {}
        self.bytes = 0
        self.version = 0
        self.running: dict[int, int] = {}
        self.commits: deque[tuple[int, frozenset[bytes]]] = deque()

    def range(self, start: bytes, end: bytes) -> list[bytes]:
        return self.keys[bisect_left(self.keys, start) : bisect_left(self.keys, end)]

    def apply(self, writes: dict[bytes, bytes | None]) -> None:
        for key, value in writes.items():
            self._set(key, value)
        self.version += 1
        self.commits.append((self.version, frozenset(writes)))

    def _set(self, key: bytes, value: bytes | None) -> None:
        old = self.values.pop(key, None)
        if old is not None:
            self.bytes -= len(key) + len(old)
        if value is not None:
            self.values[key] = value
            self.bytes += len(key) + len(value)
        if old is None and value is not None:
            insort(self.keys, key)
        elif old is not None and value is None:
            del self.keys[bisect_left(self.keys, key)]

    def started(self) -> int:
        self.running[self.version] = self.running.get(self.version, 0) + 1
        return self.version

    def ended(self, version: int) -> None:
        """Forget the commits that no running transaction is older than."""
        self.running[version] -= 1
        if not self.running[version]:
            del self.running[version]
        oldest = min(self.running, default=self.version)
        while self.commits and self.commits[0][0] <= oldest:
            self.commits.popleft()


class _MemorySnapshot(Snapshot):
    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, key: bytes) -> bytes | None:
        return self._store.values.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        keys = self._store.range(start, end)
        return [(key, self._store.values[key]) for key in _chosen(keys, limit, reverse)]

    def space(self) -> Space:
        return _space(self._store)


class _MemoryTransaction(Transaction):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self.writes: dict[bytes, bytes | None] = {}
        self._gets: set[bytes] = set()
        self._ranges: list[tuple[bytes, bytes]] = []

    def get(self, key: bytes) -> bytes | None:
        if key in self.writes:
            return self.writes[key]
        self._gets.add(key)
        return self._store.values.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        written = {key: value for key, value in self.writes.items() if start <= key < end}
        keys = set(self._store.range(start, end)).union(written).difference(k for k, v in written.items() if v is None)
        chosen = _chosen(sorted(keys), limit, reverse)
        self._ranges.append(_range_read(start, end, chosen, limit, reverse))
        return [(key, written.get(key, self._store.values.get(key)) or b"") for key in chosen]

    def space(self) -> Space:
        return _space(self._store)

    def _put(self, key: bytes, value: bytes) -> None:
        self.writes[key] = value

    def _delete(self, key: bytes) -> None:
        self.writes[key] = None

    def conflicts(self, since: int) -> bool:
        """Whether a commit after version ``since`` changed what this transaction read."""
        return any(self._read_one_of(keys) for version, keys in self._store.commits if version > since)

    def _read_one_of(self, keys: frozenset[bytes]) -> bool:
        if not self._gets.isdisjoint(keys):
            return True
        return any(start <= key < end for start, end in self._ranges for key in keys)


def _chosen(keys: list[bytes], limit: int | None, reverse: bool) -> list[bytes]:
    return (keys[::-1] if reverse else keys)[:limit]


def _range_read(start: bytes, end: bytes, keys: list[bytes], limit: int | None, reverse: bool) -> tuple[bytes, bytes]:
    """Return the part of [start, end) that was looked at: up to the last key when the limit ended it."""
    if limit is None or len(keys) < limit or not keys:
        return start, end
    return (keys[-1], end) if reverse else (start, keys[-1] + b"\0")


def _space(store: Store) -> Space:
    return Space(_TOTAL, max(0, _TOTAL - store.bytes))


class MemoryEngine(Engine):
    """A store that lives as long as this object, unless it is given.

    All on the loop's thread; the one await is marked.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store or Store()
        self._closed = False
        self._watcher: Callable[[], object] | None = None

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        self._check_open()
        return body(_MemorySnapshot(self._store))

    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        return await self.read(body)

    def watch(self, callback: Callable[[], object] | None) -> None:
        self._watcher = callback

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        self._check_open()
        txn = _MemoryTransaction(self._store)
        version = self._store.started()
        try:
            result = body(txn)
            await asyncio.sleep(0)  # others run, and may commit
            self._check_open()
            if txn.conflicts(version):
                raise Conflict("another transaction changed what this one had read")
            if txn.writes:
                self._store.apply(txn.writes)
                if self._watcher is not None:
                    self._watcher()
        finally:
            self._store.ended(version)
        return result

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")


class MemoryCandidate(Candidate):
    """A standing for the authority over a store of this process."""

    def __init__(self, address: str, store: Store, open_engine: Callable[[Store], MemoryEngine] = MemoryEngine) -> None:
        super().__init__(address)
        self._store = store
        self._open = open_engine
        self._engine: MemoryEngine | None = None

    async def take(self) -> Engine:
        if self._store.holder is not None:
            raise EngineBusy("another metaserver has the authority")
        self._store.holder = self
        self._engine = self._open(self._store)
        return self._engine

    async def holder(self) -> str | None:
        return self._store.holder.address if self._store.holder is not None else None

    async def announce(self) -> list[str]:
        self._store.standing[self] = None
        return [each.address for each in self._store.standing if each.address]

    async def resign(self) -> None:
        self.vanish()
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()
        if self._store.holder is self:
            self._store.holder = None

    def lapse(self) -> None:
        """Take the authority away, as other engines do when it is not renewed in time; the holder does not know yet."""
        if self._store.holder is self:
            self._store.holder = None

    def vanish(self) -> None:
        """Have it forgotten that this one stands, as other engines do some time after its last sign of life."""
        self._store.standing.pop(self, None)

    def notice(self) -> None:
        """Have the holder learn that the authority has lapsed."""
        self.on_lost("the authority was not renewed in time")
