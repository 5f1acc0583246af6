"""Which sessions have which inodes open for writing.

What others are told of such an inode is not to be kept by them: they ask each time, and see each commit, until the
last writer has gone. That spares both sides the breaks; it is not what makes their caches right, so it does no harm
that a session of which too many files are open is not known to have the rest of them open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from metaserver.sessions import Session

#: Inodes that one session is known to have open for writing.
MOST_OPEN: Final = 65536
#: And all sessions of one identity on a volume.
MOST_OF_IDENTITY: Final = 262_144


class Opens:
    """The inodes of one volume that are open for writing. Everything is called on the event loop's thread."""

    def __init__(self) -> None:
        self._writers: dict[int, set[Session]] = {}
        #: How many each identity has open.
        self._totals: Counter[bytes] = Counter()

    def add(self, session: Session, ino: int) -> None:
        """A session has an inode open for writing from now on."""
        if session.ended or ino in session.writing or len(session.writing) >= MOST_OPEN:
            return
        if self._totals[session.account] < MOST_OF_IDENTITY:
            self._totals[session.account] += 1
            session.writing.add(ino)
            self._writers.setdefault(ino, set()).add(session)

    def remove(self, session: Session, inos: Iterable[int]) -> None:
        """A session has these open for writing no more; those that it had not are passed over."""
        closed = session.writing.intersection(inos)
        self._totals[session.account] -= len(closed)
        if not self._totals[session.account]:
            del self._totals[session.account]
        for ino in closed:
            session.writing.discard(ino)
            writers = self._writers[ino]
            writers.discard(session)
            if not writers:
                del self._writers[ino]

    def replace(self, session: Session, inos: Iterable[int]) -> None:
        """A session has just these open for writing."""
        self.remove(session, list(session.writing))
        for ino in inos:
            self.add(session, ino)

    def by_others(self, session: Session, inos: Iterable[int]) -> list[int]:
        """Return those of these inodes that anybody but this session has open for writing."""
        if not self._writers:
            return []
        return [ino for ino in inos if self._writers.get(ino, set()) - {session}]
