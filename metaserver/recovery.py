"""What a metaserver makes sure of before it listens: that no number is given out twice.

An engine that ends without a farewell can lose the last changes that it acknowledged lazily, and with them inode
numbers and slice ids that clients have and go on using: an object under such an id may be in the store, a file with
such a number open. So whoever finds that the last server did not end cleanly skips more numbers than can be lost.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Final

from metaserver import keys, wire
from metaserver.engine.base import Engine, Transaction
from metaserver.errors import Fenced
from metaserver.fenced_engine import FencedEngine
from metaserver.namespace import list_volumes
from metaserver.records import Shard, pack_number, unpack_number
from metaserver.volumes import Volume

#: What an engine may hold back is bounded: by so many transactions, each of which gives out so many numbers.
_MOST_LOST: Final = 1 << 16
#: The note that not only the engine may have lost something.
_SPOILT: Final = b"\1"
_SKIPPED_INODES: Final = _MOST_LOST
_SKIPPED_SLICES: Final = _MOST_LOST * wire.MAX_FETCH


async def prepare(engine: Engine) -> bool:
    """Skip, on every volume, what an earlier run may have lost, and say whether it may; note that a server runs.

    All of that is durable on return, as is what was written before.
    """
    note = await engine.read(lambda snapshot: snapshot.get(keys.unclean()))
    lost = note is not None and (engine.puts_off or note == _SPOILT)
    if lost:
        for volume in await engine.read(list_volumes):
            await engine.write(functools.partial(_skip, volume=volume))
    if note != b"":
        await engine.write(lambda txn: txn.put(keys.unclean(), b""))
    await engine.sync()
    return lost


async def spoil(engine: Engine) -> None:
    """Have the next server take the engine for one that may have lost something: what clients hold of it is void."""
    await engine.write(lambda txn: txn.put(keys.unclean(), _SPOILT))
    await engine.sync()


async def finish(engine: FencedEngine) -> None:
    """Note that nothing was lost, unless another server has taken over, whose note it is then."""
    await engine.sync()
    with contextlib.suppress(Fenced):
        await engine.write(lambda txn: txn.delete(keys.unclean()))


def _skip(txn: Transaction, volume: Volume) -> None:
    for number in range(keys.SHARDS):
        key = keys.shard(volume.id, number)
        shard = Shard.unpack(txn.get(key))
        shard.next += _SKIPPED_INODES
        txn.put(key, shard.pack())
    key = keys.next_slice(volume.id)
    txn.put(key, pack_number(unpack_number(txn.get(key), 1) + _SKIPPED_SLICES))
