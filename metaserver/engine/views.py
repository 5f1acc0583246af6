"""What transaction bodies see of a store elsewhere: rows that are at hand, and a note of those that are not.

A body is a plain function that cannot wait. It is run on what is at hand; when it asks for a row that is not, it is
given up with :exc:`Missing`, the row is fetched, and it is run again. So a body that comes to its end has seen one
state of the store, and in between nothing else has run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from metaserver.engine.base import Row, Snapshot, Space, Transaction
from metaserver.engine.store import Found, Query, Writes

#: What a cached row takes beside its key and value, in bytes, about.
_ROW_BYTES: Final = 200
#: Prefixes that are known to be whole, at most.
_MOST_WHOLE: Final = 65_536
#: Rows that are fetched beyond a range's limit if there are writes in it that are not committed.
_SLACK: Final = 16


class Missing(BaseException):
    """A body needs what is not at hand. No Exception: a body that catches those does not stop this one."""

    def __init__(self, keys: Sequence[bytes] = (), query: Query | None = None, *, space: bool = False) -> None:
        super().__init__()
        self.keys = keys
        self.queries = () if query is None else (query,)
        self.space = space


class Cache:
    """Committed rows, absent ones too; the least recently used go first.

    Of a *whole* prefix all keys are at hand: those that are not among the rows are absent. It was new once, and is
    whole until one of its rows has gone.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._rows: OrderedDict[bytes, bytes | None] = OrderedDict()
        self._bytes = 0
        self._whole: OrderedDict[bytes, None] = OrderedDict()
        #: The lengths of all prefixes that ever were whole.
        self._lengths: set[int] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows or any(key[:length] in self._whole for length in self._lengths)

    def __getitem__(self, key: bytes) -> bytes | None:
        """Return the value of a key that is at hand."""
        if key not in self._rows:
            return None
        value = self._rows[key]
        self._rows.move_to_end(key)
        return value

    def is_new(self, prefix: bytes) -> None:
        """Nothing that begins so was stored when this is called; all that is from then on, comes to :meth:`update`."""
        self._lengths.add(len(prefix))
        self._whole[prefix] = None
        if len(self._whole) > _MOST_WHOLE:
            self._whole.popitem(last=False)

    def update(self, rows: Writes) -> None:
        """Add rows."""
        for key, value in rows.items():
            if key in self._rows:
                self._bytes -= _size(key, self._rows.pop(key))
            self._rows[key] = value
            self._bytes += _size(key, value)
        while self._bytes > self._most_bytes:
            key, value = self._rows.popitem(last=False)
            self._bytes -= _size(key, value)
            for length in self._lengths:
                self._whole.pop(key[:length], None)

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._whole.clear()
        self._bytes = 0


def _size(key: bytes, value: bytes | None) -> int:
    return _ROW_BYTES + len(key) + len(value or b"")


class Memo:
    """What was fetched for one body. It stays as the store is: our own commits are applied to it."""

    def __init__(self) -> None:
        self.generation = -1
        self.values: dict[bytes, bytes | None] = {}
        self._ranges: dict[tuple[bytes, bytes, bool], tuple[Query, list[Row]]] = {}

    def reset(self, generation: int) -> None:
        """Forget everything, unless it is of this generation (see remote.py)."""
        if self.generation != generation:
            self.generation = generation
            self.values.clear()
            self._ranges.clear()

    def add(self, found: Found) -> None:
        """Take in what was fetched."""
        self.values.update(found.values)
        for query, rows in found.ranges.items():
            self._ranges[query.start, query.end, query.reverse] = query, rows

    def apply(self, writes: Writes) -> None:
        """Take in what was committed."""
        for key in writes.keys() & self.values.keys():
            self.values[key] = writes[key]
        for name, (query, rows) in list(self._ranges.items()):
            if touches(writes, *query.covered(rows)):
                del self._ranges[name]

    def range(self, wanted: Query) -> list[Row]:
        """Return the rows of a range, or raise :exc:`Missing`."""
        query, rows = self._ranges.get((wanted.start, wanted.end, wanted.reverse), (wanted, None))
        if rows is None or not _suffices(query, rows, wanted.limit):
            raise Missing(query=wanted)
        return rows if wanted.limit is None else rows[: wanted.limit]


def _suffices(query: Query, rows: list[Row], limit: int | None) -> bool:
    is_whole = query.limit is None or len(rows) < query.limit
    return is_whole or (limit is not None and query.limit is not None and limit <= query.limit)


def touches(writes: Writes, start: bytes, end: bytes) -> bool:
    """Say whether any of these writes is in [start, end)."""
    return any(start <= key < end for key in writes)


class Hand:
    """What is at hand for one run of a body."""

    def __init__(self, cache: Cache, memo: Memo, space: Space | None, pending: Writes) -> None:
        self._cache = cache
        self._memo = memo
        self._space = space
        #: Written by transactions that will be committed before this one, or with it.
        self._pending = pending

    def get_many(self, keys: Sequence[bytes], own: Writes) -> list[bytes | None]:
        missing = [key for key in keys if not self._has(key, own)]
        if missing:
            raise Missing(missing)
        return [self._value(key, own) for key in keys]

    def get(self, key: bytes, own: Writes) -> bytes | None:
        if not self._has(key, own):
            raise Missing((key,))
        return self._value(key, own)

    def _has(self, key: bytes, own: Writes) -> bool:
        return key in own or key in self._pending or key in self._cache or key in self._memo.values

    def _value(self, key: bytes, own: Writes) -> bytes | None:
        if key in own:
            return own[key]
        if key in self._pending:
            return self._pending[key]
        return self._cache[key] if key in self._cache else self._memo.values[key]

    def range(self, query: Query, own: Writes) -> list[Row]:
        if query.limit == 0 or query.start >= query.end:
            return []
        written = {
            key: value
            for writes in (self._pending, own)
            for key, value in writes.items()
            if query.start <= key < query.end
        }
        if not written:
            return self._memo.range(query)
        more = query if query.limit is None else query._replace(limit=query.limit + len(written) + _SLACK)
        return overlaid(self._memo.range(more), written, query)

    def space(self) -> Space:
        if self._space is None:
            raise Missing(space=True)
        return self._space


def overlaid(rows: Sequence[Row], written: Writes, query: Query) -> list[Row]:
    """Return what a query finds when writes, all in its range, are laid over enough of the rows that are stored."""
    merged = [row for row in rows if row[0] not in written]
    merged += [(key, value) for key, value in written.items() if value is not None]
    return sorted(merged, reverse=query.reverse)[: query.limit]


class RemoteSnapshot(Snapshot):
    """The committed rows."""

    def __init__(self, hand: Hand) -> None:
        self._hand = hand

    def get(self, key: bytes) -> bytes | None:
        return self._hand.get(key, {})

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._hand.get_many(keys, {})

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._hand.range(Query(start, end, limit, reverse), {})

    def space(self) -> Space:
        return self._hand.space()


class RemoteTransaction(Transaction):
    """The rows as they will be when it is committed."""

    def __init__(self, hand: Hand) -> None:
        super().__init__()
        self._hand = hand
        self.writes: dict[bytes, bytes | None] = {}
        #: Prefixes of which nothing is stored when it is committed, but what it or a later one writes.
        self.new: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        return self._hand.get(key, self.writes)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._hand.get_many(keys, self.writes)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._hand.range(Query(start, end, limit, reverse), self.writes)

    def space(self) -> Space:
        return self._hand.space()

    def is_new(self, prefix: bytes) -> None:
        self.new.append(prefix)

    def _put(self, key: bytes, value: bytes) -> None:
        self.writes[key] = value

    def _delete(self, key: bytes) -> None:
        self.writes[key] = None
