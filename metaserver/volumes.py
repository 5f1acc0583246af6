"""Volumes: the registry of them, and what a verb is told about the one it works on."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from metaserver import keys, records, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.wire import ErrorCode


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of the engine; never changes once made."""

    id: int
    name: str
    #: Bytes; larger files live in slices.
    inline_limit: int
    #: URL of the object store that holds the slices.
    store: str
    #: 16 random bytes, made with the volume: what is cached of another volume of this name is not this one's.
    identity: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class Context:
    """On whose behalf a verb runs: the volume, the 16-byte session id, and the wall clock in nanoseconds."""

    volume: Volume
    session: bytes
    now_ns: int
    #: Other sessions that have inodes open, of those that this change is about to unlink.
    openers: Mapping[int, Collection[bytes]] = field(default_factory=dict)


def create_volume(txn: Transaction, request: wire.CreateVolume, now_ns: int) -> Volume:
    """Make a volume with an empty root directory, owned by root; VOLUME_EXISTS if the name is taken."""
    if txn.get(keys.volume(request.name)) is not None:
        raise Refused(ErrorCode.VOLUME_EXISTS, f"there is a volume {request.name!r} already")
    number = records.unpack_number(txn.get(keys.next_volume()), 1)
    txn.put(keys.next_volume(), records.pack_number(number + 1))
    volume = Volume(number, request.name, request.inline_limit, request.store, os.urandom(16))
    record = records.pack_volume(number, request.inline_limit, volume.identity, request.store)
    txn.put(keys.volume(request.name), record)
    if (request.kept_events, request.kept_s) != (wire.KEPT_EVENTS, wire.KEPT_S):
        txn.put(keys.kept_events(number), records.Kept(request.kept_events, request.kept_s).pack())
    if request.first_slice > 1:
        txn.put(keys.next_slice(number), records.pack_number(request.first_slice))
    root = records.Inode.made(wire.ROOT_INO, stat.S_IFDIR | 0o755, 0, 0, 0, now_ns, parent=wire.ROOT_INO)
    txn.put(keys.inode(number, root.ino), root.pack())
    txn.put(keys.shard(number, keys.shard_of(root.ino)), records.Shard(inodes=1).pack())
    return volume


def open_volume(snapshot: Snapshot, name: str) -> Volume:
    """Return a volume by name; NO_SUCH_VOLUME."""
    record = snapshot.get(keys.volume(name))
    if record is None:
        raise Refused(ErrorCode.NO_SUCH_VOLUME, f"there is no volume {name!r}")
    return _volume(name, record)


def list_volumes(snapshot: Snapshot) -> list[Volume]:
    """Return every volume, by name."""
    rows = snapshot.range(*keys.volumes())
    return [_volume(keys.volume_name(key), record) for key, record in rows]


def _volume(name: str, record: bytes) -> Volume:
    number, inline_limit, identity, store = records.unpack_volume(record)
    return Volume(number, name, inline_limit, store, identity)
