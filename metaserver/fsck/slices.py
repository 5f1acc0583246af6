"""Slices: whether those in use are counted right, and whether those listed as unused are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

from metaserver import keys
from metaserver.deferred import Kind as TaskKind
from metaserver.engine.base import Snapshot
from metaserver.fsck.findings import Kind
from metaserver.fsck.rows import Stream, rows, well_formed
from metaserver.fsck.sorting import Sorter
from metaserver.records import unpack_number, unpack_numbers
from metaserver.references import set_bits
from metaserver.volumes import Volume

Found = Callable[[Kind, str, str, str, list[Any]], None]

#: Beside the bytes that are needed of a slice's object: none, since the slice is unused.
UNUSED: Final = -1


def check(
    snapshot: Snapshot,
    volume: Volume,
    uses: Sorter,
    found: Found,
    stray: Callable[[bytes], None],
    tick: Callable[[str, int, int], None],
) -> int:
    """Compare the uses of slices with their counts and with the bitmap of unused ones; return how many are used."""
    with _all_uses(snapshot, volume, uses, stray) as counted:
        return _compare(snapshot, volume, counted, found, stray, tick)


def _all_uses(snapshot: Snapshot, volume: Volume, uses: Sorter, stray: Callable[[bytes], None]) -> Sorter:
    """Return one record for each use: by chunks, and by releases that are put off."""
    counted = Sorter(1)
    for slice_id, *_ in uses:
        counted.add(slice_id)
    for _, value in Stream(snapshot, volume, b"q", stray):
        if value[0] == TaskKind.RELEASE:
            for slice_id in unpack_numbers(value[2 + value[1] :]):
                counted.add(slice_id)
    return counted


def _compare(
    snapshot: Snapshot,
    volume: Volume,
    counted: Sorter,
    found: Found,
    stray: Callable[[bytes], None],
    tick: Callable[[str, int, int], None],
) -> int:
    used = last = 0
    unused = _Unused(snapshot, volume)
    actual = ((slice_id, 0, sum(1 for _ in group)) for (slice_id,), group in groupby(counted))
    stored = ((keys.number_of(key), 1, unpack_number(value, 0)) for key, value in Stream(snapshot, volume, b"r", stray))
    for slice_id, group in groupby(merge(actual, stored), itemgetter(0)):
        counts = {which: count for _, which, count in group}
        uses, count = counts.get(0, 0), counts.get(1, 0)
        used += uses > 0
        last = max(last, slice_id)
        tick("slices", used, 0)
        _check_count(slice_id, uses, count, unused, found)
    highest = max(last, unused.highest(stray))
    following = _next(snapshot, volume, stray)
    if following <= highest:
        what = f"is {following}, and slice {highest} is known"
        found(Kind.WRONG_COUNTER, "the next slice number", what, "raise_slices", [highest + 1])
    return used


def _next(snapshot: Snapshot, volume: Volume, stray: Callable[[bytes], None]) -> int:
    """Return the slice id that is given out next; ``stray`` is told of a counter of a wrong form."""
    found = rows(snapshot, keys.kind_range(volume.id, b"c"))
    return max((unpack_number(value, 1) for _, value in well_formed(found, b"c", stray)), default=1)


def _check_count(slice_id: int, uses: int, count: int, unused: _Unused, found: Found) -> None:
    where = f"slice {slice_id}"
    if not uses:
        what = f"is counted as used by {count} chunks, and none uses it"
        found(Kind.LEAKED_SLICE, where, what, "set_references", [slice_id, 0])
        return
    if uses != count:
        what = f"is used by {uses} chunks, and counted as used by {count}"
        found(Kind.WRONG_REFERENCES, where, what, "set_references", [slice_id, uses])
    if slice_id in unused:
        what = "is in use, and listed as one whose object may be deleted"
        found(Kind.DOOMED_SLICE, where, what, "set_references", [slice_id, uses])


class _Unused:
    """The bitmap, asked about slices in ascending order."""

    def __init__(self, snapshot: Snapshot, volume: Volume) -> None:
        self._snapshot = snapshot
        self._volume = volume
        self._key = b""
        self._bitmap = 0

    def __contains__(self, slice_id: int) -> bool:
        key = keys.unused(self._volume.id, slice_id)
        if key != self._key:
            self._key, self._bitmap = key, int.from_bytes(self._snapshot.get(key) or b"")
        return bool(self._bitmap >> slice_id % keys.BLOCK_SLICES & 1)

    def highest(self, stray: Callable[[bytes], None]) -> int:
        """Return the highest unused slice, or 0; ``stray`` is told of blocks of a wrong form."""
        highest = 0
        for key, value in Stream(self._snapshot, self._volume, b"u", stray):
            if any(value):
                highest = keys.unused_first(key) + int.from_bytes(value).bit_length() - 1
        return highest


def needed(snapshot: Snapshot, volume: Volume, uses: Sorter) -> Iterator[tuple[int, int]]:
    """Yield every slice that is used or unused, by rising id, with the bytes that are needed of its object."""
    used = ((slice_id, max(use[1] for use in group)) for slice_id, group in groupby(uses, itemgetter(0)))
    unused = (
        (keys.unused_first(key) + bit, UNUSED)
        for key, value in Stream(snapshot, volume, b"u", lambda _: None)
        for bit in set_bits(value)
    )
    last = 0
    for slice_id, end in merge(used, unused, key=itemgetter(0)):
        if slice_id != last:  # one that is both is used
            yield slice_id, end
        last = slice_id
