"""What a metaserver makes sure of before it listens: that no number is given out twice.

An engine that ends without a farewell can lose the last changes that it acknowledged lazily, and with them inode
numbers and slice ids that clients have and go on using: an object under such an id may be in the store, a file with
such a number open. So whoever finds that the last server did not end cleanly skips more numbers than can be lost.
"""

from __future__ import annotations

import functools
from typing import Final

from metaserver import keys, wire
from metaserver.engine.base import Engine, Transaction
from metaserver.namespace import list_volumes
from metaserver.records import Shard, pack_number, unpack_number
from metaserver.volumes import Volume

#: What an engine may hold back is bounded: by so many transactions, each of which gives out so many numbers.
_MOST_LOST: Final = 1 << 16
_SKIPPED_INODES: Final = _MOST_LOST
_SKIPPED_SLICES: Final = _MOST_LOST * wire.MAX_FETCH


async def prepare(engine: Engine) -> None:
    """Skip, on every volume, what an earlier run may have lost; note, durably, that a server runs."""
    if await engine.read(lambda snapshot: snapshot.get(keys.unclean()) is not None):
        for volume in await engine.read(list_volumes):
            await engine.write(functools.partial(_skip, volume=volume))
    else:
        await engine.write(lambda txn: txn.put(keys.unclean(), b""))
    await engine.sync()


async def finish(engine: Engine) -> None:
    """Note that nothing was lost."""
    await engine.sync()
    await engine.write(lambda txn: txn.delete(keys.unclean()))


def _skip(txn: Transaction, volume: Volume) -> None:
    for number in range(keys.SHARDS):
        key = keys.shard(volume.id, number)
        shard = Shard.unpack(txn.get(key))
        shard.next += _SKIPPED_INODES
        txn.put(key, shard.pack())
    key = keys.next_slice(volume.id)
    txn.put(key, pack_number(unpack_number(txn.get(key), 1) + _SKIPPED_SLICES))
