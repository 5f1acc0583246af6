"""What operators are told of a metaserver that serves: its sessions, by how they are doing, and those it has ended."""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from metaserver import wire
from metaserver.coherence import Coherence
from metaserver.errors import Refused
from metaserver.fencing import Tenure
from metaserver.grace import Grace
from metaserver.sessions import Session, Sessions
from metaserver.volumes import Volume

#: Evictions that are remembered, and sessions that one answer lists.
_EVICTIONS: Final = 100
_LISTED: Final = 4096
#: A client renews every third of its lease; one that is later than this part of it is late.
_LATE_PART: Final = 2


class _Evicted(NamedTuple):
    session: Session
    why: str
    at_ns: int


class Evictions:
    """The sessions that this run of the server has ended because it had to, or was told to."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._last: deque[_Evicted] = deque(maxlen=_EVICTIONS)

    def note(self, session: Session) -> None:
        """A session is ended otherwise than by its client. Several changes at once may have seen to that."""
        if any(each.session is session for each in self._last):
            return
        why = "an operator's order" if session.evicted else "its lease had run out"
        self._last.append(_Evicted(session, why, self._sessions.clock()))

    def of_volume(self, volume: Volume) -> list[wire.Eviction]:
        """Return those of a volume, the last first."""
        now_ns = self._sessions.clock()
        return [
            wire.Eviction(each.session.id, each.session.client, each.why, (now_ns - each.at_ns) // 1_000_000)
            for each in reversed(self._last)
            if each.session.volume.id == volume.id
        ]


class Overview:
    """What there is to be said of one run of a server."""

    def __init__(self, tenure: Tenure, sessions: Sessions, coherence: Coherence, evictions: Evictions) -> None:
        self._tenure = tenure
        self._sessions = sessions
        self._coherence = coherence
        self._evictions = evictions

    def status(self, software: str, grace: Grace, volume: Volume | None) -> wire.Status:
        """Return the server's status, with the sessions of a volume."""
        missing = grace.records(volume)
        live = self._sessions.of_volume(volume)[:_LISTED] if volume is not None else []
        listed = [self._session(session) for session in live]
        listed += [_missing(record.id) for record in missing[: _LISTED - len(listed)]] if volume is not None else []
        return wire.Status(
            software,
            self._tenure.epoch,
            lease_ms=self._sessions.lease_ns // 1_000_000,
            grace_ms=grace.left_ns // 1_000_000,
            missing=len(missing),
            sessions=listed,
            evicted=self._evictions.of_volume(volume) if volume is not None else [],
        )

    def _session(self, session: Session) -> wire.SessionStatus:
        now_ns, lease_ns = self._sessions.clock(), self._sessions.lease_ns
        left_ns = max(0, session.deadline_ns - now_ns)
        directories, inodes = self._coherence.held(session)
        return wire.SessionStatus(
            session.id,
            session.client,
            session.software,
            _state(session, left_ns, lease_ns),
            max(0, lease_ns - left_ns) // 1_000_000,
            left_ns // 1_000_000,
            directories,
            inodes,
            len(session.writing),
            len(session.pending),
        )

    def evict(self, volume: Volume, session_id: bytes) -> None:
        """Have a session end; raise :exc:`Refused` (NOT_FOUND).

        From here on it is refused everything. What it holds counts until it has dropped that, or its lease has run
        out: until then it may answer from it.
        """
        found = [session for session in self._sessions.of_volume(volume) if session.id == session_id]
        if not found:
            raise Refused(wire.ErrorCode.NOT_FOUND, "there is no such session")
        for session in found:
            session.evicted = True
            self._coherence.drop_everything(session)


def _state(session: Session, left_ns: int, lease_ns: int) -> wire.SessionState:
    if session.evicted or session.ended:
        return wire.SessionState.EVICTED
    if not left_ns:
        return wire.SessionState.OFFLINE
    if session.push is None or left_ns < lease_ns // _LATE_PART:
        return wire.SessionState.UNSTABLE
    return wire.SessionState.ONLINE


def _missing(session_id: bytes) -> wire.SessionStatus:
    """Return what is known of a session of an earlier run that has not come back."""
    return wire.SessionStatus(session_id, "", "", wire.SessionState.OFFLINE, 0, 0, 0, 0, 0, 0)
