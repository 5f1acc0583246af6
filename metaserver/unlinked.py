"""How many unlinked inodes the sessions of an account keep: a bounded number, as nobody would find them by a name.

A client reaps an inode soon after its last use, so removals leave little behind. They are counted here, each as if it
left an orphan; only when there may be too many of these they are counted in the engine: once in as many removals as
there was room for. What sessions of an earlier run keep is counted at the first removal of this one.

Everything is called on the event loop's thread.
"""

from __future__ import annotations

from typing import Final

from metaserver import keys, wire
from metaserver.engine.base import Snapshot
from metaserver.fenced_engine import FencedEngine
from metaserver.sessions import Session, Sessions
from metaserver.volumes import Volume

#: Orphans that the sessions of an account may keep on a volume before they may remove nothing more.
MOST_OF_ACCOUNT: Final = 262_144
#: What can leave an orphan.
_REMOVALS: Final = (wire.Remove, wire.Rename, wire.MakeTemporary)
#: Rows that are read at once.
_ROWS: Final = 1024


def most_left(request: wire.Request) -> int:
    """Return how many orphans a request can leave."""
    return len(request.names) if isinstance(request, wire.RemoveNames) else isinstance(request, _REMOVALS)


class Unlinked:
    """The orphans of a server's sessions."""

    def __init__(self, engine: FencedEngine, sessions: Sessions) -> None:
        self._engine = engine
        self._sessions = sessions
        #: How many more there can be, by volume and account.
        self._room: dict[tuple[int, bytes], int] = {}
        sessions.on_end.append(self._ended)

    async def has_room(self, session: Session, count: int) -> bool:
        """Take note that a session is about to leave so many orphans; say whether it may. Raises EngineError."""
        room = self._room.get(_key(session))
        if room is None and not any(each.reclaimed for each in self._beside(session)):
            room = MOST_OF_ACCOUNT
        if not room or room < count:
            ids = [each.id for each in self._beside(session)]
            kept = await self._engine.scan(lambda snapshot: _count(snapshot, session.volume, ids))
            room = max(0, MOST_OF_ACCOUNT - kept)
        if not session.ended:
            self._room[_key(session)] = max(0, room - count)
        return room >= count

    def _beside(self, session: Session) -> list[Session]:
        """Return the sessions of the same account on the same volume."""
        return [each for each in self._sessions.of_volume(session.volume) if each.account == session.account]

    def _ended(self, session: Session) -> None:
        if not any(each is not session for each in self._beside(session)):
            self._room.pop(_key(session), None)


def _key(session: Session) -> tuple[int, bytes]:
    return session.volume.id, session.account


def _count(snapshot: Snapshot, volume: Volume, sessions: list[bytes]) -> int:
    """Return how many orphans sessions have, if they are not too many."""
    count = 0
    for session in sessions:
        start, end = keys.orphans(volume.id, session)
        while count < MOST_OF_ACCOUNT and (rows := snapshot.range(start, end, limit=_ROWS)):
            count += len(rows)
            start = rows[-1][0] + b"\0"
    return count
