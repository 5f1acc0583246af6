"""Messages for operators: what a metaserver is doing, whose sessions it has, and the end of one of them."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from metaserver.wire.base import U63, Message, Places, SessionId, VolumeName

_Text = Annotated[str, Meta(max_length=1024)]


class SessionState(enum.StrEnum):
    """How a client is doing, as operators know it."""

    #: Connected, and renews its lease in time.
    ONLINE = "online"
    #: Not connected, or late: its lease still runs.
    UNSTABLE = "unstable"
    #: Its lease has run out, or it has not come back to this metaserver yet.
    OFFLINE = "offline"
    #: Ended by the metaserver, or about to be when its lease runs out; it must come back with empty caches.
    EVICTED = "evicted"


class GetStatus(Message, tag=52):
    """Ask any metaserver, standby or not, how it is. ``volume``: and about the sessions of this one."""

    volume: VolumeName | None = None


class EvictSession(Message, tag=53):
    """End a session: what its client still sends is refused, and it is to drop everything. NOT_FOUND: there is none."""

    volume: VolumeName
    session: SessionId


class SessionStatus(Message):
    """A session. ``client`` is its host and mount point, with a colon between them. Times are milliseconds."""

    session: SessionId
    client: _Text
    software: _Text
    state: SessionState
    #: Since its last renewal, and until its lease runs out.
    renewed_ms: U63
    left_ms: U63
    #: What it may have cached: directories of which it knows names, and inodes.
    directories: U63
    inodes: U63
    #: Files that it has open for writing, and breaks that it has not acknowledged.
    writing: U63
    breaks: U63


class Eviction(Message):
    """A session that was ended by the metaserver, so many milliseconds ago."""

    session: SessionId
    client: _Text
    why: _Text
    ago_ms: U63


class Status(Message, tag=79):
    """How a metaserver is. ``elsewhere``: of a standby, where the authority is, as far as it knows."""

    software: _Text
    #: 0: a standby.
    epoch: U63
    elsewhere: _Text = ""
    lease_ms: U63 = 0
    #: Until changes are made without waiting for who has not come back, and how many have not.
    grace_ms: U63 = 0
    missing: U63 = 0
    sessions: list[SessionStatus] = []
    evicted: list[Eviction] = []
    #: As in Welcome.
    metaservers: Places = []
