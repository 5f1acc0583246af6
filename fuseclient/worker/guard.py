"""Keeps what was fetched before a change from entering a cache after it.

A fetch takes a token before its request is sent. Whoever drops a name or an inode from the caches says so here; until
the tokens of that time have ended, what they fetched under the same key is not to be put. All calls are synchronous
and of one task loop; between asking :meth:`Guard.may_put` and putting there must be no await.
"""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

#: An inode number, or a directory and a name in it; without a name, the directory's listing.
Key = int | tuple[int, bytes]

_K = TypeVar("_K")


class Token:
    """One fetch, from before its request until its reply is in the caches. Ends by :meth:`end` or as a context."""

    __slots__ = ("_guard", "began")

    def __init__(self, guard: Guard, began: int) -> None:
        self._guard = guard
        #: The number of the last drop before the fetch.
        self.began = began

    def end(self) -> None:
        """Forget the fetch. Twice does no harm."""
        self._guard._end(self)

    def __enter__(self) -> Token:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Guard:
    """The fetches in flight and what was dropped while they were."""

    def __init__(self) -> None:
        self._last = 0
        self._everything = 0
        # Each in the order of their numbers, oldest first.
        self._tokens: dict[Token, None] = {}
        self._drops: dict[Key, int] = {}
        #: Directories of which every name was dropped, by any name.
        self._directories: dict[int, int] = {}

    def begin(self) -> Token:
        """Return the token of a fetch that is about to be sent."""
        token = Token(self, self._last)
        self._tokens[token] = None
        return token

    def dropped(self, key: Key) -> None:
        """Say that what is known under this key is out of date as of now."""
        self._last += 1
        if self._tokens:
            self._drops.pop(key, None)
            self._drops[key] = self._last

    def dropped_names(self, directory: int) -> None:
        """Say that what is known of each name in a directory, and of its listing, is out of date as of now."""
        self._last += 1
        if self._tokens:
            self._directories.pop(directory, None)
            self._directories[directory] = self._last

    def dropped_all(self) -> None:
        """Say that everything known is out of date as of now."""
        self._last += 1
        self._everything = self._last
        self._drops.clear()
        self._directories.clear()

    def may_put(self, token: Token, key: Key) -> bool:
        """Whether nothing under this key was dropped since the fetch began. ``False`` for a token that has ended."""
        if token not in self._tokens:
            return False
        if self._directories and isinstance(key, tuple) and self._directories.get(key[0], 0) > token.began:
            return False
        return max(self._everything, self._drops.get(key, 0)) <= token.began

    def is_undisturbed(self, token: Token) -> bool:
        """Whether nothing whatever was dropped since the fetch began. ``False`` for a token that has ended."""
        return token in self._tokens and self._last == token.began

    def __len__(self) -> int:
        """How many drops are remembered."""
        return len(self._drops) + len(self._directories)

    def _end(self, token: Token) -> None:
        self._tokens.pop(token, None)
        oldest = next(iter(self._tokens), None)
        if oldest is None:
            self._drops.clear()
            self._directories.clear()
        else:
            _forget(self._drops, oldest.began)
            _forget(self._directories, oldest.began)


def _forget(drops: dict[_K, int], began: int) -> None:
    """Forget the drops before a fetch."""
    while drops:
        key = next(iter(drops))
        if drops[key] > began:
            return
        del drops[key]
