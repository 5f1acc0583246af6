"""What a metaserver that has ended left to be cleared up, for a volume that nobody has mounted.

The metaserver's own janitor does the same while it runs. The objects in the store are not this module's: see the
requests InspectSlices, RetireSlices, ListSlices and ForgetSlices of :mod:`metaserver.wire`.
"""

from __future__ import annotations

from collections.abc import Callable

from metaserver import garbage, keys
from metaserver.engine.base import Engine, Snapshot
from metaserver.fsck.rows import find_inode, rows
from metaserver.volumes import Volume


def count(snapshot: Snapshot, volume: Volume, tick: Callable[[int], None]) -> tuple[int, int]:
    """Return how many unlinked inodes are kept for sessions, and their bytes. ``tick`` is told how far it is."""
    orphans = size = 0
    for key, _ in rows(snapshot, keys.orphans_after(volume.id, b"")):
        inode = find_inode(snapshot, volume, keys.orphan_ino(key))
        orphans += 1
        size += inode.size if inode is not None else 0
        tick(orphans)
    return orphans, size


async def clear_up(engine: Engine, volume: Volume, tick: Callable[[int], None]) -> None:
    """Delete unlinked inodes, whose sessions have all ended, and what deletions have put off."""
    done = 0
    for session in await engine.read(lambda snapshot: garbage.sessions_with_orphans(snapshot, volume)):
        while await engine.write(lambda txn, session=session: garbage.reap_session(txn, volume, session)):  # type: ignore[misc]
            done += 1
            tick(done)
    while await engine.write(lambda txn: garbage.sweep(txn, volume)):
        done += 1
        tick(done)
