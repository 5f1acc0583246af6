"""What the loss of objects means: which files' bytes they held, and how those bytes are given up.

Bytes that are lost become a hole in the very place that their slice has in its chunk's list, so that neither what was
written before nor after shows where it should not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Final

from metaserver import keys, references
from metaserver.engine.base import Snapshot
from metaserver.fsck.findings import Finding, Kind
from metaserver.fsck.paths import Paths
from metaserver.fsck.rows import find_inode
from metaserver.fsck.sorting import Groups, Sorter
from metaserver.inodes import Edit
from metaserver.records import pack_slices, slice_ids, unpack_slices
from metaserver.volumes import Volume
from metaserver.wire import Slice

#: Ranges that are told of each file.
_TOLD: Final = 8
#: Bytes of a transaction that are left to the release of the slice.
_SPARE_BYTES: Final = 128 * 1024

#: (inode, chunk, slice, whether its object is there but damaged)
Loss = tuple[int, int, int, int]


def sorted_losses(lost: Iterable[tuple[int, int]], uses: Iterable[tuple[int, ...]], into: Sorter) -> None:
    """Put into a sorter of :data:`Loss` every use of a lost slice; ``lost``: rising ids, and whether damaged."""
    remaining = iter(lost)
    current = next(remaining, None)
    for slice_id, end, ino, chunk in uses:
        while current is not None and current[0] < slice_id:
            current = next(remaining, None)
        if current is None:
            return
        if current[0] == slice_id and end:
            into.add(ino, chunk, slice_id, current[1])


def findings(snapshot: Snapshot, volume: Volume, losses: Sorter, links: Sorter) -> Iterator[Finding]:
    """Yield one finding for each file and chunk that has lost bytes."""
    paths, entries = Paths(snapshot, volume), Groups(links)
    for ino, of_file in groupby(losses, itemgetter(0)):
        places = entries.take(ino)
        where = paths.of(ino, *places[0]) if places else f"inode {ino}"
        for chunk, group in groupby(of_file, itemgetter(1)):
            lost = {slice_id: damaged for _, _, slice_id, damaged in group}
            kind = Kind.DAMAGED_OBJECT if all(lost.values()) else Kind.MISSING_OBJECT
            how = "damaged" if kind is Kind.DAMAGED_OBJECT else "missing"
            what = f"has lost bytes {_ranges(snapshot, volume, ino, chunk, lost)}: {how} are {_listed(lost)}"
            yield Finding(kind, ino, where, what, "give_up", [ino, chunk, list(lost)])


def _listed(slice_ids: Iterable[int]) -> str:
    names = [str(slice_id) for slice_id in slice_ids]
    return f"object{'s' * (len(names) > 1)} {', '.join(names[:_TOLD])}{' ...' * (len(names) > _TOLD)}"


def _ranges(snapshot: Snapshot, volume: Volume, ino: int, chunk: int, lost: Iterable[int]) -> str:
    ids = set(lost)
    found = [
        f"{s.offset}-{s.offset + s.length - 1}"
        for _, value in snapshot.range(*keys.parts(volume.id, ino, chunk, chunk))
        for s in unpack_slices(value[1:])
        if s.slice_id in ids
    ]
    return f"{', '.join(found[:_TOLD])}{' ...' * (len(found) > _TOLD)}"


def give_up(edit: Edit, ino: int, chunk: int, lost: list[int]) -> bool:
    """Make holes of what lost slices have in a chunk; True: call again, there is more."""
    volume, txn = edit.volume, edit.txn
    if find_inode(txn, volume, ino) is None:
        return False
    edit.touch(edit.inode(ino), modified=True)
    ids, held = set(lost), set[int]()
    rest = txn.range(*keys.parts(volume.id, ino, chunk, chunk))
    while rest and txn.bytes_left > len(rest[0][1]) + _SPARE_BYTES and txn.room > references.RESERVE + 2 * len(ids):
        key, value = rest.pop(0)
        slices = unpack_slices(value[1:])
        if here := {s.slice_id for s in slices} & ids:
            held |= here
            txn.put(key, value[:1] + pack_slices(_hole(s) if s.slice_id in ids else s for s in slices))
    references.release(txn, volume, held - {each for _, value in rest for each in slice_ids(value[1:])})
    return bool(rest)


def _hole(s: Slice) -> Slice:
    return Slice(s.offset, s.length, 0, 0)
