"""What objects are called in every kind of store. Pure.

Ids are handed out by the metaserver in rising order and never twice, so neighbours share a directory. Names sort as the
ids do: the uppermost directory has five hex digits or, from id 2^40 on, more behind a letter that says how many.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

#: What the name of an object ends in that is still being written.
UNFINISHED: Final = ".new"
#: What says which volume a store belongs to: its identity in hex.
OWNER: Final = "bpfuse-volume"
_NAME: Final = re.compile(r"[g-l]?[0-9a-f]{5,11}/[0-9a-f]{3}/([0-9a-f]{12,16})(\.new)?")
_SHORTEST: Final = 5


class Listed(NamedTuple):
    """An object in a store. ``unfinished``: its upload was broken off, or goes on just now."""

    slice_id: int
    bytes: int
    #: When it was stored, in seconds since 1970.
    stored_s: float
    unfinished: bool


def object_name(slice_id: int) -> str:
    """Return the path of a slice's object: 1024 to a directory, 1024 of those to a directory above."""
    high = f"{slice_id >> 20:05x}"
    longer = len(high) - _SHORTEST
    prefix = chr(ord("f") + longer) if longer else ""
    return f"{prefix}{high}/{slice_id >> 10 & 0x3FF:03x}/{slice_id:012x}"


def listed(path: str, size: int, stored_s: float) -> Listed | None:
    """Return what a path within a store stands for; ``None``: it is none of ours."""
    match = _NAME.fullmatch(path)
    if match is None:
        return None
    slice_id = int(match[1], 16)
    if path.removesuffix(UNFINISHED) != object_name(slice_id):
        return None
    return Listed(slice_id, size, stored_s, match[2] is not None)
