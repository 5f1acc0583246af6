"""Content of small files that was left out when their directory was fetched: who lists it wants names and attributes.

The first read of such a file comes to the worker, and then what was left out around it is fetched at once: all of its
directory, or of one with many files or bytes those from that one on, more each time. Pure.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from typing import Final, NamedTuple

#: Directories of which it is known, and stretches of one.
_DIRECTORIES: Final = 1 << 16
_STRETCHES: Final = 256


class Stretch(NamedTuple):
    """From one cookie of a directory's listing to another. ``whole``: it is all of the directory, and not
    too much for one fetch."""

    first: int
    last: int
    whole: bool


class LeftOut:
    """By directory, the stretches of its listing whose small files came without content."""

    def __init__(self) -> None:
        self._stretches: OrderedDict[int, list[Stretch]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._stretches)

    def put(self, parent: int, stretch: Stretch) -> None:
        """Content was left out here."""
        self.take(parent, stretch.first, stretch.last)
        stretches = self._stretches.setdefault(parent, [])
        if len(stretches) < _STRETCHES:
            insort(stretches, stretch)
        self._stretches.move_to_end(parent)
        if len(self._stretches) > _DIRECTORIES:
            self._stretches.popitem(last=False)

    def take(self, parent: int, first: int, last: int) -> None:
        """What lies between these cookies, both included, has come."""
        left = []
        for each in self._stretches.pop(parent, ()):
            if last < each.first or each.last < first:
                left.append(each)
                continue
            if each.first < first:
                left.append(Stretch(each.first, first - 1, False))
            if last < each.last:
                left.append(Stretch(last + 1, each.last, False))
        if left:
            self._stretches[parent] = left

    def find(self, parent: int, cookie: int) -> Stretch | None:
        """Return the stretch in which a file lies, if its content was left out."""
        for each in self._stretches.get(parent, ()):
            if each.first <= cookie <= each.last:
                return each
        return None

    def is_whole(self, parent: int) -> bool:
        """Say whether no content of a directory has come with it, all of which is known."""
        return any(each.whole for each in self._stretches.get(parent, ()))

    def forget(self, parent: int) -> None:
        """Nothing more is to be fetched of a directory."""
        self._stretches.pop(parent, None)

    def clear(self) -> None:
        """Everything will be fetched anew."""
        self._stretches.clear()
