"""A directory of many empty files, written into a volume's engine as its verbs would have, but row by row in bulk."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb

from metaserver import keys, wire
from metaserver.engine import open_engine
from metaserver.namespace import WRITES, Context, open_volume
from metaserver.records import Entry, Inode, Shard, pack_listed
from metaserver.wire import InodeFlag

NAME: Final = b"many"
_NOW_NS: Final = 10**18
_MAP_BYTES: Final = 4 << 30


def name_of(number: int) -> bytes:
    return b"entry%07d" % number


async def make(directory: Path, volume_name: str, count: int, name: bytes = NAME) -> int:
    """Make a directory of so many files in the root of a volume of an LMDB engine that nobody has open.

    Return its inode.
    """
    engine = open_engine(f"lmdb://{directory}")
    try:
        volume = await engine.read(lambda snapshot: open_volume(snapshot, volume_name))
        context = Context(volume, bytes(16), _NOW_NS)
        request = wire.MakeNode(wire.ROOT_INO, name, stat.S_IFDIR | 0o755, 0, 0)
        made = await engine.write(lambda txn: WRITES[wire.MakeNode](txn, context, request))
    finally:
        await engine.close()
    parent: int = made.attributes[0].ino
    env = lmdb.open(str(directory), map_size=_MAP_BYTES, sync=False)
    with env.begin(write=True) as txn:
        _fill(txn, volume.id, parent, count)
    env.sync(True)
    env.close()
    return parent


def _fill(txn: lmdb.Transaction, volume: int, parent: int, count: int) -> None:
    directory = Inode.unpack(parent, bytes(txn.get(keys.inode(volume, parent)) or b""))
    first = directory.version + 1
    directory.version += count
    inos = _take_inodes(txn, volume, count)
    put = txn.cursor().putmulti
    put(_inodes(volume, inos))
    put((keys.listing(volume, parent, first + n), pack_listed(ino, name_of(n))) for n, ino in enumerate(inos))
    put((keys.entry(volume, parent, name_of(n)), Entry(ino, first + n).pack()) for n, ino in enumerate(inos))
    txn.put(keys.inode(volume, parent), directory.pack())


def _take_inodes(txn: lmdb.Transaction, volume: int, count: int) -> list[int]:
    """Take inode numbers, as many of each shard."""
    share = -(-count // keys.SHARDS)
    stored = [txn.get(keys.shard(volume, number)) for number in range(keys.SHARDS)]
    shards = [Shard.unpack(None if value is None else bytes(value)) for value in stored]
    first = max(shard.next for shard in shards)
    inos = list(itertools.islice(range(first * keys.SHARDS, (first + share) * keys.SHARDS), count))
    for number, shard in enumerate(shards):
        shard.next = first + share
        shard.inodes += sum(1 for _ in range(number, count, keys.SHARDS))
        txn.put(keys.shard(volume, number), shard.pack())
    return inos


def _inodes(volume: int, inos: list[int]) -> Iterator[tuple[bytes, bytes]]:
    like = Inode.made(0, stat.S_IFREG | 0o644, 0, 0, 0, _NOW_NS)
    like.flags = InodeFlag.INLINE
    packed = like.pack()
    return ((keys.inode(volume, ino), packed) for ino in inos)
