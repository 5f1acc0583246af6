"""What the engine itself knows of servers and sessions, so that nothing of a past one is ever committed.

A server that starts takes the next **epoch**; every transaction of a server compares its own with the one stored, so
that what an earlier server still tries after another took over is refused. Every **session** has a record from its
opening to its end, and every transaction on its behalf looks for that record: once it is deleted, durably and before
anything that conflicts with what the session held, no late write of that session can be committed. The records that a
starting server finds are the sessions whose leases may still run (see grace.py).

Every session has a few **slots**, and with a change that a client numbered the outcome is stored in its slot, in the
same transaction. So a change that is sent again gets the first outcome, and one that was overtaken is refused.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from metaserver import keys, records, wire
from metaserver.engine.base import Engine, Snapshot, Transaction
from metaserver.errors import Fenced, Refused
from metaserver.wire import ErrorCode

_RECORD: Final = struct.Struct(">QQ?")
_OUTCOME: Final = struct.Struct(">Q")


class SessionRecord(NamedTuple):
    """A session that was not ended. The lease is the length, in nanoseconds, that it was given.

    ``alone``: it may have made changes that it keeps to itself until another session is opened. ``owner``: the identity
    that it belongs to (see gate.py).
    """

    id: bytes
    volume: int
    lease_ns: int
    alone: bool = False
    owner: bytes = b""


def take_over(txn: Transaction) -> int:
    """Begin the next epoch and return it."""
    epoch = records.unpack_number(txn.get(keys.epoch()), 0) + 1
    txn.put(keys.epoch(), records.pack_number(epoch))
    return epoch


class Tenure:
    """The epoch of one server, from its start on."""

    epoch: int = 0

    async def begin(self, engine: Engine) -> None:
        """Take the engine over."""
        self.epoch = await engine.write(take_over)

    def check(self, snapshot: Snapshot) -> None:
        """Raise :exc:`Fenced` if another server has taken over."""
        if records.unpack_number(snapshot.get(keys.epoch()), 0) != self.epoch:
            raise Fenced("another metaserver has taken over this engine")


def is_recorded(snapshot: Snapshot, session: bytes) -> bool:
    """Say whether a session was not ended."""
    return snapshot.get(keys.session(session)) is not None


def check_session(snapshot: Snapshot, session: bytes) -> None:
    """Raise :exc:`Refused` (STALE_SESSION) if a session was ended."""
    if not is_recorded(snapshot, session):
        raise Refused(ErrorCode.STALE_SESSION, "the session was ended")


def list_sessions(snapshot: Snapshot) -> list[SessionRecord]:
    """Return the sessions that were not ended."""
    rows = snapshot.range(*keys.sessions())
    return [_session(key, value) for key, value in rows]


def _session(key: bytes, value: bytes) -> SessionRecord:
    volume, lease_ns, alone = _RECORD.unpack_from(value)
    return SessionRecord(keys.session_id(key), volume, lease_ns, alone, value[_RECORD.size :])


def put_session(txn: Transaction, record: SessionRecord) -> None:
    """Store a session."""
    txn.put(keys.session(record.id), _RECORD.pack(record.volume, record.lease_ns, record.alone) + record.owner)


def delete_session(txn: Transaction, session: bytes) -> None:
    """End a session, and forget its outcomes. Twice does no harm."""
    txn.delete(keys.session(session))
    for key, _ in txn.range(*keys.outcomes(session), limit=wire.SLOTS):
        txn.delete(key)


class Slot(NamedTuple):
    """Where the outcome of a change is kept; a sequence of 0: it is not."""

    session: bytes
    number: int
    sequence: int


def outcome(snapshot: Snapshot, slot: Slot) -> wire.Reply | None:
    """Return the outcome of a change if it was made before; STALE_SESSION if a later one was."""
    value = snapshot.get(keys.outcome(slot.session, slot.number)) if slot.sequence else None
    if value is None:
        return None
    (sequence,) = _OUTCOME.unpack_from(value)
    if sequence > slot.sequence:
        raise Refused(ErrorCode.STALE_SESSION, "the change was given up by its client")
    return wire.decode_reply(value[_OUTCOME.size :])[1] if sequence == slot.sequence else None


def remember(txn: Transaction, slot: Slot, reply: wire.Reply) -> None:
    """Keep the outcome of a change."""
    if slot.sequence:
        body = wire.encode(0, reply)[wire.HEADER_BYTES :]
        txn.put(keys.outcome(slot.session, slot.number), _OUTCOME.pack(slot.sequence) + body)
