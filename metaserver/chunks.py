"""The slices of large files, by chunks of 64 MiB.

A chunk's slices are a list in which later ones lie over earlier ones. The list is stored in *parts*, sorted by the
inode's version when they were made: a commit appends to the last part or makes another. When a chunk has gathered many
slices since it was last tidied, they are resolved into pieces that do not overlap (a *tidy* part), and the slices of
which nothing is seen any more are released.

A transaction must stay small, and a file can have millions of slices. So a truncation deletes nothing itself: it
lays a hole over the rest of the chunk it cuts, and writes a *rule*, by which all older parts of the later chunks are
void. Readers obey the rules at once; :func:`sweep_void` deletes the void parts, some of them in the same transaction,
the rest in later ones. A file deleted leaves a rule by which all of its parts are void.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Final, NamedTuple

from metaserver import keys, references
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.records import (
    SLICE_BYTES,
    Inode,
    Rule,
    pack_rules,
    pack_slices,
    slice_ids,
    slices_within,
    unpack_rules,
    unpack_slices,
)
from metaserver.references import RESERVE
from metaserver.volumes import Volume
from metaserver.wire import CompactSlices, ErrorCode, Slice

CHUNK_BYTES: Final = 64 * 1024 * 1024

#: Chunks and different slices that one commit may touch; a client with more makes two commits.
MAX_CHUNKS: Final = 16
MAX_SLICES: Final = 32
#: Slices of an ordinary and of a tidy part: what a commit rewrites, and what fits into a value.
_PART_SLICES: Final = 128
_TIDY_SLICES: Final = 2000
#: A chunk is tidied when this many slices, and as many as were left last time, have come; or so many parts.
_TIDY_AT: Final = 16
_TIDY_PARTS: Final = 16
#: Writes that tidying leaves to the rest of the transaction, beside two for each chunk that is still to come: the
#: inode, the counters, tasks for slices released, and parts for slices.
_SPARE: Final = 18
#: Bytes that tidying a chunk and sweeping one leave: the ids of all the slices that a chunk may have.
_SPARE_BYTES: Final = 256 * 1024
#: Slices and parts that one GetContent may return and read.
_MOST_READ: Final = 40_000
_PARTS_READ: Final = 1024
#: A hole of this part of a chunk is worth tidying for: whole objects may have become unused.
_LARGE_HOLE: Final = 16
#: Pieces, and chunks that have any, that :func:`seen` returns at once.
_PIECES_SEEN: Final = 512
_CHUNKS_SEEN: Final = 64
#: Chunks of which a cut counts what is stored in them.
_CHUNKS_COUNTED: Final = 256
#: Chunks that one sweep looks into, and rules that a file may have waiting for sweeps.
_CHUNKS_SWEPT: Final = 64
_MOST_RULES: Final = 64

_PLAIN: Final = b"\0"
_TIDY: Final = b"\1"


class Part(NamedTuple):
    """A stored part of a chunk's list: a byte that says whether it is tidy, and the packed slices."""

    key: bytes
    chunk: int
    version: int
    value: bytes

    @property
    def is_tidy(self) -> bool:
        return self.value[:1] == _TIDY

    @property
    def slice_count(self) -> int:
        return len(self.value) // SLICE_BYTES

    def slices(self) -> list[Slice]:
        return unpack_slices(self.value[1:])

    def within(self, start: int, end: int) -> list[Slice]:
        return slices_within(self.value[1:], start, end)

    def ids(self) -> set[int]:
        return slice_ids(self.value[1:])


def _parts(snapshot: Snapshot, volume: Volume, ino: int, first: int, last: int, limit: int | None = None) -> list[Part]:
    rows = snapshot.range(*keys.parts(volume.id, ino, first, last), limit=limit)
    return [Part(key, *keys.part_of(key)[:2], value) for key, value in rows]


def _rules(snapshot: Snapshot, volume: Volume, ino: int) -> list[Rule]:
    return unpack_rules(snapshot.get(keys.void(volume.id, ino)))


def _is_void(part: Part, rules: list[Rule]) -> bool:
    return any(part.chunk >= rule.chunk and part.version < rule.version for rule in rules)


def _ids(parts: Iterable[Part]) -> set[int]:
    return set().union(*(part.ids() for part in parts))


# Reading


def slices_of(snapshot: Snapshot, volume: Volume, ino: int, offset: int, length: int) -> list[Slice]:
    """Return what touches [offset, offset + length), in the order of laying; TOO_LARGE to ask for less."""
    if not length:
        return []
    end = offset + length
    first, last = offset // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
    rules = _rules(snapshot, volume, ino)
    parts = _parts(snapshot, volume, ino, first, last, _PARTS_READ)
    live = (part for part in parts if not _is_void(part, rules))
    found = [s for part in live for s in part.slices() if s.offset < end and s.offset + s.length > offset]
    if len(parts) == _PARTS_READ or len(found) > _MOST_READ:
        raise Refused(ErrorCode.TOO_LARGE, f"inode {ino} has too many slices in this range: ask for less of it")
    return found


def walk(snapshot: Snapshot, volume: Volume, ino: int, start: int, end: int) -> Iterator[tuple[int, list[Slice]]]:
    """Yield the chunks in [start, end) that have parts, and what is seen there: pieces in order, without holes."""
    rules = _rules(snapshot, volume, ino)
    for chunk in _occupied(snapshot, volume, ino, start, end):
        live = (part for part in _parts(snapshot, volume, ino, chunk, chunk) if not _is_void(part, rules))
        whole = resolve([s for part in live for s in part.slices()])
        within = [s for s in whole if s.offset < end and _end(s) > start]
        yield chunk, [_piece(s, max(start, s.offset), min(end, _end(s))) for s in within]


def _occupied(snapshot: Snapshot, volume: Volume, ino: int, start: int, end: int) -> Iterator[int]:
    """Yield the chunks in [start, end) that have parts, be they void."""
    chunk, last = start // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
    while start < end and chunk <= last and (found := _parts(snapshot, volume, ino, chunk, last, limit=1)):
        yield found[0].chunk
        chunk = found[0].chunk + 1


def seen(snapshot: Snapshot, volume: Volume, ino: int, start: int, end: int) -> tuple[list[Slice], int]:
    """Return what is seen from ``start`` on, as of :func:`walk`, no more than a commit takes, and where that ends."""
    pieces: list[Slice] = []
    ids: set[int] = set()
    for count, (chunk, found) in enumerate(walk(snapshot, volume, ino, start, end)):
        if count == _CHUNKS_SEEN:
            return pieces, chunk * CHUNK_BYTES
        for piece in found:
            ids.add(piece.slice_id)
            if len(ids) > MAX_SLICES or len(pieces) == _PIECES_SEEN:
                return pieces, piece.offset
            pieces.append(piece)
    return pieces, end


# Laying slices


def lay(txn: Transaction, volume: Volume, inode: Inode, slices: Sequence[Slice]) -> None:
    """Lay slices over a file's content; the inode must have its new version. TOO_LARGE, INVALID (see references)."""
    chunks = _by_chunk(slices)
    ids = {s.slice_id for s in slices} - {0}
    if len(chunks) > MAX_CHUNKS or len(ids) > MAX_SLICES:
        raise Refused(ErrorCode.TOO_LARGE, f"a commit of {len(ids)} slices in {len(chunks)} chunks: cut it up")
    for slice_id in sorted(ids):
        _take(txn, volume, inode.ino, slice_id, chunks)
    rules = _rules(txn, volume, inode.ino)
    for done, (chunk, pieces) in enumerate(chunks.items(), start=1):
        _append(txn, volume, inode, chunk, pieces, rules, _SPARE + 2 * (len(chunks) - done))


def replace(txn: Transaction, volume: Volume, inode: Inode, start: int, end: int, pieces: Sequence[Slice]) -> int:
    """Make [start, end) of a file what these pieces say, and zeros elsewhere; return up to where that was done.

    The inode must have its new version; the pieces, those of a commit at most, use slices that are in use. INVALID.
    """
    wanted = _by_chunk(pieces)
    occupied = set(islice(_occupied(txn, volume, inode.ino, start, end), MAX_CHUNKS + 1))
    touched = sorted(occupied.union(wanted))
    end = touched[MAX_CHUNKS] * CHUNK_BYTES if len(touched) > MAX_CHUNKS else end
    laid: dict[int, list[Slice]] = {}
    for chunk in touched[:MAX_CHUNKS]:
        first, behind = max(start, chunk * CHUNK_BYTES), min(end, (chunk + 1) * CHUNK_BYTES)
        laid[chunk] = [Slice(first, behind - first, 0, 0)] * (chunk in occupied) + wanted.get(chunk, [])
    for slice_id in sorted({s.slice_id for slices in laid.values() for s in slices} - {0}):
        _take(txn, volume, inode.ino, slice_id, laid)
    rules = _rules(txn, volume, inode.ino)
    for done, (chunk, slices) in enumerate(laid.items(), start=1):
        eager = not slices[0].slice_id and slices[0].length >= CHUNK_BYTES // _LARGE_HOLE
        _append(txn, volume, inode, chunk, slices, rules, _SPARE + 2 * (len(laid) - done), eager=eager)
    return end


def _by_chunk(slices: Iterable[Slice]) -> dict[int, list[Slice]]:
    """Cut slices at the chunks' boundaries; no more chunks than one over what a commit may touch."""
    chunks: dict[int, list[Slice]] = {}
    for s in slices:
        position, end = s.offset, s.offset + s.length
        while position < end and len(chunks) <= MAX_CHUNKS:
            chunk = position // CHUNK_BYTES
            stop = min(end, (chunk + 1) * CHUNK_BYTES)
            chunks.setdefault(chunk, []).append(_piece(s, position, stop))
            position = stop
    return chunks


def _piece(s: Slice, start: int, end: int) -> Slice:
    """Return the part [start, end) of a slice."""
    return Slice(start, end - start, s.slice_id, s.start + start - s.offset if s.slice_id else 0)


def _take(txn: Transaction, volume: Volume, ino: int, slice_id: int, chunks: dict[int, list[Slice]]) -> None:
    """Count the chunks that use a slice from now on."""
    users = [chunk for chunk, pieces in chunks.items() if any(s.slice_id == slice_id for s in pieces)]
    if references.count(txn, volume, slice_id):
        users = [chunk for chunk in users if slice_id not in _ids(_parts(txn, volume, ino, chunk, chunk))]
    if users:
        references.take(txn, volume, slice_id, len(users))


def _append(
    txn: Transaction,
    volume: Volume,
    inode: Inode,
    chunk: int,
    slices: list[Slice],
    rules: list[Rule],
    spare: int,
    *,
    eager: bool = False,
) -> None:
    """Add slices to a chunk's list, or tidy it with them if it is time (or ``eager``) and leaves ``spare`` writes."""
    parts = _parts(txn, volume, inode.ino, chunk, chunk)
    live = [part for part in parts if not _is_void(part, rules)]
    inode.stored += _gain(live, slices)
    if eager or _is_time(live, len(slices)):
        pieces = resolve([s for part in live for s in part.slices()] + slices)
        if _fits(txn, live, pieces, spare):
            before = _ids(parts).union(s.slice_id for s in slices) - {0}
            after = _ids(part for part in parts if _is_void(part, rules)).union(s.slice_id for s in pieces)
            _replace(txn, volume, inode, chunk, live, pieces)
            references.release(txn, volume, before - after)
            return
    if live and not live[-1].is_tidy:
        room = _PART_SLICES - live[-1].slice_count
        txn.put(live[-1].key, live[-1].value + pack_slices(slices[:room]))
        slices = slices[room:]
    _put_parts(txn, volume, inode, chunk, slices, _PLAIN, _PART_SLICES)


def _gain(live: list[Part], slices: list[Slice]) -> int:
    """Return how many more bytes are seen of a chunk, holes left out, when slices are laid over its list."""
    start, end = min(s.offset for s in slices), max(map(_end, slices))
    touched = [s for part in live for s in part.within(start, end)]
    return _seen_bytes([*touched, *slices], start, end) - _seen_bytes(touched, start, end)


def _seen_bytes(slices: list[Slice], start: int, end: int) -> int:
    return sum(max(0, min(end, _end(s)) - max(start, s.offset)) for s in resolve(slices))


def compact(txn: Transaction, volume: Volume, inode: Inode, request: CompactSlices) -> None:
    """Put slices in the place of those that somebody has seen in a chunk; BUSY, INVALID, TOO_LARGE.

    What was laid since stays above. What lies beyond the file's end is dropped: a hole covers it, which may be one of
    those that were seen.
    """
    chunk, within = divmod(request.offset, CHUNK_BYTES)
    end = min(request.offset + CHUNK_BYTES, inode.size)
    if within or not all(request.offset <= s.offset and _end(s) <= end and s.slice_id for s in request.slices):
        raise Refused(ErrorCode.INVALID, "what is put into a chunk must lie within it, and within the file")
    rules = _rules(txn, volume, inode.ino)
    parts = _parts(txn, volume, inode.ino, chunk, chunk)
    live = [part for part in parts if not _is_void(part, rules)]
    since = _laid_since([s for part in live for s in part.slices()], request, end)
    before = _ids(parts)
    new = {s.slice_id for s in request.slices} - before
    beyond = Slice(end, request.offset + CHUNK_BYTES - end, 0, 0)
    pieces = resolve([*request.slices, *since, *([beyond] if beyond.length else [])])
    if len(new) > MAX_SLICES or not _fits(txn, live, pieces, _SPARE + len(new)):
        raise Refused(ErrorCode.TOO_LARGE, f"a chunk of {len(pieces)} pieces")
    for slice_id in sorted(new):
        _take(txn, volume, inode.ino, slice_id, {chunk: list(request.slices)})
    after = _ids(part for part in parts if _is_void(part, rules)).union(s.slice_id for s in pieces)
    _replace(txn, volume, inode, chunk, live, pieces)
    references.release(txn, volume, before.union(new) - after)


def _laid_since(slices: list[Slice], request: CompactSlices, end: int) -> list[Slice]:
    """Return a chunk's slices after those seen, which must be the first of those before ``end``; else BUSY."""
    before = [s for s in slices if s.offset < end]
    seen = pack_slices(before[: request.seen])
    if len(before) < request.seen or hashlib.blake2b(seen, digest_size=16).digest() != request.digest:
        raise Refused(ErrorCode.BUSY, "the chunk has changed: look at it again")
    return before[request.seen :]


def _is_time(live: list[Part], more: int) -> bool:
    plain = [part.slice_count for part in live if not part.is_tidy]
    tidy = sum(part.slice_count for part in live if part.is_tidy)
    return sum(plain) + more >= max(_TIDY_AT, tidy) or len(plain) >= _TIDY_PARTS


def _fits(txn: Transaction, live: list[Part], pieces: list[Slice], spare: int) -> bool:
    writes = len(live) + len(pieces) // _TIDY_SLICES + 1
    return writes <= txn.room - spare and len(pieces) * SLICE_BYTES <= txn.bytes_left - _SPARE_BYTES


def _replace(txn: Transaction, volume: Volume, inode: Inode, chunk: int, live: list[Part], pieces: list[Slice]) -> None:
    for part in live:
        txn.delete(part.key)
    _put_parts(txn, volume, inode, chunk, pieces, _TIDY, _TIDY_SLICES)


def _put_parts(
    txn: Transaction, volume: Volume, inode: Inode, chunk: int, slices: list[Slice], kind: bytes, size: int
) -> None:
    for index, start in enumerate(range(0, len(slices), size)):
        key = keys.part(volume.id, inode.ino, chunk, inode.version, index)
        txn.put(key, kind + pack_slices(slices[start : start + size]))


def resolve(slices: list[Slice]) -> list[Slice]:
    """Return what is seen of a list of slices: pieces in the order of the file that do not overlap, without holes."""
    waiting = sorted(range(len(slices)), key=lambda i: slices[i].offset, reverse=True)
    bounds = sorted({edge for s in slices for edge in (s.offset, s.offset + s.length)})
    above: list[int] = []
    seen: list[Slice] = []
    for start, end in pairwise(bounds):
        while waiting and slices[waiting[-1]].offset <= start:
            heapq.heappush(above, -waiting.pop())
        while above and _end(slices[-above[0]]) <= start:
            heapq.heappop(above)
        if above and slices[-above[0]].slice_id:
            _extend(seen, _piece(slices[-above[0]], start, end))
    return seen


def _end(s: Slice) -> int:
    return s.offset + s.length


def _extend(seen: list[Slice], piece: Slice) -> None:
    """Append a piece, or lengthen the last one if it goes on in the same slice."""
    last = seen[-1] if seen else None
    if (
        last is not None
        and last.slice_id == piece.slice_id
        and _end(last) == piece.offset
        and last.start + last.length == piece.start
    ):
        seen[-1] = Slice(last.offset, last.length + piece.length, last.slice_id, last.start)
    else:
        seen.append(piece)


# Cutting


def cut(txn: Transaction, volume: Volume, inode: Inode, size: int) -> None:
    """Give up all content from ``size`` on; the inode must have its new version. BUSY when sweeping lags far behind."""
    first, within = divmod(size, CHUNK_BYTES)
    rules = _rules(txn, volume, inode.ino)
    if within:
        if _parts(txn, volume, inode.ino, first, first, limit=1):
            _append(txn, volume, inode, first, [Slice(size, CHUNK_BYTES - within, 0, 0)], rules, _SPARE)
        first += 1
    if _parts(txn, volume, inode.ino, first, keys.LAST_CHUNK, limit=1):
        inode.stored = _stored_before(txn, volume, inode, first, size)
        _put_rules(txn, volume, inode.ino, [*rules, Rule(first, inode.version)])
        sweep_void(txn, volume, inode.ino)


def _stored_before(txn: Transaction, volume: Volume, inode: Inode, first: int, size: int) -> int:
    """Return what is stored without the chunks from ``first`` on; more than that, if these are many."""
    later = walk(txn, volume, inode.ino, first * CHUNK_BYTES, (keys.LAST_CHUNK + 1) * CHUNK_BYTES) if size else ()
    counted = (sum(piece.length for piece in pieces) for _, pieces in islice(later, _CHUNKS_COUNTED))
    return min(size, inode.stored - sum(counted))


def give_up(txn: Transaction, volume: Volume, ino: int) -> None:
    """All of a deleted inode's parts and extended attributes are to go."""
    _put_rules(txn, volume, ino, [Rule(0, keys.LAST_VERSION)])
    sweep_void(txn, volume, ino)


def is_swept(snapshot: Snapshot, volume: Volume, ino: int) -> bool:
    """Whether nothing of this file waits for a sweep."""
    return snapshot.get(keys.void(volume.id, ino)) is None


def _put_rules(txn: Transaction, volume: Volume, ino: int, rules: list[Rule]) -> None:
    """Write the rules that say more than the others do: of the later chunks, only what is newer."""
    kept: list[Rule] = []
    for rule in sorted(rules, key=lambda rule: (rule.chunk, -rule.version)):
        if not kept or rule.version > kept[-1].version:
            kept.append(rule)
    if len(kept) > _MOST_RULES:
        raise Refused(ErrorCode.BUSY, f"inode {ino} was cut too often too fast")
    txn.put(keys.void(volume.id, ino), pack_rules(kept))


def sweep_void(txn: Transaction, volume: Volume, ino: int) -> None:
    """Delete void parts, as many as the transaction has room for, and the rules when none is left."""
    rules = _rules(txn, volume, ino)
    if rules and rules[0].version == keys.LAST_VERSION and not _sweep_xattrs(txn, volume, ino):
        return
    for _ in range(_CHUNKS_SWEPT):
        found = _parts(txn, volume, ino, rules[0].chunk, keys.LAST_CHUNK, limit=1) if rules else []
        if not found:
            txn.delete(keys.void(volume.id, ino))
            return
        if txn.bytes_left < 2 * _SPARE_BYTES or not _sweep_chunk(txn, volume, ino, found[0].chunk, rules):
            break
        rules = [Rule(max(rule.chunk, found[0].chunk + 1), rule.version) for rule in rules]
    _put_rules(txn, volume, ino, rules)


def _sweep_xattrs(txn: Transaction, volume: Volume, ino: int) -> bool:
    """Delete extended attributes; True if all are gone."""
    room = max(0, txn.room - RESERVE)
    rows = txn.range(*keys.xattrs(volume.id, ino), limit=room + 1)
    for key, _ in rows[:room]:
        txn.delete(key)
    return len(rows) <= room


def _sweep_chunk(txn: Transaction, volume: Volume, ino: int, chunk: int, rules: list[Rule]) -> bool:
    """Delete a chunk's void parts and release what only they used; False if not all could be."""
    parts = _parts(txn, volume, ino, chunk, chunk)
    void = [part for part in parts if _is_void(part, rules)]
    gone = void[: max(0, txn.room - RESERVE)]
    for part in gone:
        txn.delete(part.key)
    references.release(txn, volume, _ids(gone) - _ids(part for part in parts if part not in gone) if gone else ())
    return len(gone) == len(void)
