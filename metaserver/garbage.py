"""What becomes of unlinked inodes: orphans, their deletion, and the clearing up that deletion leaves behind.

An inode without links stays whole under the session that took its last link, and under those that have it open, until
each of them says that it is used there no more, or ends. Deleting it takes a few writes; what it has in slices and
extended attributes goes by and by.
"""

from __future__ import annotations

import stat
from typing import Final

from metaserver import chunks, events, keys, references, wire
from metaserver.deferred import Kind, Task, first_task, keep_rest, put_off
from metaserver.engine.base import Snapshot, Transaction
from metaserver.inodes import Edit
from metaserver.records import Inode
from metaserver.references import RESERVE
from metaserver.volumes import Context, Volume
from metaserver.wire import InodeFlag

#: Orphans that one transaction of :func:`reap_session` looks at.
_ORPHANS: Final = 32


def reap(txn: Transaction, context: Context, request: wire.Reap) -> wire.Done:
    """Delete orphans of this session; those that are too many for one transaction soon after."""
    rest = _reap(txn, context.volume, context.session, request.inos)
    if rest:
        put_off(txn, context.volume, Kind.REAP, context.session, rest)
    return wire.Done()


def reap_session(txn: Transaction, volume: Volume, session: bytes) -> bool:
    """Delete orphans of an ended session, as many as one transaction takes; True: call again, more are left."""
    rows = txn.range(*keys.orphans(volume.id, session), limit=_ORPHANS)
    rest = _reap(txn, volume, session, [keys.orphan_ino(key) for key, _ in rows])
    return bool(rest) or len(rows) == _ORPHANS


def sessions_with_orphans(snapshot: Snapshot, volume: Volume) -> list[bytes]:
    """Return the sessions that have orphans: those of them that are no more are to be reaped."""
    sessions: list[bytes] = []
    while rows := snapshot.range(*keys.orphans_after(volume.id, sessions[-1] if sessions else b""), limit=1):
        sessions.append(keys.orphan_session(rows[0][0]))
    return sessions


def has_garbage(snapshot: Snapshot, volume: Volume) -> bool:
    """Whether :func:`sweep` has work."""
    ranges = keys.tasks(volume.id), keys.all_void(volume.id)
    return any(snapshot.range(start, end, limit=1) for start, end in ranges)


def sweep(txn: Transaction, volume: Volume) -> bool:
    """Do a bounded piece of the clearing up after deletions; True: call again. For the background."""
    task = first_task(txn, volume)
    if task is not None:
        _do(txn, volume, task)
        return True
    rows = txn.range(*keys.all_void(volume.id), limit=1)
    for key, _ in rows:
        chunks.sweep_void(txn, volume, keys.void_ino(key))
    return bool(rows)


def _do(txn: Transaction, volume: Volume, task: Task) -> None:
    if task.kind is Kind.RELEASE:
        rest = references.release_some(txn, volume, task.numbers)
    elif task.kind is Kind.FORGET:
        rest = task.numbers if events.forget(txn, volume, events.Excess(max(task.numbers))) else []
    else:
        rest = _reap(txn, volume, task.argument, task.numbers)
    keep_rest(txn, task, rest)


def _reap(txn: Transaction, volume: Volume, session: bytes, inos: list[int]) -> list[int]:
    """Delete those that are orphans of the session and of no other, while there is room; return what is left."""
    edit = Edit(txn, Context(volume, session, 0))
    done = 0
    for ino in inos:
        if txn.room < 2 * RESERVE:
            break
        key = keys.orphan(volume.id, session, ino)
        held = txn.get(key)
        if held is not None:
            txn.delete(key)
            if all(txn.get(other) is None for other in keys.orphans_beside(volume.id, ino, held)):
                delete(edit, edit.inode(ino))
        done += 1
    edit.save()
    return inos[done:]


def delete(edit: Edit, inode: Inode) -> None:
    """Delete an inode and what it holds, or mark what it holds as garbage."""
    txn, volume = edit.txn, edit.volume
    edit.drop(inode)
    if inode.is_inline or stat.S_ISLNK(inode.mode):
        txn.delete(keys.content(volume.id, inode.ino))
    has_slices = stat.S_ISREG(inode.mode) and not (inode.is_inline and chunks.is_swept(txn, volume, inode.ino))
    if has_slices or inode.flags & InodeFlag.HAS_XATTRS:
        chunks.give_up(txn, volume, inode.ino)
