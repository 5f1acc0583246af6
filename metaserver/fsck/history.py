"""The log of events: whether each follows the one before it, up to the one that was counted last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metaserver import keys
from metaserver.engine.base import Snapshot
from metaserver.fsck.findings import Kind
from metaserver.fsck.rows import Stream
from metaserver.records import unpack_number
from metaserver.volumes import Volume

Found = Callable[[Kind, str, str, str, list[Any]], None]


def check(
    snapshot: Snapshot,
    volume: Volume,
    found: Found,
    stray: Callable[[bytes], None],
    tick: Callable[[str, int, int], None],
) -> None:
    """Report what is missing in the log: what comes before the last gap is of no use to anybody."""
    last = counted = after_gap = 0
    for done, (key, value) in enumerate(Stream(snapshot, volume, b"h", stray)):
        tick("events", done, 0)
        version = keys.event_version(key)
        if version == keys.LAST_VERSION:
            counted = unpack_number(value, 0)
        else:
            after_gap = version if last and version != last + 1 else after_gap
            last = version
    if last > counted:
        what = f"is counted as {counted}, and there is event {last}"
        found(Kind.WRONG_COUNTER, "the last event", what, "raise_events", [last])
    elif 0 < last < counted:
        found(Kind.EVENTS_BROKEN, f"event {last}", f"is followed by none up to {counted}", "forget_events", [last + 1])
    elif after_gap:
        what = "does not follow the one before it"
        found(Kind.EVENTS_BROKEN, f"event {after_gap}", what, "forget_events", [after_gap])
    for _ in Stream(snapshot, volume, b"k", stray):
        tick("events", 0, 0)
