"""Directories that will be read next, as far as one can tell: those beside a directory that is being read.

Who walks a tree, or reads its files in any order at all, misses in one directory after the other of the same parent.
Then one fetch brings some of them at once, twice as many with each miss that follows soon, in the order of their
parent's listing. It pays as long as they are used, which BPF programs note: when those that nobody has asked for take
up half of the kernel cache, no more are brought. Pure.
"""

from __future__ import annotations

import stat
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from metaserver import wire

#: Seconds between two misses after which the next begins anew.
_PAUSE_S: Final = 5.0
#: Directories whose place is known, at about 150 bytes each.
_KNOWN: Final = 1 << 16
#: Entries and bytes of content that may have been brought, and not used yet, when one fetch follows another unasked.
_FAR_ENTRIES: Final = 4 * wire.MAX_FETCH
_FAR_BYTES: Final = 64 << 20
#: Directories that the next fetch is to bring, from which on they are brought before one is missed.
_STEADY: Final = 8
#: Directories that were brought ahead and are looked at at each miss.
_LOOKED_AT: Final = 64


class _Run:
    """Misses beside one another. ``width``: how many directories the next fetch brings beside the one asked for."""

    def __init__(self) -> None:
        self.width = 0
        self.last = 0.0

    def next_width(self, now: float) -> int:
        """Note a miss, and return how many directories its fetch brings."""
        if now - self.last > _PAUSE_S:
            self.width = 0
        width, self.last = self.width, now
        self.width = min(2 * width or 1, wire.MAX_ALSO)
        return width


class Siblings:
    """Told of each page of a directory; says what to fetch with a directory that is missed.

    ``is_used`` is that of the kernel cache; ``most_entries`` and ``most_bytes``: what may have been brought in vain.
    """

    def __init__(
        self,
        is_used: Callable[[int], bool | None],
        most_entries: int,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_used = is_used
        self._most_entries = most_entries
        self._most_bytes = most_bytes
        self._clock = clock
        #: By parent, its directories in the order of its listing.
        self._children: OrderedDict[int, array[int]] = OrderedDict()
        self._parents: dict[int, int] = {}
        #: By parent, and whether it is content that is missed.
        self._runs: OrderedDict[tuple[int, bool], _Run] = OrderedDict()
        #: Parents of directories in which content was missed since one was listed with its content.
        self._read: OrderedDict[int, None] = OrderedDict()
        #: Of directories that nobody has asked for yet: entries and bytes of content.
        self._unused: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._entries = self._bytes = 0
        self._brought = self._paid = self._wasted = self._held_back = 0

    def page(self, page: wire.DirectoryPage) -> None:
        """A part of a directory was fetched."""
        found = [each.attributes.ino for each in page.entries if stat.S_ISDIR(each.attributes.mode)]
        if not found:
            return
        parent = page.directory.ino
        if page.whole and parent in self._children and self._parents.get(found[0]) == parent:
            return  # it was fetched before
        children = self._children.setdefault(parent, array("Q"))
        self._children.move_to_end(parent)
        for ino in found:
            if self._parents.get(ino) != parent:
                children.append(ino)
                self._parents[ino] = parent
        while len(self._parents) > _KNOWN and len(self._children) > 1:
            self._forget(next(iter(self._children)))
        if len(self._parents) > _KNOWN:
            self._forget(parent)

    def _forget(self, parent: int) -> None:
        for ino in self._children.pop(parent):
            if self._parents.get(ino) == parent:
                del self._parents[ino]
        self._read.pop(parent, None)
        for content in (False, True):
            self._runs.pop((parent, content), None)

    def are_read(self, ino: int) -> bool:
        """Say of a directory that is about to be listed whether files beside it were read, since this was said last."""
        parent = self._parents.get(ino)
        if parent is None or parent not in self._read:
            return False
        del self._read[parent]
        return True

    def missed(self, ino: int, is_known: Callable[[int], bool], *, content: bool = False) -> list[int]:
        """A directory is about to be fetched: return those to be fetched with it. ``is_known``: not to be fetched.

        ``content``: its names are known, and a file of it is being read.
        """
        parent = self._parents.get(ino)
        if parent is None:
            return []
        if content:
            self._read[parent] = None
        width = self._runs.setdefault((parent, content), _Run()).next_width(self._clock())
        self._judge()
        if width and (self._entries > self._most_entries or self._bytes > self._most_bytes):
            self._held_back += 1
            return []
        return self._next(self._children[parent], ino, width, is_known)

    def following(self, ino: int, rest: list[int], is_known: Callable[[int], bool], *, content: bool) -> list[int]:
        """All that was to come with a directory is here, but for a rest for which a fetch had no room: return what the
        next brings unasked, while those that came are used.

        ``content``: as of :meth:`missed`.
        """
        before = self._wasted
        self._judge()
        far = self._entries > min(self._most_entries, _FAR_ENTRIES) or self._bytes > min(self._most_bytes, _FAR_BYTES)
        if far or self._wasted > before:
            return []
        if rest:
            return rest
        parent = self._parents.get(ino)
        run = self._runs.get((parent, content)) if parent is not None else None
        if parent is None or run is None or run.width < _STEADY or 2 * len(self._unused) > run.width:
            return []
        return self._next(self._children[parent], ino, run.next_width(self._clock()), is_known)

    def _next(self, children: array[int], ino: int, width: int, is_known: Callable[[int], bool]) -> list[int]:
        found: list[int] = []
        begin = children.index(ino) + 1
        for each in (*children[begin:], *children[: begin - 1]) if width else ():
            if not is_known(each) and self._parents.get(each) is not None:
                found.append(each)
                if len(found) == width:
                    break
        return found

    def brought(self, ino: int, entries: int, content_bytes: int) -> None:
        """A directory has come beside another."""
        self._take(ino)
        self._unused[ino] = entries, content_bytes
        self._entries += entries
        self._bytes += content_bytes
        self._brought += 1

    def _take(self, ino: int) -> None:
        entries, content_bytes = self._unused.pop(ino, (0, 0))
        self._entries -= entries
        self._bytes -= content_bytes

    def _judge(self) -> None:
        """Look at some of those that were brought: are they used by now?"""
        for ino in list(self._unused)[:_LOOKED_AT]:
            used = self._is_used(ino)
            if used is False:
                self._unused.move_to_end(ino)
                continue
            self._take(ino)
            self._paid += used is True
            self._wasted += used is None

    def clear(self) -> None:
        """Everything was dropped."""
        self._unused.clear()
        self._entries = self._bytes = 0

    def figures(self) -> dict[str, int]:
        """Return how many directories were brought beside others, were used, and were given up unused; and how often
        none was brought because too many were not used."""
        self._judge()
        return {
            "ahead": self._brought,
            "ahead_used": self._paid,
            "ahead_wasted": self._wasted,
            "ahead_held_back": self._held_back,
        }
