"""Where small files are: of each that came with a directory, in which and at which place of its listing. Pure."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from fuseclient.worker.feeding import comes_with_directory
from metaserver import wire

#: Files of which it is known where they are, at 16 bytes each; and inodes in a block that says which windows have them.
_PLACES: Final = 1 << 20
_BLOCK: Final = 4096
#: Blocks that a window may touch.
_MOST_BLOCKS: Final = 64


@dataclass(frozen=True)
class Window:
    """Small files of a directory that follow one another, by rising cookie."""

    parent: int
    cookies: array[int]
    inos: array[int]

    def blocks(self) -> set[int]:
        return {ino // _BLOCK for ino in self.inos}


@dataclass(frozen=True)
class Place:
    """A file's window, and its index there."""

    window: Window
    index: int

    @property
    def cookie(self) -> int:
        """Its place in the listing of ``window.parent``."""
        return self.window.cookies[self.index]


class Places:
    """Told of each page of a directory. What is said of a file is as old as that, and not to be relied upon."""

    def __init__(self) -> None:
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._places = 0
        self._blocks: dict[int, dict[tuple[int, int], None]] = {}

    def page(self, page: wire.DirectoryPage) -> None:
        """A part of a directory was fetched: remember where its small files are."""
        places = [(each.cookie, each.attributes.ino) for each in page.entries if comes_with_directory(each.attributes)]
        places.sort()
        if places and not all(self._is_known(page.directory.ino, *each) for each in (places[0], places[-1])):
            cookies, inos = zip(*places, strict=True)
            self._put(Window(page.directory.ino, array("Q", cookies), array("Q", inos)))

    def _is_known(self, parent: int, cookie: int, ino: int) -> bool:
        place = self.find(ino)
        return place is not None and (place.window.parent, place.cookie) == (parent, cookie)

    def _put(self, window: Window) -> None:
        key = window.parent, window.cookies[0]
        blocks = window.blocks()
        if key in self._windows:
            self._forget(key)
        if len(blocks) > _MOST_BLOCKS:
            return
        self._windows[key] = window
        self._places += len(window.inos)
        for block in blocks:
            self._blocks.setdefault(block, {})[key] = None
        while self._places > _PLACES:
            self._forget(next(iter(self._windows)))

    def _forget(self, key: tuple[int, int]) -> None:
        window = self._windows.pop(key)
        self._places -= len(window.inos)
        for block in window.blocks():
            del self._blocks[block][key]
            if not self._blocks[block]:
                del self._blocks[block]

    def find(self, ino: int) -> Place | None:
        """Return where a file is, as far as is known."""
        for key in reversed(self._blocks.get(ino // _BLOCK, {})):
            window = self._windows[key]
            try:
                return Place(window, window.inos.index(ino))
            except ValueError:
                continue
        return None
