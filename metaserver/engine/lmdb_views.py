"""What bodies see of LMDB: snapshots, and transactions that keep what they write until their body has returned."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import lmdb

from metaserver.engine.base import Row, Snapshot, Space, Transaction

#: Bytes of the map that the writing of one key may take up beside its value.
_WRITE_COST: Final = 16 * 1024

#: Keys with their values; None: deleted.
Writes = dict[bytes, bytes | None]


def apply(writes: Writes, txn: lmdb.Transaction) -> None:
    """Write these."""
    for key, value in writes.items():
        if value is None:
            txn.delete(key)
        else:
            txn.put(key, value)


def growth(writes: Writes, txn: lmdb.Transaction) -> int:
    """Return how many bytes of keys and values the data becomes larger by, when these are written."""
    grown = 0
    for key, value in writes.items():
        old = txn.get(key)
        grown -= 0 if old is None else len(key) + len(old)
        grown += 0 if value is None else len(key) + len(value)
    return grown


def cost(writes: Writes) -> int:
    """Return how many bytes of the map these may take up at most, by estimate: each may split pages on its way."""
    return sum(_WRITE_COST + len(value or b"") for value in writes.values())


def space(directory: str) -> Space:
    """Return how large the file system of the directory is, and how much of it is free."""
    figures = os.statvfs(directory)
    return Space(figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize)


class _View:
    """Reading, the same in snapshots and in transactions."""

    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        self._txn = txn
        self._directory = directory

    def get(self, key: bytes) -> bytes | None:
        return cast(bytes | None, self._txn.get(key))

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = cast(Callable[[bytes], bytes | None], self._txn.get)
        return [get(key) for key in keys]

    def range(self, start: bytes, end: bytes, limit: int | None, reverse: bool) -> list[Row]:
        rows: list[Row] = []
        if limit == 0:
            return rows
        with self._txn.cursor() as cursor:
            for row in self._backward(cursor, end) if reverse else self._forward(cursor, start):
                if row[0] < start or row[0] >= end:
                    break
                rows.append(row)
                if len(rows) == limit:
                    break
        return rows

    @staticmethod
    def _forward(cursor: lmdb.Cursor, start: bytes) -> Any:
        return cursor.iternext() if cursor.set_range(start) else ()

    @staticmethod
    def _backward(cursor: lmdb.Cursor, end: bytes) -> Any:
        if cursor.set_range(end):
            return cursor.iterprev() if cursor.prev() else ()
        return cursor.iterprev() if cursor.last() else ()

    def space(self) -> Space:
        return space(self._directory)


class LmdbSnapshot(Snapshot):
    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        self._view = _View(txn, directory)

    def end(self) -> None:
        """Let go of the transaction, and so of its place among LMDB's readers, of which there are few.

        An exception that a body raised keeps its frames, and this view, until the next garbage collection.
        """
        del self._view

    def get(self, key: bytes) -> bytes | None:
        return self._view.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._view.get_many(keys)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        return self._view.range(start, end, limit, reverse)

    def space(self) -> Space:
        return self._view.space()


class LmdbTransaction(Transaction):
    """What a body sees; what it writes is kept in ``writes``."""

    def __init__(self, txn: lmdb.Transaction, directory: str) -> None:
        super().__init__()
        self._view = _View(txn, directory)
        self.writes: Writes = {}

    def get(self, key: bytes) -> bytes | None:
        return self.writes[key] if key in self.writes else self._view.get(key)

    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        own = {key: value for key, value in self.writes.items() if start <= key < end}
        if not own:
            return self._view.range(start, end, limit, reverse)
        stored = self._view.range(start, end, None if limit is None else limit + len(own), reverse)
        rows = [row for row in stored if row[0] not in own]
        rows += [(key, value) for key, value in own.items() if value is not None]
        return sorted(rows, reverse=reverse)[:limit]

    def space(self) -> Space:
        return self._view.space()

    def _put(self, key: bytes, value: bytes) -> None:
        self.writes[key] = value

    def _delete(self, key: bytes) -> None:
        self.writes[key] = None
