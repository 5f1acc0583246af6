"""Which slices are in use: a count of chunks for each, and a bitmap of those that no chunk uses any more.

A slice is taken by a chunk when it is first laid there and released when its last piece has gone from the chunk's
list. Released by all, it is unused: its objects may be deleted, and it can never be taken again.

An object is put into the store before its slice is committed. So an object that no chunk uses is either on its way
into a file or will never get there. Whoever wants to delete it *retires* its slice first: puts it among the unused
ones. A commit that comes after that is refused, and its writer stores the data anew; by one that came before the slice
is in use, and is not retired.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

from metaserver import keys, wire
from metaserver.deferred import Kind, put_off
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.records import pack_number, unpack_number
from metaserver.volumes import Context, Volume
from metaserver.wire import ErrorCode

#: Writes of a transaction that clearing up leaves to the verb that caused it.
RESERVE: Final = 30

#: Blocks of the bitmap that one listing, and one request to forget, may touch.
_MAX_BLOCKS: Final = 64
_BITMAP_BYTES: Final = keys.BLOCK_SLICES // 8


def new_slices(txn: Transaction, context: Context, request: wire.NewSlices) -> wire.SliceIds:
    """Give out slice ids."""
    key = keys.next_slice(context.volume.id)
    first = unpack_number(txn.get(key), 1)
    txn.put(key, pack_number(first + request.count))
    return wire.SliceIds(list(range(first, first + request.count)))


def list_slices(snapshot: Snapshot, context: Context, request: wire.ListSlices) -> wire.SliceIds:
    """Return unused slices, the smallest ids first; never more than one ForgetSlices can take."""
    _, end = keys.all_unused(context.volume.id)
    rows = snapshot.range(keys.unused(context.volume.id, request.after + 1), end, limit=_MAX_BLOCKS)
    ids = [keys.unused_first(key) + bit for key, bitmap in rows for bit in set_bits(bitmap)]
    first = bisect_right(ids, request.after)
    return wire.SliceIds(ids[first : first + request.limit])


def forget_slices(txn: Transaction, context: Context, request: wire.ForgetSlices) -> wire.Done:
    """Drop slices from the unused ones; others are passed over. TOO_LARGE if they lie too far apart."""
    blocks = _by_block(context.volume, request.ids)
    _check_blocks(blocks)
    for key, bits in blocks.items():
        old = txn.get(key)
        left = int.from_bytes(old or b"") & ~bits
        if left:
            txn.put(key, left.to_bytes(_BITMAP_BYTES))
        elif old is not None:
            txn.delete(key)
    return wire.Done()


def inspect_slices(snapshot: Snapshot, context: Context, request: wire.InspectSlices) -> wire.SlicesInspected:
    """Sort out the slices that are not in use: never committed, unused, and never given out."""
    volume = context.volume
    following = unpack_number(snapshot.get(keys.next_slice(volume.id)), 1)
    idle, unused, foreign = [], [], []
    for slice_id in request.ids:
        if not 0 < slice_id < following:
            foreign.append(slice_id)
        elif _is_unused(snapshot, volume, slice_id):
            unused.append(slice_id)
        elif not count(snapshot, volume, slice_id):
            idle.append(slice_id)
    return wire.SlicesInspected(idle, unused, foreign)


def retire_slices(txn: Transaction, context: Context, request: wire.RetireSlices) -> wire.SliceIds:
    """Put slices that were given out and that no chunk uses on the unused list; return these. TOO_LARGE."""
    _check_blocks(_by_block(context.volume, request.ids))
    volume = context.volume
    following = unpack_number(txn.get(keys.next_slice(volume.id)), 1)
    idle = [each for each in request.ids if 0 < each < following and not count(txn, volume, each)]
    _add_unused(txn, volume, idle)
    return wire.SliceIds(idle)


def count(snapshot: Snapshot, volume: Volume, slice_id: int) -> int:
    """Return the number of chunks that use a slice."""
    return unpack_number(snapshot.get(keys.references(volume.id, slice_id)), 0)


def take(txn: Transaction, volume: Volume, slice_id: int, chunks: int) -> None:
    """So many more chunks use a slice; INVALID if its id was never given out, or was given up."""
    if slice_id >= unpack_number(txn.get(keys.next_slice(volume.id)), 1):
        raise Refused(ErrorCode.INVALID, f"slice {slice_id} was never reserved")
    if _is_unused(txn, volume, slice_id):
        raise Refused(ErrorCode.INVALID, f"slice {slice_id} is unused and may be deleted by now")
    txn.put(keys.references(volume.id, slice_id), pack_number(count(txn, volume, slice_id) + chunks))


def _is_unused(snapshot: Snapshot, volume: Volume, slice_id: int) -> bool:
    bitmap = int.from_bytes(snapshot.get(keys.unused(volume.id, slice_id)) or b"")
    return bool(bitmap >> slice_id % keys.BLOCK_SLICES & 1)


def release(txn: Transaction, volume: Volume, ids: Iterable[int]) -> None:
    """One chunk uses these slices no more. What the transaction has no room for is put off."""
    released = sorted(ids)
    now = max(0, (txn.room - RESERVE) // 2)
    _release(txn, volume, released[:now])
    if released[now:]:
        put_off(txn, volume, Kind.RELEASE, b"", released[now:])


def release_some(txn: Transaction, volume: Volume, ids: list[int]) -> list[int]:
    """Release as many as fit; return the others."""
    now = (txn.room - RESERVE) // 2
    _release(txn, volume, ids[:now])
    return ids[now:]


def _release(txn: Transaction, volume: Volume, ids: list[int]) -> None:
    unused = []
    for slice_id in ids:
        left = count(txn, volume, slice_id) - 1
        if left > 0:
            txn.put(keys.references(volume.id, slice_id), pack_number(left))
        else:
            txn.delete(keys.references(volume.id, slice_id))
            unused.append(slice_id)
    _add_unused(txn, volume, unused)


def _add_unused(txn: Transaction, volume: Volume, ids: Iterable[int]) -> None:
    for key, bits in _by_block(volume, ids).items():
        txn.put(key, (int.from_bytes(txn.get(key) or b"") | bits).to_bytes(_BITMAP_BYTES))


def _check_blocks(blocks: dict[bytes, int]) -> None:
    if len(blocks) > _MAX_BLOCKS:
        raise Refused(ErrorCode.TOO_LARGE, f"slices of {len(blocks)} blocks; the limit is {_MAX_BLOCKS}")


def _by_block(volume: Volume, ids: Iterable[int]) -> dict[bytes, int]:
    """Return the bitmap of these slices, by the key of their block."""
    blocks: dict[bytes, int] = {}
    for slice_id in ids:
        key = keys.unused(volume.id, slice_id)
        blocks[key] = blocks.get(key, 0) | 1 << slice_id % keys.BLOCK_SLICES
    return blocks


def set_bits(bitmap: bytes) -> Iterator[int]:
    """Yield the places of a bitmap's bits that are set, in ascending order."""
    bits = int.from_bytes(bitmap)
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
