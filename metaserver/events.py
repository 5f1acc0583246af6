"""The log of a volume's changes: one small record each, written in the transaction of the change itself.

Versions count the records from 1, in the order of the commits and without gaps: every transaction that changes
something reads the last version and writes the next. A record is a :class:`~metaserver.wire.Event`, in MessagePack. The
oldest are forgotten by number and by age, and who asks for what is forgotten is refused: there are no silent gaps.

What changes neither names, nor attributes, nor what a file reads, is not told: compaction, slice ids, the deletion of
what is unlinked. Neither is a file without a name before it gets one.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from metaserver import keys, wire
from metaserver.engine.base import MAX_WRITES, Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.records import Kept, pack_number, unpack_number
from metaserver.volumes import Context, Volume
from metaserver.wire import Event, Operation

#: Characters of a client's name that a record has.
MAX_CLIENT: Final = 64
#: Events of one page. Each is below 1 KiB, and a page far below what a reply may be.
PAGE_EVENTS: Final = 512
#: Events that one transaction forgets.
_FORGOTTEN: Final = MAX_WRITES - 10

_NANOSECONDS: Final = 1_000_000_000
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Event)

#: What the making of a node is called, by its type; all other types are made by mknod.
_MADE: Final[Mapping[int, Operation]] = {
    stat.S_IFREG: Operation.CREATE,
    stat.S_IFDIR: Operation.MKDIR,
    stat.S_IFLNK: Operation.SYMLINK,
}


def record(txn: Transaction, context: Context, client: str, request: wire.Request, reply: wire.Reply) -> None:
    """Add what a transaction has changed to the log; nothing if that is none of the log's business."""
    if isinstance(request, wire.MakeFiles) and isinstance(reply, wire.Changed):
        _record_made(txn, context, client, request, reply)
        return
    if isinstance(request, wire.RemoveNames) and isinstance(reply, wire.Changed):
        _record_removed(txn, context, client, request, reply)
        return
    teller = _TELLERS.get(type(request))
    if teller is None or txn.room == MAX_WRITES or not isinstance(reply, wire.Changed):
        return
    subject = reply.attributes[0]
    operation, places = teller(request, reply)
    version, kind = _next(txn, context.volume), stat.S_IFMT(subject.mode)
    head = version, context.now_ns, operation, subject.ino, kind, subject.size, client[:MAX_CLIENT]
    _put(txn, context.volume, Event(*head, *places))


def _record_made(txn: Transaction, context: Context, client: str, request: wire.MakeFiles, reply: wire.Changed) -> None:
    """Tell of each file that was made, with its size: what it holds came with it."""
    first = _next(txn, context.volume)
    for version, (file, made) in enumerate(zip(request.files, reply.attributes, strict=False), first):
        head = version, context.now_ns, Operation.CREATE, made.ino, stat.S_IFREG, made.size, client[:MAX_CLIENT]
        _put(txn, context.volume, Event(*head, file.parent, file.name))


def _record_removed(
    txn: Transaction, context: Context, client: str, request: wire.RemoveNames, reply: wire.Changed
) -> None:
    inodes = {each.ino: each for each in reply.attributes}
    first = _next(txn, context.volume)
    for version, removed in enumerate(request.names, first):
        inode = inodes[removed.ino]
        kind = stat.S_IFMT(inode.mode)
        head = version, context.now_ns, Operation.UNLINK, inode.ino, kind, inode.size, client[:MAX_CLIENT]
        _put(txn, context.volume, Event(*head, removed.parent, removed.name))


def record_repair(txn: Transaction, volume: Volume, now_ns: int) -> None:
    """Tell that anything may have changed from here on; in a log that may be damaged itself."""
    newest = txn.range(*keys.events_from(volume.id, 0), limit=1, reverse=True)
    version = max(_next(txn, volume), *(keys.event_version(key) + 1 for key, _ in newest), 1)
    _put(txn, volume, Event(version, now_ns, Operation.REPAIR, client="fsck"))


def _next(txn: Transaction, volume: Volume) -> int:
    return last_version(txn, volume) + 1


def _put(txn: Transaction, volume: Volume, event: Event) -> None:
    txn.put(keys.event(volume.id, event.version), _ENCODER.encode(event))
    txn.put(keys.last_event(volume.id), pack_number(event.version))


# What each request tells: its operation; parent and name, the new ones, and the other inode, if there are any

_Told = tuple[Operation, tuple[Any, ...]]


def _made(request: wire.MakeNode, reply: wire.Changed) -> _Told:
    return _MADE.get(stat.S_IFMT(request.mode), Operation.MKNOD), (request.parent, request.name)


def _linked(request: wire.Link, reply: wire.Changed) -> _Told:
    return Operation.LINK, (request.parent, request.name)


def _removed(request: wire.Remove, reply: wire.Changed) -> _Told:
    return Operation.RMDIR if request.directory else Operation.UNLINK, (request.parent, request.name)


def _renamed(request: wire.Rename, reply: wire.Changed) -> _Told:
    moved = reply.attributes[0].ino
    known = (moved, request.parent, request.new_parent)
    other = next((each.ino for each in reply.attributes if each.ino not in known), 0)
    operation = Operation.EXCHANGE if request.exchange else Operation.RENAME
    return operation, (request.parent, request.name, request.new_parent, request.new_name, other)


def _set(request: wire.SetAttributes, reply: wire.Changed) -> _Told:
    return Operation.ATTRIBUTES if request.size is None else Operation.CONTENT, ()


def _wrote(request: wire.Request, reply: wire.Changed) -> _Told:
    return Operation.CONTENT, ()


def _tagged(request: wire.Request, reply: wire.Changed) -> _Told:
    return Operation.XATTR, ()


_TELLERS: Final[Mapping[type, Callable[[Any, wire.Changed], _Told]]] = {
    wire.MakeNode: _made,
    wire.Link: _linked,
    wire.Remove: _removed,
    wire.Rename: _renamed,
    wire.SetAttributes: _set,
    wire.WriteInline: _wrote,
    wire.CommitSlices: _wrote,
    wire.Allocate: _wrote,
    wire.CopyRange: _wrote,
    wire.SetXattr: _tagged,
    wire.RemoveXattr: _tagged,
}


# Reading


def last_version(snapshot: Snapshot, volume: Volume) -> int:
    """Return the version of the last event that there was; 0: there was none."""
    return unpack_number(snapshot.get(keys.last_event(volume.id)), 0)


def start_of(snapshot: Snapshot, volume: Volume, since: int | None) -> int:
    """Return the version after which a stream begins; EVENTS_GONE for one that this volume has not come to."""
    last = last_version(snapshot, volume)
    if since == 0:
        oldest = _oldest(snapshot, volume)
        return last if oldest is None else oldest.version - 1
    if since is not None and since > last:
        raise Refused(wire.ErrorCode.EVENTS_GONE, f"there is no event {since}: the last one of this volume is {last}")
    return last if since is None else since


def events_after(snapshot: Snapshot, volume: Volume, version: int) -> list[Event]:
    """Return the next events after a version, at most PAGE_EVENTS; EVENTS_GONE."""
    rows = snapshot.range(*keys.events_from(volume.id, version + 1), limit=PAGE_EVENTS)
    told = [(key, value) for number, (key, value) in enumerate(rows, version + 1) if keys.event_version(key) == number]
    if told or (not rows and version == last_version(snapshot, volume)):
        return [_DECODER.decode(value) for _, value in told]
    oldest = f"the oldest is {keys.event_version(rows[0][0])}" if rows else "nor is any after it"
    raise Refused(wire.ErrorCode.EVENTS_GONE, f"event {version + 1} is not kept any more: {oldest}")


def is_event(key: bytes, value: bytes) -> bool:
    """Say whether a row of the log has the right form."""
    if key[-8:] == b"\xff" * 8:
        return len(value) == 8
    try:
        return _DECODER.decode(value).version == keys.event_version(key)
    except msgspec.DecodeError:
        return False


def _oldest(snapshot: Snapshot, volume: Volume) -> Event | None:
    rows = snapshot.range(*keys.events_from(volume.id, 0), limit=1)
    return _DECODER.decode(rows[0][1]) if rows else None


# Forgetting


class Excess(NamedTuple):
    """What is to be forgotten: all below ``version``, and what is older than ``born_ns``."""

    version: int
    born_ns: int = -(2**63)


def excess(snapshot: Snapshot, volume: Volume, now_ns: int) -> Excess | None:
    """Say what is too much or too old to be kept; ``None``: nothing is."""
    oldest = _oldest(snapshot, volume)
    if oldest is None:
        return None
    kept = Kept.unpack(snapshot.get(keys.kept_events(volume.id)))
    found = Excess(last_version(snapshot, volume) - kept.events + 1, now_ns - kept.seconds * _NANOSECONDS)
    return found if oldest.version < found.version or oldest.time_ns < found.born_ns else None


def forget(txn: Transaction, volume: Volume, excess: Excess) -> bool:
    """Forget some of the oldest events; True: call again, there may be more."""
    rows = txn.range(*keys.events_from(volume.id, 0), limit=_FORGOTTEN)
    for key, value in rows:
        if keys.event_version(key) >= excess.version and _DECODER.decode(value).time_ns >= excess.born_ns:
            return False
        txn.delete(key)
    return len(rows) == _FORGOTTEN
