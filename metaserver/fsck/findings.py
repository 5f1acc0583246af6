"""What can be found wrong, and a queue on disk of what was."""

from __future__ import annotations

import enum
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import msgspec

from metaserver.wire import body_length


class Kind(enum.StrEnum):
    """What is wrong."""

    #: A key of no known kind, or of a wrong form, or whose value cannot be read.
    STRAY_KEY = "stray-key"
    ENTRY_WITHOUT_INODE = "entry-without-inode"
    #: Entries or content of an inode that does not exist and that no entry names.
    CONTENT_WITHOUT_INODE = "content-without-inode"
    INODE_WITHOUT_ENTRY = "inode-without-entry"
    #: No links, no entry, and no session that may have it open.
    LEAKED_INODE = "leaked-inode"
    #: Unlinked, and kept for a session that is no more.
    ORPHAN = "orphan"
    #: An orphan's record for an inode that has links, or does not exist.
    STRAY_ORPHAN = "stray-orphan"
    WRONG_NLINK = "wrong-nlink"
    WRONG_PARENT = "wrong-parent"
    #: A directory with more than one entry, or the root with any.
    DIRECTORY_LINKED = "directory-linked"
    DIRECTORY_LOOP = "directory-loop"
    #: An entry that the listing of its directory lacks, or shows otherwise.
    WRONG_LISTING = "wrong-listing"
    #: A row of a listing without its entry.
    STRAY_LISTING = "stray-listing"
    #: An inode older than what it holds.
    WRONG_VERSION = "wrong-version"
    WRONG_SIZE = "wrong-size"
    WRONG_INLINE_FLAG = "wrong-inline-flag"
    WRONG_XATTR_FLAG = "wrong-xattr-flag"
    #: Content or extended attributes that their inode cannot have.
    STRAY_CONTENT = "stray-content"
    LOST_TARGET = "lost-target"
    WRONG_REFERENCES = "wrong-references"
    #: Counted as used, and used by no file.
    LEAKED_SLICE = "leaked-slice"
    #: Used by a file, and listed as one whose object may be deleted.
    DOOMED_SLICE = "doomed-slice"
    #: Statistics, or the next number of inodes or slices.
    WRONG_COUNTER = "wrong-counter"
    #: An event whose predecessor is not there.
    EVENTS_BROKEN = "events-broken"
    MISSING_OBJECT = "missing-object"
    DAMAGED_OBJECT = "damaged-object"


class Finding(msgspec.Struct, array_like=True):
    """One thing that is wrong: ``where`` and ``what`` for a person, and the repair's name with its arguments."""

    kind: Kind
    #: 0 where it is not about an inode.
    ino: int
    where: str
    what: str
    repair: str
    arguments: list[Any]


class Queue:
    """Findings in the order they came, in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="bpfuse-found-")  # noqa: SIM115 - lives as long as this object
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Finding)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, finding: Finding) -> None:
        body = self._encoder.encode(finding)
        self._file.write(len(body).to_bytes(4) + body)
        self._count += 1

    def __iter__(self) -> Iterator[Finding]:
        self._file.seek(0)
        for _ in range(self._count):
            length = body_length(self._file.read(4), 2**31)
            yield self._decoder.decode(self._file.read(length))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()


def text_of(name: bytes) -> str:
    """Return a name as text that can be shown and is always valid."""
    shown = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
