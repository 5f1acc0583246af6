"""The metaservers of a volume that a mount knows: those that its URL names, and those that it was told of since.

What it was told is kept in memory that the channel owns, so that a worker's successor knows it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import msgspec

from fuseclient.credentials import Credentials
from fuseclient.worker.finding import may_follow

_log = logging.getLogger(__name__)

#: The most that is kept, in bytes: far more than metaservers may tell.
_MOST: int = 65536


class Known:
    """``address``: those of the URL, as :func:`~fuseclient.worker.finding.connect` takes them.

    ``memory`` is the descriptor of a file in memory; nothing is in it at first.
    """

    def __init__(self, address: str, memory: int | None = None) -> None:
        self._named, mark, self._query = address.partition("?")
        self._suffix = mark + self._query
        self._memory = memory
        #: Those that the URL does not name.
        self.told = [] if memory is None else _read(memory)

    @property
    def address(self) -> str:
        """All of them, in the same form."""
        return ",".join((self._named, *self.told)) + self._suffix

    def learn(self, teller: str, places: Iterable[str]) -> None:
        """Take the word of the metaserver at ``teller`` for which there are; if it says nothing, nothing changes."""
        said, named, credentials = list(places), self._named.split(","), Credentials.parse(self._query)
        told = [each for each in said if each not in named and may_follow(teller, each, credentials)]
        if not said or told == self.told:
            return
        _log.info("metaservers beside those of the URL: %s", ", ".join(told) or "none")
        self.told = told
        if self._memory is not None:
            _write(self._memory, told)


def _read(memory: int) -> list[str]:
    said = os.pread(memory, _MOST, 0)
    return msgspec.json.decode(said, type=list[str]) if said else []


def _write(memory: int, told: list[str]) -> None:
    said = msgspec.json.encode(told)
    os.pwrite(memory, said + b" " * max(0, os.fstat(memory).st_size - len(said)), 0)
