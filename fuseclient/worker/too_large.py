"""Directories of more entries than the kernel cache has room for, which it cannot answer whole: that is said once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Final

_log = logging.getLogger(__name__)
#: Directories of which is known how far they were fetched, or that they were told of.
_KNOWN: Final = 1024


class TooLarge:
    """Told of each part of a directory that was fetched as it is listed. ``most_entries``: what there is room for."""

    def __init__(self, most_entries: int) -> None:
        self._most_entries = most_entries
        #: By directory: the last cookie of what was fetched in one go, and how many entries that are.
        self._fetched: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._told: OrderedDict[int, None] = OrderedDict()
        #: How many directories were found to be too large.
        self.count = 0

    def fetched(self, ino: int, after: int, last: int, entries: int) -> None:
        """The entries of a directory behind the cookie ``after``, up to ``last``, have come."""
        end, known = self._fetched.pop(ino, (0, 0)) if after else (0, 0)
        if after > end:  # not what follows
            return
        self._fetched[ino] = last, known + entries
        if len(self._fetched) > _KNOWN:
            self._fetched.popitem(last=False)
        if known + entries > self._most_entries and ino not in self._told:
            self._tell(ino)

    def _tell(self, ino: int) -> None:
        self._told[ino] = None
        if len(self._told) > _KNOWN:
            self._told.popitem(last=False)
        self.count += 1
        _log.warning(
            "the directory with inode %d has more entries than the kernel cache has room for, %d: those read first are "
            "given up for those read last; mount with a larger --kernel-cache-size",
            ino,
            self._most_entries,
        )
